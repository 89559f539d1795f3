"""`tadperf distill --dry-run`: checks a job, says what it would do, and ends. Writes nothing."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tadperf.cli import common
from tadperf.cli.options import SharedOptions
from tadperf.config import Config
from tadperf.config.options import CONFIG_OPTIONS
from tadperf.config.schema import flatten_sections
from tadperf.config.sources import ConfigSources
from tadperf.errors import UserError

MAX_CLASSES = 20  # rows of the table of classes


def show_dry_run(options: SharedOptions, config: Config, out: Path, compare: bool) -> None:
    """Checks the job and prints what it would do. Starts no other rank. Raises UserError as a run would."""
    from tadperf.cli.progress import display
    from tadperf.compute import launcher, ranks
    from tadperf.pipeline.plan import plan_distill

    if options.estimate:
        raise UserError("--dry-run", "--estimate", "measures what a job will take, a dry run does not; use one of them")
    processes = max(launcher.num_ranks(options.devices), ranks.environment_world_size())
    with display(options.quiet) as progress:
        plan = plan_distill(config, out, options.resume, compare, processes, progress)
    if not options.resume:
        common.print_preset(options.sources, options.quiet)
    plan["all_settings"] = str(out / "config.json") if options.resume else config_command(options.sources)
    if options.as_json:
        common.print_json(plan)
    else:
        print_plan(plan)


def config_command(sources: ConfigSources) -> str:
    """Returns the command that prints all settings of these sources."""
    words = ["tadperf", "config"]
    for option in CONFIG_OPTIONS:
        value = sources.options.get(option.field)
        if value is None:
            continue
        words += [] if option.name == "DATA" else [option.name]
        words += [] if option.kind is bool else [str(value)]
    words += ["--preset", sources.preset] if sources.preset else []
    words += ["--config", str(sources.toml_path)] if sources.toml_path else []
    words += [word for text in sources.sets for word in ("--set", text)]
    return shlex.join(words)


def print_plan(plan: Mapping[str, Any]) -> None:
    """Prints the data, the settings, the stages and the folder of a job."""
    from tadperf.cli.tables import new_table, print_text, show_tables, terminal_width

    data = plan["data"]
    noise = "" if data["noise"] == "none" else f", with added noise {data['noise']}"
    broken = f"; {data['broken']} cannot be decoded and are left out" if data["broken"] else ""
    shape = " x ".join(map(str, data["shape"]))
    print_text(f"{data['name']}: {data['train']} training and {data['test']} test images of {shape}{noise}{broken}")
    classes = new_table("class", "training", "test")
    for row in data["classes"][:MAX_CLASSES]:
        classes.add_row(row["class"], str(row["train"]), str(row["test"]))
    if others := data["classes"][MAX_CLASSES:]:
        sums = (str(sum(row[split] for row in others)) for split in ("train", "test"))
        classes.add_row(f"{len(others)} other classes", *sums)
    settings, defaults = new_table("setting", "value", "default"), flatten_sections(Config().model_dump(mode="json"))
    for field, value in plan["settings"].items():
        settings.add_row(field, _shown(value), _shown(defaults[field]))
    show_tables(classes, settings)
    count = plan["processes"]
    print_text(f"{'stages':<10} {', '.join(plan['stages']) or 'none: the run is finished'}", indent=11)
    print_text(f"{'device':<10} {plan['device']}, {count} process{'es' if count > 1 else ''}", indent=11)
    for name, folder in (("folder", plan["folder"]), *(("", folder) for folder in plan["other_folders"])):
        print(f"{name:<10} {folder}")
    print(f"{'settings':<10} {_folded(plan['all_settings'], terminal_width() - 13)}")
    print_text("Everything fits. Nothing was computed or written; --estimate measures how long the job will take.")


def _folded(command: str, width: int) -> str:
    """Returns a command in lines that a shell joins again."""
    lines: list[str] = []
    for word in map(shlex.quote, shlex.split(command)):
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return f" \\\n{'':11}".join(lines)


def _shown(value: Any) -> str:
    return "not set" if value is None else value if isinstance(value, str) else json.dumps(value)
