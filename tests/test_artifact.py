"""DistilledSet: a saved set loads as it was, and an unusable one is refused in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tadperf
from tadperf.artifact import DistilledSet, load
from tadperf.config import NetConfig
from tadperf.config.merge import merge
from tadperf.data.dataset import Dataset
from tadperf.data.enlarge import enlarge, shrink
from tadperf.data.normalise import fit_normaliser
from tadperf.errors import UserError
from tadperf.files import load_tensors, save_tensors
from tadperf.nets.training import Recipe

NAMES = ("circle", "sqüare", "dot")
RECIPE = Recipe(epochs=30, batch=8, lr=0.05, momentum=0.9, weight_decay=5e-4, augment="flip")


def photos(count: int, seed: int) -> Dataset:
    """Three classes that differ in colour: uint8 [count, 3, 8, 8]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 100, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images[torch.arange(count), labels] += 120
    return Dataset(images, labels, NAMES, "colours")


def distilled(kind: str = "meanstd", soft: bool = False) -> DistilledSet:
    data = photos(60, 0)
    normaliser = fit_normaliser(data.images, kind)
    labels = nn.functional.one_hot(data.labels[:6], 3).float() * 5 if soft else data.labels[:6]
    return DistilledSet(
        images=normaliser(data.images[:6]),
        labels=labels,
        lr=0.0213,
        class_names=NAMES,
        normaliser=normaliser,
        augment="color_flip",
        net=NetConfig.model_validate({"depth": 1, "width": 8}),
        recipe=RECIPE,
        config=merge("digits").model_dump(mode="json"),
        seed=3,
        versions={"tadperf": "0.1.0"},
        data={"name": "colours", "source": {"path": "colours"}, "fingerprint": data.fingerprint},
    )


@pytest.mark.parametrize(("kind", "soft"), [("meanstd", False), ("zca", True)])
def test_a_set_loads_as_it_was_saved(tmp_path, kind, soft):
    one = distilled(kind, soft)
    one.save(tmp_path / "d.safetensors")
    two = tadperf.load(tmp_path / "d.safetensors")
    for name in ("lr", "class_names", "augment", "net", "recipe", "config", "seed", "versions", "data"):
        assert getattr(two, name) == getattr(one, name), name
    for name in ("images", "labels"):
        a, b = getattr(one, name), getattr(two, name)
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    for name, tensor in one.normaliser.tensors().items():
        assert torch.equal(tensor, getattr(two.normaliser, name))
    assert torch.equal(two.pixels(), photos(60, 0).images[:6])
    assert (two.ipc, two.num_classes, two.shape, two.hard_labels.tolist()) == (2, 3, (3, 8, 8), [0, 1, 2, 0, 1, 2])


def small() -> DistilledSet:
    one = distilled()
    stored = shrink(one.images, 2)
    return replace(one, images=enlarge(stored, 8), stored=stored)


def test_a_set_of_small_images_is_stored_small_and_loaded_enlarged(tmp_path):
    one = small()
    one.save(tmp_path / "small")
    distilled().save(tmp_path / "full")
    two = load(tmp_path / "small")
    assert torch.equal(two.images, one.images)
    assert two.stored is not None
    assert one.stored is not None
    assert torch.equal(two.stored, one.stored)
    assert (two.ipc, two.shape, repr(two)[:64]) == (
        0,
        (3, 8, 8),
        "DistilledSet(colours: 6 images of 3 x 8 x 8 (stored 4 x 4), 3 cl",
    )
    four = replace(one, images=one.images.repeat(4, 1, 1, 1), stored=one.stored.repeat(4, 1, 1, 1))
    assert four.ipc == distilled().ipc
    saved = (tmp_path / "full").stat().st_size - (tmp_path / "small").stat().st_size
    assert saved > 0.9 * 4 * (one.images.numel() - one.stored.numel())
    # An earlier version must not take the small images for the set.
    _, metadata = load_tensors(tmp_path / "small")
    assert json.loads(metadata["tadperf"])["schema"] == 2


