"""Opens the matrices that users bring: features [N, D] and class probabilities [N, C], as files of floats.

Files stay memory-mapped where their format allows it, and checks read them in blocks.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from tadperf.data.convert import as_tensor
from tadperf.data.dataset import describe_tensor
from tadperf.data.npy import read_npy, read_npy_header
from tadperf.data.parsing import parser_errors, require_size
from tadperf.errors import UserError

SUFFIXES = (".npy", ".npz", ".pt", ".pth", ".safetensors")
BLOCK = 2**22  # numbers checked at a time: 16 MB in float32; not tuned
ROW_SUM_TOLERANCE = 0.01  # bfloat16 rounds each probability by up to 0.2 %


def open_features(path: Path | str, field: str = "features", count: int | None = None) -> Tensor:
    """Opens features [N, D] of any float type. count: the number of rows that the file must have; None allows any.

    Raises UserError, with `field` as its field, if the file cannot be read, is not a matrix of finite floats or has
    another number of rows.
    """
    return check_features(_open(Path(path), field), path, field, count)


def open_probabilities(
    path: Path | str, field: str = "probs", count: int | None = None, classes: int | None = None
) -> Tensor:
    """Opens class probabilities [N, C] as `open_features` does. classes: the number of columns; None allows any.

    Raises UserError also for logits, and for rows that do not sum to 1.
    """
    return check_probabilities(_open(Path(path), field), path, field, count, classes)


def check_features(z: Tensor, value: object, field: str = "features", count: int | None = None) -> Tensor:
    """Returns the features. Raises UserError as `open_features` does; `value` stands for the file."""
    _check_shape(z, value, field, count)
    for start, block in row_blocks(z):
        _check_finite(block, start, value, field)
    return z


def check_probabilities(
    p: Tensor, value: object, field: str = "probs", count: int | None = None, classes: int | None = None
) -> Tensor:
    """Returns the probabilities. Raises UserError as `open_probabilities` does; `value` stands for the file."""
    _check_shape(p, value, field, count)
    if p.shape[1] < 2 or classes not in (None, p.shape[1]):
        needed = "2 columns or more" if classes is None else f"{classes} columns, one for each class"
        raise UserError(field, value, f"has {p.shape[1]} columns; must have {needed}")
    for start, block in row_blocks(p):
        _check_finite(block, start, value, field)
        outside = (block < 0) | (block > 1 + ROW_SUM_TOLERANCE)
        if outside.any():
            row = int(outside.any(1).nonzero()[0])
            number = float(block[row][outside[row]][0])
            remedy = f"holds {number:g} in row {start + row}; probabilities are in [0, 1]: apply softmax to logits"
            raise UserError(field, value, remedy)
        wrong = ((block.sum(1) - 1).abs() > ROW_SUM_TOLERANCE).nonzero()
        if len(wrong):
            row = int(wrong[0])
            remedy = f"row {start + row} sums to {float(block[row].sum()):g}; every row must sum to 1: normalise it"
            raise UserError(field, value, remedy)
    return p


def row_blocks(matrix: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yields the first row and the rows of every block, as float32 or float64, at most BLOCK numbers each."""
    step = max(1, BLOCK // max(matrix.shape[1], 1))
    for start in range(0, len(matrix), step):
        block = matrix[start : start + step]
        yield start, block if block.dtype == torch.float64 else block.float()


def _check_shape(matrix: Tensor, value: object, field: str, count: int | None) -> None:
    if matrix.ndim != 2 or not matrix.is_floating_point() or not matrix.numel():
        remedy = f"holds {describe_tensor(matrix)}; must be a matrix of floats, one row for each sample"
        raise UserError(field, value, remedy)
    if count is not None and len(matrix) != count:
        raise UserError(field, value, f"has {len(matrix)} rows for {count} labels; must have one row for each label")


def _check_finite(block: Tensor, start: int, value: object, field: str) -> None:
    finite = block.isfinite().all(1)
    if not finite.all():
        row = start + int((~finite).nonzero()[0])
        raise UserError(field, value, f"NaN or infinite value in row {row}; must be finite")


def _open(path: Path, field: str) -> Tensor:
    """Opens the one array in a file. Raises UserError if the file is missing, damaged or of an unknown format."""
    if not path.is_file():
        raise UserError(field, path, f"no such file; name a file that ends in {', '.join(SUFFIXES)}")
    readers = {".npy": _open_npy, ".npz": _read_npz, ".pt": _open_pt, ".pth": _open_pt, ".safetensors": _open_tensors}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise UserError(field, path, f"unknown format; must end in {', '.join(SUFFIXES)}")
    with parser_errors(f"{suffix} file", path, "write it again", field):
        return readers[suffix](path, field)


def _open_npy(path: Path, field: str) -> Tensor:
    """Maps a .npy file. Only a file in a foreign byte order is copied into memory."""
    with open(path, "rb") as file:
        header = read_npy_header(file, path, path.stat().st_size, False, field, in_parts=True)
        offset = file.tell()
    if offset + header.size > path.stat().st_size:
        raise ValueError(f"shorter than the {header.size} bytes that its header declares")
    if not header.size:
        return torch.empty(header.shape)
    order = "F" if header.order == "F" else "C"
    # mode "c" copies on write: PyTorch needs writable memory, and the file must not change
    return as_tensor(field, np.memmap(path, header.dtype, "c", offset, header.shape, order))


def _read_npz(path: Path, field: str) -> Tensor:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) != 1:
            names = ", ".join(member.filename.removesuffix(".npy") for member in members)[:200] or "none"
            raise UserError(field, path, f"must hold one array, holds {len(members)}: {names}; store it alone")
        with archive.open(members[0]) as file:
            compressed = members[0].compress_type != zipfile.ZIP_STORED
            return as_tensor(field, _read_member(file, path, members[0].compress_size, compressed, field))


def _read_member(file: IO[bytes], path: Path, stored: int, compressed: bool, field: str) -> np.ndarray:
    return read_npy(file, path, stored, compressed, field)


def _open_pt(path: Path, field: str) -> Tensor:
    """Reads a tensor that torch.save wrote. No code in the file runs."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                require_size(path, (member.file_size,), 1, member.compress_size, True, field)
    return _single(torch.load(path, map_location="cpu", weights_only=True), path, field)


def _open_tensors(path: Path, field: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = list(file.keys())
        return _single({name: file.get_tensor(name) for name in names[:2]} if names else {}, path, field)


def _single(content: object, path: Path, field: str) -> Tensor:
    """Returns the tensor, or the only tensor of a dict."""
    if isinstance(content, dict) and len(content) == 1:
        (content,) = content.values()
    if not isinstance(content, Tensor):
        raise UserError(field, path, "must hold one tensor; store the matrix alone")
    return content.detach()
