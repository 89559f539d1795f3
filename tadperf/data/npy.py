"""Reads NumPy's .npy format without NumPy's own loader. Refuses pickles, and checks the size before it allocates."""

from __future__ import annotations

from typing import IO, NamedTuple

import numpy as np

from tadperf.data.parsing import require_size
from tadperf.errors import UserError

MAGIC = b"\x93NUMPY"


class NpyHeader(NamedTuple):
    """Shape, order ("F" or "C") and type of an array, and its size in bytes."""

    shape: tuple[int, ...]
    order: str
    dtype: np.dtype
    size: int


def read_npy_header(
    file: IO[bytes], value: object, stored_bytes: int, compressed: bool, field: str = "data", in_parts: bool = False
) -> NpyHeader:
    """Reads the header at the start of a .npy file. Raises UserError on pickled objects and as `require_size` does."""
    version = np.lib.format.read_magic(file)
    parse = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = parse(file)
    if dtype.hasobject:
        remedy = "holds pickled objects, which can run code; store plain arrays of numbers or text"
        raise UserError(field, value, remedy)
    size = require_size(value, shape, dtype.itemsize, stored_bytes, compressed, field, in_parts)
    return NpyHeader(shape, "F" if fortran else "C", dtype, size)


def read_npy(
    file: IO[bytes], value: object, stored_bytes: int, compressed: bool = False, field: str = "data"
) -> np.ndarray:
    """Reads a whole .npy file. Call it inside `parser_errors`. Raises UserError as `read_npy_header` does."""
    header = read_npy_header(file, value, stored_bytes, compressed, field)
    data = bytearray(file.read(header.size + 1))
    if len(data) != header.size:
        raise ValueError(f"{len(data)} bytes; the header declares {header.size}")
    return np.frombuffer(data, header.dtype).reshape(header.shape, order="F" if header.order == "F" else "C")
