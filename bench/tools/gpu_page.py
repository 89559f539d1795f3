"""Writes what `gpu_plan.sh` has measured as a Markdown page: `python -m tadperf.bench.tools.gpu_page FOLDER`.

A stage that has not run is named on the page. A goal that a figure misses is marked as missed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tadperf.bench.operators.goals import BARS

Facts = dict[str, Any]
MODES = ("off", "on", "oracle")  # of trust, in the whole jobs
CONVOLUTION_TIMES = ("forward", "gradient of the input", "gradient of the kernel")
# Goals: the matching iteration against the published unroll, the share of its memory, and images per second of experts.
OVER_PUBLISHED, MEMORY_SHARE, EXPERT_RATE = 3.0, 0.2, 0.35e6


def read(folder: Path, name: str) -> Facts:
    """Returns a JSON file; {} if the stage has not written it."""
    file = folder / name
    return json.loads(file.read_text()) if file.exists() else {}


def read_lines(folder: Path, name: str) -> list[Facts]:
    """Returns the rows of a file with one JSON object in each line; a line that was cut off is left out."""
    file = folder / name
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Returns a Markdown table, or one line that says that there is nothing."""
    cells = [[_cell(value) for value in row] for row in rows]
    if not cells:
        return ["Not measured."]
    lines = [list(head), ["---"] * len(head), *cells]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _cell(value: object) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def goal(value: float | None, bound: float, at_least: bool = True) -> str:
    """Returns "met", "missed" or "not measured" with the goal."""
    words = f"{'at least' if at_least else 'at most'} {bound:g}"
    if value is None:
        return f"not measured (goal: {words})"
    reached = value >= bound if at_least else value <= bound
    return f"{'met' if reached else 'missed'} (goal: {words})"


def goals(folder: Path) -> list[str]:
    """Returns the table of all goals."""
    iteration, training = read(folder, "matching.json"), read(folder, "experts.json")
    published = iteration.get("published", {})
    ours = iteration.get("formulas, CUDA graph", {})
    rows: list[tuple[object, ...]] = []
    ratio = _ratio(published.get("median_ms"), ours.get("median_ms"))
    rows.append(("matching iteration over the published unroll", ratio, goal(ratio, OVER_PUBLISHED)))
    share = _ratio(ours.get("peak_mb"), published.get("peak_mb"))
    rows.append(("its share of the published memory", share, goal(share, MEMORY_SHARE, at_least=False)))
    rate = training.get("tadperf", {}).get("images_s")
    rows.append(("training of experts, images/s", rate, goal(rate, EXPERT_RATE)))
    speed = {
        (row["operator"], row["shape"]): row
        for row in read_lines(folder, "speed.jsonl")
        if row.get("provider") == "tadperf"
    }
    for (name, shape), (figure, bound) in BARS.items():
        value = speed.get((name, shape), {}).get(figure)
        rows.append((f"{name} {shape}: {figure}", value, goal(value, bound, figure == "share_of_copy")))
    return table(("goal", "value", ""), rows)


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator and denominator else None


def first(folder: Path) -> list[str]:
    """Returns what works: the tiny jobs, and the operators' checks that failed."""
    rows = read_lines(folder, "checks.jsonl") + read_lines(folder, "huge.jsonl")
    file = folder / "first.txt"
    text = file.read_text().splitlines() if file.exists() else []
    jobs = [line[:200] for line in text if line.startswith(("PASS", "FAIL"))]
    counts = {status: sum(row["status"] == status for row in rows) for status in ("PASS", "FAIL", "SKIP")}
    failed = [(row["operator"], row["check"], row["detail"][:200]) for row in rows if row["status"] == "FAIL"]
    sanitizer = folder / "sanitize.txt"
    last = sanitizer.read_text().splitlines()[-1:] if sanitizer.exists() else ["not run"]
    return [
        *(f"- `{line}`" for line in jobs or ["no tiny job has run"]),
        f"- checks of operators: {counts['PASS']} passed, {counts['FAIL']} failed, {counts['SKIP']} skipped",
        f"- memcheck: `{last[0] if last else 'silent'}`",
        *(["", *table(("operator", "check", "detail"), failed)] if failed else []),
    ]


