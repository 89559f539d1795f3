"""The interface of a base: it computes the gradient of one iteration, and the loop does everything else.

The loop draws nothing and knows no loss. It averages the gradients over draws and ranks, updates images, labels and the
students' learning rate, undoes iterations that diverge, checks on held-out samples, saves and resumes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tadperf import seeds
from tadperf.config import MatchConfig
from tadperf.experts.store import Experts, ResidentExperts
from tadperf.matching.gradient import Gradient
from tadperf.matching.state import EXPLODED, MatchState
from tadperf.nets.flat import FlatNet
from tadperf.nets.students import Examples


@dataclass(frozen=True)
class MatchProblem:
    """The constant inputs of the matching loop.

    net: the network of experts and students. augment: the strategy of data.augment. seed: all draws derive from it.
    real: the trusted training samples with their corrected labels and weights; trajectory matching does not use them.
    side: the side in pixels to which the state's images are enlarged for networks; None if they have it already.
    make_base: (first state, problem) -> `Base`; by default the base of match.method.
    """

    net: FlatNet
    experts: Experts | ResidentExperts
    config: MatchConfig
    augment: str
    seed: int
    real: Examples | None = None
    side: int | None = None
    make_base: Callable[[MatchState, MatchProblem], Base] | None = None


class Base(ABC):
    """Computes the gradients of an iteration. A subclass implements `gradient`.

    exploded: a loss of at least this has diverged. layers: the names of the values in `Gradient.layers`, for the log.
    learns_lr: whether `Gradient.lr` is a gradient; if not, the students' learning rate stays match.lr_init.
    cache: the key of the compiled code to save after the first iteration; None if there is none.
    """

    exploded: float = EXPLODED
    layers: Sequence[str] = ()
    learns_lr: bool = False
    cache: str | None = None

    def __init__(self, state: MatchState, problem: MatchProblem) -> None:
        """state: the first one. Later states have images and labels of the same shapes."""
        self.problem = problem

    @abstractmethod
    def gradient(self, state: MatchState, number: int) -> Gradient:
        """Returns the gradient of one draw. number: from 0 to match.trajectories - 1; the ranks divide these numbers.

        Everything random must come from `draw_generator`, so that a resumed run and every rank compute the same bytes.
        It should read no value of a CUDA device: the loop launches the next iteration before this one ends.
        """

    def gradients(self, state: MatchState, numbers: Sequence[int]) -> list[Gradient]:
        """Returns the gradients of several draws. Override it if they can share work."""
        return [self.gradient(state, number) for number in numbers]


def draw_generator(problem: MatchProblem, state: MatchState, number: int) -> torch.Generator:
    """Returns the generator of one draw of this iteration."""
    return seeds.generator(problem.seed, "match", state.iteration, *([number] if number else []))


def image_gradient(
    loss: Tensor, images: Tensor, labels: Tensor | None = None, layers: Tensor | None = None
) -> Gradient:
    """Returns the `Gradient` of a base that does not learn the students' learning rate and has no student.

    loss: scalar. images: its gradient [M, C, H, W]. labels: that of the label logits [M, K], or None for hard labels.
    """
    zero = torch.zeros_like(loss)
    return Gradient(loss, images, labels, zero, zero, layers)
