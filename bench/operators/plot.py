"""Rows of one operator as a picture: milliseconds over size, a line per provider, both axes logarithmic."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path

from tadperf.bench.operators.engine import Row
from tadperf.bench.operators.report import title

MARKERS = "osD^vP*X"


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Draws the rows of one operator, medians with their 20 and 80 % quantiles, into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["median_ms"]]
    places = abscissae({row["shape"] for row in rows})
    figure = Figure(figsize=(7, 4.5), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lines = sorted({(row["dtype"], row["provider"]) for row in rows}, key=lambda key: (key[1] != "tadperf", key))
    for place, (dtype, provider) in enumerate(lines):
        own = sorted(
            (places[row["shape"]], row["median_ms"], row["q20_ms"], row["q80_ms"])
            for row in rows
            if (row["dtype"], row["provider"]) == (dtype, provider)
        )
        x, median, low, high = zip(*own, strict=True)
        spread = [[m - q for m, q in zip(median, low, strict=True)], [q - m for m, q in zip(median, high, strict=True)]]
        label = provider if len({row["dtype"] for row in rows}) == 1 else f"{provider}, {dtype}"
        width = 2.5 if provider == "tadperf" else 1.2
        axes.errorbar(
            x, median, yerr=spread, label=label, marker=MARKERS[place % len(MARKERS)], linewidth=width, capsize=2
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(list(places.values()), list(places), rotation=20)
    axes.minorticks_off()
    axes.set_ylabel("ms a call")
    if rows:
        axes.legend(fontsize="small")
        axes.set_title(title(rows[0]), fontsize="medium")
    figure.savefig(path)


def abscissae(shapes: Collection[str]) -> dict[str, float]:
    """Where each shape stands: at its number of elements, but apart from one of about as many."""
    places: dict[str, float] = {}
    last = 0.0
    for size, shape in sorted((math.prod(map(int, shape.split("x"))), shape) for shape in shapes):
        places[shape] = last = max(float(size), 1.6 * last)
    return places
