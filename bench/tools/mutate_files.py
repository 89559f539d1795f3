"""Damages valid files at random and opens them: each must open, or be refused with a UserError of one line.

Run `python -m tadperf.bench.tools.mutate_files --count 2000`. Prints one line per format: the numbers of opened files,
refused files and faults, the slowest case, and the peak memory of the process. A fault is another exception, a case of
more than 10 seconds or 2 GB, or output on stderr. --format NAME --first SEED --count 1 repeats one case.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import os
import pickle
import resource
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tadperf.data.labels import replace_labels
from tadperf.data.open import open_data
from tadperf.errors import UserError, printable

COUNT, SIDE = 12, 8  # images per split, pixels per side
MAX_SECONDS, MAX_MEMORY_MB = 10.0, 2048
LABELS = np.arange(COUNT) % 3
BIG = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)
IMAGE_FORMATS = (
    "png",
    "jpg",
    "gif",
    "webp",
    "bmp",
    "ppm",
    "tga",
    "jp2",
    "avif",
    "tif-raw",
    "tif-lzw",
    "tif-jpeg",
    "tif16",
)


class Case(NamedTuple):
    """A format: writes a valid set into a folder, and returns the file to damage and the function that opens it."""

    write: Callable[[Path], tuple[Path, Callable[[], object]]]


class Summary(NamedTuple):
    """The outcome of all mutations of a format. faults: seed and description."""

    opened: int
    refused: int
    faults: list[tuple[int, str]]
    slowest: float


def pixels() -> np.ndarray:
    """Returns uint8 [N, H, W, 3]."""
    return np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)


def mutate(data: bytes, random: np.random.Generator) -> bytes:
    """Returns the data with one to four random changes."""
    changed = bytearray(data)
    for _ in range(int(random.integers(1, 5))):
        at = int(random.integers(len(changed) + 1))
        kind = int(random.integers(8))
        if kind == 0:
            changed[at : at + 1] = bytes([int(random.integers(256))])
        elif kind == 1 and at < len(changed):
            changed[at] ^= 1 << int(random.integers(8))
        elif kind == 2:
            del changed[at : at + int(random.integers(1, 64))]
        elif kind == 3:
            changed[at:at] = random.bytes(int(random.integers(1, 64)))
        elif kind == 4:
            width = int(random.choice([2, 4, 8]))
            value = int(BIG[int(random.integers(len(BIG)))]) % (1 << 8 * width)
            order = "big" if random.integers(2) else "little"
            changed[at : at + width] = value.to_bytes(width, order)
        elif kind == 5:
            changed[at:at] = changed[at : at + int(random.integers(1, 256))]
        elif kind == 6:
            changed[at : at + 16] = bytes(min(16, len(changed) - at))
        else:
            del changed[max(1, at) :]
    return bytes(changed)


def _opens(path: Path, format: str | None = None) -> Callable[[], object]:
    return lambda: open_data(path, format=format)


def _idx(packed: bool) -> Callable[[Path], tuple[Path, Callable[[], object]]]:
    def write(folder: Path) -> tuple[Path, Callable[[], object]]:
        arrays = {"images-idx3": pixels()[..., 0], "labels-idx1": LABELS.astype(np.uint8)}
        for name, array in arrays.items():
            sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
            data = bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()
            ending = ".gz" if packed else ""
            (folder / f"train-{name}-ubyte{ending}").write_bytes(gzip.compress(data) if packed else data)
        return folder / f"train-images-idx3-ubyte{'.gz' if packed else ''}", _opens(folder)

    return write


def _npz(compressed: bool) -> Callable[[Path], tuple[Path, Callable[[], object]]]:
    def write(folder: Path) -> tuple[Path, Callable[[], object]]:
        save = np.savez_compressed if compressed else np.savez
        save(folder / "set.npz", images=pixels(), labels=LABELS, class_names=np.array(["a", "b", "c"]))
        return folder / "set.npz", _opens(folder / "set.npz")

    return write


def _npy_in_npz(folder: Path) -> tuple[Path, Callable[[], object]]:
    """Damages the .npy file of the images and zips it again, so that the zip itself stays valid."""
    import zipfile

    stream = io.BytesIO()
    np.save(stream, pixels())
    (folder / "images.npy").write_bytes(stream.getvalue())
    labels = io.BytesIO()
    np.save(labels, LABELS)

    def open_zip() -> object:
        with zipfile.ZipFile(folder / "set.npz", "w") as archive:
            archive.writestr("images.npy", (folder / "images.npy").read_bytes())
            archive.writestr("labels.npy", labels.getvalue())
        return open_data(folder / "set.npz")

    return folder / "images.npy", open_zip


def _safetensors(folder: Path) -> tuple[Path, Callable[[], object]]:
    from safetensors.numpy import save_file

    names = {"class_names": json.dumps(["a", "b", "c"])}
    save_file({"images": pixels(), "labels": LABELS}, folder / "set.safetensors", names)
    return folder / "set.safetensors", _opens(folder / "set.safetensors")


def _image(kind: str) -> Callable[[Path], tuple[Path, Callable[[], object]]]:
    from PIL import Image

    suffix, _, compression = kind.partition("-")
    options = {"compression": {"raw": None, "lzw": "tiff_lzw", "jpeg": "jpeg"}[compression]} if compression else {}

    def write(folder: Path) -> tuple[Path, Callable[[], object]]:
        for k, array in enumerate(pixels()[:3]):
            file = folder / "set" / "ab"[k % 2] / f"{k}.{suffix.removesuffix('16')}"
            file.parent.mkdir(parents=True, exist_ok=True)
            image = array[..., 0].astype(np.uint16) * 16 if kind == "tif16" else array
            Image.fromarray(image).save(file, **options)
        return next((folder / "set" / "a").iterdir()), _opens(folder / "set", format="folder")

    return write


def _parquet(folder: Path) -> tuple[Path, Callable[[], object]]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    encoded = []
    for array in pixels():
        stream = io.BytesIO()
        Image.fromarray(array).save(stream, "png")
        encoded.append({"bytes": stream.getvalue(), "path": None})
    pq.write_table(pa.table({"image": encoded, "label": LABELS}), folder / "set.parquet")
    return folder / "set.parquet", _opens(folder / "set.parquet")


def _cifar_batch(folder: Path) -> tuple[Path, Callable[[], object]]:
    for k in range(1, 6):
        data = np.random.default_rng(k).integers(0, 256, (2, 3072), dtype=np.uint8)
        batch = {"data": data, "labels": [2 * k - 2, 2 * k - 1]}
        (folder / f"data_batch_{k}").write_bytes(pickle.dumps(batch, 2))
    return folder / "data_batch_1", _opens(folder)


def _tar(packed: bool) -> Callable[[Path], tuple[Path, Callable[[], object]]]:
    def write(folder: Path) -> tuple[Path, Callable[[], object]]:
        (folder / "set").mkdir()
        _cifar_batch(folder / "set")
        file = folder / ("set.tar.gz" if packed else "set.tar")
        with tarfile.open(file, "w:gz" if packed else "w") as archive:
            archive.add(folder / "set", "set")
        return file, _opens(file)

    return write


def _labels(suffix: str) -> Callable[[Path], tuple[Path, Callable[[], object]]]:
    def write(folder: Path) -> tuple[Path, Callable[[], object]]:
        import torch

        np.savez(folder / "set.npz", images=pixels(), labels=LABELS)
        dataset, file = open_data(folder / "set.npz").train, folder / f"labels{suffix}"
        if suffix == ".npy":
            np.save(file, LABELS)
        elif suffix == ".pt":
            torch.save({"labels": LABELS}, file)
        elif suffix == ".json":
            file.write_text(json.dumps(LABELS.tolist()))
        else:
            file.write_text("index,label\n" + "".join(f"{k},{label}\n" for k, label in enumerate(LABELS)))
        return file, lambda: replace_labels(dataset, str(file))

    return write


CASES: dict[str, Case] = {
    "idx": Case(_idx(False)),
    "idx.gz": Case(_idx(True)),
    "npz": Case(_npz(False)),
    "npz-deflate": Case(_npz(True)),
    "npy-in-npz": Case(_npy_in_npz),
    "safetensors": Case(_safetensors),
    "parquet": Case(_parquet),
    "cifar": Case(_cifar_batch),
    "tar": Case(_tar(False)),
    "tar.gz": Case(_tar(True)),
    **{f"labels{suffix}": Case(_labels(suffix)) for suffix in (".csv", ".json", ".npy", ".pt")},
    **{f"image-{kind}": Case(_image(kind)) for kind in IMAGE_FORMATS},
}


def run_case(name: str, seeds: range) -> Summary:
    """Opens one mutation of a format per seed."""
    opened = refused = 0
    faults: list[tuple[int, str]] = []
    slowest = 0.0
    with tempfile.TemporaryDirectory() as place:
        file, open_file = CASES[name].write(Path(place))
        valid = file.read_bytes()
        open_file()
        for seed in seeds:
            file.write_bytes(mutate(valid, np.random.default_rng(seed)))
            start = time.monotonic()
            with _stderr() as printed:
                fault = _fault(open_file)
            elapsed = time.monotonic() - start
            slowest = max(slowest, elapsed)
            if elapsed > MAX_SECONDS:
                fault = f"took {elapsed:.0f} s"
            elif memory_mb() > MAX_MEMORY_MB and not any("MB" in text for _, text in faults):
                fault = f"took {memory_mb()} MB"
            fault = fault if fault not in (None, "refused") else printed() or fault
            opened, refused = opened + (fault is None), refused + (fault == "refused")
            if fault not in (None, "refused"):
                faults.append((seed, str(fault)))
    return Summary(opened, refused, faults, slowest)


def memory_mb() -> int:
    """Returns the largest memory that this process has used, in MB of 2**20 bytes (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _fault(open_file: Callable[[], object]) -> str | None:
    """Returns None if the file opens, "refused", or the description of another exception."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            open_file()
    except UserError as error:
        return "refused" if printable(str(error)) == str(error) else f"unprintable message {error!r}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:100]} ({Path(where.filename).name}:{where.lineno})"
    return None


@contextlib.contextmanager
def _stderr() -> Iterator[Callable[[], str | None]]:
    """Catches what the block writes to stderr, also from C. Yields a function that returns it after the block."""
    with tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        saved = os.dup(2)
        os.dup2(file.fileno(), 2)

        def printed() -> str | None:
            return f"stderr: {text[:100]!r}" if text else None

        text = b""
        try:
            yield printed
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            text = file.read()


def main() -> int:
    """Runs the command line. Returns 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=2000, help="mutations per format")
    parser.add_argument("--first", type=int, default=0, help="seed of the first mutation")
    parser.add_argument("--format", action="append", choices=CASES, help="formats to test; by default all")
    options = parser.parse_args()
    failed = False
    for name in options.format or CASES:
        result = run_case(name, range(options.first, options.first + options.count))
        text = f"{result.opened} opened, {result.refused} refused, {len(result.faults)} faults"
        print(f"{name:16} {text}, slowest {result.slowest:.2f} s, {memory_mb()} MB", flush=True)
        for seed, fault in result.faults[:10]:
            print(f"    seed {seed}: {fault}")
        failed |= bool(result.faults)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
