"""Makes pickles and archives that run code, take memory or leave their folder: python pickles.py FOLDER."""

from __future__ import annotations

import io
import os
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np


class Runs:
    """An object whose pickle calls a function that makes the folder it_ran."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder / "it_ran"),)


def make(folder: Path) -> dict[str, Path]:
    """Writes one data set per attack and returns their paths by name."""
    good = pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}, 2)
    huge_shape = pickle.dumps(np.zeros(3, np.uint8), 2).replace(b"K\x03\x85", b"J\xff\xff\xff\x7f\x85")
    batches = {
        "a pickle that makes a folder": pickle.dumps({"data": Runs(folder), "labels": [0]}, 2),
        "a pickle that names a function of builtins": b"c__builtin__\neval\n(Vopen('it_ran', 'w')\ntR.",
        "a memo index of 2**31: 16 GB of pointers": b"\x80\x02}r\xff\xff\xff\x7f.",
        "a memo index in text": b"\x80\x02}p2147483647\n.",
        "bytes of 2**60": b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b"x.",
        "an array of 2**31 - 1 bytes in three": huge_shape,
        "nested lists": b"\x80\x02" + b"]" * 20000 + b"a" * 19999 + b".",
        "a codec that is a compressor": b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x0a\x00\x00\x00zlib_codectR.",
    }
    sets = {}
    for k, (name, batch) in enumerate(batches.items()):
        place = folder / f"pickles-{k}"
        place.mkdir()
        (place / "data_batch_1").write_bytes(batch)
        sets[name] = place
    sparse = tarfile.TarInfo("set/data_batch_1")
    sparse.size = 2**40
    above = tarfile.TarInfo("../../it_ran")
    above.size = len(good)
    for k, (name, member, content) in enumerate(
        [("a member of 2**40 bytes", sparse, b""), ("a member above the archive", above, good)]
    ):
        file = folder / f"archive-{k}.tar"
        with tarfile.open(file, "w") as archive:
            if content:
                archive.addfile(member, io.BytesIO(content))
        if not content:
            file.write_bytes(member.tobuf() + bytes(1024))
        sets[name] = file
    return sets


if __name__ == "__main__":
    print("\n".join(map(str, make(Path(sys.argv[1])).values())))
