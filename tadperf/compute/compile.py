"""Denoisers, decoders and detectors compiled for inference: Inductor, CUDA graphs, TensorRT (tadperf).

`compile` changes how a module is called and nothing else: it stays the module it was, so that pipelines of diffusers,
`state_dict` and `config` go on as before. A compiler that is missing or fails costs a warning, never the run.

TensorRT has not been run on hardware; every name and keyword used of it is checked against the sources of the supported
versions of torch-tensorrt.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import re
import warnings
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from tadperf.compute.versions import versions
from tadperf.config import Backend
from tadperf.errors import UserError
from tadperf.files import cache_folder, write_bytes

BACKENDS: tuple[str, ...] = get_args(Backend)
Call = Callable[..., Any]
Module = TypeVar("Module", bound=nn.Module)

# Blocks that repeat in a model of diffusers that does not name them itself.
REPEATED = {"DiTTransformer2DModel": ["BasicTransformerBlock"]}
# What "auto" reckons with: operations a second of eager PyTorch, seconds to compile one layer that has weights, share
# of the time that compiling saves. On CPU measured by bench/accelerate.py: a UNet2DModel of 54 layers with weights.
RATE = {"cpu": 1e11, "cuda": 5e13}
COMPILE = {"cpu": 0.6, "cuda": 0.6}
SAVED = {"cpu": 0.2, "cuda": 0.3}
LAUNCH = 30e-6  # seconds that a layer takes at least on CUDA: a few launches of kernels

log = logging.getLogger(__name__)


def compile_for_inference(
    module: Module,
    backend: str = "auto",
    *,
    batch: int | None = None,
    dtype: torch.dtype | None = None,
    calls: int | None = None,
) -> Module:
    """Lets calls of `module` run compiled, without gradients in mind; returns the same module.

    backend: one of BACKENDS. "auto" chooses between eager and Inductor by the work of its first call, and logs what it
    chose; "cudagraphs" is Inductor, replayed; "tensorrt" falls back to Inductor, and Inductor to eager, with a warning.
    batch: rows of a call as the compiler sees it. Fewer are filled up with the last one, more are cut into several
    calls: one shape, compiled once, and a row's result does not depend on how many came with it.
    dtype: weights are cast to it, and so are inputs of two or more dimensions; results have the type of the first of
    these as it was given. calls: how many are to be expected in all; read by "auto", which without it compiles on CUDA
    alone.
    Raises UserError on another backend, and where CUDA graphs are asked for on a CPU.
    """
    if backend not in BACKENDS:
        raise UserError("backend", backend, f"must be one of {', '.join(BACKENDS)}")
    device = next(module.parameters()).device
    if backend == "cudagraphs" and device.type != "cuda":
        raise UserError("backend", backend, f"needs a CUDA device, the network is on {device}; use inductor or auto")
    vars(module).pop("forward", None)  # of an earlier call
    if dtype is not None:
        nn.Module.to(module, dtype)  # diffusers' own prints a warning at every cast
    inner = copy.copy(module)  # the same weights and parts, under its own forward
    run = (
        _chosen_at_first_call(inner, device, batch, calls)
        if backend == "auto"
        else _compiled_forward(inner, backend, device, batch)
    )
    module.forward = _with_casts(in_fixed_batches(run, batch) if batch else run, device, dtype)
    return module


def _compiled_forward(inner: nn.Module, backend: str, device: torch.device, batch: int | None) -> Call:
    if backend == "eager":
        return inner.forward
    if backend == "tensorrt":
        return with_fallback(
            "TensorRT",
            lambda: _tensorrt(inner, device),
            "Inductor",
            lambda: _compiled_forward(inner, "inductor", device, batch),
        )
    return with_fallback(
        "Inductor", lambda: _inductor(inner, backend == "cudagraphs", batch), "eager", lambda: _uncompiled(inner)
    )


def _inductor(inner: nn.Module, graphs: bool, batch: int | None) -> Call:
    dynamic = False if batch else None  # by default a second batch size makes the first dimension a variable
    if not graphs and _mostly_repeated(inner):
        inner.compile_repeated_blocks(dynamic=dynamic)  # pyright: ignore[reportCallIssue]
        return inner.forward
    run = torch.compile(inner.forward, dynamic=dynamic, mode="reduce-overhead" if graphs else None)
    return _replayed(run) if graphs else run


def _mostly_repeated(inner: nn.Module) -> bool:
    """Whether compiling the blocks that repeat is compiling most of a model of diffusers: more than half its weights.

    So a DiT is compiled by its one block (99.6 % of DiT-XL/2), a UNet as a whole (28 % of Stable Diffusion 1.5's).
    """
    if not hasattr(inner, "compile_repeated_blocks"):  # also diffusers before 0.35
        return False
    names = getattr(inner, "_repeated_blocks", None) or REPEATED.get(type(inner).__name__, [])
    blocks = [part for part in inner.modules() if type(part).__name__ in names]
    inner._repeated_blocks = names  # pyright: ignore[reportArgumentType]
    return 2 * sum(p.numel() for b in blocks for p in b.parameters()) > sum(p.numel() for p in inner.parameters())


def _replayed(run: Call) -> Call:
    """Results that outlive the next call, which a CUDA graph would write over."""

    def call(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return tree_map_only(Tensor, Tensor.clone, run(*args, **kwargs))

    return call


def _uncompiled(inner: nn.Module) -> Call:
    """`inner` with whatever of its parts is compiled run eagerly too."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.compiler.set_stance("force_eager"):
            return inner.forward(*args, **kwargs)

    return call


def _tensorrt(inner: nn.Module, device: torch.device) -> Call:
    """A TensorRT engine, built at the first call, kept in the cache folder, and refitted when weights have changed."""
    if device.type != "cuda":
        raise RuntimeError(f"it needs a CUDA device, the network is on {device}")
    import torch_tensorrt  # pyright: ignore[reportMissingImports]

    folder = cache_folder("tensorrt")
    with torch.cuda.device(device):  # the engine is built for the current device, whatever `device` says
        engine = torch_tensorrt.MutableTorchTensorRTModule(
            inner,
            device=device,
            strict=False,
            cache_built_engines=True,
            reuse_cached_engines=True,
            engine_cache_dir=str(folder / "engines"),
            timing_cache_path=str(folder / "timing.bin"),
        )
    seen = _weight_versions(inner)

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        if _weight_versions(inner) != seen:
            engine.load_state_dict(inner.state_dict())  # which asks for a refit
        with torch.cuda.device(device):
            result = engine(*args, **kwargs)
        inner.to(device)  # a refit leaves the weights on the CPU
        seen = _weight_versions(inner)
        return result

    return call


def _weight_versions(module: nn.Module) -> list[tuple[int, int]]:
    """Changes when a weight does: where each lies, and how often it was written."""
    return [(t.data_ptr(), t._version) for t in chain(module.parameters(), module.buffers())]


def with_fallback(name: str, build: Callable[[], Call], other: str, instead: Callable[[], Call]) -> Call:
    """Calls what `build` makes; where that fails, one warning, and what `instead` makes from then on.

    A call that fails there as well is the caller's mistake: its error is raised, and nothing changes.
    """
    first: Call | None = None
    second: Call | None = None
    failed = False

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal first, second, failed
        reason = None
        if not failed:
            try:
                first = first or build()
                return first(*args, **kwargs)
            except Exception as error:
                reason = error
        second = second or instead()
        result = second(*args, **kwargs)
        if reason is not None:
            failed, lines = True, str(reason).strip().splitlines()
            why = f"{type(reason).__name__}: {lines[0] if lines else 'no message'}"
            warnings.warn(f"{name} failed, {other} is used instead: {why}", RuntimeWarning, stacklevel=2)
        return result

    return call


def _with_casts(run: Call, device: torch.device, dtype: torch.dtype | None) -> Call:
    """`run` with numbers as tensors and, where there is a dtype, images cast on the way in and out.

    To a compiler a number is a constant: it would compile a denoiser anew at every time step, and an exported one would
    stay at the first.
    """

    def taken(value: Any) -> Any:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return torch.tensor(value, device=device)
        return value.to(dtype) if dtype is not None and _is_image(value) else value

    def forward(*args: Any, **kwargs: Any) -> Any:
        leaves, form = tree_flatten((args, kwargs))
        given = next((value.dtype for value in leaves if _is_image(value)), dtype)
        positional, named = tree_unflatten([taken(value) for value in leaves], form)
        result = run(*positional, **named)
        if given == dtype:
            return result
        return tree_map_only(Tensor, lambda t: t.to(given) if t.dtype == dtype else t, result)

    return forward


def _is_image(value: object) -> TypeGuard[Tensor]:
    """Time steps are not: bfloat16 has no 999."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2


def in_fixed_batches(run: Call, batch: int) -> Call:
    """`run` on exactly `batch` rows at a time, whatever is given.

    Rows are the first dimension of the first tensor that has any, and of all tensors that have as many.
    """

    def rows(value: Any, count: int, start: int) -> Any:
        if not (isinstance(value, Tensor) and value.ndim and len(value) == count):
            return value
        part = value[start : start + batch]
        if len(part) == batch:
            return part
        last = part[-1:] if len(part) else value.new_zeros(1, *value.shape[1:])
        return torch.cat([part, last.expand(batch - len(part), *value.shape[1:])])

    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, form = tree_flatten((args, kwargs))
        count = next(len(value) for value in leaves if isinstance(value, Tensor) and value.ndim)
        parts: list[Sequence[Any]] = []
        made = None
        for start in range(0, max(count, 1), batch):
            positional, named = tree_unflatten([rows(value, count, start) for value in leaves], form)
            results, made = tree_flatten(run(*positional, **named))
            parts.append([r[: count - start] if isinstance(r, Tensor) and r.ndim else r for r in results])
        joined = [torch.cat(p) if isinstance(p[0], Tensor) and p[0].ndim else p[0] for p in zip(*parts, strict=True)]
        assert made is not None
        return tree_unflatten(joined, made)

    return call


def _chosen_at_first_call(inner: nn.Module, device: torch.device, batch: int | None, calls: int | None) -> Call:
    """Chooses at the first call by counting what it computes, never by a clock: one seed gives one result."""
    run: Call | None = None

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal run
        if run is None:
            with FlopCounterMode(display=False) as counter:
                inner.forward(*args, **kwargs)
            layers = sum(1 for part in inner.modules() if part._parameters)
            backend, why = choose_backend(device.type, counter.get_total_flops(), layers, calls)
            log.info("%s runs %s: %s", type(inner).__name__, backend, why)
            run = _compiled_forward(inner, backend, device, batch)
        return run(*args, **kwargs)

    return call


def choose_backend(kind: str, flops: float, layers: int, calls: int | None) -> tuple[str, str]:
    """Backend and the reason for it (tadperf): Inductor where the calls to come save more than it takes to compile.

    kind: type of device. flops: operations of one call. layers: with weights. calls: expected; None where not known.
    """
    if calls is None:
        return ("inductor", "on CUDA") if kind == "cuda" else ("eager", "the number of calls is not known")
    rates = {table: values.get(kind, values["cpu"]) for table, values in (("r", RATE), ("c", COMPILE), ("s", SAVED))}
    second = max(flops / rates["r"], LAUNCH * layers if kind == "cuda" else 0.0)
    saved, cost = calls * second * rates["s"], layers * rates["c"]
    why = f"{calls} calls would save about {saved:.3g} s, compiling takes about {cost:.3g} s"
    return ("inductor" if saved > cost else "eager"), why


def _artifacts(key: str) -> Path:
    """The file of `key` under these versions and on this kind of machine; others' code would not be taken anyway."""
    gpu = torch.cuda.get_device_capability() if torch.cuda.is_available() else ""
    place = repr((key, versions(), gpu, torch.backends.cpu.get_cpu_capability()))
    name = re.sub(r"[^\w.-]+", "-", key)[:60]
    return cache_folder("compiled") / f"{name}-{hashlib.sha256(place.encode()).hexdigest()[:16]}.bin"


def load_compile_cache(key: str) -> bool:
    """Makes what an earlier process compiled under `key` known to the compilers of this one; False where nothing is.

    PyTorch's artifacts leave out the C++ that Inductor builds on a CPU, most of the time that compiling takes: objects
    stay in the same folder, unless TORCHINDUCTOR_CACHE_DIR names another. Call it before anything is compiled.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder("inductor")))
    file = _artifacts(key)
    return file.exists() and torch.compiler.load_cache_artifacts(file.read_bytes()) is not None


def save_compile_cache(key: str) -> bool:
    """Keeps what this process has compiled, for `load_caches`; False where that is nothing."""
    made = torch.compiler.save_cache_artifacts()
    if made is not None:
        write_bytes(_artifacts(key), cast(bytes, made[0]))
    return made is not None
