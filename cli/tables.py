"""Prints results as tables on stdout."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.style import StyleType
from rich.table import Table
from rich.text import Text

from tadperf.report.text import one_line
from tadperf.report.words import BASELINES, KINDS, PROTOCOL_ROWS, RUNGS, SHARES, USE, VERDICTS, duration, gain

MAX_PAIRS = 15  # rows of the table of confusions


def print_result(result: Mapping[str, Any]) -> None:
    """Prints what `tadperf distill` measured: accuracies, trust, time and memory of each stage, files, example code."""
    data = result["data"]
    noise = "" if data["noise"] in (None, "none") else f", with added noise {data['noise']}"
    print_text(
        f"{data['name']}: {data['train']} images{noise}, distilled to {result['ipc']} per class by "
        f"{_method_words(result)}{_trust_words(result['trust'])}"
    )
    show_tables(
        _accuracy_table(result),
        *([_ladder_table(result)] if len(result.get("ladder", ())) > 1 else []),
        *([_rounds_table(result["trust"]["rounds"])] if result["trust"]["rounds"] else []),
        *([_refinement_table(result["refine"])] if "refine" in result else []),
        _stages_table(result),
    )
    _print_warning(result)
    _print_files(result)


def print_refined(result: Mapping[str, Any]) -> None:
    """Prints what `tadperf refine` measured: the rounds, accuracies if networks were trained, time, files."""
    if result["accuracy"]:
        print_result(result)
        return
    data, report = result["data"], result["refine"]
    source = f"the images of {report['start']}" if report["start"] else f"{data['name']}: {data['train']} images"
    print_text(f"{source}, {result['ipc']} per class refined{_trust_words(result['trust'])}")
    print_text(f"detector: {100 * report['detector']['held_out']:.1f} % correct on the held-out samples")
    show_tables(_refinement_table(report), _stages_table(result))
    _print_files(result)


def print_comparison(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints the accuracies of every trust mode side by side."""
    columns = {"on": "trust on", "off": "trust off", "oracle": "oracle (clean labels)"}
    table = new_table("test accuracy, %", *(columns[mode] for mode in results))
    networks = dict.fromkeys(network for result in results.values() for network in result["accuracy"])
    rows = {f"distilled set, {network}": [r["accuracy"].get(network) for r in results.values()] for network in networks}
    ipc = next(iter(results.values()))["ipc"]
    rows |= {
        label.format(kind="real", ipc=ipc): cells
        for name, label in BASELINES.items()
        if any(cells := [r["baselines"].get(name) for r in results.values()])
    }
    for label, cells in rows.items():
        table.add_row(label, *(_score(cell)[0] if cell else "" for cell in cells))
    table.add_row("time", *(duration(result["seconds"]) for result in results.values()))
    show_tables(table)


def print_sweep(result: Mapping[str, Any]) -> None:
    """Prints a row for each combination, and for each network if there are several."""
    rows, fields = result["rows"], result["fields"]
    fields = [*fields, *(["network"] if len({row["network"] for row in rows}) > 1 else [])]
    table = new_table(*fields, "test accuracy, %", "random real images, %", "time")
    for row in rows:
        deviation = _deviation(row["std"]) if row["runs"] > 1 else ""
        random_real = f"{100 * row['random_real']:.1f}" if "random_real" in row else "-"
        accuracy = f"{100 * row['accuracy']:.1f}{deviation}"
        table.add_row(*(str(row[field]) for field in fields), accuracy, random_real, duration(row["seconds"]))
    show_tables(table)
    _print_paths(result["paths"])


