"""One call of `tadperf bench`: checks the request, measures operators and stages, writes the rows."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from tadperf.bench.operators import catalogue, engine, report
from tadperf.bench.operators.engine import Bench, Row, Size
from tadperf.bench.operators.measure import measure_case
from tadperf.bench.stages import runner
from tadperf.compute.device import resolve_device
from tadperf.errors import UserError


@dataclass(frozen=True)
class Request:
    """The options of `tadperf bench`, as typed."""

    words: Sequence[str] = ()
    device: str = "auto"
    sizes: str | None = None
    dtypes: str = "float32"
    base: str | None = None
    threads: str | None = None
    repeats: str = "20"
    json_file: Path | None = None
    plot_file: Path | None = None
    tune: bool = False


class OperatorPlan(NamedTuple):
    """What to measure for one operator."""

    bench: Bench
    sizes: list[Size]
    dtypes: list[torch.dtype]
    providers: list[str]


@dataclass(frozen=True)
class Plan:
    """A checked request."""

    operators: list[OperatorPlan]
    stages: dict[str, list[str]]  # stage -> names of its sizes
    device: torch.device
    threads: int | None
    repeats: int
    json_file: Path | None
    plot_file: Path | None
    tune: bool


class Measurement(NamedTuple):
    """The rows of one operator or stage, and their table."""

    rows: list[Row]
    table: list[str]


def plan(request: Request) -> Plan:
    """Checks a request. Raises UserError, which names the wrong option."""
    benches, stages = _by_kind(request.words)
    if stages:
        _refuse_operator_options(request, mixed=bool(benches))
    device = resolve_device(request.device)
    if request.tune and device.type != "cuda":
        raise UserError("--tune", device.type, "needs a CUDA device; use --device cuda")
    known = [name for bench in benches for name in bench.providers]
    dtypes = catalogue.dtypes(request.dtypes)
    operators = [
        OperatorPlan(
            bench,
            catalogue.sizes(bench, request.sizes, device.type),
            dtypes,
            catalogue.providers(bench, request.base, known),
        )
        for bench in benches
    ]
    return Plan(
        operators,
        {name: runner.sizes(runner.load(name), request.sizes) for name in stages},
        device,
        None if request.threads is None else _count("--threads", request.threads),
        _count("--repeats", request.repeats),
        request.json_file and report.output_file("--json", request.json_file, device, ".json"),
        request.plot_file and report.output_file("--plot", request.plot_file, device, ".png"),
        request.tune,
    )


def describe(request: Request) -> list[str]:
    """Returns lines about the requested operators and stages (by default all) and which providers run here."""
    from tadperf.kernels import implementations

    benches, stages = _by_kind(request.words)
    device = resolve_device(request.device)
    lines = []
    for bench in benches:
        shapes = ", ".join("x".join(map(str, size)) for size in bench.sizes[device.type])
        lines.append(f"{bench.name}: {implementations()[bench.name][device.type]} on {device.type}; {shapes}")
        for name, provider in bench.providers.items():
            lines.append(f"  {name:<16} {engine.skip_reason(provider, device=device.type) or 'runs here'}")
    named = stages if request.words else runner.STAGES
    lines += [f"{name}: a stage; {', '.join(runner.load(name).SIZES)}" for name in named]
    if not request.words:
        lines += [f"{name}: {command}" for name, command in catalogue.OWN_COMMANDS.items()]
    return lines


def measure(plan: Plan, note: Callable[[str], object]) -> Iterator[Measurement]:
    """Measures operators, then stages, and yields each as soon as it is done. note: called with lines of progress."""
    command = shlex.join(["tadperf", *sys.argv[1:]])
    with engine.threads(plan.threads) as threads:
        for operator in plan.operators:
            if plan.tune:
                _tune(operator, plan.device, note)
            facts = report.facts(operator.bench.name, plan.device, threads, command)
            rows = _operator_rows(operator, plan, note)
            yield Measurement([row | facts for row in rows], [report.title(facts), *report.lines(rows)])
        for name, sizes in plan.stages.items():
            facts = runner.facts(name, plan.device, threads, command)
            rows = _stage_rows(name, sizes, plan, note)
            yield Measurement([row | facts for row in rows], [runner.title(facts), *runner.lines(rows)])


def save(plan: Plan, rows: Sequence[Row]) -> None:
    """Writes the rows as JSON and as plots, if the plan names files for them."""
    if plan.json_file:
        report.save(plan.json_file, rows)
    if plan.plot_file:
        from tadperf.bench.operators.plot import plot

        names = list(dict.fromkeys(row["operator"] for row in rows if "operator" in row))
        for name in names:
            stem = plan.plot_file.stem
            file = plan.plot_file if len(names) == 1 else plan.plot_file.with_stem(f"{stem}-{name}")
            plot(file, [row for row in rows if row.get("operator") == name])


def _operator_rows(operator: OperatorPlan, plan: Plan, note: Callable[[str], object]) -> list[Row]:
    rows: list[Row] = []
    for size in operator.sizes:
        for dtype in operator.dtypes:
            note(f"{operator.bench.name} {'x'.join(map(str, size))} {dtype}")
            rows += measure_case(operator.bench, size, dtype, plan.device, operator.providers, plan.repeats)
    return rows


def _stage_rows(name: str, sizes: Sequence[str], plan: Plan, note: Callable[[str], object]) -> list[Row]:
    stage = runner.load(name)
    rows: list[Row] = []
    for size in sizes:
        note(f"{name} {size}")
        rows += stage.measure(size, plan.device, plan.repeats)
    runner.ratios(rows)
    return rows


def _tune(operator: OperatorPlan, device: torch.device, note: Callable[[str], object]) -> None:
    from tadperf.bench.tools.tune import tune

    for name, path in tune(operator.bench, operator.sizes, device):
        note(f"{name}: launch settings written to {path}")


def _by_kind(words: Sequence[str]) -> tuple[list[Bench], list[str]]:
    """Returns the benches of the operators among these words (all operators without a word), and the stages."""
    stages = [word for word in words if word in runner.STAGES]
    operators = [word for word in words if word not in stages]
    for word in operators:
        if word in runner.RENAMED:
            raise UserError("OPERATOR|STAGE", word, f"this stage is now called {runner.RENAMED[word]}")
        if word in catalogue.OWN_COMMANDS:
            raise UserError("OPERATOR|STAGE", word, f"is measured by {catalogue.OWN_COMMANDS[word]}")
        if word not in catalogue.NAMES:
            names = ", ".join((*catalogue.NAMES, *runner.STAGES))
            raise UserError("OPERATOR|STAGE", word, f"must be one of {names}")
    return catalogue.load_benches(operators) if operators or not words else [], stages


def _refuse_operator_options(request: Request, mixed: bool) -> None:
    """Raises UserError for an option that has no meaning for a stage.

    mixed: the request also names operators. Then it refuses sizes too: operators and stages have no size in common.
    """
    options = {
        "--base": request.base,
        "--plot": request.plot_file,
        "--tune": request.tune,
        "--dtypes": None if request.dtypes == Request.dtypes else request.dtypes,
    }
    for name, value in options.items():
        if value:
            raise UserError(name, value, "is for operators only; leave it out for a stage")
    if mixed and request.sizes:
        remedy = "operators and stages have other sizes; measure them in two calls, or leave it out"
        raise UserError("--sizes", request.sizes, remedy)


def _count(option: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UserError(option, text, "must be a positive integer")
    return int(text)
