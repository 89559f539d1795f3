"""Compares compiled networks of generation and detection with eager ones.

Run `python -m tadperf.bench.stages.compile [--json FILE]`. Weights and inputs are random; the backends of
`compute.compile.compile_for_inference` take turns. compile_s: the first call with empty caches, after another network
was compiled. restart_s: the first call after a reset that leaves only the caches on disk. On CUDA it also measures CUDA
graphs, and networks of the size of DiT-XL/2 and Stable Diffusion 1.5.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tadperf.bench.operators import engine, report
from tadperf.compute.compile import _is_image, compile_for_inference
from tadperf.compute.device import describe_device, resolve_device
from tadperf.compute.versions import versions
from tadperf.config import NetConfig
from tadperf.nets import architectures

COLUMNS = {
    "network": "{}",
    "batch": "{}",
    "dtype": "{}",
    "backend": "{}",
    "median_ms": "{:.4g}",
    "q20_ms": "{:.4g}",
    "q80_ms": "{:.4g}",
    "over_eager": "{:.2f}",
    "compile_s": "{:.1f}",
    "restart_s": "{:.1f}",
    "error": "{:.1e}",
    "layers": "{}",
    "gflops": "{:.3g}",
}


class Case(NamedTuple):
    """A network and the inputs of one call."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]  # inputs(batch)
    batch: dict[str, int]  # batch by type of device
    dtype: torch.dtype = torch.float32


