from __future__ import annotations

import kornia
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from tadperf.compute.work_progress import counting
from tadperf.data import images as images_module
from tadperf.data import normalise
from tadperf.data.images import normalise_images
from tadperf.data.normalise import Normaliser, fit_normaliser, normalise_work
from tadperf.data.open import open_data
from tadperf.errors import UserError


def images(count=500, channels=3, size=4, seed=0):
    """Returns uneven, correlated pixels."""
    g = torch.Generator().manual_seed(seed)
    smooth = (
        torch.rand(count, channels, 1, 1, generator=g) * 120 + torch.rand(count, channels, size, size, generator=g) * 90
    )
    return (smooth + torch.arange(channels)[:, None, None] * 10).to(torch.uint8)


def test_mean_and_deviation_against_float64():
    x = images()
    whole = x.double() / 255
    fitted = fit_normaliser(x)
    assert torch.allclose(fitted.mean.double(), whole.mean((0, 2, 3)), atol=1e-7)
    assert torch.allclose(fitted.std.double(), whole.std((0, 2, 3), correction=0), atol=1e-7)
    y = fitted(x)
    assert (y.dtype, y.shape) == (torch.float32, x.shape)
    expected = (whole - whole.mean((0, 2, 3), keepdim=True)) / whole.std((0, 2, 3), correction=0, keepdim=True)
    assert torch.allclose(y.double(), expected, atol=1e-5)


def test_hard_values():
    x = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    fitted = fit_normaliser(x)
    assert (fitted.mean.item(), fitted.std.item()) == (0.5, 0.5)
    assert fitted(x).flatten().tolist() == [-1.0, 1.0]
    assert fitted.invert(torch.tensor([-9.0, 0.0, 9.0]).view(3, 1, 1, 1)).flatten().tolist() == [0, 128, 255]


@pytest.mark.parametrize("chunk", [64, 4096])
def test_zca_against_kornia_and_float64(monkeypatch, chunk):
    monkeypatch.setattr(normalise, "CHUNK", chunk)
    x = images()
    fitted = fit_normaliser(x, "zca")
    plain = fit_normaliser(x)(x)
    reference = kornia.enhance.ZCAWhitening(eps=0.1, compute_inv=True).fit(plain.double())  # as MTT calls it
    assert torch.allclose(fitted(x).double(), reference(plain.double()), atol=1e-4)
    flat = plain.double().flatten(1)
    values, vectors = torch.linalg.eigh(torch.cov(flat.T) + 0.1 * torch.eye(flat.shape[1], dtype=torch.float64))
    expected = vectors @ (values**-0.5).diag() @ vectors.T
    assert fitted.zca is not None
    assert fitted.zca_inverse is not None
    assert torch.allclose(fitted.zca.double(), expected, atol=1e-5)
    product = fitted.zca.double() @ fitted.zca_inverse.double()
    assert torch.allclose(product, torch.eye(48, dtype=torch.float64), atol=1e-4)


def test_pixel_zca_equals_kornia_on_pixels_in_0_1():
    x = images()
    pixels = x.double() / 255
    reference = kornia.enhance.ZCAWhitening(eps=0.1, compute_inv=True).fit(pixels)  # as MTT calls it
    fitted = normalise.fit_pixel_zca(x)
    assert torch.allclose(fitted(x).double(), reference(pixels), atol=1e-5)
    assert torch.allclose(
        fitted.denormalise(fitted(x)).double(), reference.inverse_transform(reference(pixels)), atol=1e-5
    )
    assert not torch.allclose(fitted(x), fit_normaliser(x, "zca")(x), atol=0.1)  # another whitening


