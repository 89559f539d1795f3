"""`tadperf audit`: which labels of a set not to trust, without any distillation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tadperf.cli import common

if TYPE_CHECKING:
    from tadperf.config import Config
    from tadperf.data.dataset import Dataset
    from tadperf.trust.state import TrustState

Out = Annotated[
    common.Folder,
    typer.Option(
        "--out", metavar="FILE", help="Keep the list, .csv or .parquet, and a picture of the worst beside it."
    ),
]
ENDINGS = (".csv", ".parquet")


def audit(
    data: common.Data = None,
    labels: common.Labels = None,
    noise: common.Noise = None,
    seed: common.Seed = None,
    device: common.Device = None,
    devices: common.Devices = None,
    image_size: common.ImageSize = None,
    format: common.Format = None,
    preset: common.Preset = None,
    config_file: common.ConfigFile = None,
    sets: common.Sets = None,
    out: Out = None,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """List the labels of DATA's training split that should not be trusted, the worst first."""
    options = common.fields(
        data=data,
        labels=labels,
        noise=noise,
        seed=seed,
        device=device,
        image_size=image_size,
        format=format,
        trust="on",
    )
    config = common.merged(common.Asked(preset, config_file, sets or (), options, quiet))
    _refuse(out)
    dataset, state = common.divided(lambda: _run(config, quiet), devices)
    paths = _write(out, dataset, state) if out else {}
    result = {"noise": config.data.noise} | _result(dataset, state, paths)
    if as_json:
        common.print_json(result)
    else:
        from tadperf.cli.tables import print_audit

        print_audit(result)


def _refuse(out: Path | None) -> None:
    """Refuses a file that cannot be written, before the minutes that the audit takes."""
    from tadperf.errors import UserError

    if out is None:
        return
    if out.suffix.lower() not in ENDINGS:
        raise UserError("--out", out, "must end in .csv or .parquet")
    for file in (out, out.with_suffix(".png")):
        if file.exists():
            raise UserError("--out", file, "exists already; choose another name")
    if not out.absolute().parent.is_dir():
        raise UserError("--out", out, "its folder does not exist; make it first")


def _run(config: Config, quiet: bool) -> tuple[Dataset, TrustState]:
    from tadperf.cli.progress import display
    from tadperf.data.noise import add_noise
    from tadperf.data.open import open_data
    from tadperf.trust import audit

    d = config.data
    with display(quiet) as progress:
        train, _ = open_data(d.path, format=d.format, image_size=d.image_size, labels=d.labels, progress=progress)
        train = add_noise(train, d.noise, config.seed)
        return train, audit(train, config, progress)


def _write(out: Path, dataset: Dataset, state: TrustState) -> dict[str, str]:
    from tadperf.errors import UserError
    from tadperf.report.suspects import save_suspects

    picture = out.with_suffix(".png")
    try:
        state.export(out)
        save_suspects(picture, dataset, state)
    except OSError as error:
        raise UserError("--out", out, f"cannot be written: {error.strerror}; choose another name") from None
    return {"labels": str(out), "picture": str(picture)}


def _result(dataset: Dataset, state: TrustState, paths: dict[str, str]) -> dict[str, Any]:
    """What is printed: counts, frequent confusions, the worst ten and, by clean labels where known, its worth."""
    worst = state.worst()
    worst = worst[state.issues[worst]][:10].tolist()
    names = state.class_names
    result: dict[str, Any] = {
        "data": dataset.name,
        "samples": len(state),
        "issues": int(state.issues.sum()),
        "by_class": state.counts(),
        "pairs": [{"suggested": s, "given": g, "samples": n} for s, g, n in state.pairs()],
        "worst": [
            {
                "index": i,
                "given": names[int(state.given[i])],
                "suggested": names[int(state.suggested[i])],
                "score": float(state.score[i]),
            }
            for i in worst
        ],
        "paths": paths,
    }
    if dataset.clean_labels is not None:
        from tadperf.files import to_json_value
        from tadperf.trust.metrics import compare_with_clean

        result["against_clean_labels"] = to_json_value(compare_with_clean(state, dataset.clean_labels))
    return result
