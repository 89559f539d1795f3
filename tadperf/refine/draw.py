"""The pictures of refinement: refined.png and gradcam.png."""

from __future__ import annotations

import torch
from torch import nn

from tadperf.data.images import normalise_images
from tadperf.refine.context import RefineContext
from tadperf.refine.detector import classify_images
from tadperf.refine.rounds import RefineState, unchanged_images
from tadperf.report.gradcam import save_gradcam
from tadperf.report.refined import save_refined


def draw_refinement(context: RefineContext, detector: nn.Module, state: RefineState) -> None:
    """Writes refined.png, and gradcam.png with one real, one first and one refined image of each class.

    gradcam.png shows the first image of a class that was replaced, or its first image if none was.
    """
    task, folder = context.task, context.run.path
    names, ipc, device = task.train.class_names, task.config.match.ipc, task.device
    first, refined = (
        classify_images(detector, normalise_images(context.data.normaliser, images, device)).logits
        for images in (state.first, state.images)
    )
    pair = state.first, state.images
    save_refined(folder / "refined.png", pair, context.labels, (first, refined), names, task.config.refine.beta)
    certain = context.certain_labels
    real = torch.stack([(certain == label).nonzero()[0, 0] for label in range(len(names))])
    place = torch.arange(len(names)) * ipc + (~unchanged_images(state)).view(-1, ipc).int().argmax(1)
    rows = {"real": context.pixels(real), "unrefined": state.first[place], "refined": state.images[place]}
    classes = torch.arange(len(names))
    save_gradcam(
        folder / "gradcam.png",
        detector,
        context.data.normaliser,
        {name: (row, classes) for name, row in rows.items()},
        names,
    )
