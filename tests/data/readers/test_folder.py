from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tadperf.data.open import open_data
from tadperf.errors import DataWarning, UserError


def save(array, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def test_classes_under_train_and_val(tmp_path, pixels):
    for split in ("train", "val"):
        for k, name in enumerate(("zebra", "ant", "ant", "zebra")):
            save(pixels[k], tmp_path / split / name / f"{k}.png")
    (tmp_path / "train/.cache").mkdir()
    (tmp_path / "train/ant/.hidden.png").write_bytes(b"")
    (tmp_path / "train/ant/notes.txt").write_bytes(b"")
    with pytest.warns(DataWarning, match=r"1 other files are not used: \.txt \(1\)"):
        train, test = open_data(tmp_path)
    assert test is not None
    assert train.class_names == test.class_names == ("ant", "zebra")
    assert train.file_names == ("train/ant/1.png", "train/ant/2.png", "train/zebra/0.png", "train/zebra/3.png")
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(train.images, torch.from_numpy(pixels[[1, 2, 0, 3]]).permute(0, 3, 1, 2))


def test_classes_directly_in_the_folder_and_every_suffix(tmp_path, pixels):
    for k, suffix in enumerate(("JPG", "jpeg", "png", "bmp", "webp", "gif")):
        save(pixels[k], tmp_path / "ab"[k % 2] / "deeper" / f"{k}.{suffix}")
    train, test = open_data(tmp_path)
    assert test is None
    assert len(train) == 6
    lossless = [train.images[k] for k in (1, 4)]  # a/2.png, b/3.bmp
    assert all(
        torch.equal(x, torch.from_numpy(pixels[k]).permute(2, 0, 1)) for x, k in zip(lossless, (2, 3), strict=True)
    )


def test_grey_images_have_one_channel_unless_one_image_is_coloured(tmp_path, pixels):
    for k in range(2):
        save(pixels[k, ..., 0], tmp_path / "ab"[k] / "grey.png")
    save(pixels[2, ..., 0] > 127, tmp_path / "a/bits.png")
    sixteen = pixels[3, ..., 0].astype(np.uint16) * 256 + 77
    save(sixteen, tmp_path / "a/wide.png")
    train = open_data(tmp_path).train
    assert train.shape == (1, 8, 8)
    assert torch.equal(train.images[0, 0], torch.from_numpy((pixels[2, ..., 0] > 127) * np.uint8(255)))
    assert torch.equal(train.images[2, 0], torch.from_numpy(pixels[3, ..., 0]))
    save(pixels[4], tmp_path / "b/colour.png")
    train = open_data(tmp_path).train
    assert train.shape == (3, 8, 8)
    assert torch.equal(train.images[1], torch.from_numpy(pixels[0, ..., 0]).expand(3, -1, -1))


def test_first_frame_of_a_gif(tmp_path):
    frames = [Image.new("L", (4, 4), value) for value in (10, 200)]
    for name in "ab":
        (tmp_path / name).mkdir()
        frames[0].save(tmp_path / name / "moving.gif", save_all=True, append_images=frames[1:])
    assert open_data(tmp_path).train.images.unique().tolist() == [10]


def test_resize_scales_the_shorter_side_and_crops_the_centre(tmp_path):
    wide = np.random.default_rng(0).integers(0, 256, (8, 24, 3), dtype=np.uint8)
    save(wide, tmp_path / "a/wide.png")
    save(wide.transpose(1, 0, 2), tmp_path / "b/tall.png")
    whole = np.asarray(Image.fromarray(wide).resize((12, 4), Image.Resampling.BICUBIC))
    expected = torch.from_numpy(whole[:, 4:8].copy()).permute(2, 0, 1)
    images = open_data(tmp_path, image_size=4).train.images.int()
    assert (images[0] - expected).abs().max() <= 1  # Pillow rounds after each of the two directions
    assert (images[1] - expected.transpose(1, 2)).abs().max() <= 1


def test_symbolic_links_to_classes_are_followed(tmp_path, pixels):
    save(pixels[0], tmp_path / "store/x.png")
    save(pixels[1], tmp_path / "set/bee/x.png")
    (tmp_path / "set/ant").symlink_to(tmp_path / "store")
    assert len(open_data(tmp_path / "set").train) == 2


def test_errors(tmp_path, pixels):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image found"):
        open_data(tmp_path / "empty")
    save(pixels[0], tmp_path / "hole/a/0.png")
    (tmp_path / "hole/b").mkdir()
    with pytest.raises(UserError, match="class 'b' has no training sample"):
        open_data(tmp_path / "hole")
    save(pixels[0], tmp_path / "other/train/a/0.png")
    save(pixels[0], tmp_path / "other/test/b/0.png")
    with pytest.raises(UserError, match=r"test/b: is a class that train does not have"):
        open_data(tmp_path / "other")
    save(pixels[0], tmp_path / "sizes/a/0.png")
    save(pixels[0, :, :7], tmp_path / "sizes/a/1.png")
    with pytest.raises(UserError, match=r"1\.png: images of two sizes, 8 x 8 .*0\.png\) and 8 x 7; give image_size"):
        open_data(tmp_path / "sizes")


@pytest.mark.parametrize("keep", [0, 20, 0.5])
def test_an_undecodable_image_is_named(tmp_path, keep):
    save(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8), tmp_path / "a/0.jpg")
    data = (tmp_path / "a/0.jpg").read_bytes()
    (tmp_path / "a/1.jpg").write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(UserError, match=r"1\.jpg: cannot be decoded .*repair or remove") as caught:
        open_data(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def flat(tmp_path, pixels):
    """Returns a function that writes images of these names, and returns their folder."""

    def write(*names: str):
        for k, name in enumerate(names):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[k]).save(tmp_path / name)
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("pattern", "files", "classes", "labels"),
    [
        (r"^([a-z]+)\.", ("cat.001.png", "cat.002.png", "dog.001.png"), ("cat", "dog"), [0, 0, 1]),
        (r"_(\d+)\.", ("a_0.png", "b_2.png", "c_1.png"), ("0", "1", "2"), [0, 2, 1]),
        (r"class_(\d{2})\d{2}", ("class_0300.png", "class_0401.png", "class_0302.png"), ("03", "04"), [0, 0, 1]),
        (r"(?:^|/)(.)[^/]*$", ("x/ab.png", "y/ba.png", "z/aa.png"), ("a", "b"), [0, 1, 0]),
    ],
)
def test_labels_in_the_names_of_files(flat, pattern, files, classes, labels):
    train, test = open_data(flat(*files), label_pattern=pattern)
    assert test is None
    assert (train.class_names, train.labels.tolist()) == (classes, labels)
    assert train.file_names == tuple(sorted(files))
    assert train.source["label_pattern"] == pattern


def test_labels_in_the_names_of_files_below_split_folders(flat):
    folder = flat("train/cat.1.png", "train/dog.1.png", "test/dog.7.png")
    train, test = open_data(folder, label_pattern=r"^(\w+)\.")
    assert test is not None
    assert (train.class_names, train.labels.tolist(), test.labels.tolist()) == (("cat", "dog"), [0, 1], [1])


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("([a-z", "is no regular expression"),
        ("[a-z]+", "needs a group around the label"),
        (r"^(\d+)", "finds no label in 2 of 3 paths, first cat.png"),
        (r"^([a-z]*?)", "finds no label in 3 of 3 paths"),
    ],
)
def test_wrong_patterns_are_refused(flat, pattern, words):
    with pytest.raises(UserError, match=words) as error:
        open_data(flat("cat.png", "dog.png", "1.png"), label_pattern=pattern)
    assert error.value.field == "data.label_pattern"


def test_a_folder_without_classes_names_the_ways_out(flat):
    with pytest.raises(UserError, match=r"name a table of the images \(\.csv\), or set data\.label_pattern"):
        open_data(flat("cat.png", "dog.png"))
    with pytest.raises(UserError, match="is for folders of images"):
        open_data("digits", label_pattern="(.)")
