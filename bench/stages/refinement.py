"""One round of refinement: candidates for some anomalies made, judged and chosen.

"published" is the plain form: one candidate after another, each judged by itself, eager. Weights are random, which
changes no time. The note tells the largest difference of a pixel from the published form.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tadperf.bench.operators import engine
from tadperf.bench.operators.engine import Row
from tadperf.bench.stages import runner
from tadperf.config import DetectorConfig, DiffusionConfig, RefineConfig
from tadperf.config.merge import merge
from tadperf.nets.architectures import Shape, build
from tadperf.refine import select
from tadperf.refine.detector import DetectorOutput, classify_images, compile_detector
from tadperf.refine.models import unet
from tadperf.refine.models.base import DiffusionModel, Target, generate

FAMILIES = {"tadperf": "tadperf", "tadperf compiled": "inductor", "published": "published"}
CLASSES = 10


class Case(NamedTuple):
    shape: Shape
    anomalies: int
    candidates: int
    refine: RefineConfig
    diffusion: DiffusionConfig
    detector: DetectorConfig


def _case(preset: str, shape: Shape, anomalies: int, candidates: int) -> Case:
    config = merge(preset)
    return Case(shape, anomalies, candidates, config.refine, config.diffusion, config.detector)


SIZES = {"digits": _case("digits", (1, 8, 8), 4, 8), "cifar10": _case("quick", (3, 32, 32), 1, 8)}


def round_of(case: Case, provider: str, device: torch.device) -> Callable[[], Tensor]:
    """One round, as a function that returns the candidates uint8 [A * N, channels, H, W]."""
    count = case.anomalies * case.candidates
    rows = 1 if provider == "published" else count
    config = case.refine.model_copy(
        update={"batch": rows, "backend": "inductor" if FAMILIES[provider] == "inductor" else "eager"}
    )
    model = unet.build(case.diffusion, case.shape, CLASSES, 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        nn.init.normal_(model.conv_out.weight, std=0.05)  # pyright: ignore[reportArgumentType]
    names = tuple(map(str, range(CLASSES)))
    source: DiffusionModel = unet.as_diffusion_model(
        model, unet.schedulers()[1], config, Target(case.shape, names, device)
    )
    net = build(case.detector, case.shape, CLASSES, 0).to(device).eval()
    judge = compile_detector(net, config, 1)
    given = torch.randint(0, 256, (case.anomalies, *case.shape), generator=torch.Generator().manual_seed(0))
    starts = source.encode(given.to(torch.uint8)).repeat_interleave(case.candidates, 0)
    labels = (torch.arange(case.anomalies) % CLASSES).repeat_interleave(case.candidates)

    def run() -> Tensor:
        made = generate(source, starts, labels, list(range(count)), config.strength, rows)
        said = classify_images(judge, made.float().div(127.5).sub(1), rows)
        parted = DetectorOutput(*(part.unflatten(0, (case.anomalies, case.candidates)) for part in said))
        own = labels[:: case.candidates].to(device)
        select.choose(parted, own, said.features[:0], own[:0], config)
        return made

    return run


def once(size: str, provider: str, device: torch.device) -> Callable[[], Tensor]:
    """One round, for the peak memory of a process of its own."""
    return round_of(SIZES[size], provider, device)


def measure(size: str, device: torch.device, repeats: int, providers: Sequence[str] = tuple(FAMILIES)) -> list[Row]:
    """A row per provider, tadperf's first."""
    torch.compiler.reset()
    case = SIZES[size]
    calls = {name: round_of(case, name, device) for name in providers}
    first: dict[str, float] = {}
    made: dict[str, Tensor] = {}
    for name, call in calls.items():
        start = time.perf_counter()
        made[name] = call()
        first[name] = time.perf_counter() - start
    times = engine.interleaved(calls, repeats)
    rows = []
    for name in calls:
        apart = int((made[name].int() - made["published"].int()).abs().max())
        compiled = FAMILIES[name] == "inductor"
        rows.append(
            runner.row(
                "refinement",
                size,
                name,
                FAMILIES[name],
                times[name],
                compile_s=first[name] if compiled else None,
                peak_mb=None if compiled else runner.peak("refinement", size, name, device),
                note=f"{case.anomalies} x {case.candidates} candidates, {apart} of 255 apart",
            )
        )
    return rows
