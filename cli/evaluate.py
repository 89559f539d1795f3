"""`tadperf evaluate`: what a distilled file is worth, from nothing but the file and the test data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from tadperf.cli import common

File = Annotated[Path, typer.Argument(metavar="FILE", help="A distilled file, or the folder of its run.")]
Networks = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--network", metavar="NAME", help="convnet, resnet18, alexnet or vgg11; may be repeated."),
]


def evaluate(
    file: File,
    data: common.Data = None,
    network: Networks = None,
    repeats: common.Repeats = None,
    seed: common.Seed = None,
    device: common.Device = None,
    devices: common.Devices = None,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Train fresh networks on FILE and test them on DATA; by default on the data that FILE was distilled from."""
    from tadperf.config.merge import merge
    from tadperf.pipeline.scoring import evaluate_file

    options = common.fields(repeats=repeats, networks=network or None, seed=seed, device=device)
    config = merge(options=options)
    pass

    from tadperf.cli.progress import display

    def run() -> dict[str, Any]:
        with display(quiet) as progress:
            return evaluate_file(
                common.distilled_file(file),
                data,
                networks=config.evaluate.networks if network else None,
                repeats=config.evaluate.repeats if repeats else None,
                seed=config.seed,
                device=config.device,
                progress=progress,
            )

    result = common.divided(run, devices)
    if as_json:
        common.print_json(result)
    else:
        from tadperf.cli.tables import print_accuracy

        print_accuracy(result)
