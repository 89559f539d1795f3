"""Adds label noise on purpose, for studies. A real noisy set does not need it."""

from __future__ import annotations

import torch
from torch import Tensor

from tadperf import seeds
from tadperf.data.dataset import Dataset
from tadperf.data.labels import require_every_class
from tadperf.data.normalise import fit_normaliser
from tadperf.errors import UserError

KINDS = ("symmetric", "asymmetric", "instance")

SPREAD = 0.1  # standard deviation of the flip rates of the samples (Xia et al., 2020)
BLOCK = 4096  # inputs whose random weights are in memory at a time; not tuned
ROWS = 4096  # images converted to floats at a time; not tuned

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CONFUSED = {"truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog", "dog": "cat"}
SYNONYMS = {"car": "automobile", "plane": "airplane", "aeroplane": "airplane"}

SUPERCLASSES = tuple(
    tuple(line.split(", "))
    for line in """beaver, dolphin, otter, seal, whale
aquarium fish, flatfish, ray, shark, trout
orchid, poppy, rose, sunflower, tulip
bottle, bowl, can, cup, plate
apple, mushroom, orange, pear, sweet pepper
clock, keyboard, lamp, telephone, television
bed, chair, couch, table, wardrobe
bee, beetle, butterfly, caterpillar, cockroach
bear, leopard, lion, tiger, wolf
bridge, castle, house, road, skyscraper
cloud, forest, mountain, plain, sea
camel, cattle, chimpanzee, elephant, kangaroo
fox, porcupine, possum, raccoon, skunk
crab, lobster, snail, spider, worm
baby, boy, girl, man, woman
crocodile, dinosaur, lizard, snake, turtle
hamster, mouse, rabbit, shrew, squirrel
maple tree, oak tree, palm tree, pine tree, willow tree
bicycle, bus, motorcycle, pickup truck, train
lawn mower, rocket, streetcar, tank, tractor""".splitlines()
)
CIFAR100 = tuple(name for group in SUPERCLASSES for name in group)


def parse_noise(spec: str) -> tuple[str, float]:
    """Parses `none` or `kind:rate` (symmetric, asymmetric, instance; rate in [0, 1)). Raises UserError otherwise."""
    if spec == "none":
        return "none", 0.0
    kind, _, text = spec.partition(":")
    if kind not in KINDS:
        raise UserError(
            "--noise", spec, f"must be none, or one of {', '.join(KINDS)} with a rate, such as symmetric:0.4"
        )
    try:
        rate = float(text)
    except ValueError:
        raise UserError("--noise", spec, f"{text!r} is not a number; write {kind}:0.4") from None
    if not 0 <= rate < 1:
        raise UserError("--noise", spec, f"the rate {text} must be at least 0 and below 1")
    return kind, rate


def add_noise(dataset: Dataset, spec: str, seed: int) -> Dataset:
    """Adds noise to the given labels. The old labels become the clean labels, unless clean labels are known.

    symmetric:p   with probability p, a label becomes another class, drawn uniformly.
    asymmetric:p  with probability p, a label becomes the class it is confused with (`confusions`).
    instance:p    the rate and the new class depend on the image (Xia et al., 2020).
    The same seed and spec give the same labels on every machine. Raises UserError on a bad spec, on a set of one class,
    and if a class is left without a sample.
    """
    kind, rate = parse_noise(spec)
    if kind == "none":
        return dataset
    if dataset.num_classes < 2:
        raise UserError("--noise", spec, f"{dataset.name} has only one class; noise needs at least two")
    generator = seeds.generator(seed, "noise")
    labels = dataset.labels
    if kind == "instance":
        noisy = _instance(dataset, rate, generator) if rate else labels
    else:
        flip = torch.rand(len(labels), generator=generator, dtype=torch.float64) < rate
        if kind == "symmetric":
            step = torch.randint(1, dataset.num_classes, labels.shape, generator=generator)
            target = (labels + step) % dataset.num_classes
        else:
            target = confusions(dataset.class_names)[labels]
        noisy = torch.where(flip, target, labels)
    clean = labels if dataset.clean_labels is None else dataset.clean_labels
    return require_every_class(dataset.with_labels(noisy, clean), "--noise", spec)


def confusions(class_names: tuple[str, ...]) -> Tensor:
    """Returns the class that each class is confused with, int64 [C].

    CIFAR-10 and CIFAR-100 are recognised by their class names, in any order. CIFAR-10: truck becomes automobile, bird
    becomes airplane, deer becomes horse, cat and dog become each other, the others do not change. CIFAR-100: the next
    class of the superclass in alphabetical order. Any other set: class c becomes (c + 1) mod C ("pair flip").
    """
    for known, confused in ((CIFAR10, CONFUSED), (CIFAR100, _NEXT)):
        names = [_canonical(name, known) for name in class_names]
        if sorted(names) == sorted(known):
            place = {name: c for c, name in enumerate(names)}
            return torch.tensor([place[confused.get(name, name)] for name in names])
    return (torch.arange(len(class_names)) + 1) % len(class_names)


_NEXT = {name: group[(k + 1) % len(group)] for group in SUPERCLASSES for k, name in enumerate(group)}


def _canonical(name: str, known: tuple[str, ...]) -> str:
    """Spells a class name as in `known`: lower case, spaces for '_' and '-', singular, "airplane" for "plane"."""
    name = name.strip().lower().replace("_", " ").replace("-", " ")
    singular = name[:-1] if name.endswith("s") and name not in known else name
    return SYNONYMS.get(singular, singular)


def _instance(dataset: Dataset, rate: float, generator: torch.Generator) -> Tensor:
    """Returns the labels of `dataset` with instance-dependent noise, int64 [N] (Xia et al., 2020, algorithm 2).

    Sample i flips at rate q_i, drawn from N(rate, 0.1) truncated to [0, 1]. Its new class is drawn from
    softmax(x_i W_y) without its own class y: x_i are its standardised pixels, W_y [D, C] is standard normal. Uses
    float64, so that a rounding difference between machines practically never changes a draw.
    """
    normaliser, labels = fit_normaliser(dataset.images, "meanstd"), dataset.labels
    draws = torch.rand(2, len(labels), generator=generator, dtype=torch.float64)
    low, high = torch.special.ndtr(torch.tensor([0 - rate, 1 - rate], dtype=torch.float64) / SPREAD)
    q = (rate + SPREAD * torch.special.ndtri(low + (high - low) * draws[0])).clamp(0, 1)
    target = torch.empty_like(labels)
    inputs, classes = dataset.images[0].numel(), dataset.num_classes
    for y in range(classes):
        rows = (labels == y).nonzero().squeeze(1)
        logits = torch.zeros(len(rows), classes, dtype=torch.float64)
        for start in range(0, inputs, BLOCK):
            width = min(BLOCK, inputs - start)
            weight = torch.randn(width, classes, generator=generator, dtype=torch.float64)
            for part in torch.arange(len(rows)).split(ROWS):
                x = normaliser(dataset.images[rows[part]]).flatten(1)[:, start : start + width]
                logits[part] += x.double() @ weight
        logits[:, y] = -torch.inf
        reached = logits.softmax(1).cumsum(1)
        drawn = draws[1, rows, None] * reached[:, -1:]
        target[rows] = torch.searchsorted(reached, drawn, right=True).squeeze(1).clamp(max=classes - 1)
    flip = torch.rand(len(labels), generator=generator, dtype=torch.float64) < q
    return torch.where(flip, target, labels)
