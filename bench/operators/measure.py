"""Measures one case of an operator with all its providers, on a CPU or on CUDA."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tadperf.bench.operators import cuda, peak
from tadperf.bench.operators.engine import (
    Bench,
    Row,
    Size,
    figures,
    interleaved,
    large_copy,
    mismatch,
    ratios,
    skip_reason,
)


def working_providers(
    bench: Bench, names: Sequence[str], size: Size, inputs: tuple[Any, ...]
) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """Returns the providers that run here and agree with the reference, and the errors of the others."""
    functions: dict[str, Callable[..., Any]] = {}
    errors: dict[str, str] = {}
    device = inputs[0].device
    truth = bench.reference(*inputs)
    for name in names:
        provider = bench.providers[name]
        if skip_reason(provider, size, device.type):
            continue
        try:
            function = provider.build()
            if wrong := mismatch(truth, function(*inputs), bench, provider):
                errors[name] = wrong
            else:
                functions[name] = function
        except Exception as error:  # a provider that fails becomes a row with an error; the others are measured
            errors[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return functions, errors


def measure_case(
    bench: Bench, size: Size, dtype: torch.dtype, device: torch.device, names: Sequence[str], repeats: int
) -> list[Row]:
    """Returns the rows of one case, tadperf's first. A provider that failed or disagreed has `error` and no figures."""
    torch.compiler.reset()  # otherwise the second size would be compiled for any size
    with torch.inference_mode():
        inputs = bench.inputs(size, dtype, device, 0)
        functions, errors = working_providers(bench, names, size, inputs)
        if device.type == "cuda":
            found = cuda.measure(bench, size, dtype, device, functions, repeats)
        else:
            found = _on_cpu(bench, size, dtype, inputs, functions, repeats)
    case = {"operator": bench.name, "shape": "x".join(map(str, size)), "dtype": str(dtype).removeprefix("torch.")}
    empty = dict.fromkeys(("median_ms", "q20_ms", "q80_ms", "gb_s", "share_of_copy", "wall_ms", "launches", "peak_mb"))
    rows = []
    for name in names:
        if name in functions or name in errors:
            values = {**empty, "error": errors.get(name), **found.get(name, {})}
            rows.append({**case, "provider": name, "family": bench.providers[name].family, **values})
    ratios(rows)
    return rows


def _on_cpu(
    bench: Bench,
    size: Size,
    dtype: torch.dtype,
    inputs: tuple[Any, ...],
    functions: Mapping[str, Callable[..., Any]],
    repeats: int,
) -> dict[str, Row]:
    copy, copy_bytes = large_copy(torch.device("cpu"))
    turns: dict[str, Callable[[], object]] = {name: lambda f=f: f(*inputs) for name, f in functions.items()}
    times = interleaved(turns, repeats)
    # not in turns with the others: the copy would empty the caches for the next one
    bandwidth = copy_bytes / float(np.median(interleaved({"copy": copy}, repeats)["copy"])) / 1e6
    quick = [name for name, values in times.items() if np.median(values) < 2e3]
    peaks = peak.measure_peaks(bench.name, size, dtype, quick)
    return {
        name: {**figures(values, bench.moved(size, dtype), bandwidth), "peak_mb": peaks.get(name)}
        for name, values in times.items()
    }
