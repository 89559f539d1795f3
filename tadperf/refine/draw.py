"""The pictures of refinement: refined.png and gradcam.png."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tadperf.data.images import normalise_images
from tadperf.refine.context import RefineContext
from tadperf.refine.detector import classify_images
from tadperf.refine.rounds import RefineState, unchanged_images
from tadperf.report.drawing import save_safely
from tadperf.report.gradcam import save_gradcam
from tadperf.report.refined import save_refined


def draw_refinement(context: RefineContext, detector: nn.Module, state: RefineState) -> None:
    """Writes refined.png and gradcam.png into the run folder. Logs a warning if a picture fails."""
    folder = context.run.path
    save_safely(draw_before_and_after, folder / "refined.png", context, detector, state)
    save_safely(draw_heat_maps, folder / "gradcam.png", context, detector, state)


def draw_before_and_after(path: Path, context: RefineContext, detector: nn.Module, state: RefineState) -> None:
    """Draws the images before and after refinement, with the detector's prediction for each."""
    task, pair = context.task, (state.first, state.images)
    first, refined = (
        classify_images(detector, normalise_images(context.data.normaliser, images, task.device)).logits
        for images in pair
    )
    save_refined(path, pair, context.labels, (first, refined), task.train.class_names, task.config.refine.beta)


def draw_heat_maps(path: Path, context: RefineContext, detector: nn.Module, state: RefineState) -> None:
    """Draws one real, one first and one refined image of each class with their Grad-CAM maps.

    Shows the first replaced image of a class, or its first image if none was replaced.
    """
    names, ipc = context.task.train.class_names, context.task.config.match.ipc
    certain, classes = context.certain_labels, torch.arange(len(names))
    real = torch.stack([(certain == label).nonzero()[0, 0] for label in range(len(names))])
    place = classes * ipc + (~unchanged_images(state)).view(-1, ipc).int().argmax(1)
    images = {"real": context.pixels(real), "unrefined": state.first[place], "refined": state.images[place]}
    rows = {name: (pixels, classes) for name, pixels in images.items()}
    save_gradcam(path, detector, context.data.normaliser, rows, names)
