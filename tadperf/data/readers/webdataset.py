"""Reads WebDataset's shards: tar archives in which key.jpg and key.cls or key.json are one sample."""

from __future__ import annotations

import glob
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch

from tadperf.data.archives import ENDINGS, members, read_member
from tadperf.data.decode import BitDepth, Encoded
from tadperf.data.decode_split import decode_split
from tadperf.data.image_formats import SUFFIXES
from tadperf.data.label_table import LABELS
from tadperf.data.layout import Content, Layout, ReadOptions
from tadperf.data.parsing import parser_errors
from tadperf.data.readers.parquet import group_by_split
from tadperf.data.readers.table import class_names_of
from tadperf.data.splits import choose_splits
from tadperf.data.text import display_name, nfc
from tadperf.data.walk import is_image, walk
from tadperf.errors import UserError

MAX_LABEL = 1 << 20  # bytes of a .cls or .json file
MAX_SHARDS = 100_000  # that a pattern may name
WILD = "*?{"
PEEKED = 20  # members of an archive that are read to recognise its kind


class Sample(NamedTuple):
    """An image in a shard, and the text of its label."""

    name: str
    label: str


def is_pattern(path: str | Path) -> bool:
    """Returns whether a path is a pattern of shards: "train-{0000..0009}.tar" or "train-*.tar"."""
    return any(character in str(path) for character in WILD) and str(path).lower().endswith(ENDINGS)


def holds_shards(path: Path) -> bool:
    """Returns whether a folder holds .tar files, directly or one level down, and no images."""
    tars = itertools.chain(path.glob("*.tar"), path.glob("*/*.tar"))
    return next(tars, None) is not None and not any(is_image(file.name) for file in walk(path))


def is_shard(path: Path) -> bool:
    """Returns whether one of the first members of an archive is an image or a label."""
    extensions = (_split(member.name)[1] for member, _ in itertools.islice(members(path), PEEKED))
    return any(_is_image(extension) or extension in ("cls", "json") for extension in extensions)


def read_webdataset(path: Path, options: ReadOptions) -> Layout:
    """Reads a .tar shard, a folder of shards, or a pattern of them; splits by the names of files and folders.

    A sample is an image and a label: key.cls (text), or key.json with a known field (LABELS). options.label_column
    names another field or another extension, options.image_column the extension of the images. Labels are class numbers
    0..C-1 or class names. Raises UserError on an image without a label, a label without an image, and a damaged shard.
    """
    files = group_by_split(path, _shards(path))
    chosen = choose_splits(files)
    samples = {split: [_samples(shard, options) for shard in files[name]] for split, name in chosen.items()}
    if not any(shard for shards in samples.values() for shard in shards):
        remedy = "holds no images with labels (key.jpg and key.cls or key.json); extract an archive of an image folder"
        raise UserError("data", path, remedy)
    texts = {split: [nfc(sample.label) for shard in shards for sample in shard] for split, shards in samples.items()}
    class_names = class_names_of([text for split in texts.values() for text in split])
    number = {name: c for c, name in enumerate(class_names)}

    def encoded(split: str) -> Iterator[Encoded]:
        for shard, content in zip(files[chosen[split]], samples[split], strict=True):
            yield from _encoded(shard, {sample.name for sample in content})

    depth = BitDepth(lambda: (image for split in samples for image in encoded(split)))

    def read(split: str) -> Content:
        shards = files[chosen[split]]
        labels = torch.tensor([number[text] for text in texts[split]], dtype=torch.int64)
        names = tuple(
            display_name(f"{shard.stem}/{sample.name}")
            for shard, content in zip(shards, samples[split], strict=True)
            for sample in content
        )
        return decode_split(lambda: encoded(split), labels, options, shards, depth, names)

    return Layout(class_names, {split: lambda split=split: read(split) for split in samples})


