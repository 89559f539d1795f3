"""The rounds of refinement: find the anomalous images, generate candidates, keep the best."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tadperf import files, seeds
from tadperf.artifact import DistilledSet
from tadperf.compute import ranks
from tadperf.config import RefineConfig
from tadperf.data.normalise import Normaliser
from tadperf.errors import UserError
from tadperf.refine import select
from tadperf.refine.context import RefineContext
from tadperf.refine.detector import DetectorOutput, classify_images
from tadperf.refine.models.base import DiffusionModel, encode, generate
from tadperf.refine.prototypes import class_prototypes


class RefineState(NamedTuple):
    """The state of refinement: uint8 images [M, ...] as first generated and now, and one record for each round."""

    first: Tensor
    images: Tensor
    records: list[dict[str, Any]]


def refine_images(
    context: RefineContext, model: DiffusionModel, detector: nn.Module, start: DistilledSet | None
) -> RefineState:
    """Computes the prototypes, generates the first images and runs the rounds; saves a checkpoint in every round.

    Processes share the generation. Rank 0 makes every decision.
    """
    config, device, labels = context.config, context.task.device, context.labels
    prototypes = ranks.once(partial(_prototypes, context, model))
    checkpoint = context.run.path / "checkpoints" / "refine.safetensors"
    state = _first_state(context, model, prototypes, checkpoint, start)
    context.run.rewind("refine", len(state.records) - 1)
    while True:
        save_state(checkpoint, state)
        number, images = len(state.records), normalise_state(state, context.data.normaliser, start)
        output = ranks.once(partial(classify, detector, images, config, device))
        flagged = select.is_anomalous(output.logits, labels.to(device), config.beta).cpu()
        record = round_record(output, labels.to(device), flagged)
        state = state._replace(records=[*state.records, record])
        context.run.log("refine", number, **record)
        context.progress("refine", number, config.rounds, **record)
        if number == config.rounds or not flagged.any():
            context.progress("refine", config.rounds, config.rounds, **record)
            return state
        candidates = make_candidates(context, model, prototypes, flagged, number)
        choose = partial(_choose, context, detector, state.images, output, flagged, candidates)
        state = state._replace(images=ranks.once(choose))


def _prototypes(context: RefineContext, model: DiffusionModel) -> Tensor:
    return class_prototypes(
        context.pixels,
        partial(encode, model, batch=context.config.batch),
        context.certain_labels,
        context.task.train.class_names,
        context.task.config.match.ipc,
        context.config,
        context.task.config.seed,
    )


def _first_state(
    context: RefineContext, model: DiffusionModel, prototypes: Tensor, checkpoint: Path, start: DistilledSet | None
) -> RefineState:
    """Returns the checkpoint's state, or the images of `start`, or newly generated images."""
    state = ranks.once(lambda: load_state(checkpoint) if checkpoint.exists() else None)
    if state is not None:
        return state
    if start is not None:
        return RefineState(start.pixels(), start.pixels(), [])
    labels, config = context.labels, context.config
    image_seeds = [seeds.derive(context.task.config.seed, "generate", image) for image in range(len(labels))]
    images = generate(model, prototypes, labels, image_seeds, config.strength, config.batch, context.progress)
    return RefineState(images, images, [])


def _choose(
    context: RefineContext,
    detector: nn.Module,
    images: Tensor,
    output: DetectorOutput,
    flagged: Tensor,
    candidates: Tensor,
) -> Tensor:
    normalised = context.data.normaliser(candidates.flatten(0, 1))
    candidate_output = classify(detector, normalised, context.config, context.task.device)
    return replace_anomalies(images, context.labels, output, flagged, candidates, candidate_output, context.config)


def normalise_state(state: RefineState, normaliser: Normaliser, start: DistilledSet | None) -> Tensor:
    """Returns the images as networks take them; unchanged images of `start` keep their exact values, unrounded."""
    images = normaliser(state.images)
    return images if start is None else torch.where(unchanged_images(state)[:, None, None, None], start.images, images)


