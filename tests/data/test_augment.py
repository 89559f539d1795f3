"""Differentiable augmentation against kornia and the formulas of DSA."""

from __future__ import annotations

import math

import kornia.geometry.transform as kornia
import pytest
import torch
from torch import Tensor

from tadperf.data import augment
from tadperf.data.augment import CONTRAST, CROP, KINDS, ROTATE, SCALE, Draw, apply, apply_with_adjoint, draw, parse
from tadperf.errors import UserError

FULL = "color_crop_cutout_flip_scale_rotate"


def close(ours: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 16, channels: int = 3, size: int = 12) -> Tensor:
    return torch.randn(count, channels, size, size, generator=seeded(9))


def affine(drawn: Draw) -> Tensor:
    assert drawn.affine is not None
    return drawn.affine


@pytest.mark.parametrize("size", [12, 13])
def test_rotation_equals_kornia(size):
    x, drawn = images(size=size), draw("rotate", 16, size, seeded())
    matrix = affine(drawn)
    angle = torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0]).rad2deg()
    assert angle.abs().max() <= ROTATE
    assert angle.min() < -ROTATE / 3 < ROTATE / 3 < angle.max()
    close(apply(x, drawn), kornia.rotate(x, angle))


@pytest.mark.parametrize("size", [12, 13])
def test_scale_equals_kornia(size):
    x, drawn = images(size=size), draw("scale", 16, size, seeded())
    zoom = torch.stack([affine(drawn)[:, 0, 0], affine(drawn)[:, 1, 1]], 1)  # of x and of y, drawn independently
    assert zoom.min() >= 1 / SCALE
    assert zoom.max() <= SCALE
    assert zoom.min() < 0.95 < 1.1 < zoom.max()
    assert (zoom[:, 0] - zoom[:, 1]).abs().min() > 0
    close(apply(x, drawn), kornia.scale(x, 1 / zoom))


def test_any_affine_map_equals_kornia():
    """Rotates, scales, flips and shifts about the centre of the image at once; no draw combines kinds."""
    x, size = images(4), 12
    a, zoom, shift = 0.2, torch.tensor([1.1, 0.9]), torch.tensor([2.0, -1.0])
    turn = torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
    matrix = turn @ torch.diag(zoom * torch.tensor([-1.0, 1.0]))
    ours = apply(x, Draw(torch.cat([matrix, (shift * 2 / size)[:, None]], 1).expand(4, 2, 3), None, None))
    centre = torch.full((2,), (size - 1) / 2)
    whole = torch.eye(3)  # in pixels, from output to input; kornia needs the inverse
    whole[:2, :2], whole[:2, 2] = matrix, centre + shift - matrix @ centre
    truth = kornia.warp_affine(x, whole.inverse()[None, :2].expand(4, 2, 3), (size, size))
    close(ours, truth)


def test_flips_are_exact():
    x = images(32)
    y = apply(x, draw("flip", 32, 12, seeded()))
    flipped = torch.tensor([torch.allclose(a, b.flip(-1), atol=1e-5) for a, b in zip(y, x, strict=True)])
    kept = torch.tensor([torch.allclose(a, b, atol=1e-5) for a, b in zip(y, x, strict=True)])
    assert (flipped ^ kept).all()
    assert 8 <= int(flipped.sum()) <= 24


@pytest.mark.parametrize(("size", "reach"), [(8, 1), (12, 2), (28, 4), (32, 4)])
def test_crops_shift_by_whole_pixels_and_fill_with_zeros(size, reach):
    x, drawn = images(64, 1, size), draw("crop", 64, size, seeded())
    shift = (affine(drawn)[:, :, 2] * size / 2).round().long()
    assert reach == int(size * CROP + 0.5)
    assert shift.unique().tolist() == list(range(-reach, reach + 1))
    y = apply(x, drawn)
    for image, moved, (right, down) in zip(x[:, 0], y[:, 0], shift.tolist(), strict=True):
        rows, columns = (torch.arange(size) + step for step in (down, right))
        inside = ((rows >= 0) & (rows < size))[:, None] & ((columns >= 0) & (columns < size))
        expected = image[rows.clamp(0, size - 1)][:, columns.clamp(0, size - 1)] * inside
        close(moved, expected)


