"""Guards around file parsers: their errors become one-line UserErrors, and declared sizes are checked before use."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from tadperf.data.mapped import memory_bytes
from tadperf.errors import UserError

# The largest ratio that deflate (zip, gzip) can reach, plus a margin for headers. Source: zlib, "Technical Details".
DEFLATE_RATIO = 1040
LFS_HEADER = b"version https://git-lfs"


@contextlib.contextmanager
def parser_errors(
    kind: str, value: object, remedy: str = "copy it again", field: str = "data", file: Path | None = None
) -> Iterator[None]:
    """Turns every error that a parser raises in the block into a UserError: "not a valid <kind> (reason); <remedy>".

    A parser raises nearly any exception on damaged bytes, so all of them are caught: keep the block small.
    value: the file, or the part of it, that the message names. file: the file itself, if `value` is not its path.
    """
    try:
        yield
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(field, value, f"cannot be read ({error.strerror}); check its permissions") from None
    except MemoryError:
        raise UserError(field, value, "does not fit into memory; copy it again if it should be small") from None
    except Exception as error:
        path = file if file is not None else value
        if isinstance(path, Path) and is_lfs_pointer(path):
            text = "a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
            raise UserError(field, value, text) from None
        raise UserError(field, value, f"not a valid {kind} ({reason(error)}); {remedy}") from None


def is_lfs_pointer(path: Path) -> bool:
    """Returns whether a file is the small text that Git LFS puts in place of a large file."""
    try:
        with open(path, "rb") as file:
            return file.read(len(LFS_HEADER)) == LFS_HEADER
    except OSError:
        return False


def reason(error: BaseException) -> str:
    """Returns the first line of an exception's text, at most 120 characters, or its type if it has no text."""
    first = next(iter(str(error).strip().splitlines()), "")[:120]
    return first or type(error).__name__


def require_size(
    value: object,
    shape: Sequence[int],
    item_bytes: int,
    stored_bytes: int,
    compressed: bool,
    field: str = "data",
    in_parts: bool = False,
) -> int:
    """Checks the size of an array that a header declares, before memory is allocated. Returns its size in bytes.

    in_parts: the array is read in parts, so it may exceed the memory.
    Raises UserError if a side is negative, if the array cannot come from the stored bytes, or if it exceeds the memory.
    """
    size = math.prod(shape) * item_bytes
    text = " x ".join(map(str, shape)) or "one value"
    if min(shape, default=1) < 0 or size > stored_bytes * (DEFLATE_RATIO if compressed else 1):
        raise UserError(field, value, f"declares {text} values but holds {stored_bytes} bytes; copy the file again")
    if size > memory_bytes() and not in_parts:
        room = f"{size / 2**30:.1f} GB, this machine has {memory_bytes() / 2**30:.1f} GB"
        raise UserError(field, value, f"does not fit into memory ({room}); split it into smaller files")
    return size
