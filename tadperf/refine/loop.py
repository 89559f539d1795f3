"""Generative synthesis: the detector, the diffusion model, the first images and the rounds of refinement."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tadperf.artifact import DistilledSet
from tadperf.compute import ranks
from tadperf.compute.torch_settings import torch_settings
from tadperf.compute.workers import threads_for
from tadperf.progress import Progress, silent
from tadperf.refine.checks import check_refine_config
from tadperf.refine.context import RefineContext
from tadperf.refine.detector import compile_detector
from tadperf.refine.draw import draw_refinement
from tadperf.refine.networks import expected_batches, get_detector, get_diffusion_model
from tadperf.refine.rounds import RefineState, classify, normalise_state, refine_images, unchanged_images
from tadperf.refine.start import borrow_models, starting_images
from tadperf.run.folder import Run
from tadperf.task.samples import NormalisedData, TrainingSamples
from tadperf.task.task import Task


class RefinedImages(NamedTuple):
    """The result of generative synthesis: M images of C classes, class by class.

    images: normalised float32 [M, channels, H, W]. labels: int64 [M], or the detector's logits float32 [M, C].
    first: images and labels before refinement. lr: the learning rate of the run that was refined, if there is one.
    report: plain values for result.json.
    """

    images: Tensor
    labels: Tensor
    first: tuple[Tensor, Tensor]
    lr: float | None
    report: dict[str, Any]


def refine(
    task: Task, data: NormalisedData, samples: TrainingSamples, run: Run, progress: Progress = silent
) -> RefinedImages:
    """Generates images of every class and refines them with a detector (arXiv 2507.13074; parts are tadperf's).

    Uses the given training samples only. With refine.start, refines the images of another run and keeps those that the
    detector accepts. Runs the stages detector, diffusion and refine, and skips what a killed run had finished. Raises
    UserError on a wrong config, diffusion model or detector, or when a class has too few samples.
    """
    check_refine_config(task.config)
    _, height, width = task.train.shape
    diffusion = task.config.diffusion
    with torch_settings(threads=threads_for(diffusion.batch * diffusion.width * height * width)):
        return _run_stages(RefineContext(task, data, samples, run, progress))


def _run_stages(context: RefineContext) -> RefinedImages:
    task, config, run = context.task, context.config, context.run
    (run.path / "checkpoints").mkdir(exist_ok=True)
    start = None
    if config.start:
        start = starting_images(Path(config.start), task)
        ranks.once(partial(borrow_models, Path(config.start), task.config, run))
    # A user's model is opened first, so that a wrong one is refused before anything is trained.
    model = None if config.source == "train" else get_diffusion_model(context)
    with run.stage("detector"):
        detector, accuracy = ranks.once(lambda: get_detector(context))
    with run.stage("diffusion"):
        model = model or get_diffusion_model(context)
    with run.stage("refine"):
        batches = expected_batches(task.config, task.train.num_classes, start is not None)
        compiled = compile_detector(detector, config, batches)
        state = refine_images(context, model, compiled, start)
        draw_refinement(context, detector, state)
        images = normalise_state(state, context.data.normaliser, start)
        logits = classify(compiled, images, config, task.device).logits
    report = {
        "source": config.source,
        "start": config.start,
        "detector": {"network": task.config.detector.name, "held_out": accuracy},
        "beta": config.beta,
        "rounds": state.records,
    }
    first_images = normalise_state(state._replace(images=state.first), context.data.normaliser, start)
    first = first_images, start.labels if start else context.labels
    labels = final_labels(context.labels, logits, state, start, config.soft_labels)
    return RefinedImages(images.to(task.device), labels.to(task.device), first, start.lr if start else None, report)


def final_labels(labels: Tensor, logits: Tensor, state: RefineState, start: DistilledSet | None, soft: bool) -> Tensor:
    """Returns the labels that students learn: classes int64 [M], or logits float32 [M, C].

    Images of `start` that did not change keep the soft labels that their run has learned. All other images have the
    detector's logits, or their class if `soft` is False and `start` has no soft labels.
    """
    start_labels = start.labels if start and start.labels.is_floating_point() else None
    if start_labels is None:
        return logits.float().cpu() if soft else labels
    return torch.where(unchanged_images(state)[:, None], start_labels, logits.float().cpu())
