"""`tadperf audit`: finds the wrong labels of a data set, without distillation."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from tadperf.cli import common
from tadperf.cli.options import SharedOptions, command

if TYPE_CHECKING:
    from tadperf.config import Config
    from tadperf.data.dataset import Dataset
    from tadperf.data.label_file import LabelSet
    from tadperf.pipeline.near_duplicates import NearDuplicates
    from tadperf.trust.state import TrustState

Out = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--out",
        metavar="FILE",
        help="Write the list (.csv or .parquet), and next to it a picture of the worst samples and a page (.html).",
    ),
]

DualLoop = Annotated[
    bool,
    typer.Option(
        "--dual-loop",
        help="With images and --features, --probs or --encoder: train the networks too, and use all signals. By "
        "default no network is trained then.",
    ),
]


Apply = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--apply",
        metavar="DIR",
        help="Write a cleaned copy of an image folder (links), or corrected labels of another set, into a new folder.",
    ),
]


Near = Annotated[
    bool,
    typer.Option(
        "--near-duplicates",
        help="Also list near duplicates in the training split, and between it and the test split. Compares pixels, and "
        "features if given.",
    ),
]


@command(
    "DATA --labels --seed --device --devices --image-size --skip-broken --format --preset --config --set out "
    "apply near_duplicates --noise --features --probs --encoder dual_loop --estimate --json --quiet --debug"
)
def audit(
    options: SharedOptions,
    out: Out = None,
    apply: Apply = None,
    dual_loop: DualLoop = False,
    near_duplicates: Near = False,
) -> None:
    """List labels that are probably wrong, the worst first. The labels are those of DATA's training split.

    The list has a row for each sample. Its columns are file (for sets of files), index, verdict, score, given_label,
    suggested_label, label (empty if untrusted), reliability, round, and the class numbers given_number,
    suggested_number and label_number; the page next to the list explains them. Give it back with --labels: only the
    column label counts, and a sample without a label is left out.

    DATA may be left out with --labels and --features or --probs: such an audit needs no images, so it works for text,
    tables and sound. With images, --features, --probs or --encoder replace the networks that an audit trains.
    """
    from tadperf.pipeline.audit import audit_result, check_audit_file, write_audit

    config, has_images = _config(options)
    if options.estimate:
        return _show_estimate(options, config, has_images and (dual_loop or not _has_evidence(config)))
    if out:
        check_audit_file(out)
    if apply:
        from tadperf.pipeline.repair import check_apply

        check_apply(apply, config)
    run = partial(_audit, config, has_images, dual_loop, options.quiet)
    dataset, state = common.run_in_ranks(run, options.devices)
    result = audit_result(config, dataset, state)
    duplicates = _find_duplicates(config, dataset, result, options.quiet) if near_duplicates else None
    if out:
        result["paths"] = write_audit(out, dataset, state, result, duplicates)
        if not has_images and not options.quiet:
            common.print_note("no picture: this audit has no images")
    if apply:
        from tadperf.pipeline.repair import apply_verdicts

        result["applied"] = apply_verdicts(apply, dataset, state)
    if options.as_json:
        common.print_json(result)
    else:
        from tadperf.cli.tables import print_audit

        print_audit(result)
        if apply:
            from tadperf.cli.apply import print_applied

            print_applied(result["applied"])


def _show_estimate(options: SharedOptions, config: Config, trains: bool) -> None:
    from tadperf.cli.estimate import show_audit_estimate

    show_audit_estimate(options, config, trains)


def _find_duplicates(
    config: Config, dataset: Dataset | LabelSet, result: dict[str, Any], quiet: bool
) -> NearDuplicates:
    """Finds near duplicates and adds their counts to the result."""
    from tadperf.cli.progress import display
    from tadperf.pipeline.near_duplicates import duplicates_result, list_duplicates, user_features

    with display(quiet) as progress:
        found = list_duplicates(dataset, user_features(config, dataset, progress), progress)
    result["near_duplicates"] = duplicates_result(found)
    return found


def _config(options: SharedOptions) -> tuple[Config, bool]:
    """Returns the config, and whether the audit has images: without DATA, it has none if files replace them."""
    from dataclasses import replace

    given = {**options.sources.options, "trust.mode": "on"}
    config = replace(options.sources, options=given).config()
    if "data.path" in given or config.data.path != "digits" or not _has_evidence(config):
        return config, True
    # The presets add noise to the built-in digits, which are not used.
    return replace(options.sources, options={"data.noise": "none"} | given).config(), False


def _has_evidence(config: Config) -> bool:
    return any((config.trust.features, config.trust.probs, config.trust.encoder))


def _audit(config: Config, has_images: bool, dual_loop: bool, quiet: bool) -> tuple[Dataset | LabelSet, TrustState]:
    from tadperf.cli.progress import display
    from tadperf.errors import UserError
    from tadperf.pipeline.audit import audit_data, audit_files

    with display(quiet) as progress:
        if not has_images:
            if dual_loop:
                raise UserError("--dual-loop", "no images", "trains networks on images; name DATA")
            return audit_files(config, progress)
        return audit_data(config, progress, networks=dual_loop or not _has_evidence(config))