def print_audit(result: Mapping[str, Any]) -> None:
    """Prints the number of suspected label errors, the frequent confusions and the worst samples."""
    share = 100 * result["issues"] / result["samples"]
    noise = "" if result["noise"] == "none" else f", with added noise {result['noise']}"
    print_text(
        f"{result['data']}{noise}: {result['issues']} suspected label errors among {result['samples']} labels "
        f"({share:.1f} %)"
    )
    pairs = new_table("suggested label", "given label", "samples")
    for pair in result["pairs"][:MAX_PAIRS]:
        pairs.add_row(pair["suggested"], pair["given"], str(pair["samples"]))
    if others := result["pairs"][MAX_PAIRS:]:
        pairs.add_row(f"{len(others)} other pairs", "", str(sum(pair["samples"] for pair in others)))
    place = "file" if any("file" in sample for sample in result["worst"]) else "index"
    worst = new_table(f"worst samples ({place})", "given label", "suggested label", "score")
    for sample in result["worst"]:
        suggested = "no clear class" if sample["suggested"] == sample["given"] else sample["suggested"]
        worst.add_row(str(sample[place]), sample["given"], suggested, f"{sample['score']:.3f}")
    show_tables(*(table for table in (pairs, worst) if table.row_count))
    if "near_duplicates" in result:
        _print_duplicates(result["near_duplicates"])
    if quality := result.get("against_clean_labels"):
        figures = (f"{name.replace('_', ' ')} {value:.3f}" for name, value in quality.items() if value is not None)
        print_text(f"against the clean labels: {', '.join(figures)}")
    _print_paths(result["paths"])
    if not result["paths"]:
        print_text("add --out labels.csv to write the list of all samples and a picture of the worst")


def _print_duplicates(found: Mapping[str, Any]) -> None:
    """Prints the number of near duplicates and the first pairs."""
    leaks = "" if found["leaks"] is None else f"; {found['leaks']} pairs of a training and a test image"
    print_text(
        f"near duplicates: {found['in_train']} pairs of training samples, {found['different_labels']} with different "
        f"labels{leaks} ({found['exact']} exact, the others have a similarity of at least {found['threshold']:g})"
    )
    table = new_table("first", "label", "second", "label", "similarity")
    for pair in found["pairs"]:
        second = f"test: {pair['second']}" if pair["kind"] == "leak" else pair["second"]
        similarity = "exact" if pair["exact"] else f"{pair['similarity']:.3f}"
        table.add_row(pair["first"], pair["first_label"], second, pair["second_label"], similarity)
    if table.row_count:
        show_tables(table)


def print_accuracy(result: Mapping[str, Any]) -> None:
    """Prints what `tadperf evaluate` measured."""
    table = new_table("test accuracy", "%", "runs")
    for network, scores in result["accuracy"].items():
        table.add_row(network, *_score(scores))
    show_tables(table)


def print_protocol(result: Mapping[str, Any]) -> None:
    """Prints the comparison of `tadperf evaluate --protocol`: a table, a verdict and DD-Ranking's scores by network."""
    for network, measured in result["networks"].items():
        print_text(
            f"{network}, protocol {result['protocol']}, {result['ipc']} images per class, {result['repeats']} runs"
        )
        table = new_table("trained on", "%", "95 % interval", "gain of the set", "p")
        for row, scores in measured["rows"].items():
            against = scores.get("against_distilled")
            difference = (f"{100 * against['difference']:+.1f}", f"{against['p']:.2g}") if against else ("", "")
            table.add_row(PROTOCOL_ROWS[row], _score(scores)[0], _interval(scores["interval"]), *difference)
        show_tables(table)
        print_text(_verdict(measured["comparison"], result["repeats"]))
        lrs, ars = (measured["ddranking"][name] for name in ("lrs", "ars"))
        print_text(
            f"DD-Ranking: LRS {lrs['mean']:.3f}, ARS {ars['mean']:.3f}; 0.269 is a set that gains and loses nothing"
        )


def _interval(bounds: Sequence[float] | None) -> str:
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f}" if bounds else ""


def _verdict(comparison: Mapping[str, Any], repeats: int) -> str:
    """Returns one line that says whether the distilled set is better than the best of the other rows."""
    best = PROTOCOL_ROWS[comparison["best"]]
    figures = (
        f"{100 * comparison['gain']:+.1f} points against the best other row, {best}; largest p {comparison['p']:.2g}"
    )
    verdict = comparison["verdict"]
    if verdict == "too few runs":
        return f"no verdict: {repeats} runs cannot show a difference at 5 %; use --repeats 6 or more ({figures})"
    return f"{verdict}: {figures}"


