"""Grad-CAM (Selvaraju et al., 2017): which parts of an image a network uses for a class, as maps and as a picture.

A_k are the last feature maps of a network and y_c is the logit of a class:

    alpha_k = mean over positions of dy_c / dA_k        map = ReLU(sum_k alpha_k A_k)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tadperf.data.normalise import Normaliser
from tadperf.report.drawing import BACKGROUND, FAINT, INK, MARGIN, MAX_NAME, cell_size, paste, save_png, to_drawable
from tadperf.report.text import draw_text, drawable_names, widest

if TYPE_CHECKING:
    from PIL.Image import Image

HEAD_LAYERS = (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear)
HEAT = ((24, 15, 62), (114, 31, 129), (205, 64, 113), (253, 159, 108), (252, 253, 191))  # dark to bright, even steps
CELL, MAX_CELL = 96, 256  # pixels to which a small image is enlarged and a large one reduced
GAP, CAPTION, HEAD = 4, 18, 22  # pixels: between images, below a pair, above the rows
COLUMNS = 10  # largest number of images in a row
FONT = 13
STRENGTH = 0.55  # share of the heat colours in an overlay


class GradCam(NamedTuple):
    """Maps and predictions for N images."""

    maps: Tensor  # float32 [N, H, W], as large as the images; the maximum of each is 1, or 0 if the map is empty
    probability: Tensor  # float32 [N, C]


def grad_cam(net: nn.Module, images: Tensor, classes: Tensor) -> GradCam:
    """Computes Grad-CAM of each image for its class (Selvaraju et al., 2017, equations 1 and 2), enlarged bilinearly.

    net: a network of `nets.architectures`; takes the maps before its last pool. Runs the network in eval mode, then
    restores the mode of every layer. images: normalised, float [N, C, H, W]. classes: int64 [N].
    Raises ValueError if the network has no feature maps.
    """
    features, head = _split_head(net)
    modes, device = [(layer, layer.training) for layer in net.modules()], next(net.parameters()).device
    net.eval()
    try:
        with torch.enable_grad():
            maps = features(images.to(device)).detach().requires_grad_()
            logits = head(maps)
            total = logits.gather(1, classes.to(device)[:, None]).sum()  # in eval mode images do not affect each other
            (gradient,) = torch.autograd.grad(total, maps)
    finally:
        for layer, training in modes:
            layer.training = training
    heat = (gradient.mean((2, 3), keepdim=True) * maps.detach()).sum(1, keepdim=True).relu()
    heat = F.interpolate(heat.float(), images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    highest = heat.flatten(1).amax(1)[:, None, None]
    return GradCam(torch.where(highest > 0, heat / highest, 0.0).cpu(), logits.detach().float().softmax(1).cpu())


def _split_head(net: nn.Module) -> tuple[nn.Sequential, nn.Sequential]:
    """Splits a network into the part that ends in feature maps, and the pools and linear layers after it."""
    parts = list(net) if isinstance(net, nn.Sequential) else []
    place = len(parts)
    while place and isinstance(parts[place - 1], HEAD_LAYERS):
        place -= 1
    if not place or place == len(parts):
        raise ValueError(f"net: {type(net).__name__}: must be a Sequential that ends in pools and linear layers")
    return nn.Sequential(*parts[:place]), nn.Sequential(*parts[place:])


def save_gradcam(
    path: Path | str,
    net: nn.Module,
    normaliser: Normaliser,
    rows: Mapping[str, tuple[Tensor, Tensor]],
    class_names: Sequence[str],
) -> None:
    """Writes the picture of `draw_gradcam` as a PNG file, atomically."""
    save_png(path, draw_gradcam(net, normaliser, rows, class_names))


def draw_gradcam(
    net: nn.Module, normaliser: Normaliser, rows: Mapping[str, tuple[Tensor, Tensor]], class_names: Sequence[str]
) -> Image:
    """Draws images above their Grad-CAM overlays, with a named row for each kind of image (tadperf).

    rows: by name, such as "real" or "refined", pixels uint8 [M, C, H, W] and the classes int64 [M] that the maps
    explain. The caption is the network's prediction: black if it is the class, otherwise grey.
    """
    from PIL import Image, ImageDraw

    shown = {name: (pixels[:COLUMNS], classes[:COLUMNS]) for name, (pixels, classes) in rows.items()}
    if not any(len(classes) for _, classes in shown.values()):
        raise ValueError("rows: no image: must have one or more")
    shape = next(iter(shown.values()))[0].shape
    height, width = cell_size(shape[2], shape[3], CELL, MAX_CELL)
    step_x, step_y = max(width, CELL) + GAP, 2 * (height + GAP) + CAPTION
    names = drawable_names(class_names)
    left = widest(shown, FONT, MAX_NAME) + 2 * MARGIN
    columns = max(len(classes) for _, classes in shown.values())
    size = max(left + columns * step_x + MARGIN, 480), 2 * MARGIN + HEAD + len(shown) * step_y
    picture = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(picture)
    legend = "below each image: where the network looks for its class, and its prediction (grey if wrong)"
    legend = f"{legend};  {names.note}" if names.note else legend
    draw_text(draw, (MARGIN, MARGIN), legend, FONT - 1, FAINT, width=size[0] - 2 * MARGIN)
    for row, (name, (pixels, classes)) in enumerate(shown.items()):
        y = MARGIN + HEAD + row * step_y
        draw_text(draw, (left - MARGIN, y + height), name, FONT, INK, "rm", MAX_NAME)
        if not len(classes):
            continue
        result = grad_cam(net, normaliser(pixels), classes)
        confidence, predicted = (part.tolist() for part in result.probability.max(1))
        overlays = overlay(pixels, result.maps)
        for place, image in enumerate(to_drawable(pixels)):
            x = left + place * step_x
            paste(picture, image, (x, y), (height, width))
            paste(picture, overlays[place], (x, y + height + GAP), (height, width))
            text = f"{confidence[place]:.2f} {names.texts[predicted[place]]}"
            colour = INK if predicted[place] == int(classes[place]) else FAINT
            draw_text(draw, (x, y + 2 * (height + GAP)), text, FONT, colour, width=step_x - GAP)
    return picture


def overlay(pixels: Tensor, maps: Tensor) -> np.ndarray:
    """Mixes images uint8 [N, C, H, W] with the heat colours of maps [N, H, W] in [0, 1]; returns uint8 [N, H, W, 3].

    Images without three channels are drawn in grey. A map of 0 gives the darkest colour, so overlays are comparable.
    """
    drawable = to_drawable(pixels).astype(np.float32)
    image = drawable if drawable.ndim == 4 else np.repeat(drawable[..., None], 3, -1)
    return ((1 - STRENGTH) * image + STRENGTH * heat_colours(maps.numpy())).round().astype(np.uint8)


def heat_colours(values: np.ndarray) -> np.ndarray:
    """Maps values in [0, 1] to float32 RGB [..., 3] in 0..255, linear between the colours of HEAT."""
    steps = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(values, steps, channel) for channel in zip(*HEAT, strict=True)], -1).astype(np.float32)
