"""The program `tadperf`. Each command has its own file. Every error is one line on stderr.

Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted. Nothing heavy is imported here, so `tadperf --help` is fast.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from typing import Annotated, Any, NoReturn

import typer

from tadperf.cli import (
    apply,
    audit,
    bench,
    common,
    config,
    distill,
    evaluate,
    exchange,
    experts,
    info,
    options,
    refine,
    show,
    sweep,
)
from tadperf.cli.interrupts import Interrupts
from tadperf.compute import launcher, ranks
from tadperf.compute.allocator import keep_freed_memory
from tadperf.errors import DataWarning, UserError

COMMANDS = (
    distill.distill,
    refine.refine,
    sweep.sweep,
    audit.audit,
    apply.apply,
    experts.experts,
    evaluate.evaluate,
    show.show,
    exchange.export,
    exchange.import_,
    exchange.push,
    exchange.pull,
    info.info,
    config.config,
    bench.bench,
)

GUIDE = """tadperf: a few synthetic images from a data set whose labels are partly wrong

  tadperf distill --noise asymmetric:0.4   try it: digits with wrong labels
  tadperf audit photos/                    list labels that are probably wrong
  tadperf distill photos/                  distil it: a folder for each class

All commands: tadperf --help.  Options of one command: tadperf audit --help.
Completion in your shell: tadperf --install-completion."""

# Help without rich, which would double the time of `--help` (0.21 s instead of 0.11 s).
app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
for command in COMMANDS:
    app.command(command.__name__.rstrip("_"))(command)  # `import` is a word of Python


@app.callback(invoke_without_command=True)
def tadperf(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Fast dataset distillation for data with noisy labels."""
    if version:
        import tadperf

        print(tadperf.__version__)
    elif context.invoked_subcommand is None:
        print(GUIDE)


def main() -> NoReturn:
    """Runs the command line and ends the process."""
    keep_freed_memory()
    launcher.follow_launcher()
    _prepare_streams()
    _show_data_warnings()
    interrupts = Interrupts()
    interrupts.install()
    try:
        code = _run()
    except (common.RunInterruptedError, KeyboardInterrupt, typer.Abort) as error:
        code = 130
        if ranks.environment_rank() == 0:
            common.print_error(str(error) or "interrupted")
    finally:
        interrupts.stop()
    sys.exit(code)


def _prepare_streams() -> None:
    """Makes printing safe: discards output to closed streams, and escapes characters that the encoding lacks."""
    if sys.stdout is None or ranks.environment_rank():  # rank 0 prints the results of all ranks
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a test or a notebook may have put another stream there
            stream.reconfigure(errors="backslashreplace")


def _show_data_warnings() -> None:
    """Prints a warning about the data as one line, like an error. Other warnings keep Python's format."""
    show = warnings.showwarning

    def show_in_one_line(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, DataWarning):
            common.print_note(f"tadperf: warning: {message}")
        else:
            show(message, category, *place, **more)

    warnings.showwarning = show_in_one_line


def _run() -> int:
    """Runs the command, prints its error if it fails, and returns the exit code."""
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except UserError as error:
        if ranks.environment_rank() == 0 or launcher.is_launched():
            _print_user_error(error)
        return 2
    except common.EndedError as end:
        return end.code
    except common.RunLostError as error:
        if launcher.is_launched():
            return launcher.LOST  # the launcher prints the reason
        if ranks.environment_rank() == 0:
            common.print_error(error)
        return 1
    except (BrokenPipeError, SystemExit) as end:
        error = end.__context__ if isinstance(end, SystemExit) else end  # typer ends the process if a pipe breaks
        if not isinstance(error, BrokenPipeError):
            raise
        if common.has_no_reader(sys.stdout):
            common.redirect_to_null(sys.stdout)
            return 0  # the reader of stdout, such as `head`, has stopped reading
        return _report_failure(error)
    except common.RunFailedError as error:
        common.print_error(error)
        return 1
    except common.RunInterruptedError:
        raise  # `main` prints it
    except Exception as error:
        if Interrupts.requested:  # compiled code has replaced the interrupt by this error
            raise KeyboardInterrupt from error
        return _report_failure(error)
    if code == 130:  # typer returns this for a KeyboardInterrupt
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def _print_user_error(error: UserError) -> None:
    """Prints a mistake of the user as one line; on a terminal adds the page that helps, with --json an object."""
    from tadperf.cli.pages import help_url

    field, page = options.typed_name(error.field), help_url(error)
    common.print_error(f"{field}: {error.value}: {error.remedy}")
    if page and sys.stderr.isatty():
        common.print_stderr(f"see {page}")
    if options.invocation.as_json and not ranks.environment_rank():
        found = {"field": field, "value": str(error.value), "remedy": error.remedy, "see": page}
        common.print_json({"error": found})


def _report_failure(error: Exception) -> int:
    """Prints an unexpected error, or typer's error about wrong use. Returns the exit code."""
    format_message, exit_code = getattr(error, "format_message", None), getattr(error, "exit_code", None)
    if format_message is not None and exit_code is not None:  # typer's own errors
        context = getattr(error, "ctx", None)
        help_command = f"{context.command_path if context else 'tadperf'} --help"
        common.print_error(f"{format_message()} See: {help_command}")
        return exit_code
    if isinstance(error, ValueError) and str(error).startswith("TADPERF_"):  # a wrong environment variable
        common.print_error(error)
        return 2
    if options.invocation.debug:
        import traceback

        traceback.print_exc()
    else:
        common.print_error(f"failed: {type(error).__name__}: {error} (--debug shows the traceback)")
    if isinstance(error, OSError):
        _discard_unwritten_output()
    return 1


def _discard_unwritten_output() -> None:
    """Prevents a second error at exit if stdout cannot be written, for example because the disk is full."""
    try:
        sys.stdout.flush()
    except OSError:
        common.redirect_to_null(sys.stdout)
