"""`tadperf`: one command per file; every error one line on stderr.

Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted. Nothing heavy is imported here: `tadperf --help` is instant.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from tadperf.cli import audit, bench, common, config, distill, evaluate, experts, info, refine, show, sweep
from tadperf.compute import launcher, ranks
from tadperf.compute.allocator import keep_freed_memory
from tadperf.errors import UserError

COMMANDS = (
    distill.distill,
    refine.refine,
    sweep.sweep,
    audit.audit,
    experts.experts,
    evaluate.evaluate,
    show.show,
    info.info,
    config.config,
    bench.bench,
)

# Plain help: rich would double the time that `--help` takes (0.21 s for 0.11 s).
app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)
for command in COMMANDS:
    app.command()(command)


@app.callback(invoke_without_command=True)
def tadperf(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Fast dataset distillation for data with noisy labels."""
    if version:
        import tadperf

        print(tadperf.__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


def main() -> NoReturn:
    """Runs the command line and ends the process."""
    keep_freed_memory()
    launcher.follow_launcher()
    if ranks.environment_rank():  # what all ranks find out, rank 0 says
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as it is where a shell started us in the background
            signal.signal(number, _interrupt)
    try:
        code = app(standalone_mode=False)
        if code == 130 and not ranks.environment_rank():  # typer has turned a KeyboardInterrupt into this
            common.complain("interrupted")
    except UserError as error:
        code = 2
        if ranks.environment_rank() == 0 or launcher.is_launched():
            common.complain(error)
    except common.EndedError as end:
        code = end.code
    except common.RunLostError as error:
        code = launcher.LOST if launcher.is_launched() else 1
        if ranks.environment_rank() == 0 and not launcher.is_launched():
            common.complain(error)
    except (common.RunInterruptedError, KeyboardInterrupt, typer.Abort) as error:
        code = 130
        if ranks.environment_rank() == 0:
            common.complain(str(error) or "interrupted")
    except Exception as error:
        code = _failure(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    sys.exit(code if isinstance(code, int) else 0)


def _interrupt(number: int, frame: object) -> NoReturn:
    # Python drops an exception that is raised in a destructor or in a callback of a fork: ask until it has come through
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    raise KeyboardInterrupt


def _failure(error: Exception) -> int:
    """Says what went wrong; returns the exit code. Typer's own errors know theirs and are wrong use."""
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "tadperf"
        common.complain(f"{error.format_message()} See: {where} --help")  # pyright: ignore[reportAttributeAccessIssue]
        return error.exit_code  # pyright: ignore[reportAttributeAccessIssue]
    if common.settings.debug:
        import traceback

        traceback.print_exc()
    else:
        common.complain(f"failed: {type(error).__name__}: {error} (--debug shows the traceback)")
    return 1
