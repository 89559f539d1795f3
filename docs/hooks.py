"""Hooks of mkdocs: they fill marked places of the pages from the code, so that a page cannot be out of date.

A line `<!-- fill NAME -->` is replaced by the text that the function in FILLS returns. The figures in bench/results/
become files of the site under results/.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ROOT / "build/docs/packages"  # .ci/docs lays tadperf out here as it is installed
KINDS = {str: "text", int: "integer", float: "number", bool: "true or false"}
LIMITS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "multiple_of": "multiple of"}


def _table(header: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    """Returns a table in Markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def _plain(text: str) -> str:
    """Escapes the signs of Markdown in a text of the code. Pipes inside code need no escape in a table."""
    code = re.split(r"(`[^`]*`)", text)  # every second part is code
    return "".join(
        part if i % 2 else re.sub(r"([*_|\[\]])", r"\\\1", part).replace("<", "&lt;") for i, part in enumerate(code)
    )


def _values(annotation: Any) -> str:
    """Returns the values that a setting takes, for readers: "integer", "`on`, `off`"."""
    options = get_args(annotation)
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in options)
    if get_origin(annotation) is tuple:
        return f"list of {_values(options[0])}"
    if get_origin(annotation) in (Union, types.UnionType):
        return ", ".join(_values(option) for option in options if option is not type(None))
    return KINDS.get(annotation, str(annotation))


def _limits(metadata: list[Any]) -> str:
    found = ((sign, getattr(part, name, None)) for part in metadata for name, sign in LIMITS.items())
    return " and ".join(f"{sign} {value}" for sign, value in found if value is not None)


def _default(value: Any) -> str:
    if value is None:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else list(value) if isinstance(value, tuple) else value}`"


def settings() -> str:
    """Returns a table of the fields of every section of the config."""
    from tadperf.config.schema import Config, Section

    def rows(section: type[Section], prefix: str = "") -> Iterator[tuple[str, ...]]:
        for name, field in section.model_fields.items():
            if not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
                kind = " ".join(filter(None, (_values(field.annotation), _limits(field.metadata))))
                yield f"`{prefix}{name}`", kind, _default(field.default), _plain(field.description or "")

    header = ("field", "values", "default", "meaning")
    parts = [_table(header, rows(Config))]
    for name, field in Config.model_fields.items():
        if isinstance(section := field.annotation, type) and issubclass(section, Section):
            parts.append(f"## {name}\n\n{_plain(section.__doc__ or '')}\n\n{_table(header, rows(section, f'{name}.'))}")
    return "\n\n".join(parts)


def presets() -> str:
    """Returns a table of the presets."""
    from tadperf.config.presets import SUMMARIES

    return _table(("preset", "for"), ((f"`{name}`", text) for name, text in SUMMARIES.items()))


def commands() -> str:
    """Returns the help of every command, with its arguments and options."""
    import typer

    from tadperf.cli.app import app

    parts = []
    for name, command in typer.main.get_command(app).commands.items():  # pyright: ignore[reportAttributeAccessIssue]
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        usage = " ".join(["tadperf", name, "[OPTIONS]", *(_argument(argument) for argument in arguments)])
        rows = ((f"`{_option(p)}`", _plain(getattr(p, "help", None) or "")) for p in command.params if p.name != "help")
        text = "\n\n".join(" ".join(part.split()) for part in _plain(command.help or "").split("\n\n"))
        parts.append(f"## {name}\n\n```text\n{usage}\n```\n\n{text}\n\n{_table(('option', 'meaning'), rows)}")
    return "\n\n".join(parts)


def _argument(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required or name.startswith("[") else f"[{name}]"


def _option(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return _argument(parameter).strip("[]")
    return " ".join(
        [*parameter.opts, *([] if parameter.is_flag else [parameter.metavar or parameter.type.name.upper()])]
    )


def contributing() -> str:
    """Returns CONTRIBUTING.md without its title."""
    return (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("\n")[2]


def changelog() -> str:
    """Returns CHANGELOG.md without its title."""
    return (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("\n")[2]


FILLS: dict[str, Callable[[], str]] = {
    "settings": settings,
    "presets": presets,
    "commands": commands,
    "contributing": contributing,
    "changelog": changelog,
}


def fill(markdown: str) -> str:
    """Replaces every marked line by the text of its function."""
    for name, function in FILLS.items():
        if (mark := f"<!-- fill {name} -->") in markdown:
            markdown = markdown.replace(mark, function())
    return markdown


def as_markdown(docstring: str) -> str:
    """Returns a docstring with a paragraph for each description of arguments and of errors. Escapes angle brackets.

    An argument is a lower-case name with a colon at the start of a sentence: "labels: int64 [N]."
    """
    lines = []
    for line in docstring.splitlines():
        if line.startswith("    "):  # a formula or code
            lines.append(line)
            continue
        starts = not lines or lines[-1].rstrip().endswith((".", ":", ")")) or not lines[-1].strip()
        line = re.sub(r"(?<=\. )([a-z]\w*(?:, [a-z]\w*)*): ", r"\n\n`\1`: ", line)
        if starts and (names := re.match(r"([a-z]\w*(?:, [a-z]\w*)*): ", line)):
            line = f"\n`{names[1]}`: {line[names.end() :]}"
        elif line.startswith("Raises "):
            line = "\n" + line
        code = re.split(r"(`[^`]*`)", line)  # every second part is code
        lines.append("".join(part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(code)))
    return "\n".join(lines)


def on_startup(**_: Any) -> None:
    """Makes `import tadperf` find the sources, and docstrings.py this module. Called by mkdocs."""
    sys.path[:0] = [str(PACKAGES), str(ROOT / "docs")]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fills the marked places of a page, and finds its figures in the site. Called by mkdocs."""
    return fill(markdown.replace("](../bench/results/", "](results/"))


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Adds the figures in bench/results/ to the site. Called by mkdocs."""
    from mkdocs.structure.files import File

    for path in sorted((ROOT / "bench/results").glob("*.png")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files
