"""Any base on images that are stored small: it sees them enlarged, and its gradient is taken back to the small ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tadperf.data.enlarge import enlarge, enlarge_adjoint
from tadperf.matching.base import Base, MatchProblem
from tadperf.matching.gradient import Gradient
from tadperf.matching.state import MatchState

MakeBase = Callable[[MatchState, MatchProblem], Base]


def open_base(make: MakeBase, state: MatchState, problem: MatchProblem) -> Base:
    """Makes the base of a matching loop. If the state's images are smaller than problem.side, it sees them enlarged."""
    if problem.side is None or state.images.shape[-1] == problem.side:
        return make(state, problem)
    return EnlargingBase(make, state, problem, problem.side)


class EnlargingBase(Base):
    """Multi-formation (IDC, see data/enlarge.py) around another base, which does not know of it (tadperf)."""

    def __init__(self, make: MakeBase, state: MatchState, problem: MatchProblem, side: int) -> None:
        super().__init__(state, problem)
        self.side = side
        self.inner = make(self._enlarged(state), problem)
        self.exploded, self.layers = self.inner.exploded, self.inner.layers
        self.learns_lr, self.cache = self.inner.learns_lr, self.inner.cache

    def gradient(self, state: MatchState, number: int) -> Gradient:
        return self.gradients(state, [number])[0]

    def gradients(self, state: MatchState, numbers: Sequence[int]) -> list[Gradient]:
        small = state.images.shape[-1]
        found = self.inner.gradients(self._enlarged(state), numbers)
        return [gradient._replace(images=enlarge_adjoint(gradient.images, small)) for gradient in found]

    def _enlarged(self, state: MatchState) -> MatchState:
        return replace(state, images=enlarge(state.images, self.side))
