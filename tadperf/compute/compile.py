"""Compiles denoisers, decoders and detectors for inference with Inductor, CUDA graphs or TensorRT (tadperf).

`compile_for_inference` replaces the `forward` of a module and nothing else, so diffusers' pipelines, `state_dict` and
`config` work as before. If a compiler is missing or fails, the run continues with a warning.

The TensorRT backend has never run on a GPU. Tests check every name and keyword that is used here against the sources of
the supported versions of torch-tensorrt. The result of an engine is compared with PyTorch's before it is used.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from tadperf.compute.engine_check import checked, weight_versions
from tadperf.compute.versions import versions
from tadperf.config import Backend
from tadperf.errors import UserError
from tadperf.files import cache_folder, write_bytes

BACKENDS: tuple[str, ...] = get_args(Backend)
Call = Callable[..., Any]
Module = TypeVar("Module", bound=nn.Module)

# The repeated blocks of diffusers' models that do not name them in `_repeated_blocks`.
REPEATED = {"DiTTransformer2DModel": ["BasicTransformerBlock"]}
# The cost model of "auto": operations per second of eager PyTorch, seconds to compile one layer with weights, share of
# the time that compiling saves. The CPU values were measured by bench/stages/compile.py on a UNet2DModel of 54 layers
# with weights. The CUDA values are estimates; nobody measured them.
RATE = {"cpu": 1e11, "cuda": 5e13}
COMPILE = {"cpu": 0.6, "cuda": 0.6}
SAVED = {"cpu": 0.2, "cuda": 0.3}
LAUNCH = 30e-6  # minimum seconds per layer on CUDA, for a few kernel launches; not measured

log = logging.getLogger(__name__)


def compile_for_inference(
    module: Module,
    backend: str = "auto",
    *,
    batch: int | None = None,
    dtype: torch.dtype | None = None,
    calls: int | None = None,
) -> Module:
    """Makes calls of `module` run compiled, for use without gradients; returns the same module.

    backend: one of BACKENDS. "auto" chooses eager or Inductor by the operations of the first call and logs it.
    "cudagraphs" is Inductor with CUDA graphs. "tensorrt" falls back to Inductor, and Inductor to eager, with a warning.
    So does an engine of TensorRT whose first result is not that of PyTorch.
    batch: rows of every compiled call. Smaller inputs are padded with their last row, larger ones are split. So there
    is one shape, compiled once, and the result of a row does not depend on other rows.
    dtype: weights and inputs of two or more dimensions are cast to it. Results are cast back to the type of the first
    of these inputs. calls: expected number of calls; without it, "auto" compiles on CUDA only.
    Raises UserError for an unknown backend, and for CUDA graphs on a CPU.
    """
    if backend not in BACKENDS:
        raise UserError("backend", backend, f"must be one of {', '.join(BACKENDS)}")
    device = next(module.parameters()).device
    if backend == "cudagraphs" and device.type != "cuda":
        raise UserError("backend", backend, f"needs a CUDA device, the network is on {device}; use inductor or auto")
    vars(module).pop("forward", None)  # set by an earlier call of this function
    if dtype is not None:
        nn.Module.to(module, dtype)  # the method of diffusers prints a warning at every cast
    inner = copy.copy(module)  # shares weights and submodules, keeps the original forward
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
            lambda: checked(_tensorrt(inner, device), inner),
            "Inductor",
            lambda: _compiled_forward(inner, "inductor", device, batch),
        )
    return with_fallback(
        "Inductor", lambda: _inductor(inner, backend == "cudagraphs", batch), "eager", lambda: _uncompiled(inner)
    )


def _inductor(inner: nn.Module, graphs: bool, batch: int | None) -> Call:
    dynamic = False if batch else None  # None: a second batch size makes the first dimension symbolic
    if not graphs and _mostly_repeated(inner):
        cast(Any, inner).compile_repeated_blocks(dynamic=dynamic)
        return inner.forward
    run = torch.compile(inner.forward, dynamic=dynamic, mode="reduce-overhead" if graphs else None)
    return _with_copied_results(run) if graphs else run


def _mostly_repeated(inner: nn.Module) -> bool:
    """Returns whether the repeated blocks of a diffusers model hold more than half of its weights.

    A DiT is then compiled block by block (99.6 % of DiT-XL/2), a UNet as a whole (28 % of Stable Diffusion 1.5).
    """
    if not hasattr(inner, "compile_repeated_blocks"):  # not diffusers, or a version before 0.35
        return False
    names = getattr(inner, "_repeated_blocks", None) or REPEATED.get(type(inner).__name__, [])
    blocks = [part for part in inner.modules() if type(part).__name__ in names]
    cast(Any, inner)._repeated_blocks = names
    return 2 * sum(p.numel() for b in blocks for p in b.parameters()) > sum(p.numel() for p in inner.parameters())


def _with_copied_results(run: Call) -> Call:
    """Copies the results of `run`, because the next replay of its CUDA graph overwrites them."""

    def call(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return tree_map_only(Tensor, Tensor.clone, run(*args, **kwargs))

    return call


def _uncompiled(inner: nn.Module) -> Call:
    """Runs `inner` eagerly, including its compiled submodules."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.compiler.set_stance("force_eager"):
            return inner.forward(*args, **kwargs)

    return call


