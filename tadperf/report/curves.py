"""The results of a sweep as one picture: test accuracy over one field, a line for each combination of the others."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tadperf.files import write_bytes
from tadperf.report.text import clean_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOG_RATIO = 30.0  # the axis is logarithmic if the largest value is this many times the smallest; not tuned
MAX_LEGEND = 12  # largest number of lines in the legend
MAX_TICKS = 40  # largest number of labelled ticks
MAX_LABEL = 60  # largest number of letters in a label

Row = Mapping[str, Any]


def save_curves(path: Path | str, fields: Sequence[str], rows: Sequence[Row]) -> None:
    """Draws the rows of `pipeline.sweep.run_sweep`, with means and deviations, into a PNG file (tadperf).

    The horizontal axis is the field with the most numeric values, or the first field if none is numeric.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    field, numeric = choose_axis(fields, rows)
    values = list(dict.fromkeys(str(row[field]) for row in rows))
    several_networks = len({row["network"] for row in rows}) > 1
    names = [*(name for name in fields if name != field), *(["network"] if several_networks else [])]
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        x = row[field] if numeric else values.index(str(row[field]))
        label = _plain(", ".join(f"{name} = {row[name]}" for name in names))
        lines.setdefault(label, []).append((x, _percent(row["accuracy"]), _percent(row["std"] or 0)))
    for label, points in lines.items():
        x, mean, deviation = zip(*sorted(points), strict=True)
        axes.errorbar(x, mean, yerr=deviation, label=label, marker="o", markersize=4, capsize=2)
    if numeric:
        _numeric_ticks(axes, sorted({row[field] for row in rows}))
    else:
        shown = range(0, len(values), -(-len(values) // MAX_TICKS) or 1)
        rotation = 20 if len(values) > 4 else 0
        axes.set_xticks(list(shown), [_plain(values[place]) for place in shown], rotation=rotation)
    axes.set_xlabel(_plain(field))
    axes.set_ylabel("test accuracy, %")
    axes.set_title("mean and standard deviation over the repeats", fontsize="medium")
    if names and 0 < len(lines) <= MAX_LEGEND:
        axes.legend(fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture)
    write_bytes(path, picture.getvalue())


def choose_axis(fields: Sequence[str], rows: Sequence[Row]) -> tuple[str, bool]:
    """Returns the field for the horizontal axis, and whether its values are numbers."""

    def count_numbers(field: str) -> int:
        values = {row[field] if _is_number(row[field]) else None for row in rows}
        return 0 if None in values else len(values)

    best = max(fields, key=count_numbers)
    return best, count_numbers(best) > 0


def _numeric_ticks(axes: Axes, places: list[float]) -> None:
    """Labels the values of the sweep on the axis; uses a logarithmic axis for a wide range."""
    if places[0] > 0 and places[-1] / places[0] >= LOG_RATIO:
        axes.set_xscale("log")
    if len(places) <= MAX_TICKS:
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()


def _percent(share: float) -> float:
    """Returns a share in percent; infinite values become NaN, which matplotlib leaves out."""
    return 100 * share if math.isfinite(share) else math.nan


def _plain(text: str) -> str:
    """Returns the text in one line of limited length, without matplotlib's markup for formulas."""
    line = clean_text(text)
    line = line if len(line) <= MAX_LABEL else line[:MAX_LABEL] + "…"
    return line.replace("$", r"\$")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
