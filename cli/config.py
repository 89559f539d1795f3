"""`tadperf config`: prints the settings that a run would use."""

from __future__ import annotations

from typing import Annotated

import typer

from tadperf.cli import common
from tadperf.cli.options import SharedOptions, command

Schema = Annotated[bool, typer.Option("--schema", help="Print the JSON schema of the settings instead.")]
ListPresets = Annotated[bool, typer.Option("--list", help="Print the presets instead, one in each line.")]


@command(
    "DATA --ipc --noise --labels --seed --device --method --synthesis --trust --features --probs --encoder --compile "
    "--experts --repeats --image-size --skip-broken --format --preset --config --set schema list_presets "
    "--json --quiet --debug"
)
def config(options: SharedOptions, schema: Schema = False, list_presets: ListPresets = False) -> None:
    """Print all settings as TOML, which --config reads back."""
    from tadperf.config.merge import to_toml
    from tadperf.config.presets import SUMMARIES
    from tadperf.config.schema import Config

    if schema:
        common.print_json(Config.model_json_schema())
    elif list_presets and options.as_json:
        common.print_json(SUMMARIES)
    elif list_presets:
        from tadperf.cli.tables import print_text

        width = max(map(len, SUMMARIES)) + 2
        for name, summary in SUMMARIES.items():
            print_text(f"{name:<{width}}{summary}", indent=width)
    else:
        merged = options.sources.config()
        common.print_preset(options.sources, options.quiet)
        if options.as_json:
            common.print_json(merged.model_dump(mode="json"))
        else:
            print(to_toml(merged), end="")
