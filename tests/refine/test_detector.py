"""The detector: its features, the check that it must pass, and the weights that it accepts."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from tadperf import files
from tadperf.config import DetectorConfig
from tadperf.data.images import normalise_images
from tadperf.data.normalise import fit_normaliser
from tadperf.data.open import open_data
from tadperf.errors import UserError
from tadperf.nets.problem import Problem
from tadperf.nets.training import accuracy
from tadperf.refine.detector import (
    build_detector,
    check_detector,
    class_permutation,
    classify_images,
    load_detector,
    train_detector,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = DetectorConfig(width=8, depth=2, epochs=4, batch=32, lr=0.1)
NAMES = tuple(map(str, range(10)))


@lru_cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    split = open_data("digits").train
    images = normalise_images(fit_normaliser(split.images), split.images)
    assert isinstance(images, torch.Tensor)
    return images, split.labels


@lru_cache
def trained() -> dict[str, torch.Tensor]:
    images, labels = digits()
    problem = Problem(images[:1000], labels[:1000], NAMES, SMALL, "none", 0, torch.device("cpu"))
    return train_detector(SMALL, problem).state_dict()


def fresh(config: DetectorConfig = SMALL) -> torch.nn.Module:
    return build_detector(config, digits()[0], 10, 0)


def detector(order: list[int] | None = None) -> torch.nn.Module:
    """Returns the trained detector, with its classes in another order if one is given."""
    module = fresh()
    state = {name: value.clone() for name, value in trained().items()}
    if order is not None:
        *_, weight, bias = state
        state[weight], state[bias] = state[weight][order], state[bias][order]
    module.load_state_dict(state)
    return module.eval()


@pytest.mark.parametrize("name", ["convnet", "resnet18", "alexnet", "vgg11"])
def test_features_are_the_input_of_the_last_layer(name):
    config = DetectorConfig(name=name, width=4)
    images = torch.randn(5, 3, 8, 8)
    module: Any = build_detector(config, images, 7, 0).eval()
    logits, features = classify_images(module, images)
    torch.testing.assert_close(logits, module(images))
    assert features.ndim == 2
    torch.testing.assert_close(module[-1](features), logits)


def test_a_good_detector_is_accepted():
    images, labels = digits()
    module = detector()
    measured = check_detector(module, images[1000:], labels[1000:], NAMES)
    assert measured == accuracy(module, images[1000:], labels[1000:]) > 0.9


def test_an_untrained_detector_is_refused():
    images, labels = digits()
    with pytest.raises(UserError, match=r"^detector: accuracy 0\.\d+: is near chance: it must be above 0\.1"):
        check_detector(fresh(), images[1000:], labels[1000:], NAMES)


def test_classes_in_another_order_are_named():
    images, labels = digits()
    held_out = images[1000:], labels[1000:]
    with pytest.raises(UserError) as all_moved:
        check_detector(detector([9, *range(9)]), *held_out, NAMES)
    assert str(all_moved.value).startswith("detector: 10 of 10 classes: predicts '0' as '1', '1' as '2'")
    # The accuracy of about 0.8 would pass the other check.
    with pytest.raises(UserError, match=r"^detector: 2 of 10 classes: predicts '3' as '5', '5' as '3' .*order"):
        check_detector(detector([0, 1, 2, 5, 4, 3, 6, 7, 8, 9]), *held_out, NAMES)


@pytest.mark.parametrize(
    ("rows", "order"),
    [
        ([[5, 0, 0], [0, 5, 0], [0, 0, 5]], [0, 1, 2]),
        ([[0, 5, 0], [0, 0, 5], [5, 0, 0]], [1, 2, 0]),
        ([[0, 5, 0], [0, 5, 0], [0, 0, 5]], [0, 1, 2]),  # a class that is never predicted is not moved
        ([[2, 3, 0], [2, 2, 1], [0, 0, 5]], [0, 1, 2]),  # no clear majority in the second
        ([[0, 0, 0], [0, 5, 0], [0, 0, 5]], [0, 1, 2]),  # the first class has no held-out sample
    ],
)
def test_class_permutation(rows, order):
    assert class_permutation(torch.tensor(rows)) == order


def test_weights_of_the_user(tmp_path):
    images = digits()[0]
    path = tmp_path / "mine.safetensors"
    files.save_tensors(path, trained())
    module = load_detector(path, fresh(), 10)
    assert torch.equal(classify_images(module, images[:50]).logits, classify_images(detector(), images[:50]).logits)

    def refused(config: DetectorConfig = SMALL, classes: int = 10) -> str:
        with pytest.raises(UserError) as caught:
            load_detector(path, build_detector(config, images, classes, 0), classes)
        return str(caught.value).removeprefix(f"detector.path: {path}: ")

    assert refused(classes=7).startswith("it was trained on 10 classes, the data have 7")
    assert refused(SMALL.model_copy(update={"width": 16})).startswith(
        "0.weight is [8, 1, 3, 3], expected [16, 1, 3, 3]; "
    )
    assert "tensor '8.weight' is missing (the file holds 0.bias" in refused(
        SMALL.model_copy(update={"depth": 3, "width": 8})
    )
    files.save_tensors(path, trained() | {"more": torch.zeros(1)})
    assert refused().startswith("the network has no tensor 'more'")
    with pytest.raises(UserError, match="no such file"):
        load_detector(tmp_path / "none.safetensors", fresh(), 10)
