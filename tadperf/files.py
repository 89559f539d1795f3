"""Atomic file writes, safetensors and JSON files, the cache folder."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tadperf.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


# Several processes may compute the same file. All but one of them have no write access (tadperf.compute.ranks).
_write_access = True


def has_write_access() -> bool:
    """Returns whether this process writes files."""
    return _write_access


def set_write_access(allowed: bool) -> None:
    """Allows or forbids the writes of this module in this process."""
    global _write_access
    _write_access = allowed


@contextlib.contextmanager
def write_access(allowed: bool) -> Iterator[None]:
    """Sets the write access inside the block."""
    before = _write_access
    set_write_access(allowed)
    try:
        yield
    finally:
        set_write_access(before)


def write_bytes(path: Path | str, *chunks: bytes | memoryview) -> None:
    """Writes a file atomically and durably: a kill or a power failure leaves the old file or the complete new one.

    Writes a temporary file in the same folder, syncs it, renames it and syncs the folder. The mode follows the umask.
    Does nothing in a process without write access.
    """
    if not _write_access:
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with open(descriptor, "wb") as file:
                file.writelines(chunks)
                file.flush()
                os.fsync(descriptor)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # the error of a full disk names no file


def write_json(path: Path | str, value: object) -> None:
    """Writes a JSON file atomically. JSON has no NaN and no infinity: both become null.

    Bytes of a path that are not UTF-8 become escapes, which JSON readers decode.
    """
    text = json.dumps(to_json_value(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode(errors="backslashreplace"))


def to_json_value(value: Any) -> Any:
    """Converts a value for JSON: tuples, tensors and arrays become lists; other objects become text."""
    if isinstance(value, Mapping):
        return {str(key): to_json_value(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json_value(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return to_json_value(value.tolist()) if hasattr(value, "tolist") else str(value)


def save_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file atomically. Equal values give equal bytes.

    The library `safetensors` writes the metadata keys in random order, so the header is written again with sorted keys.
    Its own `save_file` neither syncs nor follows the umask.
    """
    from safetensors.torch import save

    # UTF-8 cannot encode a path with undecodable bytes; the escapes are valid in the JSON text of the metadata
    metadata = {key: text.encode(errors="backslashreplace").decode() for key, text in (metadata or {}).items()}
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = memoryview(save(contiguous, metadata))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:end]))
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    write_bytes(path, len(text).to_bytes(8, "little"), text, data[end:])


def load_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the tensors and the metadata of a safetensors file. Raises UserError if it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except FileNotFoundError:
        raise UserError("file", path, "no such file; check the path") from None
    except SafetensorError as error:
        raise UserError("file", path, f"truncated, or not a safetensors file ({error}); write it again") from None
    except OSError as error:
        raise UserError(
            "file", path, f"cannot be read ({error.strerror or error}); check the path and its permissions"
        ) from None


def cache_folder(part: str, create: bool = True) -> Path:
    """Returns $XDG_CACHE_HOME/tadperf/<part> (default: ~/.cache/tadperf/<part>). Creates it if `create` is True.

    Only the owner may open the folder, because compiled code in it is executed. Raises UserError if that fails.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(home) / "tadperf" / part
    if create:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            remedy = f"cannot be created ({error.strerror}); set XDG_CACHE_HOME to a folder that you can write"
            raise UserError("cache folder", folder, remedy) from None
    return folder