def test_zca_gives_white_noise_variance_one_over_one_plus_eps():
    x = torch.randint(256, (4000, 1, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    covariance = torch.cov(fit_normaliser(x, "zca")(x).flatten(1).T)
    assert torch.allclose(covariance, torch.eye(9) / 1.1, atol=0.05)  # white noise in: variance 1 / (1 + eps) out


@given(
    kind=st.sampled_from(["meanstd", "zca"]),
    channels=st.sampled_from([1, 3]),
    seed=st.integers(0, 999),
    count=st.integers(1, 9),
)
@settings(max_examples=30, deadline=None)
def test_invert_returns_the_original_pixels(kind, channels, seed, count):
    x = torch.randint(256, (count, channels, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    fitted = fit_normaliser(x, kind)
    assert torch.equal(fitted.invert(fitted(x)), x)


@pytest.mark.parametrize("kind", ["meanstd", "zca"])
def test_a_constant_channel(kind):
    x = images(20)
    x[:, 1] = 77
    fitted = fit_normaliser(x, kind)
    y = fitted(x)
    assert y.isfinite().all()
    assert torch.equal(fitted.invert(y), x)
    assert fitted.std[1] == 1
    assert y[:, 1].abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["meanstd", "zca"])
def test_tensors_survive_a_file(kind):
    x = images(50)
    fitted = fit_normaliser(x, kind)
    tensors = load(save(fitted.tensors()))
    assert len(tensors) == {"meanstd": 2, "zca": 5}[kind]
    assert torch.equal(Normaliser.from_tensors(tensors)(x), fitted(x))


def test_from_tensors_refuses_missing_unknown_and_misshapen_tensors():
    good = fit_normaliser(images(50), "zca").tensors()

    def refuse(words, **change):
        tensors = {name: tensor for name, tensor in {**good, **change}.items() if tensor is not None}
        with pytest.raises(UserError, match=words):
            Normaliser.from_tensors(tensors)

    refuse("must be mean and std", mean=None)
    refuse("all or none of zca_mean, zca, zca_inverse", zca_inverse=None)
    refuse("must be mean and std", median=torch.zeros(3))
    refuse(r"normaliser.std: float32 \[4\]: must be float32 \[3\]", std=torch.ones(4))
    refuse(r"normaliser.zca: float32 \[47, 48\]", zca=torch.ones(47, 48))
    refuse("normaliser.mean: int64", mean=torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("kind", ["meanstd", "zca"])
def test_a_tensor_and_lazy_images_hold_the_same_values(monkeypatch, kind):
    x = images(100)
    fitted = fit_normaliser(x, kind)
    tensor = normalise_images(fitted, x)
    assert isinstance(tensor, torch.Tensor)
    assert torch.allclose(tensor, fitted(x))
    monkeypatch.setattr(images_module, "MAX_NORMALISED_BYTES", x.numel() * 4 - 1)
    lazy = normalise_images(fitted, x)
    assert not isinstance(lazy, torch.Tensor)
    assert len(lazy) == 100
    index = torch.tensor([5, 99, 5, 0])
    assert torch.allclose(lazy[index], tensor[index], atol=1e-6)
    monkeypatch.setattr(images_module, "MAX_NORMALISED_BYTES", x.numel() * 4)
    assert isinstance(normalise_images(fitted, x), torch.Tensor)


def test_the_input_is_not_changed_and_digits_work():
    train = open_data("digits").train
    before = train.fingerprint
    y = normalise_images(fit_normaliser(train.images, "zca"), train.images)
    assert isinstance(y, torch.Tensor)
    assert y.isfinite().all()
    train.__dict__.pop("fingerprint")
    assert train.fingerprint == before


def test_bad_kinds():
    with pytest.raises(UserError, match="must be meanstd or zca"):
        fit_normaliser(images(4), "minmax")
    with pytest.raises(UserError, match="too large; use meanstd or a smaller --image-size"):
        fit_normaliser(torch.zeros(1, 3, 65, 65, dtype=torch.uint8), "zca")


@pytest.mark.parametrize("kind", ["meanstd", "zca"])
def test_the_progress_of_normalising_ends_at_its_work(kind, monkeypatch):
    monkeypatch.setattr(normalise, "CHUNK", 64)
    monkeypatch.setattr(images_module, "CHUNK", 64)
    train, test = images(150), images(70)
    units: list[int] = []
    with counting(units.append):
        normaliser = fit_normaliser(train, kind)
        normalise_images(normaliser, train)
        normalise_images(normaliser, test)
    assert sum(units) == normalise_work(kind, 150, 70, train[0].numel())
    assert len(units) == 5 + 4 * (kind == "zca")  # chunks of both splits; of the covariance, and the decomposition
