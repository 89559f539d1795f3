"""Where a detector looks: Grad-CAM (Selvaraju et al., 2017), as maps and as a picture of images with their overlays.

With A_k the last feature maps of a network and y_c a class's logit:

    alpha_k = mean over places of dy_c / dA_k        map = ReLU(sum_k alpha_k A_k)
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tadperf.data.normalise import Normaliser
from tadperf.files import write_bytes
from tadperf.report.grid import BACKGROUND, FAINT, INK, MARGIN, to_drawable
from tadperf.report.suspects import shorten_text

if TYPE_CHECKING:
    from PIL.Image import Image

HEAD = (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear)
HEAT = ((24, 15, 62), (114, 31, 129), (205, 64, 113), (253, 159, 108), (252, 253, 191))  # dark to bright, even steps
CELL, GAP, CAPTION = 96, 4, 18  # pixels of an image's longer side at least, between images, below a pair
COLUMNS = 10  # images of a row at most
STRENGTH = 0.55  # share of the heat in an overlay


class GradCam(NamedTuple):
    """Of N images: maps, and what the network says."""

    maps: Tensor  # float32 [N, H, W] of the images' size, each with maximum 1, or 0 all over
    probability: Tensor  # float32 [N, C]


def grad_cam(net: nn.Module, images: Tensor, classes: Tensor) -> GradCam:
    """Grad-CAM of each image for its class (Selvaraju et al., 2017, equations 1 and 2), scaled up bilinearly.

    net: a network of nets.py, in eval mode for the call; the maps are those before its last pool. images: normalised,
    float [N, C, H, W]. classes: int64 [N]. Raises ValueError on a network that has no such maps.
    """
    features, head = _cut(net)
    mode, device = net.training, next(net.parameters()).device
    net.eval()
    with torch.enable_grad():
        maps = features(images.to(device)).detach().requires_grad_()
        logits = head(maps)
        chosen = logits.gather(1, classes.to(device)[:, None]).sum()  # images do not mix: each has its own gradient
        (gradient,) = torch.autograd.grad(chosen, maps)
    net.train(mode)
    heat = (gradient.mean((2, 3), keepdim=True) * maps.detach()).sum(1, keepdim=True).relu()
    heat = F.interpolate(heat.float(), images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    highest = heat.flatten(1).amax(1)[:, None, None]
    return GradCam(torch.where(highest > 0, heat / highest, 0.0).cpu(), logits.detach().float().softmax(1).cpu())


def _cut(net: nn.Module) -> tuple[nn.Sequential, nn.Sequential]:
    """The part that ends in feature maps, and the pools and layers after it."""
    parts = list(net) if isinstance(net, nn.Sequential) else []
    place = len(parts)
    while place and isinstance(parts[place - 1], HEAD):
        place -= 1
    if not place or place == len(parts):
        raise ValueError(f"net: {type(net).__name__}: expected a Sequential of feature maps, pools and linear layers")
    return nn.Sequential(*parts[:place]), nn.Sequential(*parts[place:])


def save_gradcam(
    path: Path | str,
    net: nn.Module,
    normaliser: Normaliser,
    rows: Mapping[str, tuple[Tensor, Tensor]],
    class_names: Sequence[str],
) -> None:
    """Writes `picture` as a PNG file, atomically."""
    buffer = io.BytesIO()
    draw_gradcam(net, normaliser, rows, class_names).save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def draw_gradcam(
    net: nn.Module, normaliser: Normaliser, rows: Mapping[str, tuple[Tensor, Tensor]], class_names: Sequence[str]
) -> Image:
    """Images above their Grad-CAM overlays, a named row for each kind (tadperf).

    rows: such as "real", "unrefined", "refined"; each has pixels uint8 [M, C, H, W] and the classes int64 [M] that they
    are of, for which the maps are. Below stands what the network takes an image for, in ink where that is its class.
    """
    from PIL import Image, ImageDraw, ImageFont

    shown = {name: (pixels[:COLUMNS], classes[:COLUMNS]) for name, (pixels, classes) in rows.items()}
    height, width = next(iter(shown.values()))[0].shape[-2:]
    scale = max(1, -(-CELL // max(height, width)))
    step_x, step_y = width * scale + GAP, 2 * (height * scale + GAP) + CAPTION
    font = ImageFont.load_default(13)
    left = int(max(font.getlength(name) for name in shown)) + 2 * MARGIN
    columns = max(len(classes) for _, classes in shown.values())
    canvas = Image.new("RGB", (left + columns * step_x + MARGIN, 2 * MARGIN + len(shown) * step_y), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for row, (name, (pixels, classes)) in enumerate(shown.items()):
        y = MARGIN + row * step_y
        draw.text((left - MARGIN, y + height * scale), name, INK, font, anchor="rm")
        found = grad_cam(net, normaliser(pixels), classes)
        confidence, taken_for = (part.tolist() for part in found.probability.max(1))
        for place, (plain, mixed) in enumerate(zip(to_drawable(pixels), overlay(pixels, found.maps), strict=True)):
            x = left + place * step_x
            for image, top in ((plain, y), (mixed, y + height * scale + GAP)):
                large = Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)
                canvas.paste(large, (x, top))
            verdict = f"{confidence[place]:.2f} {class_names[taken_for[place]]}"
            right = taken_for[place] == int(classes[place])
            text = shorten_text(verdict, step_x - GAP, font)
            draw.text((x, y + 2 * (height * scale + GAP)), text, INK if right else FAINT, font)
    return canvas


def overlay(pixels: Tensor, maps: Tensor) -> np.ndarray:
    """Images uint8 [N, C, H, W], grey where they have not three channels, under the heat of maps [N, H, W] in [0, 1].

    uint8 [N, H, W, 3]; a map of 0 leaves the darkest colour over the image, so that overlays can be compared.
    """
    grey = to_drawable(pixels).astype(np.float32)
    image = grey if grey.ndim == 4 else np.repeat(grey[..., None], 3, -1)
    return ((1 - STRENGTH) * image + STRENGTH * colours(maps.numpy())).round().astype(np.uint8)


def colours(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] as float32 RGB [..., 3] from 0 to 255, linear between the steps of HEAT."""
    steps = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(values, steps, channel) for channel in zip(*HEAT, strict=True)], -1).astype(np.float32)
