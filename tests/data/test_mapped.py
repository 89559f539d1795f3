"""Large sets give the same pixels from a mapped file. It is written once, and again when the source changes."""

from __future__ import annotations

import gzip
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from tadperf.data import decode, mapped
from tadperf.data.open import open_data
from tadperf.errors import UserError


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tadperf" / "images"


def grey(count: int = 7, size: tuple[int, int] = (5, 6)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *size), np.uint8)


def folder(place: Path, colour: bool) -> Path:
    for k, image in enumerate(grey()):
        file = place / "train" / "ab"[k % 2] / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.stack([image, image, 255 - image], 2) if colour and k == 5 else image).save(file)
    return place


def npz(place: Path, colour: bool) -> Path:
    images = grey()
    if colour:
        images = np.stack([images, images, 255 - images], 3).astype(np.float32) / 255  # stored as [N, H, W, C]
    np.savez(place / "set.npz", images=images, labels=np.arange(7) % 2)
    return place / "set.npz"


def safetensors(place: Path, colour: bool) -> Path:
    images = np.stack([grey()] * 3, 3) if colour else grey()
    save_file({"images": images, "labels": np.arange(7) % 2}, place / "set.safetensors")
    return place / "set.safetensors"


def idx(place: Path, colour: bool) -> Path:
    head = bytes((0, 0, 8, 3)) + np.array([7, 5, 6], ">u4").tobytes()
    ending = ".gz" if colour else ""  # idx images are always grey
    for name, data in {
        "images-idx3": head + grey().tobytes(),
        "labels-idx1": bytes((0, 0, 8, 1, 0, 0, 0, 7)) + bytes([0, 1, 0, 1, 0, 1, 0]),
    }.items():
        (place / f"train-{name}-ubyte{ending}").write_bytes(gzip.compress(data) if ending else data)
    return place


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("make", [folder, npz, safetensors, idx])
@pytest.mark.parametrize("image_size", [None, 4])
def test_the_same_pixels_from_a_mapped_file(tmp_path, cache, monkeypatch, make, colour, image_size):
    (tmp_path / "set").mkdir()
    path = make(tmp_path / "set", colour)
    monkeypatch.setattr(decode, "CHUNK", 2)
    monkeypatch.setattr("tadperf.data.readers.arrays.CHUNK", 3)
    expected = open_data(path, image_size=image_size).train.images
    assert not list(cache.glob("*.npy"))
    monkeypatch.setattr(mapped, "is_large", lambda shape: True)
    seen: list[tuple[str, int, int]] = []
    for _ in range(2):
        images = open_data(path, image_size=image_size, progress=lambda *said, **_: seen.append(said)).train.images
        assert torch.equal(images, expected)
        assert images.is_contiguous()
    assert seen[-1][1] == seen[-1][2] == 7
    assert sum(done == total for _, done, total in seen) == len(list(cache.glob("*.npy")))  # once for each file
    assert not list(cache.glob("*.part"))


def test_a_changed_source_is_read_again_and_a_partial_file_is_overwritten(tmp_path, cache, monkeypatch):
    path = npz(tmp_path, False)
    monkeypatch.setattr(mapped, "is_large", lambda shape: True)
    assert torch.equal(open_data(path).train.images[:, 0], torch.from_numpy(grey()))
    (whole,) = cache.glob("*.npy")
    whole.rename(whole.with_suffix(".part"))  # like after a kill
    whole.with_suffix(".part").write_bytes(b"torn")
    assert torch.equal(open_data(path).train.images[:, 0], torch.from_numpy(grey()))
    np.savez(path, images=255 - grey(), labels=np.arange(7) % 2)
    os.utime(path, ns=(1, 1))
    assert torch.equal(open_data(path).train.images[:, 0], 255 - torch.from_numpy(grey()))
    assert len(list(cache.glob("*.npy"))) == 2


def test_writing_into_a_mapped_set_changes_no_file(cache, monkeypatch):
    monkeypatch.setattr(mapped, "is_large", lambda shape: True)
    images = mapped.fill_images((2, 1, 3, 3), "set", lambda out: out.fill(7) or 1)
    images += 1
    again = mapped.cached_images("set")
    assert again is not None
    assert (again == 7).all()


@pytest.mark.parametrize(("count", "size", "channels"), [(1, 4, 1), (7, 5, 1), (1025, 3, 1), (2049, 2, 2)])
def test_channels_are_cut_off_in_place(cache, monkeypatch, count, size, channels):
    monkeypatch.setattr(mapped, "is_large", lambda shape: True)
    shape = (count, 3, size, size)
    expected = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    files: list[str] = []

    def fill(pixels: np.ndarray) -> int:
        pixels[:] = expected
        return channels

    def replace(partial: Path, complete: Path) -> None:
        files.extend(file.name for file in partial.parent.iterdir())
        os.rename(partial, complete)

    monkeypatch.setattr(mapped.os, "replace", replace)
    images = mapped.fill_images(shape, "set", fill)
    assert np.array_equal(images.numpy(), expected[:, :channels])
    assert sorted(files) == ["set.lock", "set.part"]  # a second file of pixels would need more space than was checked
    assert (cache / "set.npy").stat().st_size < 200 + count * channels * size**2


def test_only_one_of_two_processes_fills_the_file(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(mapped, "is_large", lambda shape: True)

    def fill(out: np.ndarray) -> int:
        with open(tmp_path / "filled", "a") as note:
            note.write("x")
        out[:] = 3
        return 1

    fork = multiprocessing.get_context("fork")
    others = [fork.Process(target=mapped.fill_images, args=((4, 3, 8, 8), "set", fill)) for _ in range(2)]
    for other in others:
        other.start()
    for other in others:
        other.join(30)
    assert [other.exitcode for other in others] == [0, 0]
    assert (tmp_path / "filled").read_text() == "x"
    assert mapped.fill_images((4, 3, 8, 8), "set", fill).shape == (4, 1, 8, 8)


def test_a_damaged_image_and_a_full_disk_are_reported(tmp_path, cache, monkeypatch):
    path = folder(tmp_path / "set", True)
    (path / "train" / "b" / "5.png").write_bytes(b"no image")
    monkeypatch.setattr(mapped, "is_large", lambda shape: True)
    with pytest.raises(UserError, match=r"5\.png: cannot be decoded"):
        open_data(path)
    assert not list(cache.glob("*.npy"))
    monkeypatch.setattr(mapped.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        open_data(npz(tmp_path, True))


def test_sets_above_a_quarter_of_the_memory_are_large():
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert not mapped.is_large((memory // 8,))
    assert mapped.is_large((memory // 2,))
