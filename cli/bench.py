"""`tadperf bench`: operators and stages against what one would otherwise run, on this machine."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from tadperf.cli import common

if TYPE_CHECKING:
    import torch

    from tadperf.bench.operators.engine import Bench, Row

Operators = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(
        metavar="OPERATOR|STAGE", help="What to measure; all operators by default, see --list.", show_default=False
    ),
]
Sizes = Annotated[
    common.Text, typer.Option("--sizes", metavar="LIST", help="Sizes instead of the usual: 50000x10; cifar10.")
]
Dtypes = Annotated[str, typer.Option("--dtypes", metavar="LIST", help="float32, bfloat16, float16.")]
Base = Annotated[
    common.Text, typer.Option("--base", metavar="LIST", help="Baselines: eager, inductor, peer, or names; or none.")
]
Threads = Annotated[common.Text, typer.Option("--threads", metavar="N", help="CPU threads; as many as PyTorch's.")]
Repeats = Annotated[str, typer.Option("--repeats", metavar="N", help="Turns of each provider.")]
Json = Annotated[
    common.Folder, typer.Option("--json", metavar="FILE|DIR", help="Write the rows; <device>.json in DIR.")
]
Plot = Annotated[common.Folder, typer.Option("--plot", metavar="FILE|DIR", help="Draw them: a PNG for each operator.")]
Tune = Annotated[bool, typer.Option("--tune", help="Choose how Triton kernels are launched on this GPU, and keep it.")]
List = Annotated[bool, typer.Option("--list", help="Print the operators and what can run here, and leave.")]


def bench(
    operators: Operators = None,
    device: common.Device = "auto",
    sizes: Sizes = None,
    dtypes: Dtypes = "float32",
    base: Base = None,
    threads: Threads = None,
    repeats: Repeats = "20",
    json_file: Json = None,
    plot_file: Plot = None,
    tune: Tune = False,
    list_only: List = False,
    debug: common.Debug = False,
) -> None:
    """Measure operators beside eager PyTorch, torch.compile and installed peers; stages beside the published way."""
    from tadperf.bench.operators import catalogue, engine, report
    from tadperf.bench.stages import runner  # pyright: ignore[reportMissingImports]
    from tadperf.compute.device import resolve_device
    from tadperf.errors import UserError

    benches, asked = _named(operators or [])
    if not benches:
        _refused({"--base": base, "--plot": plot_file, "--tune": tune, "--dtypes": dtypes != "float32" and dtypes})
    place = resolve_device(device or "auto")
    if list_only:
        print("\n".join([*_listed(benches, place), *_listed_stages(asked if operators else list(runner.STAGES))]))
        return
    if tune and place.type != "cuda":
        raise UserError("--tune", place.type, "tunes launches on a CUDA device; use --device cuda")
    known = [name for one in benches for name in one.providers]
    names = {one.name: catalogue.providers(one, base, known) for one in benches}
    chosen = {one.name: catalogue.sizes(one, sizes, place.type) for one in benches}
    plan = _plan(asked, None if benches else sizes)
    types, turns = catalogue.dtypes(dtypes), _count("--repeats", repeats)
    count = None if threads is None else _count("--threads", threads)
    json_file = json_file and report.place("--json", json_file, place, ".json")
    plot_file = plot_file and report.place("--plot", plot_file, place, ".png")
    rows: list[Row] = []
    with engine.threads(count) as used:
        for one in benches:
            if tune:
                _tune(one, chosen[one.name], place)
            cases = [(size, dtype) for size in chosen[one.name] for dtype in types]
            rows += _operator(one, cases, place, names[one.name], turns, used)
        for name, of_stage in plan.items():
            rows += _stage(name, of_stage, place, turns, used)
    _keep(rows, json_file, plot_file)
    if any(row["error"] for row in rows):
        raise typer.Exit(1)


def _count(field: str, text: str) -> int:
    from tadperf.errors import UserError

    if not text.isdecimal() or int(text) < 1:
        raise UserError(field, text, "must be a whole number of 1 or more")
    return int(text)


def _named(words: list[str]) -> tuple[list[Bench], list[str]]:
    """The benches of the operators among these words, of all where there is no word; and the stages among them."""
    from tadperf.bench.operators import catalogue
    from tadperf.bench.stages import runner  # pyright: ignore[reportMissingImports]
    from tadperf.errors import UserError

    asked = [word for word in words if word in runner.STAGES]
    others = [word for word in words if word not in asked]
    for word in others:
        if word not in catalogue.NAMES:
            raise UserError("OPERATOR|STAGE", word, f"must be one of {', '.join((*catalogue.NAMES, *runner.STAGES))}")
    return catalogue.chosen(others) if others or not asked else [], asked


def _plan(asked: list[str], sizes: str | None) -> dict[str, list[str]]:
    """The sizes of each stage; one without a bench is left out, with a line that says so."""
    from tadperf.bench.stages import runner  # pyright: ignore[reportMissingImports]

    plan = {}
    for name in asked:
        stage = runner.load(name)
        if stage is None:
            print(f"{name}: there is no bench of this stage yet", file=sys.stderr, flush=True)
        else:
            plan[name] = runner.sizes(stage, sizes)
    return plan


def _refused(options: dict[str, Any]) -> None:
    """Raises UserError for an option that says nothing to a stage."""
    from tadperf.errors import UserError

    for name, value in options.items():
        if value:
            raise UserError(name, value, "is for operators; a stage is measured without it")


def _listed(benches: list[Bench], place: torch.device) -> list[str]:
    from tadperf.bench.operators.engine import runs_here  # pyright: ignore[reportMissingImports]
    from tadperf.kernels import implementations

    found = []
    for one in benches:
        shapes = ", ".join("x".join(map(str, size)) for size in one.sizes[place.type])
        found.append(f"{one.name}: {implementations()[one.name][place.type]} on {place.type}; {shapes}")
        for name, provider in one.providers.items():
            found.append(f"  {name:<16} {runs_here(provider, device=place.type) or 'runs here'}")
    return found


def _listed_stages(names: list[str]) -> list[str]:
    from tadperf.bench.stages import runner  # pyright: ignore[reportMissingImports]

    return [f"{name}: a stage; {', '.join(stage.SIZES)}" for name in names if (stage := runner.load(name))]


def _operator(
    one: Bench, cases: list[tuple[Any, torch.dtype]], place: torch.device, providers: list[str], turns: int, used: int
) -> list[Row]:
    """Measures one operator, prints its table and returns its rows."""
    from tadperf.bench.operators import (
        engine,
        report,  # pyright: ignore[reportMissingImports]
    )

    facts = report.facts(one.name, place, used, shlex.join(["tadperf", *sys.argv[1:]]))
    rows: list[Row] = []
    for size, dtype in cases:
        print(one.name, "x".join(map(str, size)), dtype, file=sys.stderr, flush=True)
        rows += engine.measure(one, size, dtype, place, providers, turns)
    print("", report.title(facts), *report.lines(rows), sep="\n", flush=True)
    return [row | facts for row in rows]


def _stage(name: str, sizes: list[str], place: torch.device, turns: int, used: int) -> list[Row]:
    """Measures one stage, prints its table and returns its rows."""
    from tadperf.bench.stages import runner  # pyright: ignore[reportMissingImports]

    stage = runner.load(name)
    assert stage is not None
    facts = runner.facts(name, place, used, shlex.join(["tadperf", *sys.argv[1:]]))
    rows: list[Row] = []
    for size in sizes:
        print(name, size, file=sys.stderr, flush=True)
        rows += stage.measure(size, place, turns)
    runner.ratios(rows)
    print("", runner.title(facts), *runner.lines(rows), sep="\n", flush=True)
    return [row | facts for row in rows]


def _tune(one: Bench, sizes: list[Any], place: torch.device) -> None:
    from tadperf.bench.tools import tune  # pyright: ignore[reportMissingImports]

    for operator, path in tune.tune(one, sizes, place):
        print(f"{operator}: launches kept in {path}", file=sys.stderr, flush=True)


def _keep(rows: list[Row], json_file: Path | None, plot_file: Path | None) -> None:
    from tadperf.bench.operators import report  # pyright: ignore[reportMissingImports]

    if json_file:
        report.save(json_file, rows)
    if plot_file:
        from tadperf.bench.operators.plot import plot  # pyright: ignore[reportMissingImports]

        names = list(dict.fromkeys(row["operator"] for row in rows if "operator" in row))
        for name in names:
            file = plot_file if len(names) == 1 else plot_file.with_stem(f"{plot_file.stem}-{name}")
            plot(file, [row for row in rows if row.get("operator") == name])
