"""Writes a cleaned copy of a data set, from the verdicts of an audit or a run. Never changes the data set itself."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tadperf.compute.versions import tadperf_version
from tadperf.config import Config
from tadperf.data.dataset import Dataset
from tadperf.data.label_file import LabelSet
from tadperf.data.labels import replace_labels
from tadperf.data.open import open_config
from tadperf.data.splits import split_of_folder
from tadperf.data.text import display_name
from tadperf.data.walk import visible_folders, walk
from tadperf.errors import UserError
from tadperf.progress import Progress, silent
from tadperf.refine.start import starting_trust
from tadperf.run.folder import stored_config
from tadperf.trust.state import RELABELLED, UNTRUSTED, VERDICTS, TrustState, as_given

FIELD = "--apply"
MAX_BYTES = 200  # of a folder's name; file systems allow 255
SMALL_IMAGE = 8  # pixels; images are opened for their names and labels only
LINKS: dict[str, Callable[[Path, Path], object]] = {  # the first one that the file system allows is used
    "symbolic links": lambda source, target: os.symlink(source, target),
    "hard links": lambda source, target: os.link(source.resolve(), target),
    "copies": lambda source, target: shutil.copy2(source, target),
}


class Action(NamedTuple):
    """What happens to one file: `target` is its path in the copy, "" if it is left out."""

    file: str
    source: Path
    target: str
    given_label: str
    label: str
    verdict: str
    score: float


def check_apply(out: Path, config: Config, field: str = FIELD) -> None:
    """Raises UserError if the copy cannot be written, or must not be. Runs before the audit, which takes minutes.

    field: what the user typed for `out`, for the message.
    """
    if config.data.noise != "none":
        remedy = f"writes files by their labels, but these have simulated noise ({config.data.noise}); use --noise none"
        raise UserError(field, out, remedy)
    if os.path.lexists(out):
        raise UserError(field, out, "exists already; choose another folder")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise UserError(field, out, "the folder above it does not exist; make it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(field, out, "the folder above it cannot be written; choose another")
    data = Path(config.data.path).expanduser()
    if data.is_dir() and data.resolve() in parent.resolve().joinpath(out.name).parents:
        raise UserError(field, out, "lies inside the data, which must not change; choose a folder outside")


def apply_verdicts(
    out: Path, dataset: Dataset | LabelSet, state: TrustState, test: Dataset | None = None
) -> dict[str, Any]:
    """Writes the cleaned copy into the new folder `out` and returns what was done, as in its manifest.json.

    An image folder becomes train/<class>/<file> by the working labels, without untrusted images. Its test split is
    linked as it is. Files are symbolic links, or hard links or copies if the file system has no links. manifest.csv
    has a row for each training image. Other sets get labels.csv, for `--labels`, with an empty label if untrusted.
    test: the test split, if it was made from the training images of the folder. The copy appears when it is complete:
    a kill leaves at most a hidden folder with the ending .tmp. Raises UserError if it cannot be written.
    """
    summary: dict[str, Any] = {
        "tadperf": tadperf_version(),
        "source": str(dataset.source.get("path", dataset.name)),
        "samples": len(state),
        "kept": int((state.trusted & (state.verdict != RELABELLED)).sum()),
        "relabelled": int((state.verdict == RELABELLED).sum()),
        "left_out": int((state.verdict == UNTRUSTED).sum()),
    }
    with new_folder(out) as folder:
        if isinstance(dataset, Dataset) and dataset.source.get("format") == "folder" and dataset.file_names:
            summary["files"] = _copy_folder(folder, dataset, state, test)
        else:
            summary["files"] = "labels.csv"
            (folder / "labels.csv").write_bytes(_labels_csv(dataset, state))
        (folder / "manifest.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return {**summary, "folder": str(out)}


def apply_run(run: Path, out: Path, progress: Progress = silent) -> dict[str, Any]:
    """Writes a cleaned copy of the data of a run by the run's verdicts, without a new audit.

    Raises UserError if the folder is no run, has no verdicts, or its data have changed.
    """
    config = stored_config(run)
    if config is None:
        raise UserError("RUN", run, "is not a run folder: config.json is missing; give the folder of a run")
    check_apply(out, config, "OUT")
    data = config.data.model_copy(update={"image_size": SMALL_IMAGE})
    train, test = open_config(data, progress, data.test_share)
    return apply_verdicts(out, train, starting_trust(run, train), test)


def apply_list(config: Config, out: Path, progress: Progress = silent) -> dict[str, Any]:
    """Writes a cleaned copy of an image folder by a list of labels, data.labels, such as a corrected labels.csv.

    An image whose label in the list is empty is left out; one with another label than its folder's moves to that class.
    Raises UserError if there is no list, if it does not fit, or if the data are no image folder.
    """
    check_apply(out, config, "OUT")
    if config.data.labels is None:
        raise UserError("DATA", config.data.path, "is not a run folder; add --labels FILE, the list of labels to apply")
    data = config.data.model_copy(update={"image_size": SMALL_IMAGE, "labels": None})
    train, test = open_config(data, progress)
    labelled = replace_labels(train, config.data.labels)
    if train.source["format"] != "folder" or train.file_names is None or labelled.file_names is None:
        raise UserError("DATA", config.data.path, "is no image folder; use the list itself with --labels")
    row = {name: i for i, name in enumerate(train.file_names)}
    kept = torch.tensor([row[name] for name in labelled.file_names])
    state = as_given(train.labels, train.class_names)
    working = train.labels.clone()
    working[kept] = labelled.labels
    verdict = torch.full_like(state.verdict, UNTRUSTED)
    verdict[kept] = ((labelled.labels != train.labels[kept]) * RELABELLED).to(verdict.dtype)
    suspected = (verdict != 0).float()
    reliability = (verdict != UNTRUSTED).float()
    fields = {"working": working, "suggested": working, "verdict": verdict, "score": suspected}
    return apply_verdicts(out, train, replace(state, **fields, reliability=reliability), test)


@contextlib.contextmanager
def new_folder(out: Path, field: str = FIELD) -> Iterator[Path]:
    """Yields an empty hidden folder next to `out`, which gets the name `out` if the block succeeds.

    field: what the user typed for `out`, for the message.
    """
    folder = out.absolute().with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            folder.mkdir()
            yield folder
            if os.path.lexists(out):
                raise UserError(field, out, "exists already; choose another folder")
            os.rename(folder, out)
        except OSError as error:
            raise UserError(
                field, out, f"cannot be written: {error.strerror or error}; choose another folder"
            ) from None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _copy_folder(folder: Path, dataset: Dataset, state: TrustState, test: Dataset | None) -> str:
    """Links the images into train/<class>/, and the test split. Writes manifest.csv. Returns the kind of links."""
    root = Path(os.path.abspath(dataset.source["path"]))
    assert dataset.file_names is not None
    place = Placer(folder)
    classes = place.class_folders("train", dataset.class_names)
    sources = _source_files(root, dataset.file_names)
    actions = []
    for i, (name, source) in enumerate(zip(dataset.file_names, sources, strict=True)):
        working, verdict = int(state.working[i]), int(state.verdict[i])
        target = "" if verdict == UNTRUSTED else place.link(source, classes[working], f"-{i}")
        given, label = dataset.class_names[int(state.given[i])], dataset.class_names[working] if target else ""
        actions.append(Action(name, source, target, given, label, VERDICTS[verdict], float(state.score[i])))
    _link_test_split(place, root, sources, test)
    rows = [(a.file, a.target, a.given_label, a.label, a.verdict, a.score) for a in actions]
    header = ("file", "target", "given_label", "label", "verdict", "score")
    (folder / "manifest.csv").write_bytes(_csv([header, *rows]))
    return place.kind


def _link_test_split(place: Placer, root: Path, sources: list[Path], test: Dataset | None) -> None:
    """Links the other split folders of the source as they are, or the images of a test split made from train."""
    splits = _other_splits(root, sources)
    if splits is not None:
        for path in splits:
            place.link_folder(path)
    elif test is not None and test.file_names is not None:
        classes = place.class_folders("test", test.class_names)
        for i, source in enumerate(_source_files(root, test.file_names)):
            place.link(source, classes[int(test.labels[i])], f"-{i}")


def _other_splits(root: Path, sources: list[Path]) -> list[Path] | None:
    """Returns the split folders beside the one that holds all training images; None if there is no such folder."""
    folders = sources[0].relative_to(root).parts[:-2]
    for depth, name in enumerate(folders, 1):
        train = root.joinpath(*folders[:depth])
        if split_of_folder(name) and all(train in source.parents for source in sources):
            return [path for path in visible_folders(train.parent) if split_of_folder(path.name) and path != train]
    return None


class Placer:
    """Puts files into the new folder under names that are free, with the kind of links that the file system allows."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.kind = folder, next(iter(LINKS))
        self._taken: set[str] = set()

    def class_folders(self, split: str, class_names: tuple[str, ...]) -> list[str]:
        """Makes a folder for each class and returns their paths, relative to the new folder."""
        paths = [self._free(split, safe_name(name), f"-{c}") for c, name in enumerate(class_names)]
        for path in paths:
            (self.folder / path).mkdir(parents=True)
        return paths

    def link(self, source: Path, parent: str, mark: str) -> str:
        """Links a file into a folder. Returns its path in the copy. mark: added to a name that is taken."""
        target = self._free(parent, source.name, mark)
        self._place(source, self.folder / target)
        return display_name(target)

    def link_folder(self, source: Path) -> None:
        """Links a folder, or makes a folder and links its files if the copy has no symbolic links."""
        for file in walk(source):
            target = self.folder / source.name / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            self._place(file, target)

    def _place(self, source: Path, target: Path) -> None:
        kinds = list(LINKS)
        for kind in kinds[kinds.index(self.kind) :]:
            try:
                LINKS[kind](source, target)
            except OSError:
                if kind == kinds[-1]:
                    raise
                continue
            self.kind = kind
            return

    def _free(self, parent: str, name: str, mark: str) -> str:
        """Returns parent/name, with the mark before the suffix if the name is taken, also on disks that ignore case."""
        stem, suffix = os.path.splitext(name)
        path, count = f"{parent}/{name}", 0
        while path.casefold() in self._taken:
            path = f"{parent}/{stem}{mark}{f'-{count}' if count else ''}{suffix}"
            count += 1
        self._taken.add(path.casefold())
        return path