@pytest.mark.parametrize("side", [0, -8, 3, 33, 8.0, "8", None, True])
def test_a_wrong_side_of_small_images_is_refused(tmp_path, side):
    small().save(tmp_path / "d")
    tensors, metadata = load_tensors(tmp_path / "d")
    values = json.loads(metadata["tadperf"]) | {"side": side}
    save_tensors(tmp_path / "d", tensors, {"tadperf": json.dumps(values)})
    with pytest.raises(UserError, match=r"is damaged \(side = .* does not fit"):
        load(tmp_path / "d")


@pytest.mark.parametrize("shape", [(5, 3, 4, 4), (6, 1, 4, 4), (6, 3, 4, 5), (6, 3, 9, 9), (6, 3, 0, 0), (6, 48)])
def test_small_images_that_do_not_fit_are_refused(shape):
    with pytest.raises(UserError, match="stored: "):
        replace(small(), stored=torch.zeros(shape)).validate()
    with pytest.raises(
        UserError, match=r"stored: .* must be `images` before they are enlarged; replace it by None for"
    ):
        replace(small(), images=distilled().images).validate()
    replace(small(), images=distilled().images, stored=None).validate()
    fitting = torch.zeros(6, 3, 4, 4)
    with pytest.raises(UserError, match="stored: "):
        replace(small(), stored=fitting.double()).validate()
    with pytest.raises(UserError, match="stored: 288 of 288 values"):
        replace(small(), stored=fitting * torch.nan).validate()


def test_equal_sets_give_equal_bytes(tmp_path):
    one = distilled("zca")
    reordered = replace(one, data=dict(reversed(one.data.items())), images=one.images.clone())
    one.save(tmp_path / "one")
    reordered.save(tmp_path / "two")
    load(tmp_path / "one").save(tmp_path / "three")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == (tmp_path / "three").read_bytes()


def test_the_four_lines_of_the_readme(tmp_path):
    distilled().save(tmp_path / "d.safetensors")
    ds = tadperf.load(tmp_path / "d.safetensors")
    x, y = ds.images, ds.labels
    net = ds.train()
    assert ds.accuracy(net, photos(90, 1)) > 0.9
    test = photos(90, 2)
    share = (net(ds.normaliser(test.images)).argmax(1) == test.labels).double().mean().item()
    assert ds.accuracy(net, (test.images, test.labels)) == pytest.approx(share)
    assert x.dtype == torch.float32
    assert y.tolist() == [0, 1, 2, 0, 1, 2]


def test_a_run_folder_can_be_loaded(tmp_path):
    with pytest.raises(UserError, match=r"distilled\.safetensors: no such file"):
        load(tmp_path)
    distilled().save(tmp_path / "distilled.safetensors")
    assert torch.equal(load(str(tmp_path)).images, distilled().images)


def test_repr_is_one_short_line():
    text = "DistilledSet(colours: 6 images of 3 x 8 x 8, 3 classes, soft labels, lr 0.0213, seed 3)"
    assert repr(distilled(soft=True)) == text


def test_accuracy_takes_numpy_arrays_and_restores_the_mode():
    ds, test = distilled(), photos(9, 1)
    net = ds.train(epochs=1).train()
    layers = list(net.children())
    layers[0].eval()
    expected = ds.accuracy(net, test)
    images, labels = test.images.numpy(), test.labels.numpy()
    assert ds.accuracy(net, (images, labels)) == expected
    assert ds.accuracy(net, (images[::-1], labels[::-1].astype("uint8"))) == expected
    assert ds.accuracy(net, (images, labels.tolist())) == expected
    assert [layer.training for layer in layers] == [False] + [True] * (len(layers) - 1)
    with pytest.raises(UserError, match=r"label -1: must be in 0\.\.2"):
        ds.accuracy(net, (images, labels - 1))
    with pytest.raises(UserError, match="and integer labels"):
        ds.accuracy(net, (images, labels / 2))
    with pytest.raises(UserError, match="holds no image"):
        ds.accuracy(net, (images[:0], labels[:0].astype("int64")))


