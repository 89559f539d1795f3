"""How a stage reports its progress."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called as `progress(stage, done, total, **values)`. The stage ends when done equals total.

    Stages: decode, resize, encode, features, data, trust, trust:proxies, trust:neighbours, trust:graph, experts,
    matching, detector, diffusion, generate, refine, round N, evaluate. `values` are figures to show, such as loss=0.31.
    Inside them, counted in images: data:normalise, trust:nearest, experts:training, matching:start, matching:check,
    evaluate:training, detector:training. A thread reports these and trust:proxies.
    """

    def __call__(self, stage: str, done: int, total: int, **values: object) -> None: ...


def silent(stage: str, done: int, total: int, **values: object) -> None:
    """Does nothing. Functions that take a `Progress` use this one by default."""
