"""`tadperf audit`: finds the wrong labels of a data set, without distillation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from tadperf.cli import common
from tadperf.cli.options import SharedOptions, command

if TYPE_CHECKING:
    from tadperf.config import Config
    from tadperf.data.dataset import Dataset
    from tadperf.trust.state import TrustState

Out = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--out", metavar="FILE", help="Write the list (.csv or .parquet) and a picture of the worst samples next to it."
    ),
]


@command(
    "DATA --labels --seed --device --devices --image-size --skip-broken --format --preset --config --set out --noise "
    "--json --quiet --debug"
)
def audit(options: SharedOptions, out: Out = None) -> None:
    """List the labels of DATA's training split that are probably wrong, the worst first."""
    from dataclasses import replace

    from tadperf.pipeline.audit import audit_result, check_audit_file, write_audit

    config = replace(options.sources, options={**options.sources.options, "trust.mode": "on"}).config()
    if out:
        check_audit_file(out)
    dataset, state = common.run_in_ranks(lambda: _audit(config, options.quiet), options.devices)
    result = audit_result(config, dataset, state)
    if out:
        result["paths"] = write_audit(out, dataset, state, result)
    if options.as_json:
        common.print_json(result)
    else:
        from tadperf.cli.tables import print_audit

        print_audit(result)


def _audit(config: Config, quiet: bool) -> tuple[Dataset, TrustState]:
    from tadperf.cli.progress import display
    from tadperf.pipeline.audit import audit_data

    with display(quiet) as progress:
        return audit_data(config, progress)
