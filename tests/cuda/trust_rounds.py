"""What the trust loop asks of a CUDA device: python tests/cuda/run_twin.py tests/cuda/trust_rounds.py

Prints for each case the counts of 12 proxy steps, the counts of the verdicts of one round, the launches of each Triton
kernel in two rounds, and how far these rounds are from those of a CPU.
"""

from __future__ import annotations

import collections
import json
from typing import Any

import torch
from counters import LAUNCH, counters

from tadperf.config import NetConfig, TrustConfig
from tadperf.data import images as images_module
from tadperf.data.dataset import Dataset
from tadperf.data.images import normalise_images
from tadperf.data.noise import add_noise
from tadperf.data.normalise import fit_normaliser
from tadperf.data.open import open_data
from tadperf.nets.problem import Problem
from tadperf.progress import silent
from tadperf.trust import neighbours
from tadperf.trust.loop import dual_loop
from tadperf.trust.proxies import train_proxies
from tadperf.trust.state import DTYPES, TrustState, as_given
from tadperf.trust.verdicts import assign_verdicts

DIGITS = open_data("digits").train
PART = DIGITS.subset((DIGITS.labels < 5).nonzero().squeeze(1)[:180])
PART = Dataset(PART.images, PART.labels, PART.class_names[:5], "digits", PART.labels, PART.source)
DATA = add_noise(PART, "asymmetric:0.3", 0)
NET = NetConfig.model_validate({"width": 8, "depth": 2})
CONFIG = {"rounds": 2, "proxies": 2, "epochs": 4, "batch": 36}  # a proxy sees 90 samples in 3 batches; one is smaller
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "consistency": {"consistency": 0.5},
    "one proxy, no graph": {"proxies": 1, "graph": False},
    "pixels on the CPU": {"held_out": False},
}


def problem(case: str, device: str) -> Problem:
    if case == "pixels on the CPU":  # as if the set were too large for float32 images, and for the device
        images_module.MAX_NORMALISED_BYTES = images_module.RESIDENT_SHARE = 0
    else:
        images_module.MAX_NORMALISED_BYTES = 2 << 30
    images = normalise_images(fit_normaliser(DATA.images), DATA.images, device)
    augment = "color_crop_cutout_flip_scale_rotate"
    return Problem(images, DATA.labels, DATA.class_names, NET, augment, 0, torch.device(device, 0))


def measure(case: str) -> dict[str, Any]:
    config = TrustConfig.model_validate({**CONFIG, **CASES[case]})
    on_device, found = problem(case, "cuda"), {}
    start = as_given(DATA.labels, DATA.class_names)
    assert on_device.shape == DATA.shape  # the problem reads it from an image, once
    for epochs in (4, 6):
        forget_counts()
        outputs = train_proxies(on_device, start.view(), config.model_copy(update={"epochs": epochs}), silent)
        found[epochs] = dict(counters.counts)
    forget_counts()
    assign_verdicts(outputs, start, 1, config, 0)
    verdicts = dict(counters.counts)
    forget_counts()
    rounds, expected = dual_loop(on_device, config).rounds, dual_loop(problem(case, "cpu"), config).rounds
    return {
        "steps": {kind: found[6][kind] - found[4][kind] for kind in found[6]},
        "verdicts": verdicts,
        "kernels": kernels(),
        "rounds": [compare(ours, exact) for ours, exact in zip(rounds, expected, strict=True)],
        "problems": counters.problems,
    }


def forget_counts() -> None:
    counters.counts.clear()
    counters.lines.clear()


def kernels() -> dict[str, int]:
    """Returns the launches of each Triton kernel."""
    found = collections.Counter[str]()
    for line, number in counters.lines[LAUNCH].items():
        name = line.rsplit("[", 1)[1].rstrip("]")
        if name.startswith("triton "):
            found[name.removeprefix("triton ")] += number
    return dict(found)


def compare(ours: TrustState, exact: TrustState) -> dict[str, float]:
    """Returns the largest difference of each field."""
    return {name: float((getattr(ours, name).double() - getattr(exact, name)).abs().max()) for name in DTYPES}


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Fewer candidates for the reach and the number of labels: each takes 160 launches, on both devices.
    neighbours.REACHES, neighbours.LABEL_COUNTS, neighbours.SPREAD_STEPS = (0.5, 0.9), (5.0, 40.0), 20
    print(json.dumps({case: measure(case) for case in CASES}))
