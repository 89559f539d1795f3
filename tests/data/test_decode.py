"""Image files to pixels: alpha, deep images, warnings, broken files."""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tadperf.data.decode import GROUND, BitDepth, Encoded, decode
from tadperf.data.image_formats import FORMATS, SUFFIXES
from tadperf.errors import DataWarning, UserError


@pytest.fixture
def read(tmp_path) -> Callable[..., torch.Tensor]:
    """Returns a function that saves images under these names and decodes them."""

    def decode_all(**images: Image.Image | bytes) -> torch.Tensor:
        files = []
        for name, image in images.items():
            files.append(tmp_path / name.replace("_", "."))
            files[-1].write_bytes(image) if isinstance(image, bytes) else image.save(files[-1])
        encoded = [Encoded(file.name, file) for file in files]
        return decode(iter(encoded), len(files), None, files, BitDepth(lambda: iter(encoded)))

    return decode_all


def grey(*values: int, dtype: type = np.uint8) -> Image.Image:
    return Image.fromarray(np.array([values], dtype))


def test_transparent_pixels_show_mid_grey_and_opaque_ones_are_not_changed(read):
    rgba = np.array([[[10, 20, 30, 255], [200, 200, 200, 0], [0, 0, 0, 128]]], np.uint8)
    (image,) = read(a_png=Image.fromarray(rgba))
    assert image[:, 0, 0].tolist() == [10, 20, 30]
    assert image[:, 0, 1].tolist() == [GROUND] * 3
    assert (image[:, 0, 2] - GROUND // 2).abs().max() <= 1
    opaque = np.dstack([rgba[..., :3], np.full((1, 3), 255, np.uint8)])
    (image,) = read(b_png=Image.fromarray(opaque))
    assert torch.equal(image, torch.from_numpy(rgba[..., :3].copy()).permute(2, 0, 1))


def test_grey_with_alpha_stays_grey(read):
    (image,) = read(a_png=Image.fromarray(np.array([[[10, 255], [10, 0]]], np.uint8)))
    assert image.tolist() == [[[10, GROUND]]]


def test_a_transparent_palette_colour_shows_mid_grey(read, tmp_path):
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.save(tmp_path / "a.gif", transparency=1)
    (image,) = read(a_gif=(tmp_path / "a.gif").read_bytes())
    assert image[:, 0].T.tolist() == [[255, 0, 0], [GROUND] * 3]


@pytest.mark.parametrize(
    ("values", "dtype", "bits"),
    [
        ((0, 255), np.uint16, 8),
        ((256, 1023), np.uint16, 10),
        ((0, 4095), np.uint16, 12),
        ((0, 65535), np.uint16, 16),
        ((0, 1 << 20), np.int32, 21),
        ((0, 255), np.float32, 8),
        ((0, 1000), np.float32, 10),
    ],
)
def test_deep_images_are_scaled_by_the_bits_that_the_set_uses(read, values, dtype, bits):
    images = read(a_tif=grey(*values, dtype=dtype), b_tif=grey(1, 2, dtype=dtype))
    assert images[0, 0, 0].tolist() == [int(value * 2.0 ** (8 - bits)) for value in values]
    assert images[1, 0, 0].tolist() == [int(value * 2.0 ** (8 - bits)) for value in (1, 2)]


def test_floats_up_to_one_fill_the_range(read):
    assert read(a_tif=Image.fromarray(np.array([[0, 0.5, 1]], np.float32))).flatten().tolist() == [0, 128, 255]


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_negative_and_non_finite_pixels_are_refused(read, value):
    with pytest.raises(UserError, match=r"a\.tif: cannot be decoded \(negative or non-finite pixels\)"):
        read(a_tif=Image.fromarray(np.array([[0.5, value]], np.float32)))


def test_deep_images_do_not_change_the_scale_of_8_bit_images(read):
    images = read(a_png=grey(7, 250), b_png=grey(16, 4095, dtype=np.uint16))
    assert images[:, 0, 0].tolist() == [[7, 250], [1, 255]]


def png(pixels: np.ndarray, transparent: tuple[int, ...] = ()) -> bytes:
    """Returns a PNG file with 16 bits per channel, which Pillow cannot write. pixels: [H, W, C]."""
    height, width, channels = pixels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0),
        b"tRNS": struct.pack(f">{len(transparent)}H", *transparent),
        b"IDAT": zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)),
        b"IEND": b"",
    }
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
        if data or name == b"IEND"
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(pixels: np.ndarray, order: str, compressed: bool) -> bytes:
    """Returns a TIFF file with 16 bits per channel in one strip. order: "<" or ">"."""
    height, width, channels = pixels.shape
    data = pixels.astype(order + "u2").tobytes()
    data = zlib.compress(data) if compressed else data
    tags = {256: width, 257: height, 259: 8 if compressed else 1, 262: 2, 277: channels, 278: height, 279: len(data)}
    tags |= {338: 2} if channels == 4 else {}
    end = 8 + 2 + 12 * (len(tags) + 2) + 4
    tags |= {258: end, 273: end + 2 * channels}
    entries = [
        struct.pack(order + "HHII", tag, 3 if tag == 258 else 4, channels if tag == 258 else 1, tags[tag])
        for tag in sorted(tags)
    ]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(tags))
    bits = struct.pack(order + f"{channels}H", *[16] * channels)
    return head + b"".join(entries) + struct.pack(order + "I", 0) + bits + data


