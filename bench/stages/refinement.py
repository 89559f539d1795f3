"""Measures one round of refinement: generates candidates for some rejected images, classifies them and chooses.

"published": one candidate after another, each classified alone, eager. The weights are random, which does not change
the time. The note gives the largest difference of a pixel from the published form.
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


def make_round(case: Case, provider: str, device: torch.device) -> Callable[[], Tensor]:
    """Returns a function that runs one round and returns the candidates uint8 [A * N, channels, H, W]."""
    count = case.anomalies * case.candidates
    rows = 1 if provider == "published" else count
    config = case.refine.model_copy(
        update={"batch": rows, "backend": "inductor" if FAMILIES[provider] == "inductor" else "eager"}
    )
    model = unet.build(case.diffusion, case.shape, CLASSES, 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        nn.init.normal_(model.conv_out.weight, std=0.05)
    class_names = tuple(map(str, range(CLASSES)))
    source: DiffusionModel = unet.as_diffusion_model(
        model, unet.schedulers()[1], config, Target(case.shape, class_names, device)
    )
    net = build(case.detector, case.shape, CLASSES, 0).to(device).eval()
    detector = compile_detector(net, config, 1)
    given = torch.randint(0, 256, (case.anomalies, *case.shape), generator=torch.Generator().manual_seed(0))
    starts = source.encode(given.to(torch.uint8)).repeat_interleave(case.candidates, 0)
    labels = (torch.arange(case.anomalies) % CLASSES).repeat_interleave(case.candidates)

    def run() -> Tensor:
        candidates = generate(source, starts, labels, list(range(count)), config.strength, rows)
        output = classify_images(detector, candidates.float().div(127.5).sub(1), rows)
        by_image = DetectorOutput(*(part.unflatten(0, (case.anomalies, case.candidates)) for part in output))
        wanted = labels[:: case.candidates].to(device)
        select.choose(by_image, wanted, output.features[:0], wanted[:0], config)
        return candidates

    return run


def single_call(size: str, provider: str, device: torch.device) -> Callable[[], Tensor]:
    """Returns a function that runs one round, to measure its peak memory in a new process."""
    return make_round(SIZES[size], provider, device)


def measure(size: str, device: torch.device, repeats: int, providers: Sequence[str] = tuple(FAMILIES)) -> list[Row]:
    """Returns a row for each provider, tadperf's first."""
    torch.compiler.reset()
    case = SIZES[size]
    calls = {name: make_round(case, name, device) for name in providers}
    first: dict[str, float] = {}
    images: dict[str, Tensor] = {}
    for name, call in calls.items():
        start = time.perf_counter()
        images[name] = call()
        first[name] = time.perf_counter() - start
    times = engine.interleaved(calls, repeats)
    rows = []
    for name in calls:
        difference = int((images[name].int() - images["published"].int()).abs().max())
        compiled = FAMILIES[name] == "inductor"
        rows.append(
            runner.make_row(
                "refinement",
                size,
                name,
                FAMILIES[name],
                times[name],
                compile_s=first[name] if compiled else None,
                peak_mb=None if compiled else runner.peak_memory("refinement", size, name, device),
                note=f"{case.anomalies} x {case.candidates} candidates, pixels differ by {difference} of 255",
            )
        )
    return rows