def print_experts(result: Mapping[str, Any]) -> None:
    """Prints the figures of `tadperf experts`, one in each row."""
    table = new_table("experts", "")
    for name, value in result.items():
        if name != "kernels":
            table.add_row(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    show_tables(table)


def print_info(facts: Mapping[str, Any]) -> None:
    """Prints the system and what each operator runs on."""
    system = new_table("system", "")
    for name, value in facts["versions"].items():
        system.add_row(name, value or "not installed")
    system.add_row("platform", facts["platform"])
    system.add_row("threads", f"{facts['threads']} of {facts['cores']} cores")
    for name, value in facts["devices"].items():
        system.add_row(name, value)
    native = facts["native"]
    system.add_row("native code", str(native["isa"]) if native["available"] else f"not available: {native['reason']}")
    operators = new_table("operator", "cpu", "cuda")
    for name, places in facts["operators"].items():
        operators.add_row(name, *("none" if place == "not available" else place for place in places.values()))
    show_tables(system, operators, *([_kernels_table(facts["stages"])] if "stages" in facts else []))


def _kernels_table(stages: Mapping[str, Any]) -> Table:
    """Returns which code each operator has run in each stage of a run, and how often."""
    table = new_table("stage", "operator", "code", "calls")
    for stage, operators in stages.items():
        for operator, calls in operators.items():
            for implementation, count in calls.items():
                table.add_row(stage, operator, implementation, str(count))
    return table


def _accuracy_table(result: Mapping[str, Any]) -> Table:
    """Returns the accuracies of networks trained on the distilled set, and of the baselines."""
    table = new_table("test accuracy of networks trained on", "%", "runs")
    for network, scores in result["accuracy"].items():
        table.add_row(f"distilled set, {network}", *_score(scores))
    kind = KINDS[result["trust"]["mode"]]
    for name, label in BASELINES.items():
        if scores := result["baselines"].get(name):
            table.add_row(label.format(kind=kind, ipc=result["ipc"]), *_score(scores))
    return table


def _ladder_table(result: Mapping[str, Any]) -> Table:
    """Returns what each part of the run adds to the accuracy, from random images to all images."""
    table, kind = new_table("what each part adds", "%", "gain"), KINDS[result["trust"]["mode"]]
    for rung in result["ladder"]:
        table.add_row(RUNGS[rung["rung"]].format(kind=kind), _score(rung)[0], gain(rung))
    return table


def _print_warning(result: Mapping[str, Any]) -> None:
    """Prints a note if the distilled set is worse than the images it started from: distillation has not helped."""
    initial = result["baselines"].get("initial")
    distilled = next(iter(result["accuracy"].values()), None)
    if initial and distilled and distilled["mean"] < initial["mean"]:
        print_text(
            "note: the distilled set is worse than the images it started from; "
            "try more iterations (--set match.iterations=N) or another preset"
        )


def _refinement_table(report: Mapping[str, Any]) -> Table:
    """Returns the rounds of refinement, one in each column, as the detector sees them."""
    rounds = report["rounds"]
    table = new_table("refinement", "first", *(f"round {number}" for number in range(1, len(rounds))))
    table.add_row("rejected images", *(str(record["anomalous"]) for record in rounds))
    table.add_row("of the correct class, %", *(f"{100 * record['agreement']:.1f}" for record in rounds))
    table.add_row("diversity", *("-" if r["diversity"] is None else f"{r['diversity']:.3g}" for r in rounds))
    return table


def _rounds_table(rounds: Sequence[Mapping[str, Any]]) -> Table:
    """Returns the rounds of trust, one in each column; the shares that need clean labels only if these are known."""
    table = new_table("labels by round", *(f"round {record['round']}" for record in rounds))
    sizes = [{name: sum(counts) for name, counts in record["sizes"].items()} for record in rounds]
    for verdict in sizes[0]:
        table.add_row(VERDICTS.get(verdict, verdict), *(str(size[verdict]) for size in sizes))
    kept_shares = ((sum(size.values()) - size.get("untrusted", 0)) / max(sum(size.values()), 1) for size in sizes)
    table.add_row("labels kept, %", *(f"{100 * share:.1f}" for share in kept_shares))
    for name, label in SHARES.items():
        if name in rounds[0]:
            table.add_row(label, *("-" if r[name] is None else f"{100 * r[name]:.1f}" for r in rounds))
    return table


def _stages_table(result: Mapping[str, Any]) -> Table:
    """Returns the time and the peak memory of each stage."""
    table = new_table("stage", "time", "peak memory")
    for name, stage in result["stages"].items():
        cuda = f" + {stage['peak_cuda_mb']:.0f} MB CUDA" if "peak_cuda_mb" in stage else ""
        table.add_row(name, duration(stage["seconds"]), f"{stage['peak_memory_mb']:.0f} MB{cuda}")
    table.add_row("total", duration(result["seconds"]), f"on {result['device']}")
    return table


def _print_files(result: Mapping[str, Any]) -> None:
    """Prints the paths of a run, and Python code that uses the distilled file from any folder."""
    _print_paths(result["paths"])
    data = result["data"]
    source = data["source"].get("path", data["name"])
    if Path(source).exists():
        source = str(Path(source).resolve())
    print("\n" + USE.format(path=str(Path(result["paths"]["distilled"]).resolve()), data=source))


def _print_paths(paths: Mapping[str, Any]) -> None:
    for name, path in paths.items():
        print(f"{name:<10} {path}")


def _method_words(result: Mapping[str, Any]) -> str:
    """Returns "mtt", "diffusion" or "mtt from diffusion's images"."""
    forms = {"matching": "{}", "generative": "diffusion", "hybrid": "{} from diffusion's images"}
    return forms[result["synthesis"]].format(result["method"])


def _trust_words(trust: Mapping[str, Any]) -> str:
    """Returns words for the labels that a run has used."""
    if trust["mode"] == "off":
        return ", given labels (trust off)"
    if trust["mode"] == "oracle":
        return ", with the CLEAN LABELS (oracle): an upper bound, not a result"
    return f", {100 * trust['coverage']:.0f} % of the labels kept"


class _Table(Table):
    """Shows every cell as one line of plain text: a class or file name may look like Rich's markup."""

    def add_row(
        self, *renderables: RenderableType | None, style: StyleType | None = None, end_section: bool = False
    ) -> None:
        cells = (Text(one_line(cell)) if cell else "" for cell in renderables)
        super().add_row(*cells, style=style, end_section=end_section)


def new_table(*columns: str) -> Table:
    """Returns an empty table. The first column is left-aligned, the others are right-aligned."""
    table = _Table(box=SIMPLE_HEAD, pad_edge=False)
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position == 0 else "right", overflow="fold")
    return table


def _score(scores: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the mean in percent, with the deviation if there are several runs, and the number of runs."""
    deviation = _deviation(scores["std"]) if len(scores["runs"]) > 1 else ""
    return f"{100 * scores['mean']:.1f}{deviation}", str(len(scores["runs"]))


def _deviation(std: float) -> str:
    sign = "±"
    try:
        sign.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        sign = "+-"
    return f" {sign} {100 * std:.1f}"


class _Console(Console):
    """Raises BrokenPipeError if the reader of stdout has ended. Rich would exit with code 1."""

    def on_broken_pipe(self) -> None:
        raise


def terminal_width() -> int:
    """Returns the columns of the terminal: those of COLUMNS, or 80 if there is no terminal."""
    return _Console().width


def print_text(text: str, indent: int = 0) -> None:
    """Prints a sentence in lines of the terminal's width (80 columns if there is none). Long words stay in one piece.

    indent: of all lines but the first.
    """
    lines = textwrap.wrap(
        text, terminal_width(), subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
    print("\n".join(lines))


def show_tables(*tables: Table) -> None:
    """Prints tables that fit the terminal's width (80 columns if there is none)."""
    console = _Console(highlight=False)
    for table in tables:
        console.print(table)
