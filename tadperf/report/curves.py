"""A sweep as one picture: test accuracy over one field, a line for every choice of the others."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tadperf.files import write_bytes

LOGARITHMIC = 30.0  # ratio of the largest to the smallest value from which the axis is
LINES = 12  # named in the legend at most


def save_curves(path: Path | str, fields: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws rows of `tadperf.pipeline.sweep.run_sweep`, means and deviations, into a PNG file (tadperf).

    The axis is the field that takes most numbers, or the first one where none does.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    field, numeric = axis(fields, rows)
    values = list(dict.fromkeys(str(row[field]) for row in rows))
    several = len({row["network"] for row in rows}) > 1
    names = [*(name for name in fields if name != field), *(["network"] if several else [])]
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        x = row[field] if numeric else values.index(str(row[field]))
        label = ", ".join(f"{name} = {row[name]}" for name in names)
        lines.setdefault(label, []).append((x, 100 * row["accuracy"], 100 * (row["std"] or 0)))
    for label, points in lines.items():
        x, mean, deviation = zip(*sorted(points), strict=True)
        axes.errorbar(x, mean, yerr=deviation, label=label, marker="o", markersize=4, capsize=2)
    if numeric:
        places = sorted({row[field] for row in rows})
        if places[0] > 0 and places[-1] / places[0] >= LOGARITHMIC:
            axes.set_xscale("log")
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()
    else:
        axes.set_xticks(range(len(values)), values, rotation=20 if len(values) > 4 else 0)
    axes.set_xlabel(field)
    axes.set_ylabel("test accuracy, %")
    if names and len(lines) <= LINES:
        axes.legend(fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture)
    write_bytes(path, picture.getvalue())


def axis(fields: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> tuple[str, bool]:
    """The field to draw over, and whether its values are numbers."""

    def numbers(field: str) -> int:
        found = {row[field] if _is_number(row[field]) else None for row in rows}
        return 0 if None in found else len(found)

    best = max(fields, key=numbers)
    return best, numbers(best) > 0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
