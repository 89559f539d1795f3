"""Results as tables for a person, on stdout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .progress import duration

USE = """import tadperf
ds = tadperf.load({path!r})
net = ds.train()  # or your own loop on ds.images, ds.labels
print(ds.accuracy(net, {data!r}))"""
BASELINES = {"initial": "images it started from", "random_real": "random real images", "full_data": "full data"}


def print_result(result: Mapping[str, Any]) -> None:
    """The table of `tadperf distill`: accuracies, time and memory per stage, files, how to use them."""
    data = result["data"]
    noise = "" if data["noise"] in (None, "none") else f", noise {data['noise']}"
    print(
        f"{data['name']}: {data['train']} images{noise}, distilled to {result['ipc']} per class by {result['method']}"
    )
    accuracy = table("test accuracy", "%", "runs")
    for network, scores in result["accuracy"].items():
        accuracy.add_row(f"distilled set, {network}", *score(scores))
    for name, label in BASELINES.items():
        if scores := result["baselines"].get(name):
            accuracy.add_row(label, *score(scores))
    stages = table("stage", "time", "peak memory")
    for name, stage in result["stages"].items():
        cuda = f" + {stage['peak_cuda_mb']:.0f} MB CUDA" if "peak_cuda_mb" in stage else ""
        stages.add_row(name, duration(stage["seconds"]), f"{stage['peak_memory_mb']:.0f} MB{cuda}")
    stages.add_row("total", duration(result["seconds"]), f"on {result['device']}")
    show(accuracy, stages)
    for name, path in result["paths"].items():
        print(f"{name:<10} {path}")
    print("\n" + USE.format(path=str(result["paths"]["distilled"]), data=data["source"].get("path", data["name"])))


def print_accuracy(result: Mapping[str, Any]) -> None:
    """The table of `tadperf evaluate`."""
    accuracy = table("test accuracy", "%", "runs")
    for network, scores in result["accuracy"].items():
        accuracy.add_row(network, *score(scores))
    show(accuracy)


def print_figures(result: Mapping[str, Any]) -> None:
    """Plain figures, one a row."""
    figures = table("experts", "")
    for name, value in result.items():
        figures.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    show(figures)


def print_info(facts: Mapping[str, Any]) -> None:
    """The tables of `tadperf info`."""
    system = table("system", "")
    for name, value in facts["versions"].items():
        system.add_row(name, value or "none")
    system.add_row("platform", facts["platform"])
    system.add_row("threads", f"{facts['threads']} of {facts['cores']} cores")
    for name, value in facts["devices"].items():
        system.add_row(name, value)
    native = facts["native"]
    system.add_row("native part", str(native["isa"]) if native["available"] else f"absent: {native['reason']}")
    operators = table("operator", "cpu", "cuda")
    for name, places in facts["operators"].items():
        operators.add_row(name, places["cpu"], places["cuda"])
    show(system, operators)


def table(*columns: str) -> Table:
    """A table whose first column is text and whose others are flush right."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    for position, column in enumerate(columns):
        made.add_column(column, justify="left" if position == 0 else "right", overflow="fold")
    return made


def score(scores: Mapping[str, Any]) -> tuple[str, str]:
    """Accuracies in [0, 1] as percent, with their deviation where there are several runs, and the number of runs."""
    deviation = f" ± {100 * scores['std']:.1f}" if len(scores["runs"]) > 1 else ""
    return f"{100 * scores['mean']:.1f}{deviation}", str(len(scores["runs"]))


def show(*tables: Table) -> None:
    console = Console(highlight=False)
    for one in tables:
        console.print(one)