def test_training_and_accuracy_leave_the_number_of_threads():
    ds, before = distilled(), torch.get_num_threads()
    ds.accuracy(ds.train(epochs=1), photos(9, 1))
    assert torch.get_num_threads() == before


def test_training_depends_on_the_seed_only():
    ds = distilled()

    def weights(seed: int, network: NetConfig | str | None = None) -> torch.Tensor:
        net = ds.train(network, seed=seed, epochs=2)
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert weights(1, network="alexnet").shape != weights(1).shape
    wide = NetConfig.model_validate({"depth": 1, "width": 16})
    assert len(weights(1, network=wide)) > len(weights(1))
    with pytest.raises(UserError, match=r"^network: resnet99: must be one of convnet"):
        ds.train(network="resnet99")


def test_a_test_set_in_another_class_order_is_refused():
    ds, test = distilled(), photos(9, 1)
    net = ds.train(epochs=1)
    with pytest.raises(UserError, match=r"^test: colours: .* or another order: dot for circle"):
        ds.accuracy(net, replace(test, class_names=NAMES[::-1]))
    with pytest.raises(UserError, match=r"^test: colours: .* 4 for 3"):
        ds.accuracy(net, replace(test, class_names=(*NAMES, "more")))
    with pytest.raises(UserError, match=r"^test: uint8 \[9, 3, 4, 4\]: must be \[3, 8, 8\] like the distilled"):
        ds.accuracy(net, replace(test, images=test.images[:, :, :4, :4]))
    with pytest.raises(UserError, match=r"^test: float32 \[9, 3, 8, 8\], int64 \[9\]: must be images uint8"):
        ds.accuracy(net, (test.images.float(), test.labels))


def test_the_recorded_data_set_gives_the_default_test_split():
    digits = tadperf.open_data("digits")
    normaliser = fit_normaliser(digits.train.images)
    index = torch.cat([(digits.train.labels == c).nonzero()[:2, 0] for c in range(10)])
    ds = replace(
        distilled(),
        images=normaliser(digits.train.images[index]),
        labels=digits.train.labels[index],
        normaliser=normaliser,
        class_names=digits.train.class_names,
        augment="none",
        data={"name": "digits", "source": digits.train.source, "fingerprint": digits.train.fingerprint},
    )
    assert digits.test is not None
    assert torch.equal(ds.test_split().images, digits.test.images)
    net = ds.train(epochs=3)
    assert ds.accuracy(net, "digits") == ds.accuracy(net, digits.test)
    with pytest.raises(UserError, match="nowhere"):
        ds.test_split("nowhere")


NAN = float("nan")


@pytest.mark.parametrize(
    ("change", "field", "remedy"),
    [
        ({"images": torch.full((6, 3, 8, 8), NAN)}, "images", "must be finite"),
        (
            {"images": torch.zeros(6, 3, 8, 8).index_fill(0, torch.tensor([2]), float("inf"))},
            "images",
            "must be finite",
        ),
        ({"images": torch.zeros(6, 3, 8)}, "images", r"float32 [M, channels, H, W]"),
        ({"images": torch.zeros(6, 3, 8, 8, dtype=torch.float64)}, "images", "must be float32"),
        ({"images": torch.zeros(0, 3, 8, 8)}, "images", "M > 0"),
        ({"images": torch.zeros(6, 1, 8, 8)}, "normaliser.mean", "1 values"),
        ({"labels": torch.tensor([0, 1, 2])}, "labels", "the 6 images"),
        ({"labels": torch.tensor([0, 1, 2, 0, 1, 3])}, "labels", "must be in 0..2"),
        ({"labels": torch.tensor([0, 1, 2, 0, 1, -1])}, "labels", "must be in 0..2"),
        ({"labels": torch.zeros(6, 4)}, "labels", "float32 [M, 3]"),
        ({"labels": torch.full((6, 3), NAN)}, "labels", "must be finite"),
        ({"lr": 0.0}, "lr", "above 0"),
        ({"lr": NAN}, "lr", "above 0"),
        ({"augment": "shear"}, "data.augment", "unknown"),
    ],
)
def test_invalid_sets_are_refused_before_anything_is_written(tmp_path, change, field, remedy):
    with pytest.raises(UserError) as caught:
        replace(distilled(), **change).save(tmp_path / "d")
    assert caught.value.field == field
    assert remedy in caught.value.remedy
    assert not list(tmp_path.iterdir())


