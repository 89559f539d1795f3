"""`tadperf export` and `import`: sets in the layouts of other programs. `tadperf push` and `pull`: published sets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from tadperf.cli import common
from tadperf.cli.options import SharedOptions, command

if TYPE_CHECKING:
    from tadperf.pipeline.exchange import SCALES

# Optional[...] and not `| None`: typer evaluates these types on Python 3.10 too.
Text = Optional[str]  # noqa: UP045
File = Annotated[Path, typer.Argument(metavar="FILE", help="A distilled file, or the folder of its run.")]
Layout = Annotated[
    str,
    typer.Option("--to", metavar="LAYOUT", help="folder (PNG images of each class), ddranking, or mtt (.pt files)."),
]
NewFolder = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--out", metavar="DIR", help="The new folder; by default beside FILE."),
]
Mean = Annotated[Text, typer.Option("--mean", metavar="R,G,B", help="Mean of the channels, of pixels in 0..1.")]
Std = Annotated[Text, typer.Option("--std", metavar="R,G,B", help="Standard deviation of the channels.")]
Constants = Annotated[
    Text, typer.Option("--constants", metavar="NAME", help="Mean and deviation of published code: cifar or imagenet.")
]
Foreign = Annotated[
    Path,
    typer.Argument(
        metavar="PATH", help="A folder with images.pt, images_best.pt, or a folder of images for each class."
    ),
]
NewFile = Annotated[Path, typer.Option("--out", metavar="FILE", help="The distilled file to write.")]
Rate = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("--lr", metavar="X", help="Learning rate of students; by default that of lr.pt, or 0.01."),
]
Probabilities = Annotated[bool, typer.Option("--probabilities", help="Soft labels are probabilities, not logits.")]
Zca = Annotated[
    bool, typer.Option("--zca", help="Images are whitened as with --zca in MTT, FTD and DATM; needs --data.")
]
Accuracy = Annotated[
    Text,
    typer.Option("--accuracy", metavar="MEAN,SD", help="Published accuracy in percent, for evaluate --verify."),
]
Target = Annotated[str, typer.Argument(metavar="TARGET", help="A folder, or hf://user/name on the Hugging Face hub.")]
Source = Annotated[str, typer.Argument(metavar="SOURCE", help="The folder of a pushed set, or hf://user/name.")]
License = Annotated[str, typer.Option("--license", metavar="ID", help="For the card, such as cc-by-4.0.")]
Pulled = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--out", metavar="DIR", help="The new folder; by default the name of SOURCE."),
]


@command("file layout out mean std constants --json --debug")
def export(
    options: SharedOptions,
    file: File,
    layout: Layout,
    out: NewFolder = None,
    mean: Mean = None,
    std: Std = None,
    constants: Constants = None,
) -> None:
    """Write the set of FILE for other programs."""
    from tadperf.artifact import load
    from tadperf.pipeline.exchange import export_set

    file = common.distilled_file(file)
    facts = export_set(
        load(file), out or file.with_name(f"{file.stem}-{layout}"), layout, _scales(mean, std, constants)
    )
    if options.as_json:
        common.print_json(facts)
    else:
        print(facts["folder"])


@command(
    "path --data out mean std constants zca rate probabilities accuracy"
    " --image-size --config --set --json --quiet --debug"
)
def import_(
    options: SharedOptions,
    path: Foreign,
    out: NewFile,
    mean: Mean = None,
    std: Std = None,
    constants: Constants = None,
    rate: Rate = None,
    probabilities: Probabilities = False,
    zca: Zca = False,
    accuracy: Accuracy = None,
) -> None:
    """Read a set of another program into one distilled file. `evaluate`, `show` and Python open this file.

    Mean and deviation are those that the images were normalised by; without them, those of --data.
    """
    from tadperf.cli.progress import display
    from tadperf.config import Config
    from tadperf.errors import UserError
    from tadperf.pipeline.exchange import import_set

    config = options.sources.config(Config())
    given = "data.path" in options.sources.options
    scales, published = _scales(mean, std, constants), None if accuracy is None else _published(accuracy)
    with display(options.quiet) as progress:
        distilled = import_set(path, config, given, scales, rate, probabilities, progress, zca, published)
    try:
        distilled.save(out)
    except OSError as error:
        raise UserError("--out", out, f"cannot be written: {error.strerror}; choose another file") from None
    if options.as_json:
        common.print_json({"file": str(out), "images": len(distilled.images), "classes": distilled.num_classes})
    else:
        print(out)
        if not options.quiet:
            common.print_note(repr(distilled))


@command("file target license --json --debug")
def push(options: SharedOptions, file: File, target: Target, license: License = "unknown") -> None:
    """Publish the set of FILE with its figures and settings. A card (README.md) describes it."""
    from tadperf.pipeline.publish import push as push_set

    facts = push_set(common.distilled_file(file), target, license)
    if options.as_json:
        common.print_json(facts)
    else:
        print(facts.get("url", facts["target"]))


@command("source out --json --debug")
def pull(options: SharedOptions, source: Source, out: Pulled = None) -> None:
    """Get a published set. `evaluate --verify`, `show` and Python open it."""
    from tadperf.pipeline.publish import pull as pull_set

    facts = pull_set(source, out or Path(Path(source).name))
    if options.as_json:
        common.print_json(facts)
    else:
        print(facts["folder"])


def _scales(mean: str | None, std: str | None, constants: str | None) -> SCALES | None:
    """Returns mean and deviation as the user typed them, or None."""
    from tadperf.errors import UserError
    from tadperf.pipeline.exchange import CONSTANTS

    if constants is not None:
        if constants not in CONSTANTS:
            raise UserError("--constants", constants, f"must be {' or '.join(CONSTANTS)}")
        if mean or std:
            raise UserError("--constants", constants, "stands for --mean and --std; leave these out")
        return CONSTANTS[constants]
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise UserError("--mean" if mean is None else "--std", "missing", "give both --mean and --std")
    return _numbers("--mean", mean), _numbers("--std", std)


def _published(text: str) -> tuple[float, float]:
    """Returns mean and deviation as shares, from percent as papers print them."""
    from tadperf.errors import UserError

    values = _numbers("--accuracy", text, "28.3,0.5")
    if len(values) != 2 or not (1 < values[0] <= 100 and 0 <= values[1] <= 100):
        raise UserError("--accuracy", text, "must be mean and standard deviation in percent, such as 28.3,0.5")
    return values[0] / 100, values[1] / 100


def _numbers(option: str, text: str, example: str = "0.49,0.48,0.45") -> list[float]:
    from tadperf.errors import UserError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(option, text, f"must be numbers with commas between them, such as {example}") from None
