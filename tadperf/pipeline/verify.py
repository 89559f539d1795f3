"""Compares a new measurement of a distilled set with the accuracy that was stored beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tadperf.errors import UserError
from tadperf.nets.students import summarise

FIELD = "--verify"
STANDARD_ERRORS = 3.0  # of the difference of two means; not tuned
LEAST_DIFFERENCE = 0.005  # always allowed: the means of few students repeat no better; not tuned


class Comparison(NamedTuple):
    """The stored and the measured mean accuracy of a network, and the difference that chance explains."""

    stored: float
    measured: float
    difference: float
    allowed: float
    agrees: bool


def stored_accuracy(file: Path) -> dict[str, list[float]]:
    """Returns the accuracies of each network's students, from result.json in the folder of a distilled file.

    Raises UserError if there is no such file, or if it is damaged.
    """
    path = file.parent / "result.json"
    try:
        rows = json.loads(path.read_bytes())["accuracy"]
        accuracy = {str(name): [float(value) for value in row["runs"]] for name, row in rows.items()}
    except FileNotFoundError:
        raise UserError(FIELD, path, "no such file; only a run or a pulled set stores its accuracy") from None
    except OSError as error:
        raise UserError(FIELD, path, f"cannot be read ({error.strerror}); check its permissions") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(FIELD, path, "is damaged: it holds no accuracy of networks; copy it again") from None
    for name, runs in accuracy.items():
        if not runs or not all(0 <= value <= 1 for value in runs):
            raise UserError(FIELD, path, f"is damaged: {name} has no accuracies from 0 to 1; copy it again")
    return accuracy


def verify(stored: Mapping[str, list[float]], measured: Mapping[str, Mapping[str, Any]]) -> dict[str, Comparison]:
    """Compares the mean accuracies of each network that was stored and measured (tadperf).

    They agree if they differ by at most 3 standard errors of their difference, or by half a point. One of them may have
    a single student; then both have the deviation of the other one. stored: as `stored_accuracy` returns it. measured:
    the accuracy of `evaluate_file`. Raises UserError if they have no network in common.
    """
    names = [name for name in measured if name in stored]
    if not names:
        raise UserError(FIELD, ", ".join(measured), f"was not stored; use --network {' or '.join(stored)}")
    return {name: _compare(stored[name], measured[name]["runs"]) for name in names}


def _compare(stored: list[float], measured: list[float]) -> Comparison:
    before, now = summarise(stored), summarise(measured)
    deviations = [row["std"] for row, runs in ((before, stored), (now, measured)) if len(runs) > 1] or [0.0]
    error = math.hypot(deviations[0] / math.sqrt(len(stored)), deviations[-1] / math.sqrt(len(measured)))
    allowed = max(LEAST_DIFFERENCE, STANDARD_ERRORS * error)
    difference = now["mean"] - before["mean"]
    return Comparison(before["mean"], now["mean"], difference, allowed, abs(difference) <= allowed)
