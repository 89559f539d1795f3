"""One iteration of matching, which is launched first and judged later, so that a GPU never waits for the CPU."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from tadperf.compute.transfer import Download
from tadperf.config import MatchConfig
from tadperf.errors import UserError
from tadperf.matching.gradient import Gradient
from tadperf.matching.state import EXPLODED, MatchState, apply_gradient


class Outcome(NamedTuple):
    """What the loop decides on and reports.

    lr: the students' learning rate after the iteration. diverged: whether the iteration must be undone: its loss
    exploded, or its gradient or the new state is not finite. layers: the matching loss of each layer, [] if not known.
    """

    loss: float
    lr: float
    diverged: bool
    layers: list[float]


class Attempt(NamedTuple):
    """An iteration that was launched; on CUDA it may still run.

    state: the state before it. updated: the state after it, if it has not diverged. values: the numbers of its
    `Outcome`, on their way to the CPU.
    """

    state: MatchState
    updated: MatchState
    values: Download

    @classmethod
    def launch(cls, state: MatchState, gradient: Gradient, config: MatchConfig) -> Attempt:
        """Updates the state. Reads no value, so on CUDA it does not wait."""
        updated = apply_gradient(state, gradient, config)
        checked = [gradient.loss, gradient.images, gradient.lr, updated.images, updated.log_lr]
        if updated.labels.is_floating_point():
            checked.append(updated.labels)
        # The infinity norm of values is finite only if all of them are: it keeps NaN.
        largest = torch.stack(torch._foreach_norm(checked, math.inf)).amax()
        values = torch.stack([gradient.loss, updated.log_lr.exp(), updated.log_lr, largest])
        return cls(
            state, updated, Download(values if gradient.layers is None else torch.cat([values, gradient.layers]))
        )

    def outcome(self, config: MatchConfig, exploded: float = EXPLODED) -> Outcome:
        """Waits for this iteration, but not for what was launched after it.

        exploded: a loss of at least this has diverged.
        Raises UserError if the learned learning rate has become 0 or infinite, although its logarithm is finite.
        """
        loss, lr, log_lr, largest, *layers = self.values.read().tolist()
        if math.isfinite(log_lr) and not 0 < lr < math.inf:
            remedy = f"it drove the students' learning rate to {lr} at iteration {self.updated.iteration}"
            raise UserError("match.lr_lr", config.lr_lr, f"too large: {remedy}; use a smaller value, such as 0.05")
        return Outcome(loss, lr, not (loss < exploded and math.isfinite(largest)), layers)
