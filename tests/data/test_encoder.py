"""Features from a network in a folder: formats, pooling, the stored file, a killed computation, and wrong folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tadperf.data import encoder
from tadperf.data.dataset import Dataset
from tadperf.data.encoder import encode_images
from tadperf.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SIDE = 16


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tadperf" / "features"


def images(count: int = 40, channels: int = 3, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, channels, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    return Dataset(pixels, torch.arange(count) % 2, ("a", "b"), "set")


def save_vit(folder: Path, classifier: bool = True) -> Any:
    """Writes a random ViT of transformers. With a classifier it has no pooler."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    size = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(**size, image_size=SIDE, patch_size=8)
    torch.manual_seed(0)
    model = (transformers.ViTForImageClassification if classifier else transformers.ViTModel)(config).eval()
    model.save_pretrained(folder)
    processor = {"size": {"height": SIDE, "width": SIDE}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    content = {"image_processor_type": "ViTImageProcessor", "do_resize": True, "do_normalize": True, **processor}
    (folder / "preprocessor_config.json").write_text(json.dumps({**content, "do_rescale": True}))
    return model


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels.float() / 255 - 0.5) / 0.25


@torch.no_grad()
def test_a_classifier_of_transformers_gives_its_class_token(tmp_path):
    model = save_vit(tmp_path / "vit")
    data, calls = images(), []
    z = encode_images(str(tmp_path / "vit"), data, CPU, lambda *call, **_: calls.append(call))
    expected = model.vit(pixel_values=normalised(data.images)).last_hidden_state[:, 0]
    torch.testing.assert_close(z, expected, atol=1e-4, rtol=1e-4)
    assert calls == [("encode", 0, 40), ("encode", 32, 40), ("encode", 40, 40)]


