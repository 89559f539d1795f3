"""Turns Ctrl-C, SIGTERM and SIGHUP into KeyboardInterrupt, so that a run can leave its folder in order."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from types import FrameType

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
REPEAT = 1.0  # seconds between two checks whether the interrupt was lost; not tuned
SAME_REQUEST = 0.5  # seconds in which a second signal is ignored: a shell and its job control both send one; not tuned


class Interrupts:
    """Raises KeyboardInterrupt on the first signal and ends the process at once on a later one.

    Python drops an exception that is raised in a destructor or in a callback of a fork. So the interrupt is raised
    again every second, until some code handles it. Cleanup is not interrupted: it runs while the interrupt is handled.
    Compiled code can also replace the interrupt by an error of its own; `requested` tells that it came first.
    """

    requested = False  # whether this process has received one of the signals

    def __init__(self) -> None:
        self._error: KeyboardInterrupt | None = None
        self._since = 0.0
        self._process = os.getpid()

    def install(self) -> None:
        """Sets the handlers. A signal that the parent process chose to ignore stays ignored."""
        for name in SIGNALS:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        if hasattr(signal, "SIGALRM"):
            signal.signal(signal.SIGALRM, self._on_alarm)

    def stop(self) -> None:
        """Stops raising the interrupt."""
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked worker: its parent ends it
        if self._error is None:
            self._error, self._since = KeyboardInterrupt(), time.monotonic()
            Interrupts.requested = True
            if hasattr(signal, "setitimer"):
                signal.setitimer(signal.ITIMER_REAL, REPEAT, REPEAT)
            raise self._error
        if time.monotonic() - self._since > SAME_REQUEST:
            with contextlib.suppress(OSError):
                os.write(
                    sys.__stderr__.fileno() if sys.__stderr__ else 2, b"tadperf: interrupted again; ended at once\n"
                )
            os._exit(130)

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        if self._error is not None and not _is_handled(self._error):
            raise self._error


def _is_handled(error: BaseException) -> bool:
    """Returns whether the interrupted code is an `except`, `finally` or `with` block that handles this error."""
    current = sys.exc_info()[1]
    while current is not None:
        if current is error:
            return True
        current = current.__context__
    return False
