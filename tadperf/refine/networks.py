"""The detector and the diffusion model of a run: the user's, the run's own, or newly trained ones."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from tadperf import files, seeds
from tadperf.compute import ranks
from tadperf.compute.work_progress import reporting, work
from tadperf.config import Config
from tadperf.nets.problem import Problem
from tadperf.refine.context import RefineContext
from tadperf.refine.detector import build_detector, check_detector, load_detector, train_detector
from tadperf.refine.models.base import DiffusionModel, Target
from tadperf.refine.models.guidance import PER_CLASS, is_guided
from tadperf.refine.models.open import open_model
from tadperf.refine.models.train import PixelSamples, train_diffusion_model

# Expected share of anomalous first images, for refine.backend = "auto"; each later round expects half as many. On
# digits it was 0 of 100 with a trusted view of 99.8 % right labels, and 23 of 100 with 10 % of pair flips.
ANOMALOUS = 0.1


def get_detector(context: RefineContext) -> tuple[nn.Module, float]:
    """Returns the detector and its accuracy on held-out samples: the user's, the run's own, or one trained now."""
    config, samples, run, device = context.task.config, context.samples, context.run, context.task.device
    classes = context.task.train.num_classes
    run_file = run.path / "detector.safetensors"
    path = config.detector.path or (str(run_file) if run_file.exists() else None)
    context.progress("detector", 0, 1)
    if path:
        module = build_detector(config.detector, samples.images, classes, 0)
        detector = load_detector(path, module, classes).to(device)
    else:
        problem = Problem(
            samples.images,
            samples.labels,
            context.task.train.class_names,
            config.detector,
            config.data.augment,
            config.seed,
            device,
            samples.weights,
        )
        with reporting(context.progress, "detector:training", work(config.detector.epochs * len(samples.images))):
            detector = train_detector(config.detector, problem)
    accuracy = check_detector(detector, samples.held_out, samples.held_out_labels, context.task.train.class_names)
    if not path:
        files.save_tensors(run_file, detector.state_dict())
    run.rewind("detector", 0)
    run.log("detector", 1, held_out=accuracy)
    context.progress("detector", 1, 1, held_out=accuracy)
    return detector, accuracy


def get_diffusion_model(context: RefineContext) -> DiffusionModel:
    """Returns the diffusion model of refine.source; for "train" the run's own, which is trained if it is missing."""
    task, config = context.task, context.config
    batches = expected_batches(task.config, task.train.num_classes, config.start is not None)
    trusted = guidance_images(context) if is_guided(config) else None
    target = Target(task.train.shape, task.train.class_names, task.device, batches, trusted)
    if config.source == "train":
        folder = context.run.path / "diffusion"
        pixels = PixelSamples(context.pixels, context.samples.labels, context.samples.weights)
        train = partial(
            train_diffusion_model, folder, pixels, target, task.config.diffusion, task.config.seed, context.run
        )
        ranks.once(partial(train, progress=context.progress))
        config = config.model_copy(update={"source": str(folder)})
    return open_model(config, target)


def guidance_images(context: RefineContext) -> tuple[Tensor, Tensor]:
    """Returns up to PER_CLASS random trusted images of each class, uint8 [N, ...], and their classes int64 [N]."""
    labels, generator = context.certain_labels, seeds.generator(context.task.config.seed, "guidance")
    order = torch.randperm(len(labels), generator=generator)
    drawn = [order[labels[order] == label][:PER_CLASS] for label in range(context.task.train.num_classes)]
    return context.pixels(torch.cat(drawn)), labels[torch.cat(drawn)]


def expected_batches(config: Config, num_classes: int, started: bool) -> int:
    """Returns how many batches of images refinement is likely to generate, for refine.backend = "auto" (tadperf).

    started: whether the first images come from another run.
    """
    refine, images = config.refine, num_classes * config.match.ipc
    shares = [ANOMALOUS * 0.5**number for number in range(refine.rounds)]
    candidates = sum(
        math.ceil(images * share * refine.candidates / refine.batch) for share in shares if images * share >= 1
    )
    return candidates + (0 if started else math.ceil(images / refine.batch))
