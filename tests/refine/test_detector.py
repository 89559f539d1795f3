"""The detector: what it reads, how it proves itself, and whose weights it takes."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from tadperf import files
from tadperf.config import DetectorConfig
from tadperf.data.images import normalise_images
from tadperf.data.normalise import fit_normaliser
from tadperf.data.open import open_data
from tadperf.errors import UserError
from tadperf.nets.training import accuracy
from tadperf.refine.detector import (
    build_detector,
    check_detector,
    classify_images,
    load_detector,
    permutation,
    train_detector,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = DetectorConfig(width=8, depth=2, epochs=4, batch=32, lr=0.1)  # pyright: ignore[reportCallIssue]
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
    return train_detector(SMALL, images[:1000], labels[:1000], None, 10, "none", 0, torch.device("cpu")).state_dict()


def fresh(config: DetectorConfig = SMALL) -> torch.nn.Module:
    return build_detector(config, digits()[0], 10, 0)


def detector(order: list[int] | None = None) -> torch.nn.Module:
    """The trained detector, its classes in another order where one is given."""
    module = fresh()
    state = {name: value.clone() for name, value in trained().items()}
    if order is not None:
        *_, weight, bias = state
        state[weight], state[bias] = state[weight][order], state[bias][order]
    module.load_state_dict(state)
    return module.eval()


@pytest.mark.parametrize("name", ["convnet", "resnet18", "alexnet", "vgg11"])
def test_features_are_what_the_last_layer_reads(name):
    config = DetectorConfig(name=name, width=4)  # pyright: ignore[reportCallIssue]
    images = torch.randn(5, 3, 8, 8)
    module = build_detector(config, images, 7, 0).eval()
    logits, features = classify_images(module, images)
    torch.testing.assert_close(logits, module(images))
    assert features.ndim == 2
    torch.testing.assert_close(module[-1](features), logits)  # pyright: ignore[reportIndexIssue]


def test_a_good_detector_proves_itself():
    images, labels = digits()
    module = detector()
    found = check_detector(module, images[1000:], labels[1000:], NAMES)
    assert found == accuracy(module, images[1000:], labels[1000:]) > 0.9


def test_an_untrained_detector_is_refused():
    images, labels = digits()
    with pytest.raises(UserError, match=r"^detector: accuracy 0\.\d+: is near chance: it must be above 0\.1"):
        check_detector(fresh(), images[1000:], labels[1000:], NAMES)


def test_classes_in_another_order_are_named():
    images, labels = digits()
    held = images[1000:], labels[1000:]
    with pytest.raises(UserError) as all_moved:
        check_detector(detector([9, *range(9)]), *held, NAMES)
    assert str(all_moved.value).startswith("detector: 10 of 10 classes: takes '0' for its '1', '1' for its '2'")
    with pytest.raises(UserError, match=r"^detector: 2 of 10 classes: takes '3' for its '5', '5' for its '3': .*order"):
        check_detector(detector([0, 1, 2, 5, 4, 3, 6, 7, 8, 9]), *held, NAMES)  # accuracy alone, about 0.8, would pass


@pytest.mark.parametrize(
    ("rows", "order"),
    [
        ([[5, 0, 0], [0, 5, 0], [0, 0, 5]], [0, 1, 2]),
        ([[0, 5, 0], [0, 0, 5], [5, 0, 0]], [1, 2, 0]),
        ([[0, 5, 0], [0, 5, 0], [0, 0, 5]], [0, 1, 2]),  # a class forgotten is not a class moved
        ([[2, 3, 0], [2, 2, 1], [0, 0, 5]], [0, 1, 2]),  # no clear majority in the second
        ([[0, 0, 0], [0, 5, 0], [0, 0, 5]], [0, 1, 2]),  # nothing held out of the first
    ],
)
def test_permutation(rows, order):
    assert permutation(torch.tensor(rows)) == order


def test_weights_of_ones_own(tmp_path):
    images = digits()[0]
    path = tmp_path / "mine.safetensors"
    files.save_tensors(path, trained())
    module = load_detector(path, fresh(), 10)
    assert torch.equal(classify_images(module, images[:50]).logits, classify_images(detector(), images[:50]).logits)

    def refused(config: DetectorConfig = SMALL, classes: int = 10) -> str:
        with pytest.raises(UserError) as caught:
            load_detector(path, build_detector(config, images, classes, 0), classes)
        return str(caught.value).removeprefix(f"detector.path: {path}: ")

    assert refused(classes=7).startswith("tells 10 classes apart, the data have 7")
    assert refused(SMALL.model_copy(update={"width": 16})).startswith("0.weight is [8, 1, 3, 3], not [16, 1, 3, 3]; ")
    assert "has no '8.weight', only 0.bias" in refused(SMALL.model_copy(update={"depth": 3, "width": 8}))
    files.save_tensors(path, trained() | {"more": torch.zeros(1)})
    assert refused().startswith("holds 'more', which the network has not")
    with pytest.raises(UserError, match="there is no such file"):
        load_detector(tmp_path / "none.safetensors", fresh(), 10)