@pytest.mark.parametrize(("size", "side"), [(8, 4), (28, 14), (32, 16)])
def test_cutout_is_a_square_clipped_at_the_border(size, side):
    drawn = draw("cutout", 200, size, seeded())
    y = apply(torch.ones(200, 2, size, size), drawn)
    assert drawn.hole is not None
    assert set(y.unique().tolist()) == {0.0, 1.0}
    for image, (row, column) in zip(y, drawn.hole.long().tolist(), strict=True):
        expected = torch.ones(size, size)
        top, left = row - side // 2, column - side // 2
        expected[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = 0
        assert torch.equal(image, expected.expand(2, -1, -1))
    area = (y[:, 0] == 0).sum((1, 2))
    assert area.max() == side * side
    assert area.min() < side * side
    assert drawn.hole.min() == 0
    assert drawn.hole.max() == size


def dsa_color(x: Tensor, b: float, s: float, c: float) -> Tensor:
    """Applies brightness, saturation and contrast to one image, in the order of DSA's public code."""
    x = x + b
    mean = x.mean(dim=1, keepdim=True)
    x = (x - mean) * s + mean
    mean = x.mean(dim=[1, 2, 3], keepdim=True)
    return (x - mean) * c + mean


@pytest.mark.parametrize("channels", [1, 3])
def test_colour_equals_dsa(channels):
    x, drawn = images(200, channels), draw("color", 200, 12, seeded())
    assert drawn.color is not None
    y = apply(x, drawn)
    for k, (b, s, c) in enumerate(drawn.color.tolist()):
        close(y[k : k + 1], dsa_color(x[k : k + 1], b, s, c))
    low, high = drawn.color.min(0).values, drawn.color.max(0).values
    for k, (lowest, highest) in enumerate([(-0.5, 0.5), (0.0, 2.0), (CONTRAST, 1 + CONTRAST)]):
        margin = 0.05 * (highest - lowest)
        assert lowest <= low[k] < lowest + margin
        assert highest - margin < high[k] <= highest


def touched(drawn: Draw) -> dict[str, Tensor]:
    """Returns which images show which kind. A crop by 0 pixels and half of the flips change nothing."""
    matrix, color, hole = drawn
    assert matrix is not None
    assert color is not None
    assert hole is not None
    zoomed = (matrix[:, 1, 1] != 1) & (matrix[:, 1, 0] == 0)
    return {
        "color": (color != torch.tensor([0.0, 1.0, 1.0])).any(1),
        "crop": (matrix[:, :, 2] != 0).any(1),
        "cutout": ~hole.isnan().any(1),
        "flip": matrix[:, 0, 0] == -1,
        "scale": zoomed,
        "rotate": matrix[:, 1, 0] != 0,
    }


def test_each_image_gets_one_kind_and_all_kinds_come_equally_often():
    count, size = 12_000, 32
    kinds = touched(draw(FULL, count, size, seeded()))
    assert torch.stack(list(kinds.values())).sum(0).max() == 1
    shown = {"flip": 1 / 2, "crop": 1 - 1 / 81}  # half of the flips; one of 9 x 9 shifts is zero
    for kind in KINDS:
        share = shown.get(kind, 1.0) / len(KINDS)
        deviation = math.sqrt(count * share * (1 - share))
        assert abs(int(kinds[kind].sum()) - count * share) < 4 * deviation, kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_strategy_of_one_kind_does_nothing_else(kind):
    matrix, color, hole = draw(kind, 50, 8, seeded())
    assert (color is not None) == (kind == "color")
    assert (hole is not None) == (kind == "cutout")
    assert (matrix is not None) == (kind in {"crop", "flip", "scale", "rotate"})


def test_a_replay_gives_the_same_bits():
    x, drawn = images(), draw(FULL, 16, 12, seeded())
    y = apply(x, drawn)
    assert torch.equal(apply(x, drawn), y)
    assert torch.equal(apply(x, draw(FULL, 16, 12, seeded())), y)
    assert not torch.equal(apply(x, draw(FULL, 16, 12, seeded(1))), y)


def test_rows_returns_the_draw_of_a_range_of_images():
    x, drawn = images(), draw(FULL, 16, 12, seeded())
    parts = [apply(x[i : i + 5], drawn.rows(i, i + 5)) for i in range(0, 16, 5)]
    torch.testing.assert_close(torch.cat(parts), apply(x, drawn), rtol=0, atol=1e-6)
    assert Draw(None, None, None).rows(0, 5) == (None, None, None)


@pytest.mark.parametrize("strategy", [FULL, "flip_cutout", "none"])
def test_a_draw_moves_to_a_device(strategy):
    drawn, meta = draw(strategy, 5, 8, seeded()), torch.device("meta")
    moved = drawn.to(meta)
    assert isinstance(moved, type(drawn))
    assert [None if f is None else (f.shape, f.device) for f in moved] == [
        None if f is None else (f.shape, meta) for f in drawn
    ]
    assert drawn.to(torch.device("cpu")) is drawn


@pytest.mark.parametrize("strategy", [*KINDS, FULL])
def test_the_gradient_with_respect_to_the_images(strategy):
    x = torch.randn(6, 2, 6, 6, dtype=torch.float64, generator=seeded(), requires_grad=True)
    drawn = draw(strategy, 6, 6, seeded(3))
    assert torch.autograd.gradcheck(lambda x: apply(x, drawn), x)


@pytest.mark.parametrize("strategy", ["none", "flip", FULL])
def test_apply_with_adjoint_gives_the_bits_of_autograd(strategy):
    x, drawn = images(), draw(strategy, 16, 12, seeded())
    grad = torch.randn(x.shape, generator=seeded(1))
    y, adjoint = apply_with_adjoint(x, drawn)
    assert not y.requires_grad
    assert not x.requires_grad
    assert torch.equal(y, apply(x, drawn))
    leaf = x.clone().requires_grad_()
    assert torch.equal(adjoint(grad), torch.autograd.grad(apply(leaf, drawn), leaf, grad)[0])


def test_apply_with_adjoint_takes_the_adjoint_operator_where_the_kernels_run(monkeypatch):
    x, drawn = images(), draw(FULL, 16, 12, seeded())
    grad = torch.randn(x.shape, generator=seeded(1))
    _, by_autograd = apply_with_adjoint(x, drawn)
    monkeypatch.setattr(augment, "is_fused", lambda *tensors: True)
    monkeypatch.setattr(torch.autograd, "grad", None)
    y, adjoint = apply_with_adjoint(x, drawn)
    assert not y.requires_grad
    found = adjoint(grad)
    monkeypatch.undo()
    torch.testing.assert_close(found, by_autograd(grad), rtol=0, atol=1e-5)


def test_none_changes_nothing():
    x = images()
    assert parse("none") == ()
    assert torch.equal(apply(x, draw("none", 16, 12, seeded())), x)


@pytest.mark.parametrize("strategy", ["crop_zoom", "Crop", "", "crop__flip", "none_crop"])
def test_an_unknown_kind_is_refused(strategy):
    with pytest.raises(UserError, match="join any of color, crop") as refused:
        augment.draw(strategy, 1, 8, seeded())
    assert refused.value.field == "data.augment"