def _tensorrt(inner: nn.Module, device: torch.device) -> Call:
    """Returns a TensorRT engine. It is built at the first call, cached on disk, and refitted when weights change."""
    if device.type != "cuda":
        raise RuntimeError(f"it needs a CUDA device, the network is on {device}")
    import torch_tensorrt  # pyright: ignore[reportMissingImports]

    folder = cache_folder("tensorrt")
    with torch.cuda.device(device):  # the engine is built for the current device; its argument `device` is ignored
        engine = torch_tensorrt.MutableTorchTensorRTModule(
            inner,
            device=device,
            strict=False,
            cache_built_engines=True,
            reuse_cached_engines=True,
            engine_cache_dir=str(folder / "engines"),
            timing_cache_path=str(folder / "timing.bin"),
        )
    fitted = weight_versions(inner)

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal fitted
        if weight_versions(inner) != fitted:
            engine.load_state_dict(inner.state_dict())  # requests a refit
        with torch.cuda.device(device):
            result = engine(*args, **kwargs)
        inner.to(device)  # a refit leaves the weights on the CPU
        fitted = weight_versions(inner)
        return result

    return call


def with_fallback(name: str, build: Callable[[], Call], other: str, build_other: Callable[[], Call]) -> Call:
    """Returns a function that calls the result of `build`. If that fails, it warns once and switches to `build_other`.

    If the other function fails on the same call, the caller made a mistake: its error is raised and nothing changes.
    Inductor keeps its files in tadperf's cache folder during the call (`_inductor_folder`).
    name, other: names of the two implementations in the warning.
    """
    first: Call | None = None
    second: Call | None = None
    failed = False

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal first, second, failed
        reason = None
        if not failed:
            try:
                with _inductor_folder():
                    first = first or build()
                    return first(*args, **kwargs)
            except Exception as error:
                reason = error
        second = second or build_other()
        result = second(*args, **kwargs)
        if reason is not None:
            failed, lines = True, str(reason).strip().splitlines()
            why = f"{type(reason).__name__}: {lines[0] if lines else 'no message'}"
            warnings.warn(f"{name} failed, {other} is used instead: {why}", RuntimeWarning, stacklevel=2)
        return result

    return call


def _with_casts(run: Call, device: torch.device, dtype: torch.dtype | None) -> Call:
    """Wraps `run`: numbers become tensors, and images are cast to `dtype` and back if there is one.

    A compiler treats a number as a constant. It would compile a denoiser again for every time step, and an exported
    denoiser would always use the first one.
    """

    def to_input(value: Any) -> Any:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return torch.tensor(value, device=device)
        return value.to(dtype) if dtype is not None and _is_image(value) else value

    def forward(*args: Any, **kwargs: Any) -> Any:
        leaves, form = tree_flatten((args, kwargs))
        input_dtype = next((value.dtype for value in leaves if _is_image(value)), dtype)
        positional, named = tree_unflatten([to_input(value) for value in leaves], form)
        result = run(*positional, **named)
        if input_dtype == dtype:
            return result
        return tree_map_only(Tensor, lambda t: t.to(input_dtype) if t.dtype == dtype else t, result)

    return forward


