"""Reads files of torch.save from others. No code in a file runs."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tadperf.data.parsing import parser_errors, reason, require_size
from tadperf.errors import UserError


def load_torch_file(path: Path, field: str, mapped: bool = False) -> Any:
    """Returns the tensors, lists and dicts of a file that torch.save wrote, on the CPU.

    mapped: the tensors are memory-mapped, so that only those that are used are read.

    Raises UserError, with `field`, if the file is missing or damaged, holds anything else, or does not fit into memory.
    """
    if not path.is_file():
        raise UserError(field, path, "no such file; check the path")
    with parser_errors("file of torch.save", path, "copy it again", field):
        archived = zipfile.is_zipfile(path)
        if archived:
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    require_size(path, (member.file_size,), 1, member.compress_size, True, field, mapped)
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and archived)
        except pickle.UnpicklingError as error:
            lines = [line for line in str(error).splitlines() if "GLOBAL" in line or "nsupported" in line]
            text = lines[0].strip()[:150] if lines else reason(error)
            raise UserError(field, path, f"refused, it holds more than plain tensors ({text})") from None


def load_tensor(path: Path, field: str) -> Tensor:
    """Returns the only tensor of a file of torch.save. Raises UserError as `load_torch_file`, and for anything else."""
    content = load_torch_file(path, field)
    if isinstance(content, dict) and len(content) == 1:
        (content,) = content.values()
    if not isinstance(content, Tensor) or content.layout != torch.strided or content.is_quantized:
        raise UserError(field, path, f"holds a {type(content).__name__}; must hold one dense tensor")
    return content.detach()