def modified(path: Path, tensors: dict | None = None, values: dict | None = None, drop: str = "") -> Path:
    """Saves a set with some tensors and metadata replaced, and one name removed."""
    distilled().save(path)
    stored, metadata = load_tensors(path)
    text = json.loads(metadata["tadperf"]) | (values or {})
    stored |= tensors or {}
    text.pop(drop, None)
    stored.pop(drop, None)
    save_tensors(path, stored, {"tadperf": json.dumps(text)})
    return path


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"tensors": {"images": torch.full((6, 3, 8, 8), NAN)}},
            r"images: 1152 of 1152 values are NaN.*distill it again",
        ),
        ({"tensors": {"labels": torch.arange(6)}}, "labels: 3: must be in 0..2"),
        ({"tensors": {"lr": torch.tensor(-1.0)}}, "lr: -1.0: must be a finite number above 0"),
        ({"tensors": {"lr": torch.ones(2)}}, "file: .*is damaged"),
        ({"tensors": {"normaliser.std": torch.zeros(3)}}, "normaliser.std: .*must be above 0"),
        ({"tensors": {"normaliser.zca": torch.zeros(3, 3)}}, "file: .*is damaged .*zca"),
        ({"drop": "images"}, "file: .*is damaged .'images' is missing"),
        ({"drop": "recipe"}, "file: .*is damaged .'recipe' is missing"),
        ({"drop": "schema"}, "file: .*metadata is damaged"),
        ({"values": {"recipe": {"epochs": "many"}}}, "file: .*is damaged .*epochs"),
        ({"values": {"net": {"name": "transformer"}}}, "file: .*is damaged .*name"),
        ({"values": {"class_names": [1, 2, 3]}}, "file: .*class_names are not"),
        ({"values": {"seed": "x"}}, "file: .*seed is not a int"),
        ({"values": {"schema": 3, "written_by": "9.9.0"}}, "file: .*has schema 3, written by tadperf 9.9.0; upgrade"),
    ],
)
def test_a_modified_file_is_refused(tmp_path, changes, expected):
    with pytest.raises(UserError, match=f"^{expected}") as caught:
        load(modified(tmp_path / "d.safetensors", **changes))
    assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path):
    file = tmp_path / "d.safetensors"
    distilled().save(file)
    content = file.read_bytes()
    for length in (0, 5, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(UserError, match="truncated, or not a safetensors file"):
            load(file)
    torch.save(torch.zeros(1), tmp_path / "images_best.pt")
    with pytest.raises(UserError, match="is a PyTorch file; make a distilled set of it with: tadperf import"):
        load(tmp_path / "images_best.pt")
    save_tensors(file, {"images": torch.zeros(1)})
    with pytest.raises(UserError, match="no tadperf metadata, so it is not a distilled set"):
        load(file)
    save_tensors(file, {"images": torch.zeros(1)}, {"tadperf": "{"})
    with pytest.raises(UserError, match="metadata is damaged"):
        load(file)
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "none")


def made(**changes: Any) -> DistilledSet:
    values: dict[str, Any] = {"images": torch.zeros(4, 3, 8, 8), "labels": [0, 1, 0, 1], "mean": (0.5,) * 3}
    values |= {"std": (0.2,) * 3}
    values |= changes
    return DistilledSet.from_tensors(**values)


