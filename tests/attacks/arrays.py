"""Makes .npz, .safetensors and idx files whose headers do not fit their content: python arrays.py FOLDER."""

from __future__ import annotations

import gzip
import io
import json
import struct
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np


def npy(shape: str, dtype: str = "|u1", data: bytes = b"") -> bytes:
    """Returns a .npy file whose header has the text `shape`, right or wrong."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def write_npz(path: Path, images: bytes, labels: bytes, kind: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", kind) as archive:
        archive.writestr("images.npy", images)
        archive.writestr("labels.npy", labels)
    return path


def write_safetensors(path: Path, header: dict[str, object] | bytes, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def write_idx(folder: Path, sizes: Iterable[int], data: bytes, packed: bool) -> Path:
    folder.mkdir()
    images = b"\0\0\x08\x03" + b"".join(size.to_bytes(4, "big") for size in sizes) + data
    labels = b"\0\0\x08\x01\0\0\0\x02\0\x01"
    for name, content in (("images-idx3", images), ("labels-idx1", labels)):
        ending = ".gz" if packed else ""
        (folder / f"train-{name}-ubyte{ending}").write_bytes(gzip.compress(content) if packed else content)
    return folder


def saved(array: np.ndarray, pickled: bool = False) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=pickled)
    return stream.getvalue()


def make(folder: Path) -> dict[str, Path]:
    """Writes one file per attack and returns their paths by name."""
    images, labels = saved(np.zeros((2, 8, 8), np.uint8)), saved(np.array([0, 1]))
    tensor = {"dtype": "U8", "shape": [2, 8, 8], "data_offsets": [0, 128]}
    pair = {"labels": {"dtype": "I64", "shape": [2], "data_offsets": [128, 144]}}
    pixels, numbers, huge_label = bytes(128), struct.pack("<qq", 0, 1), struct.pack("<qq", 0, 2**62)
    beyond = {**tensor, "data_offsets": [0, 2**50]}
    empty = {"dtype": "U8", "shape": [2**40, 1, 0, 0], "data_offsets": [0, 0]}
    names = [
        ("npz: an array of 2**60 bytes in a file of 1 KB", write_npz, (npy("(1152921504606846976,)"), labels)),
        ("npz: a shape whose product overflows", write_npz, (npy("(4294967296, 4294967296, 4)"), labels)),
        ("npz: a negative side", write_npz, (npy("(-2, 8, 8)", data=bytes(128)), labels)),
        ("npz: a bomb of 4 GB", write_npz, (npy("(67108864, 8, 8)", data=bytes(1000)), labels)),
        ("npz: 2**40 images without pixels", write_npz, (npy("(1099511627776, 0, 0)"), labels)),
        ("npz: a header that is code", write_npz, (npy("__import__('os').system('touch it_ran')"), labels)),
        ("npz: a header of deep brackets", write_npz, (npy("(" * 3000), labels)),
        ("npz: label 2**62", write_npz, (images, saved(np.array([0, 2**62])))),
        ("npz: pickled labels", write_npz, (images, saved(np.array([{}, {}], dtype=object), pickled=True))),
        ("safetensors: a header of 2**62 bytes", write_safetensors, (b"",)),
        (
            "safetensors: offsets beyond the file",
            write_safetensors,
            ({"images": beyond},),
        ),
        ("safetensors: 2**40 images without pixels", write_safetensors, ({"images": empty, **_shift(pair)}, numbers)),
        (
            "safetensors: label 2**62",
            write_safetensors,
            ({"images": tensor, **pair}, pixels + huge_label),
        ),
        ("safetensors: deep JSON", write_safetensors, (b"[" * 100000,)),
        ("idx: 2**32 images in 200 bytes", write_idx, ((2**32 - 1, 8, 8), bytes(128), False)),
        ("idx: every size is the largest", write_idx, ((2**32 - 1,) * 3, bytes(128), True)),
        ("idx: sides of zero", write_idx, ((2, 0, 0), b"", False)),
        ("idx.gz: a bomb of 256 MB behind two images", write_idx, ((2, 8, 8), bytes(1 << 28), True)),
    ]
    files = {}
    for k, (name, write, arguments) in enumerate(names):
        suffix = name.partition(":")[0]
        place = folder / f"arrays-{k}{'' if suffix.startswith('idx') else '.' + suffix}"
        files[name] = write(place, *arguments)
    huge = files["safetensors: a header of 2**62 bytes"]
    huge.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    return files


def _shift(tensors: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    return {name: {**tensor, "data_offsets": [0, 16]} for name, tensor in tensors.items()}


if __name__ == "__main__":
    print("\n".join(map(str, make(Path(sys.argv[1])).values())))
