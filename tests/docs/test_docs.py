"""The pages of docs/: Python blocks run, commands are parsed or run, files and settings in them exist.

A block marked ```python runs, all blocks of a page in one namespace. A line of a ```sh block that starts with `tadperf`
is parsed; after the mark `<!-- run -->` it runs with tiny settings. ```toml is merged, ```bash is checked by `bash -n`.
The folder in which they run has photos/, an image folder; distilled.safetensors and runs/digits, a finished run; and
features.npy, probs.npy and labels.csv for the training digits.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import typer
from PIL import Image

import tadperf
from tadperf.cli.app import COMMANDS, app
from tadperf.config.merge import merge, to_toml
from tadperf.config.schema import Config, DiffusionConfig, flatten_sections
from tadperf.refine.models import unet

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^(<!-- run -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
REPOSITORY = "https://github.com/tadperf/tadperf/blob/main/"
LANGUAGES = {"python", "sh", "toml", "bash", "text"}


class Block(NamedTuple):
    runs: bool
    language: str
    text: str


def blocks(page: Path, language: str) -> list[Block]:
    found = [Block(bool(run), kind, text) for run, kind, text in BLOCK.findall(page.read_text())]
    return [block for block in found if block.language == language]


def command_lines(text: str) -> Iterator[list[str]]:
    """Yields the words of each line that starts with `tadperf`, without comments. A backslash joins two lines."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["tadperf"]:
            yield words[1:]


def cases(language: str, runs: bool | None = None) -> list[Any]:
    pages = [page for page in PAGES if any(runs in (None, block.runs) for block in blocks(page, language))]
    return [pytest.param(page, id=page.stem) for page in pages]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, tiny_config) -> Path:
    """Makes the files that the pages name."""
    folder = tmp_path_factory.mktemp("docs")
    rng = np.random.default_rng(0)
    for label, low in (("cats", 0), ("dogs", 120)):
        for split, count in (("train", 24), ("test", 6)):
            (folder / "photos" / split / label).mkdir(parents=True)
            for i in range(count):
                values = low + rng.integers(0, 120, (8, 8, 3))
                Image.fromarray(values.astype(np.uint8)).save(folder / "photos" / split / label / f"{i}.png")
    config = tiny_config(trust__mode="on")
    (folder / "tiny.toml").write_text(to_toml(config))
    tadperf.distill(config, folder / "runs/digits")
    shutil.copy(folder / "runs/digits/distilled.safetensors", folder)
    network = unet.build(DiffusionConfig(width=8, layers=1), (1, 8, 8), 10, seed=0)
    unet.save(folder / "runs/digits/diffusion", network, unet.schedulers()[1])
    train = tadperf.open_data("digits").train
    np.save(folder / "features.npy", train.images.flatten(1).float().numpy())
    np.save(folder / "probs.npy", np.eye(10, dtype=np.float32)[train.labels.numpy()] * 0.9 + 0.01)
    (folder / "labels.csv").write_text("\n".join(["label", *map(str, train.labels.tolist())]) + "\n")
    return folder


@pytest.fixture
def workplace(prepared, tmp_path, monkeypatch) -> Path:
    """Copies the prepared files into an empty folder and changes to it."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", cases("python"))
def test_python_blocks_run(page, workplace):
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page, "python"):
        exec(compile(block.text, f"{page.name}: {block.text[:60]!r}", "exec"), names)


@pytest.mark.parametrize("page", cases("sh"))
def test_commands_are_parsed(page, monkeypatch, workplace):
    group = typer.main.get_command(app)
    for block in blocks(page, "sh"):
        for name, *arguments in (words for words in command_lines(block.text) if words):
            command = group.commands[name]  # pyright: ignore[reportAttributeAccessIssue]
            values = command.make_context(name, list(arguments)).params
            merge(values.get("preset"), sets=values.get("set") or ())  # the fields and values exist


@pytest.mark.parametrize("page", cases("sh", runs=True))
def test_marked_commands_run(page, workplace, monkeypatch):
    monkeypatch.setattr("tadperf.compute.device.hide_gpus", lambda: None)  # it would stay for all later tests
    group = typer.main.get_command(app)
    for block in (block for block in blocks(page, "sh") if block.runs):
        for name, *arguments in command_lines(block.text):
            has_config = "config" in {p.name for p in group.commands[name].params}  # pyright: ignore
            app([name, *arguments, *(["--config", "tiny.toml"] if has_config else [])], standalone_mode=False)


@pytest.mark.parametrize("page", cases("toml"))
def test_config_files_are_merged(page, tmp_path):
    for block in blocks(page, "toml"):
        (tmp_path / "file.toml").write_text(block.text)
        merge(toml_path=tmp_path / "file.toml")


@pytest.mark.parametrize("page", cases("bash"))
def test_shell_scripts_have_correct_syntax(page):
    for block in blocks(page, "bash"):
        subprocess.run(["bash", "-n"], input=block.text, text=True, check=True, timeout=20)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_in_the_menu_and_names_files_that_exist(page):
    text = page.read_text()
    assert text.startswith("# ")
    assert f": {page.name}" in (ROOT / "mkdocs.yml").read_text()
    assert text.count("```") % 2 == 0
    assert set(re.findall(r"^```(\w+)", text, re.MULTILINE)) <= LANGUAGES
    for address in re.findall(rf"{REPOSITORY}([^)#\s]+)", text):
        assert (ROOT / address).exists(), address
    for target in re.findall(r"\]\(([\w./-]+\.(?:md|png))", text):
        place = ROOT / "docs" / target
        assert place.is_file(), target
    fields = flatten_sections(Config().model_dump())
    sections = {name.partition(".")[0] for name in fields if "." in name}
    for field in re.findall(r"`(?:--set )?([a-z]+\.[a-z_]+)(?:=[^`]*)?`", text):
        if field.partition(".")[0] in sections:
            assert field in fields, field


def hooks() -> Any:
    """Returns the module docs/hooks.py."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs/hooks.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_settings_has_every_field():
    text = hooks().fill((ROOT / "docs/configuration.md").read_text())
    for field, value in flatten_sections(Config().model_dump()).items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{field}` |"))
        assert row.replace("\\|", "").count("|") == 5
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            assert f"| `{value}` |" in row


def test_the_page_of_commands_has_every_command_and_option():
    text = hooks().fill((ROOT / "docs/commands.md").read_text())
    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    assert len(commands) == len(COMMANDS)
    for name, command in commands.items():
        part = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for parameter in (p for p in command.params if p.param_type_name == "option" and p.name != "help"):
            assert f"`{parameter.opts[0]}" in part


def test_help_texts_are_escaped():
    text = hooks().commands()
    assert r"Then only refine.\*, detector.\*, diffusion.\*" in text  # * would start emphasis
    assert "by default runs/&lt;data>-" in text
    assert "| `RUN|DATA` |" in text  # Markdown does not split a cell inside code


def test_a_docstring_becomes_readable_markdown():
    fill = hooks()
    assert fill.as_markdown("Reads x.\nrows: int [N], see <name>.\n    a < b\nRaises ValueError.") == (
        "Reads x.\n\n`rows`: int [N], see &lt;name>.\n    a < b\n\nRaises ValueError."
    )
    assert fill.as_markdown("See `runs/<name>`.") == "See `runs/<name>`."
    assert fill.as_markdown("x: float [N]. y, z: [N].") == "\n`x`: float [N]. \n\n`y, z`: [N]."
    assert fill.as_markdown("It waits for the\ndevice: slow.") == "It waits for the\ndevice: slow."  # inside a sentence
