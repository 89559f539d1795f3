"""`tadperf experts`: trains only the experts, so that several runs can share their trajectories."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tadperf.cli import common
from tadperf.cli.options import SharedOptions, command

if TYPE_CHECKING:
    from tadperf.config import Config


@command(
    "DATA --noise --labels --trust --seed --device --devices --method --image-size --skip-broken --format "
    "--preset --config --set --out --resume --json --quiet --debug"
)
def experts(options: SharedOptions) -> None:
    """Train the experts that `distill --experts DIR` matches."""
    from tadperf.pipeline.run_config import choose_run, experts_folder

    config, out = choose_run(options.sources, options.out, options.resume, experts_folder)
    with common.resumable("experts", out, options.devices):
        result = common.run_in_ranks(lambda: _train(options, config, out), options.devices)
    if options.as_json:
        common.print_json(result)
    else:
        from tadperf.cli.tables import print_experts

        print_experts(result)


def _train(options: SharedOptions, config: Config, out: Path) -> dict[str, Any]:
    from tadperf.cli.progress import display
    from tadperf.pipeline.experts import train_shared_experts
    from tadperf.pipeline.prepare import prepare
    from tadperf.run.folder import Run

    with display(options.quiet) as progress:
        task = prepare(config, progress)
        with Run.create(out, config, options.resume) as run:
            if not options.resume:
                common.print_preset(options.sources, options.quiet)
            return train_shared_experts(task, run, progress)