def unchanged_images(state: RefineState) -> Tensor:
    """Returns which images have not changed since they were generated, bool [M]."""
    return (state.images == state.first).flatten(1).all(1)


def classify(detector: nn.Module, images: Tensor, config: RefineConfig, device: torch.device) -> DetectorOutput:
    """Runs the detector on normalised images [M, channels, H, W], refine.batch images at a time."""
    return classify_images(detector, images.to(device), config.batch)


def round_record(output: DetectorOutput, labels: Tensor, flagged: Tensor) -> dict[str, Any]:
    """Returns a round's figures: anomalous images, agreement of label and detector, diversity within classes."""
    agreement = (output.logits.argmax(1) == labels).double().mean()
    return {
        "anomalous": int(flagged.sum()),
        "anomaly_rate": float(flagged.double().mean()),
        "agreement": float(agreement),
        "diversity": select.diversity(output.features, labels),
    }


def make_candidates(
    context: RefineContext, model: DiffusionModel, prototypes: Tensor, flagged: Tensor, number: int
) -> Tensor:
    """Generates N candidates for each of A anomalies, uint8 [A, N, channels, H, W]: same prototype and label, new seed.

    The strength grows from round to round, so that a prototype made of mislabelled samples loses its influence
    (tadperf). On digits with 10 % of pair flips in the trusted view, 23 of 100 images were anomalous at strength 0.3.
    After five rounds 15 still were at that strength, and none when it grew to 1.
    """
    config, seed = context.config, context.task.config.seed
    anomalies, count = flagged.nonzero()[:, 0], config.candidates
    image_seeds = [seeds.derive(seed, "candidate", number, a, k) for a in anomalies.tolist() for k in range(count)]
    index, stage = anomalies.repeat_interleave(count), f"round {number + 1}"
    strength = config.strength + (config.reach - config.strength) * (number + 1) / config.rounds
    images = generate(
        model, prototypes[index], context.labels[index], image_seeds, strength, config.batch, context.progress, stage
    )
    return images.unflatten(0, (len(anomalies), count))


def replace_anomalies(
    images: Tensor,
    labels: Tensor,
    output: DetectorOutput,
    flagged: Tensor,
    candidates: Tensor,
    candidate_output: DetectorOutput,
    config: RefineConfig,
) -> Tensor:
    """Replaces each anomalous image by its best candidate, and returns uint8 images [M, ...].

    An image stays if its best candidate is anomalous too, with no higher probability of the label. So no round makes an
    image worse for the detector (tadperf). output: for the M images. candidates: [A, N, ...]. candidate_output: A * N
    rows.
    """
    device = output.logits.device
    place, kept = flagged.nonzero()[:, 0].to(device), (~flagged).nonzero()[:, 0].to(device)
    labels, shape = labels.to(device), candidates.shape[:2]
    competing = DetectorOutput(*(part.unflatten(0, shape) for part in candidate_output))
    winner = select.choose(competing, labels[place], output.features[kept], labels[kept], config)
    row = torch.arange(len(place), device=device)
    logits = competing.logits[row, winner.clamp(min=0)]
    before = select.confidence(output.logits[place], labels[place])
    better = select.confidence(logits, labels[place]) > before
    accepted = (winner >= 0) & (better | ~select.is_anomalous(logits, labels[place], config.beta))
    row, place, winner = (index[accepted].cpu() for index in (row, place, winner))
    images = images.clone()
    images[place] = candidates[row, winner]
    return images


def save_state(path: Path, state: RefineState) -> None:
    """Writes the checkpoint, atomically."""
    tensors = {"before": state.first.clone(), "images": state.images}  # safetensors refuses shared memory
    files.save_tensors(path, tensors, {"records": json.dumps(state.records)})


def load_state(path: Path) -> RefineState:
    """Reads a checkpoint. Raises UserError if it is damaged."""
    tensors, metadata = files.load_tensors(path)
    try:
        return RefineState(tensors["before"], tensors["images"], json.loads(metadata["records"]))
    except (KeyError, ValueError) as error:
        remedy = f"is not a checkpoint of refinement ({error}); delete it and resume: the images are generated again"
        raise UserError("refine", path, remedy) from None
