"""What the commands share: their options, the merged config, errors, JSON."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, TypeVar

import typer

if TYPE_CHECKING:
    from tadperf.config import Config

T = TypeVar("T")


@dataclass
class Settings:
    """Of this process: whether an unexpected error shows its traceback."""

    debug: bool = False


settings = Settings()


def _set_debug(value: bool) -> bool:
    settings.debug = settings.debug or value
    return value


# Numbers are read as text: the config checks them, so that every wrong value is answered in the same words.
# Optional[...] and not `| None`: typer reads these when the module is imported, on every Python from 3.10.
Text = Optional[str]  # noqa: UP045
Folder = Optional[Path]  # noqa: UP045
DATA_HELP = "'digits', or a file or folder of images: parquet, image folder, CIFAR pickles, npz, safetensors, idx.gz"

Data = Annotated[Text, typer.Argument(metavar="DATA", help=DATA_HELP, show_default=False)]
Format = Annotated[Text, typer.Option("--format", metavar="NAME", help="Format of DATA, where detection fails.")]
ImageSize = Annotated[Text, typer.Option("--image-size", metavar="N", help="Resize every image to N x N.")]
Labels = Annotated[
    Text, typer.Option("--labels", metavar="FILE", help="Labels instead of the given: CSV, .npy, .pt:key.")
]
Noise = Annotated[
    Text, typer.Option("--noise", metavar="KIND:P", help="Add label noise: symmetric:P, asymmetric:P, instance:P.")
]
Ipc = Annotated[Text, typer.Option("--ipc", metavar="N", help="Synthetic images per class.")]
Method = Annotated[Text, typer.Option("--method", metavar="NAME", help="Distillation method: mtt, ftd or datm.")]
Synthesis = Annotated[
    Text, typer.Option("--synthesis", metavar="KIND", help="matching, generative (diffusion), or hybrid.")
]
Compile = Annotated[
    Text, typer.Option("--compile", metavar="MODE", help="auto, on or off: torch.compile for the steps of matching.")
]
Trust = Annotated[
    Text, typer.Option("--trust", metavar="MODE", help="on, off, or oracle (uses the clean labels, and says so).")
]
Repeats = Annotated[Text, typer.Option("--repeats", metavar="N", help="Fresh students per network.")]
Seed = Annotated[Text, typer.Option("--seed", metavar="N", help="One seed gives one result.")]
Devices = Annotated[
    Text, typer.Option("--devices", metavar="K", help="Divide the work over K processes here, on CUDA one per device.")
]
Device = Annotated[Text, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:i.")]
Preset = Annotated[
    Text, typer.Option("--preset", metavar="NAME", help="Where the config starts; see 'tadperf config'.")
]
ConfigFile = Annotated[Folder, typer.Option("--config", metavar="FILE", help="A TOML file over the preset.")]
Sets = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--set", metavar="A.B=C", help="Any field of the config, over the file; may be repeated."),
]
Out = Annotated[Folder, typer.Option("--out", metavar="DIR", help="Run folder; by default runs/<data>-....")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", callback=_set_debug, help="Show the traceback of a failure.")]

FIELDS = {
    "data": "data.path",
    "format": "data.format",
    "image_size": "data.image_size",
    "labels": "data.labels",
    "noise": "data.noise",
    "ipc": "match.ipc",
    "method": "match.method",
    "compile": "match.compile",
    "trust": "trust.mode",
    "synthesis": "synthesis",
    "experts": "experts.path",
    "repeats": "evaluate.repeats",
    "networks": "evaluate.networks",
    "seed": "seed",
    "device": "device",
    "batch": "refine.batch",
    "backend": "refine.backend",
}


@dataclass(frozen=True)
class Asked:
    """What the options say about the config."""

    preset: str | None
    file: Path | None
    sets: Sequence[str]
    options: dict[str, Any]
    quiet: bool


class RunInterruptedError(Exception):
    """Ctrl-C or SIGTERM during a run; the text says how to continue."""


class EndedError(Exception):
    """This process ends here with a code: another one has said what there was to say."""

    def __init__(self, code: int):
        self.code = code
        super().__init__(code)


class RunLostError(Exception):
    """A run that other processes took part in has lost one; the text says which and how to continue."""


def complain(message: object) -> None:
    """One line on stderr."""
    from tadperf.compute import ranks

    if ranks.environment_rank():
        message = f"rank {ranks.environment_rank()}: {message}"
    print("tadperf:", " ".join(str(message).split()), file=sys.stderr, flush=True)


def note(message: str) -> None:
    """One line on stderr that is no complaint; several ranks say it once."""
    from tadperf.compute import ranks

    if ranks.environment_rank() == 0:
        print(message, file=sys.stderr, flush=True)


def fields(**options: Any) -> dict[str, Any]:
    """Options by parameter name -> by dotted field of the config, without those that were not given."""
    return {FIELDS[name]: value for name, value in options.items() if value is not None}


def merged(asked: Asked, base: Config | None = None) -> Config:
    """The config that the options ask for, over that of a resumed run."""
    from tadperf.config.merge import merge

    return merge(asked.preset, asked.file, asked.sets, asked.options, base)


def state_preset(asked: Asked) -> None:
    """Says on stderr which preset a new run starts from, where none was named."""
    from tadperf.config.merge import default_preset

    if asked.preset is None and not asked.quiet:
        preset = default_preset(asked.file, asked.sets, asked.options)
        note(f"preset {preset} (--preset chooses another)")


def run_config(
    asked: Asked, out: Path | None, resume: bool, default_out: Callable[[Config], Path]
) -> tuple[Config, Path]:
    """The config and folder of a run; for a resumed one, options that were not given come from its config.json."""
    from tadperf.run.folder import check_run_folder, stored_config

    if not (resume and out):
        config = merged(asked)
        out = out or default_out(config)
        if not resume:
            check_run_folder(out, resume)
            return config, out
    check_run_folder(out, resume)
    return merged(asked, stored_config(out)), out


def data_name(path: str) -> str:
    """What a run folder is called after: "digits", or the file's or folder's name without its endings."""
    name = Path(path).resolve().name
    return name.split(".")[0] or name.strip(".") or "data"


@contextlib.contextmanager
def resumable(command: str, out: Path, devices: str | None = None) -> Iterator[None]:
    """Ctrl-C inside, or the loss of another process, says how the run continues."""
    try:
        yield
    except (KeyboardInterrupt, RunLostError) as error:
        again = f"--devices {devices} --resume" if devices else "--resume"
        hint = f"; continue with: tadperf {command} {again} --out {shlex.quote(str(out))}" if out.exists() else ""
        if isinstance(error, KeyboardInterrupt):
            raise RunInterruptedError(f"interrupted{hint}") from None
        raise RunLostError(f"{error}{hint}") from None


def divided(run: Callable[[], T], devices: str | None) -> T:
    """Runs in as many processes as `--devices` says, or with those that torchrun has started, or here alone.

    Only rank 0 comes back with the result; the others, and a process that has started others, end.
    """
    from tadperf.compute import launcher, ranks

    count = launcher.num_ranks(devices)
    try:
        if count > 1:
            raise EndedError(launcher.launch_ranks(count, sys.argv[1:]))
        ranks.join()
        result = run()
        leader = ranks.rank() == 0
        ranks.leave()
    except (launcher.RankDiedError, ranks.RankLostError) as error:
        raise RunLostError(str(error)) from None
    if not leader:
        raise EndedError(0)
    return result


def distilled_file(path: Path) -> Path:
    """The distilled set itself, where a run folder was named."""
    return path / "distilled.safetensors" if path.is_dir() else path


def print_json(value: object) -> None:
    """One JSON object on stdout."""
    import json

    from tadperf.files import to_json_value

    print(json.dumps(to_json_value(value), ensure_ascii=False, allow_nan=False))