DEEP_FILES = {
    "png": png,
    "tif little": lambda pixels: tiff(pixels, "<", False),
    "tif big": lambda pixels: tiff(pixels, ">", False),
    "tif little compressed": lambda pixels: tiff(pixels, "<", True),
    "tif big compressed": lambda pixels: tiff(pixels, ">", True),
}


@pytest.mark.parametrize("kind", DEEP_FILES)
@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("channels", [3, 4])
def test_colour_with_16_bits_per_channel_is_scaled_by_the_bits_that_the_set_uses(read, kind, bits, channels):
    pixels = np.random.default_rng(0).integers(0, 2**bits, (5, 7, channels), np.uint16)
    pixels[0, 0], pixels[..., 3:] = 2**bits - 1, 65535
    dark = np.full_like(pixels, 65535)
    dark[..., :3] = pixels[..., :3] // 8
    name = kind[:3]
    images = read(**{f"a_{name}": DEEP_FILES[kind](pixels), f"b_{name}": DEEP_FILES[kind](dark)})
    for image, source in zip(images, (pixels, dark), strict=True):
        assert torch.equal(image, torch.from_numpy((source[..., :3] >> (bits - 8)).astype(np.uint8)).permute(2, 0, 1))


def test_transparency_with_16_bits_per_channel(read):
    grey = np.array([[[4095, 65535], [4095, 0], [16, 65535]]], np.uint16)
    assert read(a_png=png(grey)).tolist() == [[[[255, GROUND, 1]]]]
    colour = np.array([[[4095, 0, 16, 65535], [4095, 0, 0, 0]]], np.uint16)
    assert read(b_png=png(colour))[0, :, 0].T.tolist() == [[255, 0, 1], [GROUND] * 3]
    keyed = np.array([[[4095, 0, 16], [4095, 0, 17]]], np.uint16)  # the two colours differ in the low byte alone
    assert read(c_png=png(keyed, (4095, 0, 17)))[0, :, 0].T.tolist() == [[255, 0, 1], [GROUND] * 3]


def test_all_broken_images_are_counted_and_five_are_named(read):
    with pytest.raises(UserError) as caught:
        read(**{f"{k:02}_png": b"junk" for k in range(23)}, good_png=grey(1, 2))
    message = str(caught.value)
    assert message.startswith("data: 23 images: cannot be decoded: 00.png (unknown format), ")
    assert "04.png" in message
    assert "05.png" not in message
    assert message.endswith("and 18 more; repair or remove them, or leave them out with --skip-broken")
    copy = pickle.loads(pickle.dumps(caught.value))  # another process may raise it
    assert (str(copy), copy.broken[22].row) == (message, 22)


def test_pillows_warnings_are_counted_in_one_line(read, tmp_path):
    grey(1, 2).save(tmp_path / "a.tif", description="x" * 10)
    data = bytearray((tmp_path / "a.tif").read_bytes())
    data[9] = 1  # declares 256 more entries in the table of tags than exist
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        images = read(b_tif=bytes(data), c_tif=grey(3, 4))
    assert images[0].flatten().tolist() == [1, 2]
    assert [warning.category for warning in caught] == [DataWarning]
    assert re.match(r"Pillow gave \d+ warnings about the images, the first: Corrupt EXIF", str(caught[0].message))


def test_libtiff_prints_nothing(read, capfd, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.tif", compression="tiff_adobe_deflate")
    data = bytearray((tmp_path / "a.tif").read_bytes())
    data[300:400] = bytes(100)
    with pytest.raises(UserError, match="cannot be decoded"):
        read(b_tif=bytes(data))
    assert capfd.readouterr().err == ""


def test_suffixes_and_formats_are_known_to_pillow():
    Image.init()
    known = Image.registered_extensions()
    formats = {known[suffix] for suffix in SUFFIXES if suffix in known}
    assert formats <= set(FORMATS)
    assert {".jpg", ".png", ".tif", ".webp", ".gif", ".bmp", ".ppm", ".tga", ".jp2"} <= set(SUFFIXES) & set(known)
    assert not {"EPS", "PDF", "WMF", "HDF5", "MPEG"} & set(FORMATS)


def test_lossless_formats_keep_their_pixels(read):
    assert (
        read(**{f"{k}_{suffix[1:]}": grey(9, 9) for k, suffix in enumerate((".pgm", ".tga", ".dib", ".pcx"))})
        .eq(9)
        .all()
    )


def test_equal_images_are_reported(read):
    with pytest.warns(DataWarning, match="all 3 images are equal"):
        read(a_png=grey(1, 2), b_png=grey(1, 2), c_png=grey(1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(d_png=grey(1, 2), e_png=grey(1, 2), f_png=grey(1, 3))


def test_the_bit_depth_is_computed_once(tmp_path):
    calls = []
    grey(0, 1000, dtype=np.uint16).save(tmp_path / "a.png")

    def images():
        calls.append(1)
        return iter([Encoded("a", Path(tmp_path / "a.png"))])

    depth = BitDepth(images)
    assert [depth(), depth()] == [10, 10]
    assert calls == [1]
