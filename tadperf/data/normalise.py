"""Maps pixels to network inputs and back: by mean and standard deviation, optionally followed by ZCA whitening."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tadperf.compute.torch_settings import torch_settings
from tadperf.compute.work_progress import add_processed, work
from tadperf.data.dataset import describe_tensor
from tadperf.errors import UserError

EPS = 0.1  # added to the eigenvalues of the covariance; MTT's code has the same value (kornia's ZCAWhitening)
# Largest number of inputs for ZCA (64 x 64 x 3): the matrix takes 1.2 GB in float64, the decomposition minutes.
MAX_ZCA_INPUTS = 12288
CHUNK = 4096  # images normalised at a time; not tuned
# The decomposition of ZCA on D inputs takes as long as whitening 13 D images (12.7 D at D = 1536 on one
# core). Only the progress and the estimate use this.
DECOMPOSITION = 13


@dataclass(frozen=True)
class Normaliser:
    """Maps uint8 images to float32 and back. Made by `fit_normaliser` and stored in every distilled set.

    mean, std: [C], of pixels in [0, 1].
    zca_mean [D], zca [D, D], zca_inverse [D, D]: with ZCA only, D = C * H * W.
    """

    mean: Tensor
    std: Tensor
    zca_mean: Tensor | None = None
    zca: Tensor | None = None
    zca_inverse: Tensor | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Maps uint8 [N, C, H, W] to normalised float32 [N, C, H, W] on the same device."""
        x = _standardise(images, self.mean, self.std)
        if self.zca is None or self.zca_mean is None:
            return x
        inputs = x.flatten(1).sub_(self.zca_mean.to(x.device))
        with _full_precision(x.device):
            return (inputs @ self.zca.to(x.device)).view_as(x)

    def invert(self, x: Tensor) -> Tensor:
        """Maps normalised float [N, C, H, W] back to uint8 pixels, rounded and clamped to 0..255."""
        return (self.denormalise(x) * 255).round().clamp(0, 255).to(torch.uint8)

    def denormalise(self, x: Tensor) -> Tensor:
        """Maps normalised float [N, C, H, W] back to float pixels, neither rounded nor clamped; 0 to 1 is the range."""
        if self.zca_inverse is not None and self.zca_mean is not None:
            with _full_precision(x.device):
                x = (x.flatten(1) @ self.zca_inverse.to(x) + self.zca_mean.to(x)).view_as(x)
        mean, std = self.mean.to(x)[:, None, None], self.std.to(x)[:, None, None]
        return x * std + mean

    def to(self, device: torch.device | str) -> Normaliser:
        """Returns a copy with its tensors on `device`."""
        return Normaliser(**{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors to store, by field name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Normaliser:
        """Creates a normaliser from what `tensors` returns.

        Raises UserError if a tensor is missing, unknown, or has a wrong type or shape.
        """
        names = {field.name for field in fields(cls)}
        whitening = {"zca_mean", "zca", "zca_inverse"}
        if tensors.keys() not in (names, names - whitening):
            keys = ", ".join(sorted(tensors)) or "nothing"
            raise UserError("normaliser", keys, "must be mean and std, and all or none of zca_mean, zca, zca_inverse")
        channels, inputs = tensors["mean"].numel(), tensors["zca_mean"].numel() if "zca_mean" in tensors else 0
        shapes = {"mean": (channels,), "std": (channels,), "zca_mean": (inputs,)}
        for name, tensor in tensors.items():
            shape = shapes.get(name, (inputs, inputs))
            if tensor.shape != shape or tensor.dtype != torch.float32:
                raise UserError(f"normaliser.{name}", describe_tensor(tensor), f"must be float32 {list(shape)}")
        return cls(**tensors)


def fit_normaliser(images: Tensor, kind: str = "meanstd", device: torch.device | None = None) -> Normaliser:
    """Fits "meanstd" or "zca" to images uint8 [N, C, H, W]. ZCA is applied after "meanstd".

    The published code of MTT whitens pixels in [0, 1] instead: `fit_pixel_zca`.

    Mean and standard deviation are exact: they come from a histogram, which needs little memory. A constant channel
    gets deviation 1. device: computes ZCA, chunk by chunk; by default the images' device. The result lies on the CPU.
    Raises UserError on another kind, and for ZCA on images of more than 12288 inputs.
    """
    if kind not in ("meanstd", "zca"):
        raise UserError("data.normalise", kind, "must be meanstd or zca")
    if kind == "zca":
        _refuse_large(images)
    mean, std = _moments(images)
    if kind == "meanstd":
        return Normaliser(mean, std)
    return Normaliser(mean, std, *_whitening(images, mean, std, device or images.device))


def fit_pixel_zca(images: Tensor, device: torch.device | None = None) -> Normaliser:
    """Fits ZCA to the pixels in [0, 1] of images uint8 [N, C, H, W], as the published code of MTT, FTD and DATM does.

    Its mean is 0 and its deviation 1, so `denormalise` returns pixels in [0, 1]. Raises UserError for images of more
    than 12288 inputs.
    """
    _refuse_large(images)
    mean, std = torch.zeros(images.shape[1]), torch.ones(images.shape[1])
    return Normaliser(mean, std, *_whitening(images, mean, std, device or images.device))


def _refuse_large(images: Tensor) -> None:
    if images[0].numel() > MAX_ZCA_INPUTS:
        size = " x ".join(map(str, images.shape[1:]))
        remedy = f"images of {size} are too large; use meanstd or a smaller --image-size"
        raise UserError("data.normalise", "zca", remedy)


def normalise_work(kind: str, train: int, test: int, inputs: int) -> int:
    """Returns the units of work (`work_progress.work`) of fitting a normaliser and applying it to both splits.

    inputs: D, the values of an image. A pass over the images that only adds up values is left out.
    """
    fitted = train + DECOMPOSITION * inputs if kind == "zca" else 0
    return work(fitted + train + test)


def _full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Keeps the products of a block out of TF32 on CUDA: its relative error of 5e-4 would reach every pixel."""
    return torch_settings(tf32=False) if device.type == "cuda" else nullcontext()


def _standardise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    mean, std = mean.to(images.device)[:, None, None], std.to(images.device)[:, None, None]
    return images.to(torch.float32).div_(255).sub_(mean).div_(std)


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation [C] of pixels in [0, 1], computed in float64 from a histogram per channel."""
    channels = images.shape[1]
    counts = torch.zeros(channels, 256, dtype=torch.float64, device=images.device)
    for chunk in images.split(CHUNK):
        for c in range(channels):
            counts[c] += torch.bincount(chunk[:, c].reshape(-1), minlength=256)
    counts = counts.cpu()
    share = counts / counts.sum(1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ levels
    std = (share * (levels - mean[:, None]) ** 2).sum(1).sqrt()
    std = torch.where(std > 1e-12, std, 1.0)  # the values of a constant channel become 0, not NaN
    return mean.float(), std.float()


def _whitening(images: Tensor, mean: Tensor, std: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ZCA of standardised pixels with covariance S: mean [D], (S + eps I)^-1/2 and (S + eps I)^1/2 [D, D].

    Runs on `device`. The decomposition uses float64: in float32 its error was 9e-4 on CIFAR-10.
    """
    inputs, mean, std = images[0].numel(), mean.to(device), std.to(device)
    centre = torch.zeros(inputs, dtype=torch.float64, device=device)
    for chunk in images.split(CHUNK):
        centre += _standardise(chunk.to(device), mean, std).flatten(1).sum(0, dtype=torch.float64)
    centre = (centre / len(images)).float()
    covariance = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
    with _full_precision(device):
        for chunk in images.split(CHUNK):
            x = _standardise(chunk.to(device), mean, std).flatten(1).sub_(centre)
            covariance += x.T @ x  # products in float32, the sum over chunks in float64
            add_processed(len(chunk))
    values, vectors = torch.linalg.eigh(covariance / max(1, len(images) - 1))
    add_processed(DECOMPOSITION * inputs)
    root = (values.clamp_min(0) + EPS).sqrt()
    inverse, forward = (vectors / root) @ vectors.T, (vectors * root) @ vectors.T
    return centre.cpu(), inverse.float().cpu(), forward.float().cpu()


def normaliser_from_lists(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Normaliser:
    """Returns the normaliser with this mean and deviation, a number for each channel of the images [M, channels, H, W].

    Raises UserError if one is missing or has another length.
    """
    channels = images.shape[1] if images.ndim == 4 else 0
    for name, values in (("mean", mean), ("std", std)):
        if values is None or len(values) != channels:
            given = "missing" if values is None else f"{len(values)} numbers"
            raise UserError(name, given, f"must have a number for each of the {channels} channels, of pixels in 0..1")
    return Normaliser(*(torch.as_tensor(values, dtype=torch.float32) for values in (mean, std)))
