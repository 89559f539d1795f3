"""Publishes distilled sets: a folder, or a data set of the Hugging Face hub, with a card that describes the set."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tadperf import artifact, files
from tadperf.artifact import DistilledSet
from tadperf.config import Config
from tadperf.config.merge import to_toml
from tadperf.data.readers.hub import NAME, PREFIX
from tadperf.errors import UserError, printable
from tadperf.pipeline.exchange import check_new_folder
from tadperf.pipeline.package import DISTILLED
from tadperf.pipeline.repair import new_folder

CARD, RESULT, SETTINGS = "README.md", "result.json", "config.toml"
FIGURES = ("ipc", "seed", "synthesis", "method", "accuracy", "baselines", "lr", "device")  # of result.json
UNKNOWN_LICENSE = "unknown"  # the hub's word
CARD_CLASSES = 20  # a card names at most this many classes
HUB = "pip install huggingface_hub"


def push(file: Path, target: str, license: str = UNKNOWN_LICENSE) -> dict[str, Any]:
    """Writes a set with its card, figures and settings into a folder, or into `hf://user/name`. Returns the place.

    Absolute paths in the set become names: they would show the folders of this machine. license: an identifier of the
    hub, such as cc-by-4.0. Files of these names in the target are replaced. Raises UserError if the set is damaged,
    and if the target cannot be written.
    """
    distilled = public_set(artifact.load(file))
    try:
        config = Config.model_validate(distilled.config)
    except ValidationError:
        raise UserError("FILE", file, "its config is damaged, or of another version of tadperf") from None
    figures = _figures(file.parent / RESULT)
    name = _hub_name(target, "TARGET")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        distilled.save(folder / DISTILLED)
        (folder / SETTINGS).write_text(to_toml(config), encoding="utf-8")
        if figures:
            files.write_json(folder / RESULT, figures)
        (folder / CARD).write_text(card(distilled, figures, license, name or Path(target).name), encoding="utf-8")
        if name:
            return {"target": f"hf://{name}", "url": _upload(name, folder)}
        _copy(folder, Path(target))
    return {"target": target}


def pull(source: str, out: Path) -> dict[str, Any]:
    """Copies a published set from a folder or from `hf://user/name` into the new folder `out`, after checking it.

    The folder can be evaluated, also with --verify. Raises UserError if the set is missing or damaged.
    """
    check_new_folder(out)
    name = _hub_name(source, "SOURCE")
    if name is None and not (Path(source) / DISTILLED).is_file():
        raise UserError("SOURCE", source, f"holds no {DISTILLED}; give the folder of a pushed set, or hf://user/name")
    with new_folder(out, "--out") as folder:
        for file in (DISTILLED, RESULT, SETTINGS, CARD):
            found = _download(name, file) if name else Path(source) / file
            if found is not None and found.is_file():
                shutil.copyfile(found, folder / file)
        distilled = artifact.load(folder / DISTILLED)
    return {"folder": str(out), "set": repr(distilled)}


def public_set(distilled: DistilledSet) -> DistilledSet:
    """Returns the set with absolute paths in its description replaced by the names of their files."""
    return replace(distilled, data=_without_folders(distilled.data), config=_without_folders(distilled.config))


def card(distilled: DistilledSet, figures: Mapping[str, Any], license: str, name: str) -> str:
    """Returns the card of a set, README.md: facts that the hub reads, figures, the command, and how to use the set."""
    front = {
        "license": license,
        "pretty_name": name,
        "task_categories": ["image-classification"],
        "tags": ["dataset-distillation", "tadperf"],
    }
    size, kind = " x ".join(map(str, distilled.shape)), "soft" if distilled.labels.is_floating_point() else "hard"
    if distilled.stored is not None:
        size += f" (stored as {distilled.stored.shape[2]} x {distilled.stored.shape[3]})"
    source = str(distilled.data.get("name", "unknown data"))
    names = ", ".join(map(_inline, distilled.class_names[:CARD_CLASSES]))
    more = ", ..." if distilled.num_classes > CARD_CLASSES else ""
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front.items()),  # JSON is YAML
        "---",
        "",
        f"# {_inline(name)}",
        "",
        f"{len(distilled.images)} distilled images of {_inline(source)}: {size}, {distilled.num_classes} classes, "
        f"{kind} labels. The license of the original data may apply to these images, too.",
        "",
        *_accuracy_table(figures),
        f"Learning rate of students: {distilled.lr:.4g}. Seed: {distilled.seed}. Classes: {names}{more}.",
        "",
        *_origin(distilled, source),
        "## Use",
        "",
        "    import tadperf",
        "",
        f'    ds = tadperf.load("{DISTILLED}")  # images, labels, normaliser, recipe; runs no code from the file',
        "    net = ds.train()",
        "",
        "`tadperf evaluate . DATA --verify` repeats the measurement."
        if figures
        else "`tadperf evaluate . DATA` measures it.",
        "",
    ]
    return "\n".join(lines)


def _accuracy_table(figures: Mapping[str, Any]) -> list[str]:
    rows = [
        f"| {_inline(name)} | {100 * row['mean']:.1f} ± {100 * row['std']:.1f} % | {len(row['runs'])} |"
        for name, row in {**figures.get("accuracy", {}), **figures.get("baselines", {})}.items()
    ]
    return (
        ["| trained on it; baselines below | test accuracy | runs |", "| --- | --- | --- |", *rows, ""] if rows else []
    )


def _origin(distilled: DistilledSet, source: str) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in distilled.versions.items() if version)
    if "imported" in distilled.data:
        accuracy = ""
        if published := distilled.data.get("published"):
            accuracy = f" Its published accuracy is {100 * published['mean']:.1f} ± {100 * published['std']:.1f} %."
        return [f"Imported from the files of another program ({versions}).{accuracy}", ""]
    command = f"    tadperf distill {_inline(source)} --config {SETTINGS}"
    return [f"## Command ({versions})", "", command, ""]


def _inline(text: str) -> str:
    """Returns text without characters that would end a line, a cell or a tag of Markdown."""
    return printable(text).replace("|", "/").replace("<", "(").replace(">", ")").replace("`", "'")


def _figures(path: Path) -> dict[str, Any]:
    """Returns the figures of result.json without paths, or nothing if there is no such file.

    Raises UserError if it is damaged.
    """
    if not path.is_file():
        return {}
    try:
        result = dict(json.loads(path.read_bytes()))
        figures = {name: result[name] for name in FIGURES if name in result}
        _accuracy_table(figures)
        if not figures:
            raise ValueError("no figures")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError("FILE", path, "is damaged; delete it to publish the set without figures") from None
    return figures


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_folders(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_folders(part) for part in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def _copy(folder: Path, target: Path) -> None:
    try:
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.iterdir()):
            files.write_bytes(target / file.name, file.read_bytes())
    except OSError as error:
        raise UserError("TARGET", target, f"cannot be written: {error.strerror}; choose another folder") from None


def _hub_name(text: str, field: str) -> str | None:
    """Returns "user/name" of "hf://user/name", or None for a folder. Raises UserError for a name that is none."""
    if not PREFIX.match(text):
        return None
    name = PREFIX.sub("", text, count=1)
    if not NAME.fullmatch(name) or ":" in name:
        raise UserError(field, text, "must be hf://user/name")
    return name


def _upload(name: str, folder: Path) -> str:
    """Uploads the files of a folder to a data set of the hub and returns its address."""
    hub = _hub()
    try:
        api = hub.HfApi()
        url = api.create_repo(name, repo_type="dataset", exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, repo_type="dataset", commit_message="tadperf push")
    except Exception as error:  # the errors of many libraries
        remedy = f"cannot be written ({_reason(error)}); check the name and the network, and log in with: hf auth login"
        raise UserError("TARGET", f"hf://{name}", remedy) from None
    return str(url)


def _download(name: str, file: str) -> Path | None:
    """Downloads a file of a data set of the hub; returns None if the set has no file of this name."""
    hub = _hub()
    try:
        return Path(hub.hf_hub_download(name, file, repo_type="dataset"))
    except hub.errors.EntryNotFoundError:
        if file == DISTILLED:
            raise UserError("SOURCE", f"hf://{name}", f"holds no {DISTILLED}, so it is no distilled set") from None
        return None
    except Exception as error:  # the errors of many libraries
        remedy = f"cannot be read ({_reason(error)}); check the name and the network"
        raise UserError("SOURCE", f"hf://{name}", remedy) from None


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise UserError("hf://", "huggingface_hub is missing", f"install it: {HUB}", topic="extras") from None
    return huggingface_hub


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