def matching(folder: Path) -> list[str]:
    """Returns the table of the matching iteration."""
    facts = read(folder, "matching.json")
    published = facts.get("published", {}).get("median_ms")
    columns = ("median_ms", "peak_mb", "first_two_calls_s", "gradient_error_t3")
    rows = [
        (name, *(row.get(key) for key in columns), _ratio(published, row.get("median_ms")), row.get("error"))
        for name, row in facts.items()
        if isinstance(row, dict) and not name.startswith("kernels")
    ]
    head = ("form", "ms", "peak MB", "first two calls, s", "gradient error, T = 3", "over published", "error")
    return [f"`{facts.get('case', 'not measured')}`", "", *table(head, rows), *longest(facts)]


def experts(folder: Path) -> list[str]:
    """Returns the tables of the training of experts."""
    facts = read(folder, "experts.json")
    rows = [
        (name, row.get("images_s"), row.get("graph_ms"), row.get("eager_ms"), row.get("error"))
        for name, row in facts.items()
        if isinstance(row, dict) and not name.startswith("kernels")
    ]
    head = ("what", "images/s", "CUDA graph, ms", "eager, ms", "error")
    return [f"`{facts.get('case', 'not measured')}`", "", *table(head, rows), *longest(facts)]


def longest(facts: Facts) -> list[str]:
    """Returns a table of the ten longest kernels for each profile in the facts."""
    lines = []
    for name, row in facts.items():
        if name.startswith("kernels") and "longest" in row:
            title = f"{name}: {row['kernels']} kernels, {row['busy_ms']} ms"
            rows = [(entry["name"], entry["calls"], entry["ms"]) for entry in row["longest"][:10]]
            lines += ["", title, "", *table(("kernel", "calls", "ms"), rows)]
    return lines


def jobs(folder: Path) -> list[str]:
    """Returns the table of the whole jobs."""
    rows = []
    for mode in MODES:
        facts = read(folder, "jobs.json").get(mode)
        if facts is None:
            continue
        accuracy = next(iter(facts.get("result.json", {}).get("accuracy", {}).values()), {})
        figures = f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['std']:.1f} %" if accuracy else "not finished"
        seconds = {name: stage["seconds"] for name, stage in facts.get("stages.json", {}).items()}
        rows.append((mode, figures, ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())))
    note = "The three runs share the GPU, so their seconds are no timings."
    return [*table(("trust", "accuracy", "seconds of stages"), rows), "", note]


def speed(folder: Path) -> list[str]:
    """Returns the table of the operators' speed."""
    columns = ("operator", "shape", "provider", "median_ms", "q20_ms", "q80_ms", "gb_s", "share_of_copy", "over_eager")
    rows = [[row.get(key) for key in (*columns, "error")] for row in read_lines(folder, "speed.jsonl")]
    return table((*columns, "error"), rows)


def machine(folder: Path) -> list[str]:
    """Returns the machine's facts as a list, and its convolutions as a table."""
    facts = read(folder, "facts.json")
    lines = [
        f"- {name}: {value}"
        for name, value in facts.items()
        if not name.startswith("convolution") and name not in ("versions", "command", "isa")
    ]
    lines += [f"- {name}: {value}" for name, value in facts.get("versions", {}).items()]
    rows = [
        (name.removeprefix("convolution "), *(row.get(key) for key in CONVOLUTION_TIMES), row.get("error"))
        for name, row in facts.items()
        if name.startswith("convolution")
    ]
    times = [f"{name}, ms" for name in CONVOLUTION_TIMES]
    head = ("3 x 3 convolution to 128 channels, 256 images", *times, "error")
    return [*lines, "", *table(head, rows)]


def page(folder: Path) -> list[str]:
    """Returns the lines of the page."""
    facts = read(folder, "facts.json")
    sections = {
        "Goals": goals,
        "What works": first,
        "Matching iteration": matching,
        "Experts": experts,
        "Whole jobs": jobs,
        "Operators": speed,
        "Machine": machine,
    }
    lines = [f"# tadperf on {facts.get('device', 'an unknown device')}, {facts.get('date', 'no date')}", ""]
    lines += ["Made by `bash bench/tools/gpu_plan.sh`.", ""]
    for title, section in sections.items():
        lines += [f"## {title}", "", *section(folder), ""]
    return lines


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("gpu_page: give the folder of gpu_plan.sh's results", file=sys.stderr)
        return 2
    print("\n".join(page(Path(arguments[0]))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
