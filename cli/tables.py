"""Results as tables for a person, on stdout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tadperf.cli.progress import duration

USE = """import tadperf
ds = tadperf.load({path!r})
net = ds.train()  # or your own loop on ds.images, ds.labels
print(ds.accuracy(net, {data!r}))"""
PAIRS = 15  # confusions listed by name
BASELINES = {
    "initial": "images it started from",
    "random_real": "random {} images, {} per class",
    "full_trusted": "all {} images, labels as trust left them",
    "full_data": "all images, labels as given",
}


def print_result(result: Mapping[str, Any]) -> None:
    """The table of `tadperf distill`: accuracies, what trust did, time and memory per stage, files, how to use them."""
    data = result["data"]
    noise = "" if data["noise"] in (None, "none") else f", noise {data['noise']}"
    print(
        f"{data['name']}: {data['train']} images{noise}, distilled to {result['ipc']} per class by {made_by(result)}"
        f"{trust_words(result['trust'])}"
    )
    accuracy = table("test accuracy", "%", "runs")
    for network, scores in result["accuracy"].items():
        accuracy.add_row(f"distilled set, {network}", *score(scores))
    kind = {"on": "trusted", "off": "real", "oracle": "truly labelled"}[result["trust"]["mode"]]
    for name, label in BASELINES.items():
        if scores := result["baselines"].get(name):
            accuracy.add_row(label.format(kind, result["ipc"]), *score(scores))
    show(
        accuracy,
        *([rounds_table(result["trust"]["rounds"])] if result["trust"]["rounds"] else []),
        *([refined_table(result["refine"])] if "refine" in result else []),
        stages_table(result),
    )
    print_files(result)


def print_refined(result: Mapping[str, Any]) -> None:
    """The tables of `tadperf refine`: its rounds; accuracies where students were trained; time, files, how to use."""
    if result["accuracy"]:
        print_result(result)
        return
    data, made = result["data"], result["refine"]
    begun = f"the images of {made['start']}" if made["start"] else f"{data['name']}: {data['train']} images"
    print(f"{begun}, {result['ipc']} per class refined{trust_words(result['trust'])}")
    print(f"detector: {100 * made['detector']['held_out']:.1f} % of the held-out samples right")
    show(refined_table(made), stages_table(result))
    print_files(result)


def refined_table(made: Mapping[str, Any]) -> Table:
    """The rounds of refinement, a column each, by the detector's verdict."""
    rounds = made["rounds"]
    shown = table("refinement", "first", *(f"round {number}" for number in range(1, len(rounds))))
    shown.add_row("anomalous images", *(str(r["anomalous"]) for r in rounds))
    shown.add_row("of the right class, %", *(f"{100 * r['agreement']:.1f}" for r in rounds))
    shown.add_row("diversity", *("-" if r["diversity"] is None else f"{r['diversity']:.3g}" for r in rounds))
    return shown


def print_files(result: Mapping[str, Any]) -> None:
    """Where everything lies, and how the distilled file is used."""
    for name, path in result["paths"].items():
        print(f"{name:<10} {path}")
    data = result["data"]
    print("\n" + USE.format(path=str(result["paths"]["distilled"]), data=data["source"].get("path", data["name"])))


def made_by(result: Mapping[str, Any]) -> str:
    """ "mtt", "diffusion", "mtt from diffusion's images"."""
    ways = {"matching": "{}", "generative": "diffusion", "hybrid": "{} from diffusion's images"}
    return ways[result["synthesis"]].format(result["method"])


def trust_words(trust: Mapping[str, Any]) -> str:
    """How the labels were taken, for the first line of a result."""
    if trust["mode"] == "off":
        return ", labels as given (trust off)"
    if trust["mode"] == "oracle":
        return ", with the CLEAN LABELS (oracle): a yardstick, not a result"
    return f", {100 * trust['coverage']:.0f} % of the images trusted"


SHARES = {  # rows of the table of trust's rounds, by what `tadperf.trust.metrics` calls them
    "view_accuracy": "labels right in the view, %",
    "precision": "trusted: right, %",
    "recall": "trusted, of all right labels, %",
    "recalled_accuracy": "recalled: right, %",
    "relabel_accuracy": "relabelled: right now, %",
}


