from __future__ import annotations

import hashlib
import math
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from tadperf.data.dataset import Dataset
from tadperf.data.noise import CIFAR10, CIFAR100, SUPERCLASSES, add_noise, confusions, parse_noise
from tadperf.data.open import open_data
from tadperf.errors import UserError

SPECS = ("symmetric:0.4", "asymmetric:0.4", "instance:0.4")


def made_up(count, names, size=4):
    torch.manual_seed(0)
    images = torch.randint(256, (count, 1, size, size), dtype=torch.uint8)
    return Dataset(images, torch.arange(count) % len(names), names, "made-up")


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "instance"])
@pytest.mark.parametrize("rate", [0.1, 0.4, 0.8])
def test_the_observed_rate_is_the_requested_one(kind, rate):
    noisy = add_noise(made_up(20000, tuple("abcde")), f"{kind}:{rate}", seed=3)
    flipped = (noisy.labels != noisy.clean_labels).double().mean().item()
    expected = rate
    if kind == "instance":  # the mean of the normal distribution truncated to [0, 1]
        expected = stats.truncnorm(-rate / 0.1, (1 - rate) / 0.1, loc=rate, scale=0.1).mean()
    assert abs(flipped - expected) < 5 * math.sqrt(0.25 / 20000)


def test_symmetric_targets_are_uniform_over_the_other_classes():
    noisy = add_noise(made_up(30000, tuple("abcdef")), "symmetric:0.5", seed=0)
    clean = cast(Tensor, noisy.clean_labels)
    table = torch.zeros(6, 6).index_put_((clean, noisy.labels), torch.ones(()), accumulate=True)
    for c in range(6):
        others = table[c][torch.arange(6) != c]
        assert stats.chisquare(others.numpy()).pvalue > 1e-4


def test_asymmetric_targets_on_cifar10_in_any_order_and_spelling():
    names = ("Truck", "cars", "birds", "plane", "deer", "horses", "cat", "Dogs", "frog", "ship")
    noisy = add_noise(made_up(5000, names), "asymmetric:0.6", seed=0)
    clean = cast(Tensor, noisy.clean_labels)
    moved = noisy.labels != clean
    pairs = {(names[a], names[b]) for a, b in zip(clean[moved], noisy.labels[moved], strict=True)}
    expected = {("Truck", "cars"), ("birds", "plane"), ("deer", "horses"), ("cat", "Dogs"), ("Dogs", "cat")}
    assert pairs == expected
    assert abs(moved.double().mean() - 0.3) < 0.03  # half of the classes keep their label


def test_confusions():
    ten = dict(zip(CIFAR10, confusions(CIFAR10).tolist(), strict=True))
    assert [ten[name] for name in ("truck", "bird", "deer", "cat", "dog")] == [1, 0, 7, 5, 3]
    assert [ten[name] for name in ("airplane", "automobile", "frog", "horse", "ship")] == [0, 1, 6, 7, 8]
    names = tuple(sorted(name.replace(" ", "_") for name in CIFAR100))  # as the hub and the authors spell them
    assert (len(set(names)), names[0], names[22], names[99]) == (100, "apple", "clock", "worm")
    target = confusions(names)
    group = {name.replace(" ", "_"): k for k, members in enumerate(SUPERCLASSES) for name in members}
    assert all(group[names[c]] == group[names[t]] for c, t in enumerate(target.tolist()))
    orbit, c = [], names.index("bus")
    for _ in range(5):
        orbit.append(names[c])
        c = int(target[c])
    assert orbit == ["bus", "motorcycle", "pickup_truck", "train", "bicycle"]
    assert names[c] == "bus"
    assert confusions(tuple("abc")).tolist() == [1, 2, 0]
    assert confusions(tuple(map(str, range(10)))).tolist() == [*range(1, 10), 0]


