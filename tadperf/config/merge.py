"""From presets, a TOML file, `--set` and named options to one checked Config."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from tadperf.config import Config
from tadperf.config.presets import METHODS, PRESETS
from tadperf.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

# What the command line calls a field; an error about an option that was given uses this name.
OPTIONS = {
    "data.path": "DATA",
    "data.format": "--format",
    "data.image_size": "--image-size",
    "data.labels": "--labels",
    "data.noise": "--noise",
    "match.ipc": "--ipc",
    "match.method": "--method",
    "trust.mode": "--trust",
    "synthesis": "--synthesis",
    "refine.batch": "--batch",
    "refine.backend": "--backend",
    "evaluate.repeats": "--repeats",
    "evaluate.networks": "--network",
    "seed": "--seed",
    "device": "--device",
}


def merge(
    preset: str | None = None,
    toml_path: Path | str | None = None,
    sets: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    base: Config | None = None,
) -> Config:
    """base < preset < what the method changes in it < TOML file < `--set section.key=value` < named options (tadperf).

    sets: "section.key=value" each. options: dotted field to value or None. base: what a resumed run was started with.
    With neither preset nor base, the preset is `default_preset`. What nothing of these sets the method does, and then
    the defaults. Raises UserError, naming the field, on an unknown preset, file, key or value.
    """
    layers = _layers(toml_path, sets, options)
    if preset is None and base is None:
        preset = _default_preset(layers)
    merged: dict[str, Any] = base.model_dump() if base else {}
    for layer in (_preset(preset), _method(preset, layers), *layers):
        merged = _over(merged, layer)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise _user_error(error, options or {}) from None


def default_preset(
    toml_path: Path | str | None = None, sets: Sequence[str] = (), options: Mapping[str, Any] | None = None
) -> str:
    """The preset where none is named: "digits", or "digits-ipc1" at IPC 1, for the built-in digits; else "quick"."""
    return _default_preset(_layers(toml_path, sets, options))


def to_toml(config: Config) -> str:
    """The whole config as TOML that `--config` reads back; what is not set stands in a comment."""
    values = config.model_dump(mode="json")
    lines = [_toml_line(name, value) for name, value in values.items() if not isinstance(value, dict)]
    for section, fields in values.items():
        if isinstance(fields, dict):
            lines += ["", f"[{section}]", *(_toml_line(name, value) for name, value in fields.items())]
    return "\n".join(lines) + "\n"


def _toml_line(name: str, value: Any) -> str:
    # A JSON value is a TOML value, but for null and for U+007F, which TOML wants escaped.
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"# {name} is not set" if value is None else f"{name} = {text}"


def _layers(toml_path: Path | str | None, sets: Sequence[str], options: Mapping[str, Any] | None) -> list[dict]:
    named = {name: value for name, value in (options or {}).items() if value is not None}
    layers = [_read_toml(toml_path), *map(_parse_set, sets), *(_nest(*item) for item in named.items())]
    for layer in layers:
        _refuse_unknown(layer, Config)
    return layers


def _default_preset(layers: Iterable[dict]) -> str:
    path, ipc = Config.model_fields["data"].default.path, None
    for layer in layers:
        path = layer.get("data", {}).get("path", path)
        ipc = layer.get("match", {}).get("ipc", ipc)
    if path != "digits":
        return "quick"
    return "digits-ipc1" if str(ipc) == "1" else "digits"


def _preset(name: str | None) -> Mapping[str, Any]:
    if name is None:
        return {}
    if name not in PRESETS:
        close = get_close_matches(name, PRESETS, 1)
        raise UserError("--preset", name, f"did you mean {close[0]}?" if close else f"known are {', '.join(PRESETS)}")
    return PRESETS[name]


def _method(preset: str | None, layers: Iterable[dict]) -> Mapping[str, Any]:
    named = [layer["match"]["method"] for layer in layers if "method" in layer.get("match", {})]
    return METHODS.get(preset or "", {}).get(str(named[-1]), {}) if named else {}


def _read_toml(path: Path | str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError("--config", path, f"cannot be read: {error.strerror}") from None
    except ValueError as error:  # also what TOML and UTF-8 decoding raise
        raise UserError("--config", path, f"is not valid TOML: {error}") from None


def _parse_set(text: str) -> dict[str, Any]:
    """ "match.ipc=5" -> {"match": {"ipc": 5}}: the value as TOML, or as text where it is none."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UserError("--set", text, "must be section.key=value, such as match.ipc=5")
    value = value.strip()
    try:
        parsed = tomllib.loads(f"value = {value}")
    except ValueError:
        parsed = {}
    return _nest(name.strip(), parsed["value"] if set(parsed) == {"value"} else value)


def _nest(name: str, value: Any) -> dict[str, Any]:
    for key in reversed(name.split(".")):
        value = {key: value}
    return value


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _over(merged[key], value) if both else value
    return merged


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    # Python 3.10 takes list[int] for a type, and then issubclass refuses it
    is_class = isinstance(kind, type) and get_origin(kind) is None
    return kind if is_class and issubclass(kind, BaseModel) else None


def _names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted field of a model."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        section = _section(field)
        names += _names(section, f"{prefix}{name}.") if section else [prefix + name]
    return names


def _refuse_unknown(values: Mapping[str, Any], model: type[BaseModel], prefix: str = "") -> None:
    for key, value in values.items():
        name = prefix + key
        field = model.model_fields.get(key)
        section = _section(field) if field else None
        if field is None or (isinstance(value, Mapping) and section is None):
            while isinstance(value, Mapping) and value:
                key, value = next(iter(value.items()))
                name += f".{key}"
            raise UserError(name, _shown(value), f"unknown key; {_suggestion(name)}")
        if section is None:
            continue
        if not isinstance(value, Mapping):
            raise UserError(
                name, _shown(value), f"is a section; set one of its keys, such as {_names(section, f'{name}.')[0]}"
            )
        _refuse_unknown(value, section, f"{name}.")


def _suggestion(name: str) -> str:
    """The nearest known field: by its whole name, else by its last part ("ipc" is match.ipc)."""
    known = _names(Config)
    by_key = {field.rpartition(".")[2]: field for field in reversed(known)}
    key = get_close_matches(name.rpartition(".")[2], by_key, 1, 0.7)
    whole = get_close_matches(name, known, 1)
    nearest = whole[0] if whole else by_key[key[0]] if key else None
    return f"did you mean {nearest}?" if nearest else "`tadperf config` lists the known ones"


def _user_error(error: ValidationError, options: Mapping[str, Any]) -> UserError:
    first = error.errors()[0]
    path = [part for part in first["loc"] if isinstance(part, str)]  # without the place inside a list
    name, field = ".".join(path), _field(path)
    message = first["msg"].replace("Input should", "must").replace("tuple", "list")
    if first["type"] == "string_pattern_mismatch":  # a pattern is no help, the description is
        message = f"must be {field.description}"
    elif field.description:
        message += f" ({field.description})"
    given = options.get(name) is not None
    return UserError(OPTIONS.get(name, name) if given else name, _shown(first["input"]), message)


def _field(path: Sequence[str]) -> FieldInfo:
    model: type[BaseModel] = Config
    for name in path[:-1]:
        model = _section(model.model_fields[name]) or model
    return model.model_fields[path[-1]]


def _shown(value: Any) -> str:
    """A value in one line."""
    return " ".join(str(value).split()) or '""'
