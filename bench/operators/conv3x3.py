"""Compares tadperf.kernels.conv3x3 with PyTorch's direct convolution.

`python -m tadperf.bench.operators.conv3x3 [--threads N]`.

CPU only, float32, channels_last. It measures y, the input's gradient and the kernel's gradient for layers of tadperf's
networks; both implementations take turns. error: the largest difference from float64, divided by the largest value;
PyTorch's error is in brackets.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tadperf.bench.operators import engine
from tadperf.kernels import conv3x3, conv3x3_input, conv3x3_kernel

SIZES = ((100, 32, 4), (100, 64, 8), (32, 64, 32), (32, 128, 8), (32, 128, 16), (100, 128, 16), (100, 256, 4))


def inputs(images: int, channels: int, size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x, kernel and the gradient of y; the same number of channels in and out."""
    generator = torch.Generator().manual_seed(0)
    maps = (images, channels, size, size)
    tensors = (torch.randn(shape, generator=generator) for shape in (maps, (channels, channels, 3, 3), maps))
    x, kernel, grad = (part.to(dtype).contiguous(memory_format=torch.channels_last) for part in tensors)
    return x, kernel, grad


def passes(x: Tensor, kernel: Tensor, grad: Tensor) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """Returns our function and PyTorch's function for each pass."""

    def backward(wanted: int) -> Tensor:
        mask = [wanted == 0, wanted == 1, False]
        return torch.ops.aten.convolution_backward(
            grad, x, kernel, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask
        )[wanted]

    return {
        "y": (lambda: conv3x3(x, kernel), lambda: torch.conv2d(x, kernel, padding=1)),
        "input": (lambda: conv3x3_input(grad, kernel), lambda: backward(0)),
        "kernel": (lambda: conv3x3_kernel(grad, x), lambda: backward(1)),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tadperf.bench.operators.conv3x3", description=__doc__)
    parser.add_argument("--threads", type=int, help="by default PyTorch's number")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args(arguments)
    print("images x channels x side | pass | ours, ms (20 %, 80 %) | direct | times | error")
    with engine.threads(options.threads), torch.no_grad():
        for size in SIZES:
            truth = {name: pair[1]() for name, pair in passes(*inputs(*size, torch.float64)).items()}
            for name, (ours, direct) in passes(*inputs(*size)).items():
                times = engine.interleaved({"ours": ours, "direct": direct}, options.repeats)
                low, median, high = np.quantile(times["ours"], (0.2, 0.5, 0.8))
                other, largest = float(np.median(times["direct"])), truth[name].abs().max()
                errors = [float((f().double() - truth[name]).abs().max() / largest) for f in (ours, direct)]
                print(
                    f"{' x '.join(map(str, size))} | {name} | {median:.2f} ({low:.2f}, {high:.2f}) | {other:.2f} | "
                    f"{other / median:.2f} | {errors[0]:.0e} ({errors[1]:.0e})"
                )


if __name__ == "__main__":
    main()
