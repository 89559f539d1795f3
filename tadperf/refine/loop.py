"""Generative synthesis: detector, prototypes, first images, and rounds that make the anomalous ones again."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tadperf import files, seeds
from tadperf.artifact import DistilledSet
from tadperf.compute import ranks
from tadperf.compute.workers import threads_for
from tadperf.config import Config, RefineConfig
from tadperf.data.images import normalise_images
from tadperf.data.normalise import Normaliser
from tadperf.progress import Progress, silent
from tadperf.refine import select
from tadperf.refine.checks import check_refine_config
from tadperf.refine.detector import (
    DetectorOutput,
    build_detector,
    check_detector,
    classify_images,
    compile_detector,
    load_detector,
    train_detector,
)
from tadperf.refine.models.base import DiffusionModel, Target, encode, generate
from tadperf.refine.models.open import open_model
from tadperf.refine.models.train import train_diffusion_model
from tadperf.refine.prototypes import prototypes
from tadperf.refine.start import borrow_models, starting_images
from tadperf.report.gradcam import save_gradcam
from tadperf.report.refined import save_refined
from tadperf.run.folder import Run
from tadperf.task.samples import NormalisedData, TrainingSamples
from tadperf.task.task import Task

# Share of the first images, halved in every round, that refine.backend = auto reckons with. On digits it was 0 of 100
# with a trusted view of 99.8 % right labels, and 23 of 100 with 10 % of pair flips believed.
ANOMALOUS = 0.1


class RefinedImages(NamedTuple):
    """What generative synthesis makes, class by class.

    images: normalised float32 [M, channels, H, W]. labels: int64 [M], or the detector's logits float32 [M, C]. first:
    images and labels before refinement. lr: of the run that was refined, where there is one. report: plain values, for
    result.json.
    """

    images: Tensor
    labels: Tensor
    first: tuple[Tensor, Tensor]
    lr: float | None
    report: dict[str, Any]


class Rounds(NamedTuple):
    """Where refinement stands: uint8 images [M, ...] as first generated and now, and a record of every round so far."""

    before: Tensor
    images: Tensor
    records: list[dict[str, Any]]


def refine(
    task: Task, data: NormalisedData, seen: TrainingSamples, run: Run, progress: Progress = silent
) -> RefinedImages:
    """Images of every class from a diffusion model, refined under a detector (arXiv 2507.13074; parts are tadperf's).

    Learns from the samples of `seen` alone. With refine.start the images of that run are refined: those that the
    detector takes for what they are stay as they are. Runs the stages detector, diffusion and refine; what a killed run
    had finished of them is not done again. Raises UserError on a wrong config, source or detector, or a class of too
    few samples.
    """
    config, train = task.config, task.train
    check_refine_config(config)
    (run.path / "checkpoints").mkdir(exist_ok=True)
    start = None
    if config.refine.start:
        start = starting_images(Path(config.refine.start), task)
        ranks.once(partial(borrow_models, Path(config.refine.start), config, run))
    _, height, width = train.shape
    torch.set_num_threads(threads_for(config.diffusion.batch * config.diffusion.width * height * width))
    # A checkpoint is opened first, so that one that does not fit is refused before anything is trained.
    given = None if config.refine.source == "train" else get_source(task, data, seen, run, progress)
    with run.stage("detector"):
        detector, accuracy = ranks.once(lambda: get_detector(task, seen, run, progress))
    with run.stage("diffusion"):
        source = given or get_source(task, data, seen, run, progress)
    with run.stage("refine"):
        fast = compile_detector(detector, config.refine, expected_batches(config, train.num_classes, start is not None))
        state = refined_images(task, data, seen, source, fast, start, run, progress)
        draw(task, data, seen, detector, state, run)
        as_seen = normalised(state, data.normaliser, start)
        logits = said(fast, as_seen, config.refine, task.device).logits
    report = {
        "source": config.refine.source,
        "start": config.refine.start,
        "detector": {"network": config.detector.name, "held_out": accuracy},
        "beta": config.refine.beta,
        "rounds": state.records,
        "picture": str(run.path / "refined.png"),
    }
    labels = torch.arange(train.num_classes).repeat_interleave(config.match.ipc)
    first = (normalised(state._replace(images=state.before), data.normaliser, start), start.labels if start else labels)
    final = relabelled(labels, logits, state, start, config.refine.soft_labels)
    return RefinedImages(as_seen.to(task.device), final.to(task.device), first, start.lr if start else None, report)


def normalised(state: Rounds, normaliser: Normaliser, start: DistilledSet | None) -> Tensor:
    """The images as networks take them; those of `start` that were not made again as they were, unrounded."""
    images = normaliser(state.images)
    return images if start is None else torch.where(untouched(state)[:, None, None, None], start.images, images)


def untouched(state: Rounds) -> Tensor:
    """bool [M]: images that are as they were first."""
    return (state.images == state.before).flatten(1).all(1)


def relabelled(labels: Tensor, logits: Tensor, state: Rounds, start: DistilledSet | None, soft: bool) -> Tensor:
    """What students learn: the classes int64 [M], or logits [M, C]: the detector's, and those `start` has learned."""
    learned = start.labels if start and start.labels.is_floating_point() else None
    if learned is None:
        return logits.float().cpu() if soft else labels
    return torch.where(untouched(state)[:, None], learned, logits.float().cpu())


def expected_batches(config: Config, classes: int, started: bool) -> int:
    """Batches of images that are likely to be made, for refine.backend = auto (tadperf)."""
    r, images = config.refine, classes * config.match.ipc
    shares = [ANOMALOUS * 0.5**number for number in range(r.rounds)]
    again = sum(math.ceil(images * share * r.candidates / r.batch) for share in shares if images * share >= 1)
    return again + (0 if started else math.ceil(images / r.batch))


def draw(task: Task, data: NormalisedData, seen: TrainingSamples, detector: nn.Module, state: Rounds, run: Run) -> None:
    """refined.png, and gradcam.png of a real, an unrefined and a refined image of every class, as far as there is room.

    Shown is a class's first image that was made again, or its first.
    """
    names, ipc = task.train.class_names, task.config.match.ipc
    labels = torch.arange(len(names)).repeat_interleave(ipc)
    pair, device = (state.before, state.images), task.device
    logits = tuple(
        classify_images(detector, normalise_images(data.normaliser, images, device)).logits for images in pair
    )
    save_refined(run.path / "refined.png", pair, labels, (logits[0], logits[1]), names, task.config.refine.beta)
    own = seen.labels.where(seen.certain, -1).cpu()
    real = torch.stack([(own == label).nonzero()[0, 0] for label in range(len(names))])
    place = torch.arange(len(names)) * ipc + (~untouched(state)).view(-1, ipc).int().argmax(1)
    classes = torch.arange(len(names))
    rows = {"real": pixels(data, seen, real), "unrefined": state.before[place], "refined": state.images[place]}
    save_gradcam(
        run.path / "gradcam.png", detector, data.normaliser, {name: (row, classes) for name, row in rows.items()}, names
    )


def get_detector(task: Task, seen: TrainingSamples, run: Run, progress: Progress) -> tuple[nn.Module, float]:
    """The detector and its accuracy on held-out samples: the user's, the run's own, or one trained now."""
    config, classes = task.config, task.train.num_classes
    own = run.path / "detector.safetensors"
    given = config.detector.path or (str(own) if own.exists() else None)
    progress("detector", 0, 1)
    if given:
        module = build_detector(config.detector, seen.images, classes, 0)
        detector = load_detector(given, module, classes).to(task.device)
    else:
        detector = train_detector(
            config.detector,
            seen.images,
            seen.labels,
            seen.weights,
            classes,
            config.data.augment,
            config.seed,
            task.device,
        )
    accuracy = check_detector(detector, seen.held_out, seen.held_out_labels, task.train.class_names)
    if not given:
        files.save_tensors(own, detector.state_dict())
    run.rewind("detector", 0)
    run.log("detector", 1, held_out=accuracy)
    progress("detector", 1, 1, held_out=accuracy)
    return detector, accuracy


def get_source(task: Task, data: NormalisedData, seen: TrainingSamples, run: Run, progress: Progress) -> DiffusionModel:
    """The diffusion model of refine.source; for "train" one of the run's own, trained where it is missing."""
    config = task.config.refine
    batches = expected_batches(task.config, task.train.num_classes, config.start is not None)
    target = Target(task.train.shape, task.train.class_names, task.device, batches)
    if config.source == "train":
        folder = run.path / "diffusion"
        learn = partial(
            train_diffusion_model,
            folder,
            partial(pixels, data, seen),
            seen.labels,
            seen.weights,
            target,
            task.config.diffusion,
            task.config.seed,
            run,
            progress,
        )
        ranks.once(learn)
        config = config.model_copy(update={"source": str(folder)})
    return open_model(config, target)


def pixels(data: NormalisedData, seen: TrainingSamples, index: Tensor) -> Tensor:
    """Samples of the view as uint8, by index."""
    return data.normaliser.invert(seen.images[index])


def said(detector: nn.Module, images: Tensor, config: RefineConfig, device: torch.device) -> DetectorOutput:
    """The detector's verdict on normalised images."""
    return classify_images(detector, images.to(device), config.batch)


def refined_images(
    task: Task,
    data: NormalisedData,
    seen: TrainingSamples,
    source: DiffusionModel,
    detector: nn.Module,
    start: DistilledSet | None,
    run: Run,
    progress: Progress,
) -> Rounds:
    """Prototypes, the first images and the rounds of refinement, each kept in the run's checkpoint.

    Ranks divide what is generated; what is concluded from it, rank 0 concludes for all.
    """
    config, seed = task.config.refine, task.config.seed
    ipc, names = task.config.match.ipc, task.train.class_names
    labels = torch.arange(len(names)).repeat_interleave(ipc)
    find = partial(
        prototypes,
        partial(pixels, data, seen),
        partial(encode, source, batch=config.batch),
        seen.labels.where(seen.certain, -1).cpu(),
        names,
        ipc,
        config,
        seed,
    )
    origins = ranks.once(find)
    saved = run.path / "checkpoints" / "refine.safetensors"
    state = ranks.once(lambda: load(saved) if saved.exists() else None)
    if state is None and start is not None:
        state = Rounds(start.pixels(), start.pixels(), [])
    elif state is None:
        first = [seeds.derive(seed, "generate", image) for image in range(len(labels))]
        images = generate(source, origins, labels, first, config.strength, config.batch, progress)
        state = Rounds(images, images, [])
    run.rewind("refine", len(state.records) - 1)
    while True:
        save(saved, state)
        number, as_seen = len(state.records), normalised(state, data.normaliser, start)
        verdict = ranks.once(partial(said, detector, as_seen, config, task.device))
        flagged = select.anomalous(verdict.logits, labels.to(task.device), config.beta).cpu()
        state = state._replace(records=[*state.records, record(verdict, labels.to(task.device), flagged)])
        run.log("refine", number, **state.records[-1])
        progress("refine", number, config.rounds, **state.records[-1])
        if number == config.rounds or not flagged.any():
            progress("refine", config.rounds, config.rounds, **state.records[-1])
            return state
        made = make_candidates(source, origins, labels, flagged, config, seed, number, progress)
        judge = partial(said, detector, data.normaliser(made.flatten(0, 1)), config, task.device)
        choose = partial(replaced, state.images, labels, verdict, flagged, made, config=config)
        state = state._replace(images=ranks.once(lambda judge=judge, choose=choose: choose(judged=judge())))


def record(verdict: DetectorOutput, labels: Tensor, flagged: Tensor) -> dict[str, Any]:
    """What is kept of a round: how many images are anomalous, label agreement, and diversity within classes."""
    agreement = (verdict.logits.argmax(1) == labels).double().mean()
    return {
        "anomalous": int(flagged.sum()),
        "anomaly_rate": float(flagged.double().mean()),
        "agreement": float(agreement),
        "diversity": select.diversity(verdict.features, labels),
    }


def make_candidates(
    source: DiffusionModel,
    origins: Tensor,
    labels: Tensor,
    flagged: Tensor,
    config: RefineConfig,
    seed: int,
    number: int,
    progress: Progress,
) -> Tensor:
    """N candidates for every anomaly, uint8 [A, N, channels, H, W]: same prototype and label, fresh seeds.

    Strength grows from round to round, so that a prototype made of mislabelled samples is left behind (tadperf). On
    digits with 10 % of pair flips, believed, 23 of 100 images were anomalous at strength 0.3: after five rounds 15
    still were at that strength, none when it grew to 1.
    """
    anomalies, count = flagged.nonzero()[:, 0], config.candidates
    own = [seeds.derive(seed, "candidate", number, a, k) for a in anomalies.tolist() for k in range(count)]
    index, stage = anomalies.repeat_interleave(count), f"round {number + 1}"
    strength = config.strength + (config.reach - config.strength) * (number + 1) / config.rounds
    images = generate(source, origins[index], labels[index], own, strength, config.batch, progress, stage)
    return images.unflatten(0, (len(anomalies), count))


def replaced(
    images: Tensor,
    labels: Tensor,
    verdict: DetectorOutput,
    flagged: Tensor,
    candidates: Tensor,
    judged: DetectorOutput,
    config: RefineConfig,
) -> Tensor:
    """The images with every anomaly replaced by its winner, unless that is anomalous too and the less confident.

    verdict: of the images; judged: of the candidates [A, N, ...], flattened to A * N rows. So no round can make an
    image worse in the detector's eyes (tadperf).
    """
    device = verdict.logits.device
    place, held = flagged.nonzero()[:, 0].to(device), (~flagged).nonzero()[:, 0].to(device)
    labels, shape = labels.to(device), candidates.shape[:2]
    competing = DetectorOutput(*(part.unflatten(0, shape) for part in judged))
    winner = select.choose(competing, labels[place], verdict.features[held], labels[held], config)
    row = torch.arange(len(place), device=device)
    logits = competing.logits[row, winner.clamp(min=0)]
    before = select.confidence(verdict.logits[place], labels[place])
    better = select.confidence(logits, labels[place]) > before
    taken = (winner >= 0) & (better | ~select.anomalous(logits, labels[place], config.beta))
    row, place, winner = (index[taken].cpu() for index in (row, place, winner))
    images = images.clone()
    images[place] = candidates[row, winner]
    return images


def save(path: Path, state: Rounds) -> None:
    """Keeps the rounds so far, atomically."""
    tensors = {"before": state.before.clone(), "images": state.images}  # safetensors takes no shared memory
    files.save_tensors(path, tensors, {"records": json.dumps(state.records)})


def load(path: Path) -> Rounds:
    """Reads what `save` kept."""
    tensors, metadata = files.load_tensors(path)
    return Rounds(tensors["before"], tensors["images"], json.loads(metadata["records"]))
