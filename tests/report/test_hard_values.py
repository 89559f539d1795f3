"""Every picture on hard values: odd names and sizes, one sample, one class, a thousand classes, NaN."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from tadperf.artifact import DistilledSet
from tadperf.config import NetConfig
from tadperf.data.dataset import Dataset
from tadperf.data.normalise import Normaliser
from tadperf.nets.training import Recipe
from tadperf.report import text
from tadperf.report.curves import save_curves
from tadperf.report.drawing import MEGAPIXELS, cell_size, save_safely
from tadperf.report.gradcam import draw_gradcam
from tadperf.report.grid import draw_grid
from tadperf.report.refined import draw_refined
from tadperf.report.suspects import draw_suspects
from tadperf.report.trust_growth import BAR, COLOURS, draw_trust_growth
from tadperf.trust.state import TrustState, as_given

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = (
    "猫",
    "été",
    "قطة",
    "\U0001f600",
    "a\nb\x1b[31m\0c",
    "",
    " ",
    "x" * 5000,
    "class 0",
    "\udcff",
    "e\u0301",
    "$a_b$",
)
SHAPES = ((1, 1, 1), (1, 8, 8), (3, 1000, 3), (3, 2, 700), (4, 5, 5))

names = st.lists(st.text(max_size=8) | st.sampled_from(NAMES), min_size=1, max_size=12).map(tuple)
quick = settings(max_examples=25, deadline=None, derandomize=True)


def pixels(count: int, shape: tuple[int, int, int]) -> Tensor:
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def distilled(labels: Tensor, shape: tuple[int, int, int], class_names: tuple[str, ...]) -> DistilledSet:
    normaliser = Normaliser(torch.zeros(shape[0]), torch.ones(shape[0]))
    net, recipe = NetConfig.model_validate({}), Recipe(1, 1, 0.1, 0.0, 0.0, "none")
    data = {"name": class_names[0]}
    images = normaliser(pixels(len(labels), shape))
    return DistilledSet(images, labels, 0.01, class_names, normaliser, "none", net, recipe, {}, 0, {}, data)


def state(labels: Tensor, class_names: tuple[str, ...], seed: int = 0) -> TrustState:
    """Returns a state with random verdicts."""
    generator = torch.Generator().manual_seed(seed)
    verdict = torch.randint(0, 4, labels.shape, generator=generator).to(torch.uint8)
    suggested = torch.randint(0, len(class_names), labels.shape, generator=generator)
    working = torch.where(verdict == 2, suggested, labels)
    ones = torch.ones(len(labels))
    return TrustState(labels, working, verdict, ones, ones.to(torch.int16), ones, suggested, class_names)


@quick
@given(names, st.integers(1, 20), st.sampled_from(SHAPES))
def test_grid(class_names, count, shape):
    labels = torch.arange(count) % len(class_names)
    draw_grid(distilled(labels, shape, class_names))


@quick
@given(names, st.integers(1, 20), st.sampled_from(SHAPES))
def test_suspects(class_names, count, shape):
    labels = torch.arange(count) % len(class_names)
    files = tuple(class_names[k % len(class_names)] for k in range(count))
    data = Dataset(pixels(count, shape), labels, class_names, class_names[0])
    for dataset in (data, replace(data, file_names=files)):
        draw_suspects(dataset, state(labels, class_names))


@quick
@given(names, st.integers(1, 2000), st.integers(1, 60))
def test_trust_growth(class_names, count, rounds):
    labels = torch.arange(count) % len(class_names)
    draw_trust_growth([state(labels, class_names, seed) for seed in range(rounds)])


@quick
@given(names, st.integers(1, 20), st.sampled_from(SHAPES), st.sampled_from([0.0, 1.0, math.nan, math.inf]))
def test_refined(class_names, count, shape, value):
    labels = torch.arange(count) % len(class_names)
    logits = torch.full((count, len(class_names)), value)
    images = pixels(count, shape)
    draw_refined((images, 255 - images), labels, (logits, logits.nan_to_num()), class_names, 0.5)


@quick
@given(names, st.integers(1, 12), st.sampled_from(SHAPES[1:]), st.sampled_from([1.0, 1e30, math.nan]))
def test_gradcam(class_names, count, shape, weight):
    conv, last = nn.Conv2d(shape[0], 2, 1), nn.Linear(2, len(class_names))
    nn.init.constant_(conv.weight, weight)
    net = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)
    normaliser = Normaliser(torch.zeros(shape[0]), torch.ones(shape[0]))
    classes = torch.arange(count) % len(class_names)
    rows = {class_names[0]: (pixels(count, shape), classes), "none": (pixels(0, shape), classes[:0])}
    draw_gradcam(net, normaliser, rows, class_names)


figures = st.floats(0, 1) | st.sampled_from([math.nan, math.inf])
fields = (
    st.floats(-1e6, 1e6) | st.integers(-3, 3) | st.booleans() | st.none() | st.text(max_size=4) | st.sampled_from(NAMES)
)


@settings(quick, max_examples=10)
@given(st.lists(st.tuples(fields, fields, figures, figures | st.none()), max_size=8))
@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
def test_curves(values):
    rows: list[dict[str, Any]] = [
        {"match.ipc": a, "experts.path": b, "network": "convnet", "accuracy": accuracy, "std": std}
        for a, b, accuracy, std in values
    ]
    with pytest.MonkeyPatch.context() as patch:
        written: list[bytes] = []
        patch.setattr("tadperf.report.curves.write_bytes", lambda path, data: written.append(data))
        save_curves("c.png", ["match.ipc", "experts.path"], rows)
        assert written[0].startswith(b"\x89PNG")


def test_a_thousand_classes_and_large_images_stay_within_the_size_limit():
    class_names = tuple(f"name {c}" for c in range(1000))
    labels = torch.arange(1000)
    images = torch.zeros(1000, 3, 1, 1, dtype=torch.uint8).expand(-1, -1, 1000, 1000)
    small, logits = images[:, :, :64, :64], torch.zeros(1000, 1000)
    for picture in (
        draw_trust_growth([state(labels, class_names)]),
        draw_suspects(Dataset(images[:50], labels[:50], class_names, "photos"), state(labels[:50], class_names)),
        draw_refined((small, small), labels, (logits, logits), class_names, 0.5),
        draw_grid(distilled(labels, (1, 32, 32), class_names)),
    ):
        assert picture.width * picture.height < 3 * MEGAPIXELS * 1e6


def test_a_single_recalled_sample_of_a_large_class_does_not_break_the_bars():
    """Its bar is less than a pixel wide."""
    labels = torch.zeros(5000, dtype=torch.int64)
    verdict = torch.zeros(5000, dtype=torch.uint8)
    verdict[0], verdict[1] = 1, 3
    picture = draw_trust_growth([replace(as_given(labels, ("a", "b")), verdict=verdict)])
    colours = {colour for _, colour in picture.getcolors(2**20) or []}
    assert COLOURS["trusted"] in colours
    assert COLOURS["relabelled"] not in colours  # neither in the bars nor in the legend
    assert picture.height > BAR


def test_no_rounds_and_no_images_are_refused():
    with pytest.raises(ValueError, match="rounds: none: must be one state or more"):
        draw_trust_growth([])
    rows = {"real": (pixels(0, (1, 8, 8)), torch.arange(0))}
    with pytest.raises(ValueError, match="rows: no image"):
        draw_gradcam(nn.Flatten(), Normaliser(torch.zeros(1), torch.ones(1)), rows, ("a",))


def test_the_picture_of_suspects_shows_their_files():
    labels, names = torch.tensor([0, 1, 0, 1]), ("a", "b")
    data = Dataset(pixels(4, (1, 8, 8)), labels, names, "set")
    verdicts = replace(as_given(labels, names), verdict=torch.full((4,), 3, dtype=torch.uint8))
    drawn = [
        draw_suspects(replace(data, file_names=files), verdicts).tobytes()
        for files in (
            None,
            ("a.png",) * 4,
            ("b.png",) * 4,
            ("long/" * 50 + "b.png",) * 4,
            ("long/" * 60 + "b.png",) * 4,
        )
    ]
    assert len(set(drawn)) == 4
    assert drawn[3] == drawn[4]  # both are shortened to the same end


def test_no_suspects_is_a_picture_with_a_headline():
    labels = torch.zeros(3, dtype=torch.int64)
    picture = draw_suspects(Dataset(pixels(3, (1, 8, 8)), labels, ("a",), "clean"), as_given(labels, ("a",)))
    assert isinstance(picture, Image.Image)
    assert picture.getextrema() != ((255, 255),) * 3


def test_a_failing_picture_is_one_warning(tmp_path, caplog):
    def save(path, message):
        raise ZeroDivisionError(message)

    with caplog.at_level(logging.WARNING, "tadperf"):
        assert not save_safely(save, tmp_path / "trust.png", "two\nlines")
    assert [record.getMessage() for record in caplog.records] == [
        "trust.png was not written: ZeroDivisionError: two lines"
    ]
    assert save_safely(lambda path: path.write_bytes(b"x"), tmp_path / "good.png")
    assert not save_safely(lambda path: path.write_bytes(b"x"), tmp_path / "missing" / "bad.png")


def test_names_without_a_font_are_shown_by_number(monkeypatch):
    """With Pillow's built-in font alone, as on a machine without fonts."""
    monkeypatch.setattr(text, "font_files", lambda: ())
    text.font_file.cache_clear()
    try:
        result = text.drawable_names(("cat", "猫", "", "dog\n"))
    finally:
        text.font_file.cache_clear()
    assert result.texts == ["cat", "class 1", "class 2", "dog"]
    assert result.note == "1 class name shown by number: no font here has the characters"


