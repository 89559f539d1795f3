"""`--estimate`: says what a job will take, and ends without starting it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tadperf.cli import common
from tadperf.cli.options import SharedOptions
from tadperf.config import Config
from tadperf.errors import UserError

NOTE = (
    "from short trials on this machine as it is now; without decoding, k-means, torch.compile and pages; "
    "trust may need fewer rounds"
)


def show_estimate(options: SharedOptions, config: Config) -> None:
    """Opens the data of a distillation, and prints what it will take. Starts no other rank, writes no run folder."""
    from tadperf.cli.progress import display
    from tadperf.pipeline.estimate import estimate_distill
    from tadperf.pipeline.prepare import prepare

    with display(options.quiet) as progress:
        task = prepare(config, progress)
    _print(options, estimate_distill(task, _ranks(options)))


def show_audit_estimate(options: SharedOptions, config: Config, trains: bool) -> None:
    """Does the same for an audit. Raises UserError if it trains no networks."""
    from tadperf.cli.progress import display
    from tadperf.pipeline.estimate import audit_task, estimate_audit

    if not trains:
        remedy = "is for audits that train networks; this one takes seconds to minutes: leave out --estimate"
        raise UserError("--estimate", "audit", remedy)
    with display(options.quiet) as progress:
        task = audit_task(config, progress)
    _print(options, estimate_audit(task, _ranks(options)))


def _ranks(options: SharedOptions) -> int:
    """Returns the number of processes that the job would use."""
    from tadperf.compute import launcher, ranks

    if not options.quiet:
        common.print_note("estimate: running short trials of each stage")
    return max(launcher.num_ranks(options.devices), ranks.environment_world_size())


def _print(options: SharedOptions, result: Mapping[str, Any]) -> None:
    if options.as_json:
        common.print_json(result)
    else:
        print_estimate(result)


def print_estimate(result: Mapping[str, Any]) -> None:
    """Prints the estimate as a table."""
    from tadperf.cli.tables import new_table, print_text, show_tables
    from tadperf.report.words import duration

    table = new_table("stage", "about")
    for stage, seconds in result["stages"].items():
        table.add_row(stage, duration(seconds))
    table.add_row("total", duration(result["seconds"]))
    show_tables(table)
    files = ", ".join(f"{name} {_size(size)}" for name, size in result["disk"].items())
    cuda = f", {_size(result['cuda_bytes'])} of the GPU's" if "cuda_bytes" in result else ""
    print_text(f"memory  {_size(result['memory_bytes'])} for the largest process{cuda}", indent=8)
    print_text(f"disk    {_size(result['disk_bytes'])}{f' ({files})' if files else ''}", indent=8)
    print_text(f"        {NOTE}", indent=8)


def _size(count: int) -> str:
    """Formats bytes as "12 MB" or "3.4 GB", with 2**20 and 2**30 bytes."""
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.0f} MB"
