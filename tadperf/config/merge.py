"""Merges presets, a TOML file, `--set` and named options into one checked Config."""

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
from tadperf.config.options import option_name
from tadperf.config.presets import DIGITS_NOISE, METHODS, PRESETS
from tadperf.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

DIGITS_PRESETS = ("digits", "digits-ipc1")  # they add label noise, but only to the built-in digits

# What a message requires for each type of pydantic's errors. {name} is replaced by that value of the error.
REQUIREMENTS = {
    "int_type": "must be an integer",
    "int_parsing": "must be an integer",
    "int_parsing_size": "must be an integer with fewer digits",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "literal_error": "must be {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "too_short": "must have at least {min_length} value",
}


def merge(
    preset: str | None = None,
    toml_path: Path | str | None = None,
    sets: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    base: Config | None = None,
) -> Config:
    """Merges the sources of settings. Later ones win: base, preset, method, TOML file, `sets`, `options` (tadperf).

    sets: texts such as "match.ipc=5" (section.key=value).
    options: dotted field to value; None means that the option was not given.
    base: the settings that a resumed run was started with.
    Without preset and base, the preset is `default_preset`. The presets for the digits add label noise to the
    built-in digits, unless a source sets data.noise. Other fields take the method's values, then the defaults.
    Raises UserError, which names the field, on an unknown preset, file, key or value.
    """
    layers = _layers(toml_path, sets, options)
    if preset is None and base is None:
        preset = _default_preset(layers)
    merged: dict[str, Any] = base.model_dump() if base else {}
    for layer in (_preset(preset), _method(preset, layers), *layers):
        merged = _merge_sections(merged, layer)
    if preset in DIGITS_PRESETS and merged.get("data", {}).get("path") == "digits":
        merged = _merge_sections({"data": {"noise": DIGITS_NOISE}}, merged)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise _user_error(error, options or {}) from None


def default_preset(
    toml_path: Path | str | None = None, sets: Sequence[str] = (), options: Mapping[str, Any] | None = None
) -> str:
    """Returns the preset to use if none is named: for the digits "digits" or (at IPC 1) "digits-ipc1", else "quick"."""
    return _default_preset(_layers(toml_path, sets, options))


def to_toml(config: Config) -> str:
    """Writes all settings as TOML, which `--config` reads back. Settings without a value become comments.

    Also comments out the noise of the built-in digits: a file with another data.path must not add noise to that data.
    """
    values = config.model_dump(mode="json")
    lines = [_toml_line(name, value) for name, value in values.items() if not isinstance(value, dict)]
    for section, fields in values.items():
        if isinstance(fields, dict):
            lines += ["", f"[{section}]", *(_toml_line(name, value) for name, value in fields.items())]
    if (config.data.path, config.data.noise) == ("digits", DIGITS_NOISE):
        line = _toml_line("noise", DIGITS_NOISE)
        lines[lines.index(line)] = f"# {line}  (for the digits; without the #, for any data)"
    return "\n".join(lines) + "\n"


def _toml_line(name: str, value: Any) -> str:
    # JSON values are valid TOML, except null and the character U+007F, which TOML requires as an escape.
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
    return "digits-ipc1" if _as_int(ipc) == 1 else "digits"


def _as_int(value: object) -> int | None:
    """Converts an integer or its text to int, as Config does. Returns None for anything else."""
    try:
        return int(value) if isinstance(value, (int, str)) else None
    except ValueError:
        return None


def _preset(name: str | None) -> Mapping[str, Any]:
    if name is None:
        return {}
    if name not in PRESETS:
        close = get_close_matches(name, PRESETS, 1)
        raise UserError(
            "--preset", name, f"did you mean {close[0]}?" if close else f"choose one of {', '.join(PRESETS)}"
        )
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
        raise UserError("--config", path, f"cannot be read ({error.strerror}); check the path") from None
    except ValueError as error:  # the base class of the errors of TOML and UTF-8
        raise UserError("--config", path, f"is not valid TOML: {error}") from None


def _parse_set(text: str) -> dict[str, Any]:
    """Parses "match.ipc=5" to {"match": {"ipc": 5}}. The value is read as TOML, or as text if it is not TOML."""
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


def _merge_sections(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Merges nested sections; the values of `upper` win."""
    merged = dict(lower)
    for key, value in upper.items():
        are_sections = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge_sections(merged[key], value) if are_sections else value
    return merged


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    # Python 3.10 takes list[int] for a type, and then issubclass refuses it
    if not isinstance(kind, type) or get_origin(kind) is not None:
        return None
    return kind if issubclass(kind, BaseModel) else None


def _field_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Returns all dotted field names of a model."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        section = _section(field)
        names += _field_names(section, f"{prefix}{name}.") if section else [prefix + name]
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
            raise UserError(name, _shown(value), f"unknown key; {_suggestion(name)}", topic="settings")
        if section is None:
            continue
        if not isinstance(value, Mapping):
            raise UserError(
                name,
                _shown(value),
                f"is a section; set one of its keys, such as {_field_names(section, f'{name}.')[0]}",
            )
        _refuse_unknown(value, section, f"{name}.")


def _suggestion(name: str) -> str:
    """Suggests the nearest known field, by its full name or by its last part ("ipc" suggests match.ipc)."""
    known = _field_names(Config)
    by_key = {field.rpartition(".")[2]: field for field in reversed(known)}
    key = get_close_matches(name.rpartition(".")[2], by_key, 1, 0.7)
    names = get_close_matches(name, known, 1)
    nearest = names[0] if names else by_key[key[0]] if key else None
    return f"did you mean {nearest}?" if nearest else "`tadperf config` lists all keys"


def _user_error(error: ValidationError, options: Mapping[str, Any]) -> UserError:
    first = error.errors()[0]
    path = [part for part in first["loc"] if isinstance(part, str)]  # without the index inside a list
    name, field = ".".join(path), _field(path)
    message = _requirement(first["type"], first.get("ctx", {}), field)
    if field.description and field.description not in message:
        message += f" ({field.description})"
    given = options.get(name) is not None
    return UserError(option_name(name) if given else name, _shown(first["input"]), message)


def _requirement(kind: str, values: Mapping[str, Any], field: FieldInfo) -> str:
    """Returns what the value of a field must be, from REQUIREMENTS or from the field's description."""
    return REQUIREMENTS.get(kind, f"must be {field.description}").format(**values)


def _field(path: Sequence[str]) -> FieldInfo:
    model: type[BaseModel] = Config
    for name in path[:-1]:
        model = _section(model.model_fields[name]) or model
    return model.model_fields[path[-1]]


def _shown(value: Any) -> str:
    """Formats a value on one line."""
    return " ".join(str(value).split()) or '""'
