"""Compares a new measurement of a distilled set with the accuracy that was stored beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tadperf import artifact
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


class Published(NamedTuple):
    """The mean and the deviation that a publication gives, as shares in [0, 1]. The number of runs is not known."""

    mean: float
    std: float


Stored = list[float] | Published  # the accuracies of a network's students, or what a publication says


def stored_accuracy(file: Path) -> Mapping[str, Stored]:
    """Returns the accuracies of each network's students, from result.json in the folder of a distilled file.

    An imported file may hold a published accuracy (`import --accuracy`), which is taken for its network.
    Raises UserError if there is no such file, or if it is damaged.
    """
    published = _published(file)
    return published or _measured(file)


def _published(file: Path) -> dict[str, Published]:
    if not file.is_file():
        return {}
    distilled = artifact.load(file)
    if "published" not in distilled.data:
        return {}
    try:
        found = Published(**{name: float(value) for name, value in distilled.data["published"].items()})
    except (TypeError, ValueError, AttributeError):
        found = Published(math.nan, math.nan)
    if not (0 <= found.mean <= 1 and 0 <= found.std <= 1):
        raise UserError(FIELD, file, "its published accuracy is damaged; import it again with --accuracy")
    return {distilled.net.name: found}


def _measured(file: Path) -> dict[str, list[float]]:
    path = file.parent / "result.json"
    try:
        rows = json.loads(path.read_bytes())["accuracy"]
        accuracy = {str(name): [float(value) for value in row["runs"]] for name, row in rows.items()}
    except FileNotFoundError:
        raise UserError(
            FIELD, path, "no such file; only a run or a pulled set stores its accuracy (or import --accuracy)"
        ) from None
    except OSError as error:
        raise UserError(FIELD, path, f"cannot be read ({error.strerror}); check its permissions") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(FIELD, path, "is damaged: it holds no accuracy of networks; copy it again") from None
    for name, runs in accuracy.items():
        if not runs or not all(0 <= value <= 1 for value in runs):
            raise UserError(FIELD, path, f"is damaged: {name} has no accuracies from 0 to 1; copy it again")
    return accuracy


def verify(stored: Mapping[str, Stored], measured: Mapping[str, Mapping[str, Any]]) -> dict[str, Comparison]:
    """Compares the mean accuracies of each network that was stored and measured (tadperf).

    They agree if they differ by at most 3 standard errors of their difference, or by half a point. One of them may have
    a single student; then both have the deviation of the other one. A published deviation counts as that of one run, as
    the number of runs is not known. stored: as `stored_accuracy` returns it. measured:
    the accuracy of `evaluate_file`. Raises UserError if they have no network in common.
    """
    names = [name for name in measured if name in stored]
    if not names:
        raise UserError(FIELD, ", ".join(measured), f"was not stored; use --network {' or '.join(stored)}")
    return {name: _compare(stored[name], measured[name]["runs"]) for name in names}


def _compare(stored: Stored, measured: list[float]) -> Comparison:
    published = isinstance(stored, Published)
    before, now = stored._asdict() if published else summarise(stored), summarise(measured)
    count = 1 if published else len(stored)
    known = ((before, published or count > 1), (now, len(measured) > 1))
    deviations = [row["std"] for row, several in known if several] or [0.0]
    error = math.hypot(deviations[0] / math.sqrt(count), deviations[-1] / math.sqrt(len(measured)))
    allowed = max(LEAST_DIFFERENCE, STANDARD_ERRORS * error)
    difference = now["mean"] - before["mean"]
    return Comparison(before["mean"], now["mean"], difference, allowed, abs(difference) <= allowed)
