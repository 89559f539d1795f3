"""The operators that have a bench file, and the values that the options of a benchmark may have."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch

from tadperf.bench.operators.engine import FAMILIES, Bench, Size
from tadperf.errors import UserError

NAMES = (
    "per_sample",
    "per_sample_linear",
    "mixture",
    "trajectory_distance",
    "reliability",
    "diverse_pick",
    "norm_relu_pool",
    "norm_relu_pool_dual",
    "differentiable_augment",
)
OWN_COMMANDS = {  # measured by their own programs
    "conv3x3": "python -m tadperf.bench.operators.conv3x3 (CPU only)",
    "compile": "python -m tadperf.bench.stages.compile",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(name: str) -> Bench:
    """Returns the bench of one operator."""
    return importlib.import_module(f"tadperf.bench.operators.{name}").BENCH


def load_benches(names: Sequence[str]) -> list[Bench]:
    """Returns the benches of these operators, or of all without a name. Raises UserError for an unknown name."""
    for name in names:
        if name not in NAMES:
            raise UserError("OPERATOR", name, f"must be one of {', '.join(NAMES)}")
    return [load(name) for name in names or NAMES]


def parse_size(bench: Bench, text: str) -> Size:
    """Reads a size such as "50000x10". Raises UserError if the operator does not take it."""
    parts = text.split("x")
    if len(parts) != len(bench.axes) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        example = "x".join(map(str, bench.sizes["cpu"][0]))
        raise UserError("--sizes", text, f"{bench.name} takes {'x'.join(bench.axes)}, such as {example}")
    return tuple(map(int, parts))


def sizes(bench: Bench, text: str | None, device: str) -> list[Size]:
    """Reads a list of sizes such as "50000x10,1000x100"; by default the sizes of the bench for this type of device."""
    return [parse_size(bench, part.strip()) for part in text.split(",")] if text else list(bench.sizes[device])


def dtypes(text: str) -> list[torch.dtype]:
    """Reads a list of types such as "float32,bfloat16". Raises UserError for an unknown type."""
    for name in text.split(","):
        if name not in DTYPES:
            raise UserError("--dtypes", name, f"must be one of {', '.join(DTYPES)}")
    return [DTYPES[name] for name in text.split(",")]


def providers(bench: Bench, text: str | None, known: Sequence[str] = ()) -> list[str]:
    """Returns tadperf and the providers that `text`, a list of families and names, selects.

    None selects all. "none" selects tadperf alone.
    Raises UserError for a word that is neither a family, nor a provider of this bench, nor one of `known`.
    """
    wanted = FAMILIES if text is None else () if text == "none" else text.split(",")
    for word in wanted:
        if word not in (*FAMILIES, *bench.providers, *known):
            names = [name for name in bench.providers if name not in (*FAMILIES, "tadperf")]
            raise UserError("--base", word, f"must be one of {', '.join((*FAMILIES, *names))}, or none")
    return [
        name
        for name, provider in bench.providers.items()
        if provider.family == "tadperf" or name in wanted or provider.family in wanted
    ]
