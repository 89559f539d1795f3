"""Declares the options that commands share, and the decorator that gives options to a command."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from tadperf.compute import device
from tadperf.config.options import CONFIG_OPTIONS, DATA_HELP, Option
from tadperf.config.sources import ConfigSources

OPTIONS = {
    option.name: option
    for option in (
        *CONFIG_OPTIONS,
        Option("--data", "DATA", DATA_HELP, "data.path"),  # for a command whose argument is not the data
        Option("--devices", "K", "Divide the work among K local processes, on CUDA one per device."),
        Option("--preset", "NAME", "Settings to start from; see 'tadperf config --list'."),
        Option("--config", "FILE", "A TOML file; its settings override the preset.", kind=Path),
        Option("--set", "A.B=C", "Any setting; overrides the file; may be repeated.", kind=list),
        Option("--out", "DIR", "Run folder; by default runs/<data>-....", kind=Path),
        Option("--resume", "", "Continue the run in the folder.", kind=bool),
        Option("--estimate", "", "Measure in trials what the job takes. 'distill --dry-run' only checks.", kind=bool),
        Option("--json", "", "Print one JSON object and nothing else on stdout.", kind=bool),
        Option("--quiet", "", "No progress and no notes on stderr.", kind=bool),
        Option("--debug", "", "Show the traceback of a failure.", kind=bool),
    )
}
# Optional[...] and not `| None`: typer evaluates these types on Python 3.10 too.
TYPES = {str: Optional[str], Path: Optional[Path], list: Optional[list[str]], bool: bool}  # noqa: UP045


@dataclass
class Invocation:
    """What error messages need to know about the command line of this process."""

    as_json: bool = False  # print a JSON object for an error, too
    debug: bool = False  # show the traceback of an unexpected error
    typed: Mapping[str, str] | None = None  # dotted field -> the option that the user typed for it


invocation = Invocation()


@dataclass(frozen=True)
class SharedOptions:
    """The values of the shared options. An option that the command does not have counts as not given."""

    sources: ConfigSources
    devices: str | None
    out: Path | None
    resume: bool
    as_json: bool
    quiet: bool
    estimate: bool


def command(line: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command its options, in the order of the help text.

    line: the names of shared options ("--ipc", "DATA") and of the function's own parameters ("compare"). The function
    is called with `SharedOptions` and with its own parameters by name.
    """
    names = line.split()

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        # On Python 3.10 typing.get_type_hints would add Optional to every parameter with the default None.
        parameters = inspect.signature(function, eval_str=True).parameters
        specific = [name for name in names if name in parameters]
        shared = [OPTIONS[name] for name in names if name not in parameters]

        @functools.wraps(function)
        def run(**values: Any) -> None:
            specific_values = {name: values.pop(name) for name in specific}
            function(_shared_options(shared, values), **specific_values)

        del run.__wrapped__  # typer would read the parameters of the function itself
        by_name = {name: parameters[name] for name in specific}
        by_name |= {option.name: _parameter(option) for option in shared}
        ordered = [by_name[name].replace(kind=inspect.Parameter.KEYWORD_ONLY) for name in names]
        run.__signature__ = inspect.Signature(ordered)  # pyright: ignore[reportAttributeAccessIssue]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
        return run

    return decorate


def _parameter(option: Option) -> inspect.Parameter:
    """Returns the parameter that typer turns into the option."""
    if option.name.startswith("-"):
        info: Any = typer.Option(option.name, metavar=option.metavar or None, help=option.help)
    else:
        info = typer.Argument(metavar=option.metavar, help=option.help, show_default=False)
    default = False if option.kind is bool else None
    annotation = Annotated[TYPES[option.kind], info]
    return inspect.Parameter(
        _parameter_name(option), inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _parameter_name(option: Option) -> str:
    return option.name.lstrip("-").replace("-", "_").lower()


def _shared_options(options: list[Option], values: Mapping[str, Any]) -> SharedOptions:
    """Collects the values of the shared options. Records which of them the user typed, for error messages."""
    by_option = {option: values[_parameter_name(option)] for option in options}
    given = {
        option: str(value.resolve()) if isinstance(value, Path) else value  # a resumed run may start in another folder
        for option, value in by_option.items()
        if option.field and value not in (None, [], False)
    }
    invocation.as_json = bool(values.get("json", False))
    invocation.debug = bool(values.get("debug", False))
    invocation.typed = {option.field: option.name for option in given}
    fields = {option.field: value for option, value in given.items()}
    if fields.get("device") == "cpu":
        device.hide_gpus()
    sources = ConfigSources(values.get("preset"), values.get("config"), values.get("set") or (), fields)
    return SharedOptions(
        sources,
        values.get("devices"),
        values.get("out"),
        values.get("resume", False),
        values.get("json", False),
        values.get("quiet", False),
        values.get("estimate", False),
    )


def typed_name(field: str) -> str:
    """Returns what the user typed for the field of an error: "--data" for "data.path", "--ipc" for "match.ipc".

    A field that no option of this command line has set keeps its name.
    """
    by_name = {option.name: option.field for option in CONFIG_OPTIONS} | {"data": "data.path"}
    return (invocation.typed or {}).get(by_name.get(field, field), field)