@torch.no_grad()
def test_a_pooler_that_has_weights_is_used(tmp_path):
    model = save_vit(tmp_path / "vit", classifier=False)
    z = encode_images(str(tmp_path / "vit"), images(), CPU)
    expected = model(pixel_values=normalised(images().images)).pooler_output
    torch.testing.assert_close(z, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_network_of_feature_maps_is_pooled(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    save_vit(tmp_path / "net")
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    model = transformers.ResNetModel(config).eval()
    model.save_pretrained(tmp_path / "net")
    z = encode_images(str(tmp_path / "net"), images(), CPU)
    expected = model(pixel_values=normalised(images().images)).pooler_output.flatten(1)
    torch.testing.assert_close(z, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_clip_gives_its_image_features(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    size = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision, text = {"image_size": SIDE, "patch_size": 8}, {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1}
    config = transformers.CLIPConfig(vision_config=size | vision, text_config=size | text, projection_dim=6)
    transformers.CLIPModel(config).save_pretrained(tmp_path / "clip")
    sides = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    content = json.dumps({"image_processor_type": "CLIPImageProcessor", **sides})
    (tmp_path / "clip" / "preprocessor_config.json").write_text(content)
    z = encode_images(str(tmp_path / "clip"), images(), CPU)
    assert z.shape == (40, 6)
    assert z.std(0).min() > 0


def test_code_in_the_folder_does_not_run(tmp_path, monkeypatch):
    save_vit(tmp_path / "vit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    code = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    (tmp_path / "vit" / "code.py").write_text("open('it_ran', 'w')\n")
    (tmp_path / "vit" / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": code}))
    with pytest.raises(UserError, match=r"--encoder: .*vit: not a valid transformers image model"):
        encode_images(str(tmp_path / "vit"), images(), CPU)
    (tmp_path / "vit" / "config.json").write_text(json.dumps({**config, "auto_map": code}))
    assert encode_images(str(tmp_path / "vit"), images(), CPU).shape == (40, 12)
    assert not (tmp_path / "it_ran").exists()


def test_grey_images_are_repeated_and_small_images_scaled(tmp_path):
    save_vit(tmp_path / "vit")
    grey = images(channels=1)
    colour = Dataset(grey.images.expand(-1, 3, -1, -1).contiguous(), grey.labels, ("a", "b"), "set")
    z = encode_images(str(tmp_path / "vit"), grey, CPU)
    assert torch.equal(z, encode_images(str(tmp_path / "vit"), colour, CPU))
    small = Dataset(grey.images[:, :, :5, :5].contiguous(), grey.labels, ("a", "b"), "set")
    assert encode_images(str(tmp_path / "vit"), small, CPU).shape == (40, 12)


def test_features_are_computed_once_for_the_same_images(tmp_path, monkeypatch, cache):
    save_vit(tmp_path / "vit")
    data = images()
    first = encode_images(str(tmp_path / "vit"), data, CPU)
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".npy"]

    def refuse(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(encoder, "_open_transformers", refuse)
    assert torch.equal(first, encode_images(str(tmp_path / "vit"), data.with_labels(1 - data.labels, None), CPU))
    with pytest.raises(AssertionError, match="computed again"):
        encode_images(str(tmp_path / "vit"), images(seed=1), CPU)


def test_a_killed_computation_continues(tmp_path, monkeypatch):
    save_vit(tmp_path / "vit")
    whole = encode_images(str(tmp_path / "vit"), images(), CPU).clone()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(encoder, "CPU_BATCH", 8)
    monkeypatch.setattr(encoder, "SAVED", 1)

    def interrupt(stage: str, done: int, total: int, **_: object) -> None:
        if done == 24:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_images(str(tmp_path / "vit"), images(), CPU, interrupt)
    calls = []
    z = encode_images(str(tmp_path / "vit"), images(), CPU, lambda *call, **_: calls.append(call[1]))
    assert calls == [24, 32, 40]
    torch.testing.assert_close(z, whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_model_of_timm(tmp_path):
    try:
        import timm  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm cannot be imported: {error}")
    torch.manual_seed(0)
    arguments = {"img_size": SIDE, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **arguments).eval()
    folder = tmp_path / "timm"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    recipe = {"input_size": [3, SIDE, SIDE], "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic"}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 2, "model_args": arguments}
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": recipe}))
    z = encode_images(str(folder), images(), CPU)
    features = model.forward_head(model.forward_features(normalised(images().images)), pre_logits=True)
    torch.testing.assert_close(z, features, atol=1e-4, rtol=1e-4)
    assert encode_images(str(folder), images(channels=1), CPU).shape == (40, 16)


def test_a_missing_package_is_named_with_the_extra(tmp_path, monkeypatch):
    save_vit(tmp_path / "vit")
    for name, config in (("transformers", {"model_type": "vit"}), ("timm", {"architecture": "resnet18"})):
        (tmp_path / "vit" / "config.json").write_text(json.dumps(config))
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=rf"--encoder: .*vit: needs {name}; install tadperf\[encoder\]"):
            encode_images(str(tmp_path / "vit"), images(), CPU)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "has no config.json; name the folder of a transformers or timm model"),
        ({"config.json": "{"}, "has no .safetensors weights; other formats can run code"),
        ({"config.json": "{", "model.safetensors": ""}, "not a valid config.json"),
        ({"config.json": "[]", "model.safetensors": ""}, "not a valid config.json (a JSON list)"),
        ({"config.json": "{}", "model.safetensors": ""}, "its config.json has neither model_type"),
        ({"config.json": '{"model_type": "vit"}', "model.safetensors": ""}, "not a valid transformers image model"),
        ({"config.json": '{"model_type": "no such model"}', "model.safetensors": ""}, "not a valid transformers image"),
    ],
    ids=str,
)
def test_wrong_folders(tmp_path, files, words):
    pytest.importorskip("transformers", reason="needs transformers")
    folder = tmp_path / "model"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(UserError) as error:
        encode_images(str(folder), images(), CPU)
    assert str(error.value).startswith(f"--encoder: {folder}: {words}") or words in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    save_vit(tmp_path / "vit")
    save_file({"other": torch.zeros(2)}, tmp_path / "vit" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"its weights lack .* tensors, first "):
        encode_images(str(tmp_path / "vit"), images(), CPU)


def test_features_that_are_not_finite_are_refused(tmp_path, cache):
    model = save_vit(tmp_path / "vit")
    model.vit.layernorm.weight.data.fill_(np.nan)
    model.save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match="the network returns values that are not finite"):
        encode_images(str(tmp_path / "vit"), images(), CPU)
    assert not list(cache.glob("*.npy"))
