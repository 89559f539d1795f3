"""Audits the labels of a data set: opens the data, runs the dual loop, writes the list and the picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from tadperf.config import Config
from tadperf.data.broken import save_broken
from tadperf.data.dataset import Dataset
from tadperf.data.label_file import LabelSet, open_label_file
from tadperf.data.matrix import open_features, open_probabilities
from tadperf.data.noise import add_noise
from tadperf.data.open import open_config
from tadperf.errors import UserError
from tadperf.files import to_json_value
from tadperf.pipeline.near_duplicates import NearDuplicates, duplicates_file, save_duplicates
from tadperf.progress import Progress, silent
from tadperf.report.drawing import save_safely
from tadperf.report.page import save_audit_page
from tadperf.report.suspects import save_suspects
from tadperf.trust.audit import audit
from tadperf.trust.evidence import audit_labels, open_evidence
from tadperf.trust.metrics import compare_with_clean
from tadperf.trust.state import TrustState

LIST_SUFFIXES = (".csv", ".parquet")
WORST = 10  # samples that the result names; the list holds all


def audit_data(
    config: Config, progress: Progress = silent, networks: bool = True
) -> tuple[Dataset | LabelSet, TrustState]:
    """Opens the training split that `config` names, with its label noise, and audits it (`tadperf.trust.audit`).

    networks: False trains none and uses trust.features, trust.probs and trust.encoder alone.
    """
    data = config.data
    train, _ = open_config(data, progress)
    train = add_noise(train, data.noise, config.seed)
    return train, audit(train, config, progress, networks)


def audit_files(config: Config, progress: Progress = silent) -> tuple[Dataset | LabelSet, TrustState]:
    """Audits data.labels by the files trust.features and trust.probs, without images (`tadperf.trust.audit_labels`).

    Raises UserError if a file is missing or wrong, and if the config asks for what needs images.
    """
    trust = config.trust
    field, path = ("--features", trust.features) if trust.features else ("--probs", trust.probs)
    if trust.encoder:
        raise UserError("--encoder", trust.encoder, "computes features of images; name DATA, a set of images")
    if config.data.labels is None:
        raise UserError(field, path, "needs the labels of its rows; give --labels FILE, or DATA, a set of images")
    data = config.data
    for option, value in (
        ("--noise", None if data.noise == "none" else data.noise),
        ("--image-size", data.image_size),
        ("--format", data.format),
        ("--skip-broken", data.skip_broken or None),
    ):
        if value is not None:
            raise UserError(option, value, "needs a set of images; name DATA")
    p = open_probabilities(trust.probs, "--probs") if trust.probs else None
    z = open_features(trust.features, "--features") if trust.features else None
    count = len(p) if p is not None else len(z) if z is not None else None
    labels = open_label_file(config.data.labels, count, None if p is None else p.shape[1])
    evidence = open_evidence(trust, labels, torch.device("cpu"), progress)
    return labels, audit_labels(labels.labels, *evidence, labels.class_names, progress, trust.budget)


def broken_file(path: Path) -> Path:
    """Returns the file for the list of broken images, next to the list of labels."""
    return path.with_name(f"{path.stem}.broken.csv")


def check_audit_file(path: Path) -> None:
    """Raises UserError if the list or its picture cannot be written. Runs before the audit, which takes minutes."""
    if path.suffix.lower() not in LIST_SUFFIXES:
        raise UserError("--out", path, f"must end in {' or '.join(LIST_SUFFIXES)}")
    for file in (path, path.with_suffix(".png"), path.with_suffix(".html"), broken_file(path), duplicates_file(path)):
        if file.exists():
            raise UserError("--out", file, "exists already; choose another name")
    if not path.absolute().parent.is_dir():
        raise UserError("--out", path, "its folder does not exist; make it first")
    if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise UserError("--out", path, "its folder cannot be written; choose another")


def write_audit(
    path: Path,
    dataset: Dataset | LabelSet,
    state: TrustState,
    result: dict[str, Any],
    duplicates: NearDuplicates | None = None,
) -> dict[str, str]:
    """Writes the list, and next to it a picture of the worst samples and a page. Returns the paths by name.

    result: of `audit_result`; the page shows it. If the page fails, logs a warning.

    Also writes a list of the images that were left out as broken, if there are any. Raises UserError if a list cannot
    be written. If the picture fails, logs a warning.
    """
    try:
        state.export(path, dataset.file_names)
        wrote_broken = isinstance(dataset, Dataset) and save_broken(broken_file(path), dataset)
        if duplicates is not None:
            save_duplicates(duplicates_file(path), duplicates)
    except OSError as error:
        raise UserError("--out", path, f"cannot be written: {error.strerror}; choose another name") from None
    picture = path.with_suffix(".png")
    paths = {"labels": str(path)} | ({"broken": str(broken_file(path))} if wrote_broken else {})
    if dataset.images is not None and save_safely(save_suspects, picture, dataset, state):
        paths["picture"] = str(picture)
    if duplicates is not None:
        paths["duplicates"] = str(duplicates_file(path))
    page, values = path.with_suffix(".html"), result | {"paths": paths}
    shown = duplicates.shown() if duplicates is not None else None
    if save_safely(save_audit_page, page, values, state, dataset.images, dataset.file_names, shown):
        paths["report"] = str(page)
    return paths


def audit_result(config: Config, dataset: Dataset | LabelSet, state: TrustState) -> dict[str, Any]:
    """Returns the counts, the confusions and the worst samples, and the quality if clean labels are known."""
    order = state.worst()
    worst = order[state.issues[order]][:WORST].tolist()
    names = state.class_names
    result: dict[str, Any] = {
        "noise": config.data.noise,
        "data": dataset.name,
        "source": dataset.source.get("path", dataset.name),
        "samples": len(state),
        "issues": int(state.issues.sum()),
        "by_class": state.counts(),
        "pairs": [
            {"suggested": suggested, "given": given, "samples": count} for suggested, given, count in state.pairs()
        ],
        "worst": [
            {
                "index": index,
                **({} if dataset.file_names is None else {"file": dataset.file_names[index]}),
                "given": names[int(state.given[index])],
                "suggested": names[int(state.suggested[index])],
                "score": float(state.score[index]),
            }
            for index in worst
        ],
        "paths": {},
    }
    if dataset.clean_labels is not None:
        result["against_clean_labels"] = to_json_value(compare_with_clean(state, dataset.clean_labels))
    return result
