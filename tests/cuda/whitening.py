"""Fits and applies ZCA on the twin: the copies it makes, the precision of its products, and the error of its results.

python tests/cuda/run_twin.py tests/cuda/whitening.py
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tadperf.compute.torch_settings import MATMUL, torch_settings
from tadperf.data import images as images_module
from tadperf.data import normalise
from tadperf.task.samples import normalise_data

CHUNKS = 5


class Calls(TorchFunctionMode):
    """Collects whether TF32 was allowed in each float32 product on the device, and the copies of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.tf32: list[bool] = []
        self.uploaded_images = self.downloaded_values = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "matmul" in func.__name__ and args[0].is_cuda and args[0].dtype == torch.float32:
            self.tf32.append(MATMUL.allow_tf32)
        if func.__name__ == "to" and args[0].is_cpu and result.is_cuda and args[0].dtype == torch.uint8:
            self.uploaded_images += len(args[0])
        if func.__name__ in ("to", "cpu") and args[0].is_cuda and result.is_cpu:
            self.downloaded_values += args[0].numel()
        return result


def pixels(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    smooth = torch.rand(count, 3, 1, 1, generator=generator) * 120
    return (smooth + torch.rand(count, 3, 4, 4, generator=generator) * 120).to(torch.uint8)


def normalised(device: str, train: torch.Tensor, test: torch.Tensor) -> Any:
    sets = SimpleNamespace(images=train, labels=None), SimpleNamespace(images=test, labels=None)
    config = SimpleNamespace(data=SimpleNamespace(normalise="zca"))
    task: Any = SimpleNamespace(train=sets[0], test=sets[1], config=config, device=torch.device(device))
    return normalise_data(task)


def measure(share: float) -> dict[str, Any]:
    """share: the largest share of the device's free memory that the pixels may take."""
    images_module.RESIDENT_SHARE = share
    normalise.CHUNK = images_module.CHUNK = 40
    train, test = pixels(40 * CHUNKS), pixels(40)
    expected = normalised("cpu", train, test)
    with torch_settings(tf32=True), Calls() as calls:
        found = normalised("cuda", train, test)
    with torch_settings(tf32=True), Calls() as inverse:
        back = found.normaliser.to("cuda").invert(found.train)
    results, truth = ({"train": x.train, "test": x.test, **x.normaliser.tensors()} for x in (found, expected))
    errors = [(results[name].cpu() - truth[name]).abs().max() / truth[name].abs().max() for name in truth]
    return {
        "error": float(max(errors)),
        "pixels": torch.equal(back.cpu(), train),
        "tf32": calls.tf32 + inverse.tf32,
        "uploads of the set": (calls.uploaded_images - len(test)) / len(train),
        "downloaded values": calls.downloaded_values,
    }


if __name__ == "__main__":
    print(json.dumps({"resident": measure(0.25), "in chunks": measure(0.0)}))
