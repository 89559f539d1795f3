"""The words and figures of the page, from the results of a run or an audit."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tadperf.report.text import one_line
from tadperf.report.words import BASELINES, COLUMNS, KINDS, RUNGS, SHARES, USE, VERDICTS, duration, gain

MAX_NAME, MAX_PATH = 60, 160  # letters of a class name and of a path; a long path keeps its end
MAX_CLASSES = 100  # rows of the table of trust by class
MAX_ROUNDS = 12  # columns of the table of trust by round; the last rounds are shown
AUDIT_USE = """import tadperf
train, test = tadperf.open_data({data!r}, labels={labels!r})  # corrected labels, without untrusted samples"""
TABLE_USE = """import csv
with open({labels!r}, newline="", encoding="utf-8") as file:
    rows = [row for row in csv.DictReader(file) if row["label"]]  # without untrusted samples"""
SECTIONS = (
    "accuracy",
    "ladder",
    "trust",
    "suspects",
    "duplicates",
    "distilled",
    "refinement",
    "stages",
    "columns",
    "against_clean_labels",
)


def run_values(result: Mapping[str, Any], class_names: Sequence[str]) -> dict[str, Any]:
    """Returns the values of the template that come from the content of result.json."""
    data, trust, paths = result["data"], result["trust"], result["paths"]
    source = data["source"].get("path", data["name"])
    return dict.fromkeys(SECTIONS) | {
        "kind": "Distillation report",
        "title": data["name"],
        "lead": f"{data['train']} images{_noise(data['noise'])}, distilled to {result['ipc']} per class.",
        "oracle": trust["used_clean_labels"],
        "cards": _run_cards(result),
        "accuracy": _accuracy(result),
        "ladder": _ladder(result),
        "trust": _trust(trust["rounds"], class_names) if trust["rounds"] else None,
        "refinement": _refinement(result["refine"]["rounds"]) if "refine" in result else None,
        "stages": _stages(result),
        "use": USE.format(path=paths["distilled"], data=source),
        "commands": [
            shlex.join(["tadperf", "evaluate", paths["distilled"]]),
            shlex.join(["tadperf", "show", paths["run"]]),
        ],
        "columns": COLUMNS if trust["rounds"] else None,
        "list_name": "labels.csv",
        "facts": {
            "data": source,
            "training images": data["train"],
            "test images": data["test"],
            "image size": " x ".join(str(side) for side in data["shape"]),
            "added noise": data["noise"] or "none",
            "synthesis": result["synthesis"],
            "method": result["method"],
            "trust": trust["mode"],
            "seed": result["seed"],
            "device": result["device"],
            "learning rate of students": f"{result['lr']:.4g}",
        },
        "files": {name: path for name, path in paths.items() if name != "report"},
    }


def audit_values(result: Mapping[str, Any], class_names: Sequence[str], has_images: bool) -> dict[str, Any]:
    """Returns the values of the template that come from the result of an audit. has_images: whether it had images."""
    issues, samples, paths = result["issues"], result["samples"], result["paths"]
    clean = result.get("against_clean_labels")
    counts = {verdict: sum(by_class) for verdict, by_class in result["by_class"].items()}
    cards = [
        ("suspected errors", f"{issues}", f"{percent(issues / samples)} of {samples} labels"),
        ("relabelled", f"{counts['relabelled']}", "another label is clear"),
        ("untrusted", f"{counts['untrusted']}", "no label is clear"),
    ]
    if clean:
        note = f"of the suspects have a wrong label; {percent(clean['issue_recall'])} of the wrong labels are suspects"
        cards.append(("precision", percent(clean["issue_precision"]), note))
    source, labels = result.get("source") or result["data"], str(paths.get("labels", "labels.csv"))
    csv = labels if labels.lower().endswith(".csv") else "labels.csv"
    return dict.fromkeys(SECTIONS) | {
        "kind": "Label audit",
        "title": result["data"],
        "lead": f"{issues} suspected label errors among {samples} labels{_noise(result['noise'])}.",
        "oracle": False,
        "cards": cards,
        "trust": _trust([{"round": 1, "sizes": result["by_class"]}], class_names),
        "against_clean_labels": {name.replace("_", " "): percent(value) for name, value in clean.items()}
        if clean
        else None,
        "use": (AUDIT_USE if has_images else TABLE_USE).format(data=source, labels=csv),
        "commands": [
            shlex.join(["tadperf", *words, "--labels", csv])
            for words in (["apply", source, "cleaned"], ["distill", source])
        ]
        if has_images
        else [],
        "columns": COLUMNS,
        "list_name": Path(csv).name,
        "facts": {
            "data": source,
            "labels": samples,
            "classes": len(class_names),
            "added noise": result["noise"] or "none",
        },
        "files": {name: path for name, path in paths.items() if name != "report"},
    }


def _noise(noise: str | None) -> str:
    return "" if noise in (None, "none") else f", with added noise {noise}"


