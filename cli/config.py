"""`tadperf config`: the config as a run would take it."""

from __future__ import annotations

from typing import Annotated

import typer

from tadperf.cli import common

Schema = Annotated[bool, typer.Option("--schema", help="Print the JSON schema of the config instead.")]


def config(
    data: common.Data = None,
    ipc: common.Ipc = None,
    noise: common.Noise = None,
    labels: common.Labels = None,
    trust: common.Trust = None,
    seed: common.Seed = None,
    device: common.Device = None,
    method: common.Method = None,
    repeats: common.Repeats = None,
    image_size: common.ImageSize = None,
    format: common.Format = None,
    preset: common.Preset = None,
    config_file: common.ConfigFile = None,
    sets: common.Sets = None,
    schema: Schema = False,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Print the merged config as TOML, which --config reads back.

    Presets: digits, quick, cifar10-ipc{1,10,50}, cifar100-ipc{1,10,50}, tiny-ipc{1,10}.
    """
    from tadperf.config.merge import to_toml
    from tadperf.config.schema import Config

    if schema:
        common.print_json(Config.model_json_schema())
        return
    options = common.fields(
        data=data,
        ipc=ipc,
        noise=noise,
        labels=labels,
        trust=trust,
        seed=seed,
        device=device,
        method=method,
        repeats=repeats,
        image_size=image_size,
        format=format,
    )
    asked = common.Asked(preset, config_file, sets or (), options, quiet)
    merged = common.merged(asked)
    common.state_preset(asked)
    if as_json:
        common.print_json(merged.model_dump(mode="json"))
    else:
        print(to_toml(merged), end="")