def expand_braces(pattern: str) -> list[str]:
    """Expands {0000..0012} and {a,b} in a pattern. Raises UserError above MAX_SHARDS names."""
    parts = []
    for part in re.split(r"(\{[^{}]*\})", pattern):
        numbers = re.fullmatch(r"\{(\d{1,9})\.\.(\d{1,9})\}", part)
        if numbers:
            first, last = int(numbers[1]), int(numbers[2])
            if last - first >= MAX_SHARDS:
                raise UserError("data", pattern, f"names {last - first + 1} shards; must be at most {MAX_SHARDS}")
            parts.append([f"{k:0{len(numbers[1])}}" for k in range(first, last + 1)])
        else:
            parts.append(part[1:-1].split(",") if part.startswith("{") else [part])
    count = 1
    for choices in parts:
        count *= len(choices)
    if count > MAX_SHARDS:
        raise UserError("data", pattern, f"names {count} shards; must be at most {MAX_SHARDS}")
    return ["".join(choice) for choice in itertools.product(*parts)]


def _shards(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        files = [file for file in walk(path) if file.name.lower().endswith(ENDINGS)]
    else:
        files = []
        for name in expand_braces(str(path)):
            found = sorted(glob.glob(name)) if "*" in name or "?" in name else [name]
            files += map(Path, found)
        missing = next((file for file in files if not file.is_file()), None)
        if missing is not None:
            raise UserError("data", missing, "no such file; correct the pattern, or download the shard")
    if not files:
        raise UserError("data", path, "no .tar file is there; correct the path or the pattern")
    return sorted(set(files))


def _samples(shard: Path, options: ReadOptions) -> list[Sample]:
    """Returns the samples of a shard in the order of their images. Reads its small files, and no image."""
    images: dict[str, str] = {}
    labels: dict[str, str] = {}
    wanted = options.label_column
    for member, archive in members(shard):
        key, extension = _split(member.name)
        place = f"{shard}: {member.name}"
        if extension == (options.image_column or extension) and _is_image(extension):
            if key in images:
                remedy = "is a second image of its sample; choose an extension with --set data.image_column=NAME"
                raise UserError("data", place, remedy)
            images[key] = member.name
        elif extension == (wanted or "cls"):
            labels[key] = _text(read_member(shard, member, archive, MAX_LABEL), place)
        elif extension == "json" and key not in labels:
            label = _field(read_member(shard, member, archive, MAX_LABEL), wanted, place)
            if label is not None:
                labels[key] = label
    alone = next((key for key in images if key not in labels), None) if labels else None
    if alone is not None:
        raise UserError("data", f"{shard}: {images[alone]}", "has no label; add a .cls file, or remove the image")
    alone = next((key for key in labels if key not in images), None)
    if alone is not None:
        raise UserError("data", f"{shard}: {alone}", "has a label and no image; add the image, or remove the label")
    return [Sample(name, labels[key]) for key, name in images.items()] if labels else []


def _encoded(shard: Path, names: set[str]) -> Iterator[Encoded]:
    for member, archive in members(shard):
        if member.name in names:
            yield Encoded(f"{shard}: {member.name}", read_member(shard, member, archive))


def _split(name: str) -> tuple[str, str]:
    """Splits "a/0001.seg.png" into "a/0001" and "seg.png". A hidden file has no extension."""
    path = PurePosixPath(name)
    if path.name.startswith((".", "__")):
        return name, ""
    start, _, extension = path.name.partition(".")
    return str(path.with_name(start)) if start else name, extension.lower()


def _is_image(extension: str) -> bool:
    return f".{extension}".endswith(SUFFIXES)


def _text(data: bytes, place: str) -> str:
    with parser_errors("text in UTF-8", place, "write the label as text"):
        text = data.decode("utf-8").strip()
        if not text or "\n" in text:
            raise ValueError("empty" if not text else "several lines")
    return text


def _field(data: bytes, wanted: str | None, place: str) -> str | None:
    """Returns the label in a JSON object as text, or None if it has no known field."""
    with parser_errors("JSON object", place, "write an object with the field label"):
        content = json.loads(data)
        if not isinstance(content, dict):
            raise ValueError(f"a JSON {type(content).__name__}")
    name = next((name for name in ([wanted] if wanted else LABELS) if name in content), None)
    if name is None:
        return None
    value = content[name]
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise UserError("data", place, f"its {name} is {str(value)[:40]!r}; must be an integer or a class name")
    return str(value).strip()