def test_instance_noise_depends_on_the_image():
    """Equal images of a class get nearly always one target (Xia et al.); another seed gives another target."""
    images = torch.randint(256, (8, 1, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).repeat(
        500, 1, 1, 1
    )
    labels = torch.arange(8).repeat(500) % 4
    dataset = Dataset(images, labels, tuple("abcd"), "made-up")
    targets = []
    for seed in range(4):
        noisy = add_noise(dataset, "instance:0.4", seed)
        moved = noisy.labels != labels
        counts = torch.stack(
            [noisy.labels[(torch.arange(4000) % 8 == k) & moved].bincount(minlength=4) for k in range(8)]
        )
        assert (counts.max(1).values / counts.sum(1)).mean() > 0.8  # 1/3 if targets ignored the image
        targets.append(counts.argmax(1).tolist())
    assert len({tuple(target) for target in targets}) == 4


def test_instance_targets_follow_the_papers_softmax(monkeypatch):
    """Compares with a loop over samples and the same draws, also in small blocks."""
    from tadperf import seeds
    from tadperf.data import noise
    from tadperf.data.normalise import fit_normaliser

    dataset = made_up(40, tuple("abc"))
    x = fit_normaliser(dataset.images)(dataset.images).flatten(1).double()
    for block in (4096, 5):
        monkeypatch.setattr(noise, "BLOCK", block)
        g = seeds.generator(1, "noise")
        draws = torch.rand(2, 40, generator=g, dtype=torch.float64)
        weights = []
        for _ in range(3):
            parts = [torch.randn(min(block, 16 - k), 3, generator=g, dtype=torch.float64) for k in range(0, 16, block)]
            weights.append(torch.cat(parts))
        flips = torch.rand(40, generator=g, dtype=torch.float64)
        q = stats.truncnorm.ppf(draws[0].numpy(), -4, 6, loc=0.4, scale=0.1)
        expected = []
        for i, y in enumerate(dataset.labels.tolist()):
            logits = x[i] @ weights[y]
            logits[y] = -torch.inf
            cumulative = logits.softmax(0).cumsum(0)
            target = int((cumulative <= draws[1, i]).sum())
            expected.append(target if flips[i] < q[i] else y)
        assert add_noise(dataset, "instance:0.4", 1).labels.tolist() == expected


@pytest.mark.parametrize("spec", SPECS)
def test_one_seed_gives_one_result_and_another_a_different_one(spec):
    dataset = open_data("digits").train
    a, b, c = (add_noise(dataset, spec, seed).labels for seed in (7, 7, 8))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize(
    ("spec", "digest"), [*zip(SPECS, ("a2c59e786993b000", "32b6ea26784bb624", "f1f20ad107c6b4a1"), strict=True)]
)
def test_labels_are_the_same_on_every_machine(spec, digest):
    labels = add_noise(open_data("digits").train, spec, seed=0).labels
    assert hashlib.blake2b(labels.numpy().tobytes(), digest_size=8).hexdigest() == digest


@pytest.mark.parametrize("spec", SPECS)
def test_known_clean_labels_are_kept(spec):
    plain = made_up(300, tuple("abc"))
    truth = plain.labels.roll(1)
    noisy = add_noise(plain.with_labels(plain.labels, truth), spec, 0)
    assert noisy.clean_labels is truth
    assert torch.equal(noisy.labels, add_noise(plain, spec, 0).labels)  # depends on the given labels only
    assert torch.equal(cast(Tensor, add_noise(plain, spec, 0).clean_labels), plain.labels)


def test_none_changes_nothing_and_rate_zero_changes_no_label():
    dataset = made_up(30, tuple("abc"))
    assert add_noise(dataset, "none", 0) is dataset
    for kind in ("symmetric", "asymmetric", "instance"):
        assert torch.equal(add_noise(dataset, f"{kind}:0", 0).labels, dataset.labels)


@given(
    kind=st.sampled_from(["symmetric", "asymmetric", "instance"]),
    rate=st.floats(0, 0.99),
    classes=st.integers(2, 7),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_labels_stay_in_range(kind, rate, classes, seed):
    dataset = made_up(50 * classes, tuple(map(str, range(classes))), size=2)
    try:
        noisy = add_noise(dataset, f"{kind}:{rate!r}", seed)
    except UserError as error:
        assert "no training sample" in str(error)  # noqa: PT017
        return
    assert noisy.labels.dtype == torch.int64
    assert int(noisy.labels.min()) >= 0
    assert int(noisy.labels.max()) < classes


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("symmetric:1.5", "rate 1.5 must be at least 0 and below 1"),
        ("symmetric:-0.1", "rate -0.1"),
        ("symmetric:nan", "rate nan"),
        ("symmetric:1", "below 1"),
        ("symmetric:many", "'many' is not a number; write symmetric:0.4"),
        ("symmetric", "'' is not a number"),
        ("pair:0.4", "must be none, or one of symmetric, asymmetric, instance"),
        ("", "must be none"),
        ("none:0.4", "must be none"),
    ],
)
def test_bad_specs(spec, words):
    for call in (parse_noise, lambda spec: add_noise(made_up(9, tuple("abc")), spec, 0)):
        with pytest.raises(UserError, match=words) as caught:
            call(spec)
        assert (caught.value.field, caught.value.value) == ("--noise", spec)


def test_parse_noise():
    assert parse_noise("none") == ("none", 0.0)
    assert parse_noise("asymmetric:0.25") == ("asymmetric", 0.25)


def test_one_class_is_refused_and_an_empty_class_is_named():
    with pytest.raises(UserError, match="has only one class"):
        add_noise(made_up(5, ("a",)), "symmetric:0.4", 0)
    with pytest.raises(UserError, match=r"class '.' .*has no training sample"):
        add_noise(made_up(4, tuple("abcd")), "symmetric:0.9", 0)