def _is_image(value: object) -> TypeGuard[Tensor]:
    """Returns whether a value is to be cast. Time steps are not, because bfloat16 cannot represent 999."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2


def in_fixed_batches(run: Call, batch: int) -> Call:
    """Calls `run` on exactly `batch` rows at a time, for inputs of any length.

    The first tensor with a dimension gives the number of rows. Every tensor with this many rows is split.
    """

    def rows(value: Any, count: int, start: int) -> Any:
        if not (isinstance(value, Tensor) and value.ndim and len(value) == count):
            return value
        part = value[start : start + batch]
        if len(part) == batch:
            return part
        padding = part[-1:] if len(part) else value.new_zeros(1, *value.shape[1:])
        return torch.cat([part, padding.expand(batch - len(part), *value.shape[1:])])

    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, form = tree_flatten((args, kwargs))
        count = next(len(value) for value in leaves if isinstance(value, Tensor) and value.ndim)
        parts: list[Sequence[Any]] = []
        result_form = None
        for start in range(0, max(count, 1), batch):
            positional, named = tree_unflatten([rows(value, count, start) for value in leaves], form)
            results, result_form = tree_flatten(run(*positional, **named))
            parts.append([r[: count - start] if isinstance(r, Tensor) and r.ndim else r for r in results])
        joined = [torch.cat(p) if isinstance(p[0], Tensor) and p[0].ndim else p[0] for p in zip(*parts, strict=True)]
        assert result_form is not None
        return tree_unflatten(joined, result_form)

    return call


def _chosen_at_first_call(inner: nn.Module, device: torch.device, batch: int | None, calls: int | None) -> Call:
    """Chooses the backend at the first call. Counts operations and measures no time, so one seed gives one result."""
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
    """Returns the backend and the reason: Inductor if it saves more time than it takes to compile (tadperf).

    kind: type of device. flops: operations per call. layers: number of layers with weights. calls: expected number of
    calls; None if unknown.
    """
    if calls is None:
        return ("inductor", "on CUDA") if kind == "cuda" else ("eager", "the number of calls is not known")
    rate, compile_seconds, saved_share = (table.get(kind, table["cpu"]) for table in (RATE, COMPILE, SAVED))
    seconds = max(flops / rate, LAUNCH * layers if kind == "cuda" else 0.0)
    saved, cost = calls * seconds * saved_share, layers * compile_seconds
    why = f"{calls} calls would save about {saved:.3g} s, compiling takes about {cost:.3g} s"
    return ("inductor" if saved > cost else "eager"), why


@contextlib.contextmanager
def _inductor_folder() -> Iterator[None]:
    """Makes Inductor use tadperf's cache folder inside the block, unless TORCHINDUCTOR_CACHE_DIR names another one.

    Inductor reads this folder only from the environment, when it compiles and when it loads compiled code. If the
    variable is not set, Inductor sets it to its default; so the default counts as not set.
    """
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if before is not None:
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # takes seconds if nothing is compiled

        if before != os.path.abspath(default_cache_dir()):
            yield
            return
    try:
        folder = cache_folder("inductor")
    except UserError:  # nothing can be kept; Inductor's default folder serves this process
        yield
        return
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
        else:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def _cache_file(key: str) -> Path:
    """Returns the file of `key` for these versions and this kind of machine; PyTorch rejects other machines' code."""
    gpu = torch.cuda.get_device_capability() if torch.cuda.is_available() else ""
    place = repr((key, versions(), gpu, torch.backends.cpu.get_cpu_capability()))
    name = re.sub(r"[^\w.-]+", "-", key)[:60]
    return cache_folder("compiled") / f"{name}-{hashlib.sha256(place.encode()).hexdigest()[:16]}.bin"


def load_compile_cache(key: str) -> bool:
    """Loads the compiled code that an earlier process saved under `key`. Returns whether there is any.

    Call it before anything is compiled. PyTorch's artifacts do not contain the C++ objects that Inductor builds on a
    CPU, which take most of the compile time. These stay in the folder that `with_fallback` sets for both processes.
    """
    try:
        file = _cache_file(key)
    except UserError:  # without a cache folder, every process compiles again
        return False
    with _inductor_folder():
        return file.exists() and torch.compiler.load_cache_artifacts(file.read_bytes()) is not None


def save_compile_cache(key: str) -> bool:
    """Saves what this process compiled, for `load_compile_cache`. Returns whether anything was saved.

    A cache folder that cannot be written costs a log message, not the run.
    """
    artifacts = torch.compiler.save_cache_artifacts()
    if artifacts is None:
        return False
    try:
        write_bytes(_cache_file(key), cast(bytes, artifacts[0]))
    except (UserError, OSError) as error:
        log.warning("compiled code is not kept for the next process: %s", error)
        return False
    return True