def safe_name(name: str) -> str:
    """Returns a class name as the name of a visible folder: no separators or control characters, limited length."""
    text = re.sub(r"[/\\\x00-\x1f\x7f]", "_", name.encode(errors="backslashreplace").decode())
    text = "_" + text if text.startswith(".") or not text.strip() else text
    return text.encode()[:MAX_BYTES].decode(errors="ignore")


def _source_files(root: Path, names: tuple[str, ...]) -> list[Path]:
    """Returns the file of each name. A name differs from the path on disk if the path is not UTF-8 in form NFC.

    Raises UserError if a file is missing, or if two files have the same name.
    """
    if len(set(names)) < len(names):
        twice = next(name for k, name in enumerate(names) if name in names[:k])
        raise UserError(FIELD, twice, "is the name of two files that differ in their Unicode form only; rename one")
    by_name: dict[str, Path] = {}
    files = []
    for name in names:
        file = root / name
        if not file.is_file():
            by_name = by_name or {display_name(found.relative_to(root).as_posix()): found for found in walk(root)}
            file = by_name.get(name, file)
        if not file.is_file():
            raise UserError(FIELD, file, "is missing; the data have changed since they were opened")
        files.append(file)
    return files


def _labels_csv(dataset: Dataset | LabelSet, state: TrustState) -> bytes:
    """Returns the labels in the order of the data, as `--labels` reads them."""
    names = state.class_names
    header = (
        *(["file"] if dataset.file_names is not None else []),
        "index",
        "label",
        "given_label",
        "verdict",
        "score",
    )
    rows = [
        (
            *([dataset.file_names[i]] if dataset.file_names is not None else []),
            i,
            "" if verdict == UNTRUSTED else names[working],
            names[given],
            VERDICTS[verdict],
            score,
        )
        for i, (working, given, verdict, score) in enumerate(
            zip(*(x.tolist() for x in (state.working, state.given, state.verdict, state.score)), strict=True)
        )
    ]
    return _csv([header, *rows])


def _csv(rows: list[tuple[Any, ...]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode(errors="backslashreplace")
