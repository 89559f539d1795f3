"""Functions that the commands share: messages, JSON, interruption, several processes."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TextIO, TypeVar

from tadperf.cli.interrupts import Interrupts
from tadperf.config.sources import ConfigSources
from tadperf.errors import printable

T = TypeVar("T")


class RunInterruptedError(Exception):
    """Ctrl-C, SIGTERM or SIGHUP interrupted a run; the text says how to continue."""


class RunFailedError(Exception):
    """A run cannot write or read one of its files; the text says which one, what to do and how to continue."""


class RunLostError(Exception):
    """A run has lost one of its processes; the text says which one, and how to continue."""


class EndedError(Exception):
    """This process ends with an exit code; another process has printed the reason."""

    def __init__(self, code: int) -> None:
        self.code = code
        super().__init__(code)


def print_error(message: object) -> None:
    """Prints an error as one line on stderr."""
    from tadperf.compute import ranks

    if ranks.environment_rank():
        message = f"rank {ranks.environment_rank()}: {message}"
    print_stderr(printable(f"tadperf: {' '.join(str(message).split())}"))


def print_note(message: str) -> None:
    """Prints one line on stderr, on rank 0 only."""
    from tadperf.compute import ranks

    if ranks.environment_rank() == 0:
        print_stderr(printable(message))


@cache
def note_missing_operators() -> None:
    """Prints one line, once in a process, if the operators run plain PyTorch without the user's wish."""
    from tadperf.kernels import native

    if not native.available() and os.environ.get("TADPERF_KERNELS") != "reference":
        print_note(f"the operators run plain PyTorch, which is slower: {native.reason()}")


def print_stderr(line: str) -> None:
    """Prints a line on stderr. If stderr cannot be written any more, the run continues without messages."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        redirect_to_null(sys.stderr)


def print_json(value: object) -> None:
    """Prints one JSON object on stdout, in ASCII if stdout is not UTF-8."""
    import json

    from tadperf.files import to_json_value

    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(to_json_value(value), ensure_ascii=not utf8, allow_nan=False))


def print_preset(sources: ConfigSources, quiet: bool) -> None:
    """Prints on stderr which preset a new run starts from, unless the user chose one."""
    if sources.preset is None and not quiet:
        print_note(f"preset {sources.preset_name()} (--preset chooses another)")


@contextlib.contextmanager
def resumable(command: str, out: Path, devices: str | None = None) -> Iterator[None]:
    """If a run is interrupted, loses a process or cannot write, adds the command that continues it to the error."""
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        # Compiled code may have replaced the interrupt by an error of its own.
        interrupted = isinstance(error, KeyboardInterrupt) or (
            Interrupts.requested and not isinstance(error, EndedError)
        )
        can_continue = isinstance(error, RunLostError | OSError) and not isinstance(error, BrokenPipeError)
        if not interrupted and (not can_continue or (isinstance(error, OSError) and error.filename is None)):
            raise
        options = f"--devices {devices} --resume" if devices else "--resume"
        hint = f"; continue with: tadperf {command} {options} --out {shlex.quote(str(out))}" if out.exists() else ""
        if interrupted:
            raise RunInterruptedError(f"interrupted{hint}") from None
        if isinstance(error, OSError):
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = "free some space" if is_full else "check the disk and its permissions"
            raise RunFailedError(f"{error.filename}: {error.strerror}; {remedy}{hint}") from error
        raise RunLostError(f"{error}{hint}") from None


def run_in_ranks(run: Callable[[], T], devices: str | None) -> T:
    """Calls `run` in the processes that `--devices` or torchrun asks for, or in this process alone.

    Only rank 0 returns the result. The other ranks, and the process that started them, raise EndedError.
    """
    from tadperf.compute import launcher, ranks

    count = launcher.num_ranks(devices)
    try:
        if count > 1:
            raise EndedError(launcher.launch_ranks(count, sys.argv[1:]))
        ranks.join()
        result = run()
        is_leader = ranks.rank() == 0
        ranks.leave()
    except (launcher.RankDiedError, ranks.RankLostError) as error:
        raise RunLostError(str(error)) from None
    if not is_leader:
        raise EndedError(0)
    return result


def distilled_file(path: Path) -> Path:
    """Returns the distilled file of a run folder, or the file itself."""
    return path / "distilled.safetensors" if path.is_dir() else path


def has_no_reader(stream: TextIO) -> bool:
    """Returns whether a stream is a pipe whose reader has ended."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def redirect_to_null(stream: TextIO) -> None:
    """Redirects a stream that cannot be written to /dev/null, so that Python's flush at exit does not fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
