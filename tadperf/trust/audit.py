"""Audits the labels of a set of images without distillation."""

from __future__ import annotations

import math

from tadperf.compute.device import resolve_device
from tadperf.compute.torch_settings import torch_settings
from tadperf.compute.work_progress import reporting
from tadperf.config import Config
from tadperf.config.merge import merge
from tadperf.data.dataset import Dataset
from tadperf.data.images import device_pixels, normalise_images
from tadperf.data.normalise import fit_normaliser, normalise_work
from tadperf.nets.problem import Problem
from tadperf.progress import Progress, silent
from tadperf.trust.evidence import audit_labels, loop_signals, open_evidence
from tadperf.trust.loop import dual_loop
from tadperf.trust.state import TrustState


def audit(
    dataset: Dataset, config: Config | None = None, progress: Progress = silent, networks: bool = True
) -> TrustState:
    """Runs the dual loop on a set of images and returns a verdict for every label (TAD; `dual_loop`).

    config: only the sections data (normalise, augment), net and trust, and seed, device and tf32 are used. None means
    the default preset for this set: a digits preset for the built-in digits, else `quick`. Does not read
    `dataset.clean_labels`.
    trust.features, trust.probs and trust.encoder are further signals. networks: with False no network is trained, and
    the verdicts come from these alone (`audit_labels`). Raises UserError if there are none then.
    """
    if config is None:
        config = merge(options={"data.path": dataset.source.get("path", dataset.name)})
    device = resolve_device(config.device)
    with torch_settings(tf32=config.tf32):
        evidence = open_evidence(config.trust, dataset, device, progress)
        if not networks:
            names, wrong = dataset.class_names, config.trust.budget
            return audit_labels(dataset.labels, *evidence, names, progress, wrong)
        probabilities, features = loop_signals(evidence, dataset.labels, dataset.num_classes, progress)
        pixels, kind = device_pixels(dataset.images, device), config.data.normalise
        with reporting(progress, "data:normalise", normalise_work(kind, len(dataset), 0, math.prod(dataset.shape))):
            images = normalise_images(fit_normaliser(pixels, kind, device), pixels, device)
        names, augment = dataset.class_names, config.data.augment
        problem = Problem(images, dataset.labels, names, config.net, augment, config.seed, device)
        trust = config.trust.model_copy(update={"mode": "on"})
        return dual_loop(problem, trust, progress=progress, evidence=probabilities, features=features).state