def test_tensors_of_another_method_make_a_set_in_one_line(tmp_path):
    data = photos(60, 0)
    images = (data.images[:6] / 255 - 0.3) / 0.2
    ds = DistilledSet.from_tensors(images.numpy(), data.labels[:6].numpy().astype("uint8"), [0.3] * 3, [0.2] * 3, 0.05)
    assert torch.equal(ds.pixels(), data.images[:6])
    assert (ds.labels.dtype, ds.class_names, ds.lr, ds.recipe.lr) == (torch.int64, ("0", "1", "2"), 0.05, 0.05)
    assert repr(ds) == "DistilledSet(imported: 6 images of 3 x 8 x 8, 3 classes, hard labels, lr 0.05, seed 0)"
    ds.save(tmp_path / "d.safetensors")
    again = load(tmp_path / "d.safetensors")
    assert torch.equal(again.images, ds.images)
    net = again.train(NetConfig(depth=1, width=8), epochs=30)
    assert again.accuracy(net, photos(90, 1)) > 0.6  # its classes have no names, so they fit by their numbers
    named = DistilledSet.from_tensors(images, data.labels[:6], [0.3] * 3, [0.2] * 3, class_names=("a", "b", "c"))
    with pytest.raises(UserError, match="has other classes than the distilled set"):
        named.accuracy(net, photos(9, 1))


def test_probabilities_become_logits_with_the_same_softmax():
    labels = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    ds = made(images=torch.zeros(2, 3, 8, 8), labels=labels, probabilities=True)
    assert torch.allclose(ds.labels.softmax(1), labels)
    assert torch.equal(made(images=torch.zeros(2, 3, 8, 8), labels=labels).labels, labels)


@pytest.mark.parametrize("kind", ["meanstd", "zca"])
def test_the_float_inverse_is_neither_rounded_nor_clamped(kind):
    ds = distilled(kind)
    pixels = ds.normaliser.denormalise(ds.images)
    assert torch.allclose(pixels, photos(60, 0).images[:6] / 255, atol=1e-4)
    assert float(ds.normaliser.denormalise(ds.images * 100).max()) > 1


WRONG_TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "pixels": ({"images": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)}, r"images: uint8 .* must be normalised float"),
    "one image": ({"images": torch.zeros(3, 8, 8)}, "mean: 3 numbers: must have a number for each of the 0 channels"),
    "NaN": ({"images": torch.full((4, 3, 8, 8), float("nan"))}, "images: 768 of 768 values are NaN"),
    "too few labels": ({"labels": [0, 1]}, r"labels: int64 \[2\]: must have one label for each of the 4 images"),
    "negative label": ({"labels": [0, 1, -1, 0]}, r"labels: -1: must be in 0\.\.1"),
    "absurd label": ({"labels": [0, 1, 0, 10**15]}, "labels: 1000000000000000: is above 100000; give class_names"),
    "no name for a label": ({"class_names": ["a"]}, r"labels: 1: must be in 0\.\.0"),
    "float classes": ({"labels": [0.0, 1.0, 0.0, 1.0]}, r"labels: float64 \[4\]: must be int64 \[M\], or float"),
    "logits as probabilities": (
        {"labels": torch.full((4, 2), 3.0), "probabilities": True},
        "labels: the first row sums to 6: probabilities must be at least 0 and sum to 1",
    ),
    "no mean": ({"mean": None}, "mean: missing: must have a number for each of the 3 channels"),
    "std of one channel": ({"std": [0.2]}, "std: 1 numbers: must have a number for each"),
    "std 0": ({"std": [0.2, 0.0, 0.2]}, r"normaliser.std: .* must be above 0"),
    "lr 0": ({"lr": 0.0}, "lr: 0.0: must be a finite number above 0"),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_tensors_that_are_no_set_are_refused_in_one_line(name):
    changes, message = WRONG_TENSORS[name]
    with pytest.raises(UserError, match=message) as error:
        made(**changes)
    assert "\n" not in str(error.value)