def unet(size: int, width: int, levels: int, channels: int) -> Case:
    """Returns the case of a class-conditional UNet2DModel over pixels, as refine.source = "train" builds it."""

    def build() -> nn.Module:
        from diffusers import UNet2DModel

        return UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=2,
            norm_num_groups=8,
            block_out_channels=(width, *[2 * width] * (levels - 1)),
            down_block_types=("DownBlock2D",) * levels,
            up_block_types=("UpBlock2D",) * levels,
            attention_head_dim=width,
            num_class_embeds=11,
        )

    def inputs(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x, time_step = torch.randn(batch, channels, size, size), torch.tensor(500)
        return (x, time_step), {"class_labels": torch.arange(batch) % 10, "return_dict": False}

    return Case(build, inputs, {"cpu": 50 if size <= 8 else 10, "cuda": 500})


def detector(name: str, size: int, channels: int) -> Case:
    """Returns the case of a detector with the network `name`."""

    def build() -> nn.Module:
        net = NetConfig.model_validate({"name": name})
        return architectures.build(net, (channels, size, size), 10, 0)

    return Case(build, lambda batch: ((torch.randn(batch, channels, size, size),), {}), {"cpu": 100, "cuda": 1000})


def dit_xl() -> Case:
    """Returns the case of DiT-XL/2 at 256 x 256: latents 4 x 32 x 32, each image with and without its class."""

    def build() -> nn.Module:
        from diffusers import DiTTransformer2DModel

        return DiTTransformer2DModel(
            num_attention_heads=16,
            attention_head_dim=72,
            in_channels=4,
            out_channels=8,
            num_layers=28,
            sample_size=32,
            patch_size=2,
            num_embeds_ada_norm=1000,
        )

    def inputs(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = {"timestep": torch.full((batch,), 500), "class_labels": torch.arange(batch), "return_dict": False}
        return (torch.randn(batch, 4, 32, 32),), named

    return Case(build, inputs, {"cpu": 2, "cuda": 32}, torch.bfloat16)


def stable_diffusion() -> Case:
    """Returns the case of Stable Diffusion 1.5's UNet at 256 x 256: latents 4 x 32 x 32, 77 words of a prompt."""

    def build() -> nn.Module:
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel(sample_size=32, cross_attention_dim=768, attention_head_dim=8)

    def inputs(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        words = torch.randn(batch, 77, 768)
        return (torch.randn(batch, 4, 32, 32), torch.tensor(500), words), {"return_dict": False}

    return Case(build, inputs, {"cpu": 2, "cuda": 32}, torch.bfloat16)


CASES = {
    "unet-8": unet(8, 64, 2, 1),
    "unet-32": unet(32, 64, 4, 3),
    "convnet-8": detector("convnet", 8, 1),
    "convnet-32": detector("convnet", 32, 3),
    "resnet18-32": detector("resnet18", 32, 3),
    "dit-xl": dit_xl(),
    "sd-1.5": stable_diffusion(),
}
LARGE = ("dit-xl", "sd-1.5")  # by default on CUDA only


def to_device(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@torch.no_grad()
def measure(case: Case, device: torch.device, backends: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """Returns a row for each backend. error: the largest difference from eager over the largest value."""
    from torch._inductor.utils import fresh_cache
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    batch = case.batch[device.type]
    module = case.build().to(device, case.dtype).eval()
    args, named = case.inputs(batch)
    args, named = tuple(to_device(device, x) for x in args), {name: to_device(device, x) for name, x in named.items()}
    calls: dict[str, Callable[[], Tensor]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for backend in backends:

        def call(net: nn.Module) -> Tensor:
            result = first(net(*args, **named))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return result

        def fresh(backend: str = backend) -> nn.Module:
            torch.compiler.reset()
            return compile_for_inference(copy.deepcopy(module), backend, batch=batch, dtype=case.dtype)

        net, rows[backend] = fresh(), {}
        if backend != "eager":
            with fresh_cache():
                rows[backend]["compile_s"] = seconds(lambda net=net: call(net))
                net = fresh()
                rows[backend]["restart_s"] = seconds(lambda net=net: call(net))
        calls[backend] = lambda net=net: call(net)
    times = engine.interleaved(calls, repeats)
    expected = calls["eager"]()
    with FlopCounterMode(display=False) as counter:
        module(*[x.to(case.dtype) if _is_image(x) else x for x in args], **named)
    layers = sum(1 for part in module.modules() if part._parameters)
    size = {"layers": layers, "gflops": counter.get_total_flops() / 1e9}
    for backend, row in rows.items():
        q20, median, q80 = (float(q) for q in np.quantile(times[backend], (0.2, 0.5, 0.8)))
        difference = (calls[backend]().float() - expected.float()).abs().max() / expected.float().abs().max()
        row |= {"median_ms": median, "q20_ms": q20, "q80_ms": q80, "rounds": len(times[backend])}
        row |= {"over_eager": float(np.median(times["eager"])) / median, "error": float(difference), **size}
        row |= {"backend": backend, "batch": batch, "dtype": str(case.dtype).removeprefix("torch.")}
    return list(rows.values())


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the rows as aligned text."""
    cells = [[COLUMNS[k].format(row[k]) if row.get(k) is not None else "-" for k in COLUMNS] for row in rows]
    cells.insert(0, list(COLUMNS))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tadperf.bench.stages.compile", description=__doc__)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=", ".join(CASES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--backends", help="to compare with eager; by default inductor, and cudagraphs on CUDA")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, help="CPU threads; by default PyTorch's number")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    device = resolve_device(options.device)
    default = "inductor,cudagraphs" if device.type == "cuda" else "inductor"
    backends = (options.backends or default).split(",")
    names = options.networks or [name for name in CASES if device.type == "cuda" or name not in LARGE]
    rows: list[dict[str, Any]] = []
    with engine.threads(options.threads) as used, torch.no_grad():
        compile_for_inference(nn.Linear(4, 4).to(device), "inductor")(torch.zeros(2, 4, device=device))
        facts = {
            "device": describe_device(device),
            "threads": used,
            "versions": versions(),
            "date": date.today().isoformat(),
            "command": shlex.join([*parser.prog.split(), *arguments]),
        }
        print(f"{facts['device']}, {used} threads, torch {torch.__version__}")
        for name in names:
            print(name, file=sys.stderr, flush=True)
            rows += [
                {"network": name} | row for row in measure(CASES[name], device, ["eager", *backends], options.repeats)
            ]
    print("\n".join(lines(rows)))
    if options.json:
        report.save(options.json, [row | facts for row in rows])


if __name__ == "__main__":
    main(sys.argv[1:])
