"""One iteration of matching at real sizes on a fake CUDA device whose tensors have no values.

Anything that reads a value of the device raises an error, so it cannot be part of a CUDA graph. Prints shapes and
devices of the gradients: python tests/cuda/run_stub.py tests/cuda/fake_sweep.py
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tadperf import seeds
from tadperf.config import MatchConfig, NetConfig
from tadperf.data.augment import Draw
from tadperf.matching import step_backends
from tadperf.matching.gradient import Step, adjoint
from tadperf.matching.trajectories import draw_steps
from tadperf.nets.architectures import build
from tadperf.nets.flat import FlatNet

NET = FlatNet(build(NetConfig.model_validate({"width": 128, "depth": 3}), (3, 32, 32), 10, 0))
CONFIG = MatchConfig.model_validate({"steps": 2, "batch": 100})
AUGMENT = "color_crop_cutout_flip_scale_rotate"


def gradients(soft: bool, backend: str, exact: bool) -> list[str]:
    """Returns shape and device of the gradients of images, labels and learning rate."""
    drawn = draw_steps(CONFIG, 100, 32, AUGMENT, seeds.generator(0)).split()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        device = torch.device("cuda", 0)

        def fake(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else mode.from_tensor(values).to(device)

        start, target = (torch.empty(NET.num_parameters, device=device) for _ in range(2))
        images, lr = torch.empty(100, 3, 32, 32, device=device), torch.empty((), device=device)
        labels = torch.empty(100, 10, device=device) if soft else torch.zeros(100, dtype=torch.int64, device=device)
        steps: list[Any] = [Step(fake(step.rows), Draw(*map(fake, step.drawn))) for step in drawn]  # pyright: ignore
        chosen = getattr(step_backends, backend)(NET)
        gradient = adjoint(NET, start, target, images, labels, lr, steps, exact, chosen)
        return [f"{tuple(value.shape)} {value.device}" for value in gradient if value is not None]


if __name__ == "__main__":
    cases = {"formulas": (False, "eager", True), "TESLA": (False, "eager", False), "autograd": (True, "autograd", True)}
    found: dict[str, Any] = {name: gradients(*case) for name, case in cases.items()}
    try:
        with FakeTensorMode():
            torch.empty((), device="cuda").item()
    except DataDependentOutputException:
        found["a read of a value"] = "refused"
    print(json.dumps(found))