def _run_cards(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns name, figure and note of the most important numbers."""
    data, trust, cards = result["data"], result["trust"], []
    if first := next(iter(result["accuracy"].values()), None):
        cards.append(("test accuracy", _score(first), "of networks trained on the distilled set"))
    if full := result["baselines"].get("full_data"):
        cards.append(("all images", _score(full), "accuracy of networks trained on all images, given labels"))
    count, parts = result["ipc"] * data["classes"], result.get("factor", 1) ** 2
    small = f", each in the form of {parts} small ones" if parts > 1 else ""
    cards.append(("distilled images", f"{count}", f"{result['ipc']} for each of {data['classes']} classes{small}"))
    if trust["rounds"]:
        cards.append(("labels kept", percent(trust["coverage"]), f"of {data['train']} training labels"))
    cards.append(("time", duration(result["seconds"]), f"on {result['device']}"))
    return cards


def _accuracy(result: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Returns a row for each network on the distilled set and for each baseline; None if nothing was measured."""
    kind = KINDS[result["trust"]["mode"]]
    rows = [(f"distilled set, {network}", scores, True) for network, scores in result["accuracy"].items()]
    rows += [
        (label.format(kind=kind, ipc=result["ipc"]), result["baselines"][name], False)
        for name, label in BASELINES.items()
        if name in result["baselines"]
    ]
    return [_accuracy_row(*row) for row in rows] or None


def _ladder(result: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Returns a row for each rung of the ladder, with its gain over the rung below; None if there is one rung at most.

    Results of older versions have no ladder.
    """
    kind, rungs = KINDS[result["trust"]["mode"]], result.get("ladder", ())
    rows = [
        _accuracy_row(RUNGS[rung["rung"]].format(kind=kind), rung, rung["rung"] == "distilled") | {"gain": gain(rung)}
        for rung in rungs
    ]
    return rows if len(rows) > 1 else None


def _accuracy_row(label: str, scores: Mapping[str, Any], ours: bool) -> dict[str, Any]:
    """Returns the figures of a row, and its bar and whisker in percent of the width."""
    mean, std = (100 * float(scores[name] or 0) for name in ("mean", "std"))
    mean, std = (value if math.isfinite(value) else 0.0 for value in (mean, std))
    low, high = max(0.0, mean - std), min(100.0, mean + std)
    several = len(scores["runs"]) > 1
    whisker = (round(low, 2), round(high - low, 2)) if several else None
    bar = round(min(mean, 100.0), 2)
    return {
        "label": label,
        "score": _score(scores),
        "runs": len(scores["runs"]),
        "bar": bar,
        "whisker": whisker,
        "ours": ours,
    }


def _trust(rounds: Sequence[Mapping[str, Any]], class_names: Sequence[str]) -> dict[str, Any]:
    """Returns the verdicts of the last round by given class, and those of each round."""
    rounds, last = rounds[-MAX_ROUNDS:], rounds[-1]["sizes"]
    by_class = [_counts(class_names[c], {v: last[v][c] for v in last}) for c in range(len(class_names))]
    shown = by_class[:MAX_CLASSES]
    if len(by_class) > MAX_CLASSES:
        total = {v: sum(last[v][MAX_CLASSES:]) for v in last}
        shown.append(_counts(f"{len(by_class) - MAX_CLASSES} more classes", total))
    shares = {label: [percent(r[name]) for r in rounds] for name, label in SHARES.items() if name in rounds[0]}
    return {
        "verdicts": VERDICTS,
        "by_class": shown,
        "rounds": [_counts(f"round {r['round']}", {v: sum(n) for v, n in r["sizes"].items()}) for r in rounds],
        "shares": {label.removesuffix(", %"): values for label, values in shares.items()},
    }


def _counts(name: str, counts: Mapping[str, int]) -> dict[str, Any]:
    """Returns a row of verdicts: counts, widths of the bar's parts in percent, and the share that is kept."""
    total = sum(counts.values())
    parts = [(verdict, round(100 * count / total, 2)) for verdict, count in counts.items() if count]
    kept = percent((total - counts["untrusted"]) / total) if total else "-"
    return {"name": name, "counts": counts, "parts": parts, "kept": kept, "total": total}


def _refinement(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the rounds of refinement as columns, and a row for each figure."""
    return {
        "columns": ["first images", *(f"round {number}" for number in range(1, len(rounds)))],
        "rows": {
            "rejected images": [str(r["anomalous"]) for r in rounds],
            "of the correct class": [percent(r["agreement"]) for r in rounds],
            "diversity": ["-" if r["diversity"] is None else f"{r['diversity']:.3g}" for r in rounds],
        },
    }


def _stages(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns time, share of the longest time and peak memory of each stage."""
    stages = result["stages"]
    longest = max((stage["seconds"] for stage in stages.values()), default=0) or 1
    return [
        {
            "name": name,
            "time": duration(stage["seconds"]),
            "bar": round(100 * stage["seconds"] / longest, 2),
            "memory": f"{stage['peak_memory_mb']:.0f} MB",
            "cuda": f"{stage['peak_cuda_mb']:.0f} MB" if "peak_cuda_mb" in stage else "",
        }
        for name, stage in stages.items()
    ]


def percent(share: float | None) -> str:
    """Returns a share in percent, or a dash for None and NaN."""
    return "-" if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"


def _score(scores: Mapping[str, Any]) -> str:
    """Returns the mean in percent, with the deviation if there are several runs."""
    mean, std = scores["mean"], scores["std"]
    if len(scores["runs"]) < 2 or mean is None or std is None:
        return percent(mean)
    return f"{100 * mean:.1f} ± {100 * std:.1f} %"


def shown_name(name: object, limit: int = MAX_NAME) -> str:
    """Returns a name in one line of limited length, without characters that reorder the text around them."""
    line = one_line(name)
    return line if len(line) <= limit else line[:limit] + "…"


def shown_path(path: object) -> str:
    """Returns a path in one line; a long one keeps its end, which names the file."""
    line = one_line(path)
    return line if len(line) <= MAX_PATH else "…" + line[-MAX_PATH:]