def rounds_table(rounds: Sequence[Mapping[str, Any]]) -> Table:
    """The dual loop, a column a round; what compares with clean labels only where these are known."""
    made = table("trust", *(f"round {record['round']}" for record in rounds))
    for verdict in rounds[0]["sizes"]:
        made.add_row(verdict, *(str(sum(record["sizes"][verdict])) for record in rounds))
    for name, label in SHARES.items():
        if name in rounds[0]:
            made.add_row(label, *("-" if r[name] is None else f"{100 * r[name]:.1f}" for r in rounds))
    return made


def stages_table(result: Mapping[str, Any]) -> Table:
    """Time and peak memory of each stage."""
    stages = table("stage", "time", "peak memory")
    for name, stage in result["stages"].items():
        cuda = f" + {stage['peak_cuda_mb']:.0f} MB CUDA" if "peak_cuda_mb" in stage else ""
        stages.add_row(name, duration(stage["seconds"]), f"{stage['peak_memory_mb']:.0f} MB{cuda}")
    stages.add_row("total", duration(result["seconds"]), f"on {result['device']}")
    return stages


def print_comparison(results: Mapping[str, Mapping[str, Any]]) -> None:
    """The same rows side by side for every trust mode."""
    columns = {"on": "trust on", "off": "trust off", "oracle": "oracle (clean labels)"}
    sides = table("test accuracy, %", *(columns[mode] for mode in results))
    networks = next(iter(results.values()))["accuracy"]
    rows = {f"distilled set, {n}": [r["accuracy"].get(n) for r in results.values()] for n in networks}
    rows |= {
        label.format("real", next(iter(results.values()))["ipc"]): [r["baselines"].get(n) for r in results.values()]
        for n, label in BASELINES.items()
    }
    for label, cells in rows.items():
        sides.add_row(label, *(score(cell)[0] if cell else "" for cell in cells))
    sides.add_row("time", *(duration(r["seconds"]) for r in results.values()))
    show(sides)


def print_sweep(result: Mapping[str, Any]) -> None:
    """The table of `tadperf sweep`: a row for each combination, and network where there are several."""
    rows, fields = result["rows"], result["fields"]
    fields = [*fields, *(["network"] if len({row["network"] for row in rows}) > 1 else [])]
    made = table(*fields, "test accuracy, %", "random real, %", "time")
    for row in rows:
        deviation = f" ± {100 * row['std']:.1f}" if row["runs"] > 1 else ""
        real = f"{100 * row['random_real']:.1f}" if "random_real" in row else "-"
        accuracy = f"{100 * row['accuracy']:.1f}{deviation}"
        made.add_row(*(str(row[field]) for field in fields), accuracy, real, duration(row["seconds"]))
    show(made)
    for name, path in result["paths"].items():
        print(f"{name:<10} {path}")


def print_audit(result: Mapping[str, Any]) -> None:
    """The tables of `tadperf audit`."""
    share = 100 * result["issues"] / result["samples"]
    noise = "" if result["noise"] == "none" else f", noise {result['noise']}"
    print(f"{result['data']}{noise}: {result['issues']} of {result['samples']} labels held wrong ({share:.1f} %)")
    pairs = table("seems to be", "labelled", "samples")
    for pair in result["pairs"][:PAIRS]:
        pairs.add_row(pair["suggested"], pair["given"], str(pair["samples"]))
    if len(result["pairs"]) > PAIRS:
        pairs.add_row(
            f"{len(result['pairs']) - PAIRS} other pairs", "", str(sum(p["samples"] for p in result["pairs"][PAIRS:]))
        )
    worst = table("worst samples", "labelled", "seems to be", "score")
    for sample in result["worst"]:
        worst.add_row(str(sample["index"]), sample["given"], sample["suggested"], f"{sample['score']:.3f}")
    show(*(one for one in (pairs, worst) if one.row_count))
    if known := result.get("against_clean_labels"):
        told = (f"{name.replace('_', ' ')} {value:.3f}" for name, value in known.items() if value is not None)
        print(f"against the clean labels: {', '.join(told)}")
    for name, path in result["paths"].items():
        print(f"{name:<10} {path}")
    if not result["paths"]:
        print("--out labels.csv keeps the whole list, and a picture of the worst")


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