def test_a_font_with_the_glyphs_is_used_if_there_is_one():
    """Matplotlib's DejaVu Sans has é and Arabic; Pillow's built-in font lacks both."""
    for name in ("été", "قطة"):
        assert text.drawable_names((name,)).texts == [name]
        assert text.font_file(name)
    assert text.font_file("plain") == ""
    assert not text.has_glyph("", "猫")


def test_text_is_shortened_to_the_width():
    assert text.shorten_text("short", 12, 500) == "short"
    shortened = text.shorten_text("long " * 1000, 12, 100)
    assert shortened.endswith("…")
    assert 80 < text.text_width(shortened, 12) <= 100
    assert text.shorten_text("long", 12, 0) == "…"
    end = text.keep_end("folder/" * 100 + "a.png", 12, 100)
    assert end.startswith("…")
    assert end.endswith("/a.png")
    assert 80 < text.text_width(end, 12) <= 100
    assert text.keep_end("short", 12, 500) == "short"
    assert text.keep_end("long", 12, 0) == "…"


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (8, 8, (48, 48)),
        (1, 1, (48, 48)),
        (7, 3, (49, 21)),
        (100, 60, (100, 60)),
        (1000, 3, (256, 1)),
        (512, 512, (256, 256)),
    ],
)
def test_cells_are_enlarged_by_whole_numbers_and_reduced_to_the_limit(height, width, expected):
    assert cell_size(height, width, 48, 256) == expected
