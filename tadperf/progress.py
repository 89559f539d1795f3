"""How a stage tells its caller how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called as `progress(stage, done, total, **values)`; done = total ends the stage.

    Stages: decode, resize, data, trust, trust:proxies, experts, matching, detector, diffusion, generate, refine,
    round N, evaluate:<what>. `values` are figures worth showing, such as loss=0.31.
    """

    def __call__(self, stage: str, done: int, total: int, **values: object) -> None: ...


def silent(stage: str, done: int, total: int, **values: object) -> None:
    """Shows nothing; the default of every function that takes a `Progress`."""
