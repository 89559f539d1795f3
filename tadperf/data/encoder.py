"""Features of images from a pretrained network in a local folder: an image model of transformers or of timm.

Both formats are folders with config.json and weights in .safetensors, as the Hugging Face hub stores them. No code from
the folder runs, and nothing is downloaded.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tadperf.data.dataset import Dataset
from tadperf.data.mapped import cache_name
from tadperf.data.parsing import parser_errors, reason
from tadperf.errors import UserError
from tadperf.files import cache_folder
from tadperf.progress import Progress, silent

FIELD = "--encoder"
EXTRA = "install tadperf[encoder]"
CPU_BATCH, CUDA_BATCH = 32, 256  # images at a time; not tuned
SAVED = 16  # batches between two writes of the progress; not tuned
VERSION = 1  # of the features; part of every name, so that older files are not used
Encode = Callable[[Tensor], Tensor]  # uint8 [B, 3, H, W] on the CPU -> float32 [B, D] on the device


def encode_images(folder: str, data: Dataset, device: torch.device, progress: Progress = silent) -> Tensor:
    """Returns the features float32 [N, D] of all images, memory-mapped from a file in the user's cache folder.

    folder: holds the network (see the top of this module). The network scales the images to its own input size. Grey
    images are repeated to three channels. A file with the features of the same images and network is used again, and a
    killed computation continues. If several processes ask for the same features, one computes them.
    progress: called as stage "encode" after each batch. Raises UserError if the network or the package that it needs is
    missing or cannot be used, if features are not finite, or if the disk is full.
    """
    place, kind = find_model(folder)
    weights = sorted(path for path in place.iterdir() if path.suffix in (".json", ".safetensors"))
    name = cache_name(weights, "features", VERSION, kind, device.type, _fingerprint(data.images))
    store = cache_folder("features")
    complete = store / f"{name}.npy"
    with open(store / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            encode = {"transformers": _open_transformers, "timm": _open_timm}[kind](place, device)
            _fill(encode, data.images, store / f"{name}.part", device, progress)
            os.replace(store / f"{name}.part", complete)
            (store / f"{name}.part.json").unlink(missing_ok=True)
    return torch.from_numpy(np.load(complete, mmap_mode="c"))  # mode "c": PyTorch needs writable memory


def find_model(folder: str) -> tuple[Path, str]:
    """Returns the folder and the package that it is for. Raises UserError if it is not a folder of either."""
    place = Path(folder).expanduser().absolute()
    if not place.is_dir():
        remedy = "no such folder; name a local folder with config.json and weights in .safetensors"
        raise UserError(FIELD, folder, remedy)
    config = place / "config.json"
    if not config.is_file():
        raise UserError(FIELD, folder, "has no config.json; name the folder of a transformers or timm model")
    if not any(place.glob("*.safetensors")):
        raise UserError(FIELD, folder, "has no .safetensors weights; other formats can run code: convert the weights")
    with parser_errors("config.json", folder, "copy the model again", FIELD, config):
        values = json.loads(config.read_bytes())
        if not isinstance(values, dict):
            raise ValueError(f"a JSON {type(values).__name__}")
    kind = "transformers" if "model_type" in values else "timm" if "architecture" in values else None
    if kind is None:
        raise UserError(FIELD, folder, "its config.json has neither model_type (transformers) nor architecture (timm)")
    return place, kind


def _fingerprint(images: Tensor) -> str:
    """Returns a hash of the images alone: other labels keep the features."""
    digest = hashlib.blake2b(repr(tuple(images.shape)).encode(), digest_size=16)
    for start in range(0, len(images), 65536):
        digest.update(images[start : start + 65536].contiguous().numpy().data)
    return digest.hexdigest()


def _fill(encode: Encode, images: Tensor, partial: Path, device: torch.device, progress: Progress) -> None:
    """Writes the features into a mapped file. Continues after the batches that an earlier process has written."""
    batch = CUDA_BATCH if device.type == "cuda" else CPU_BATCH
    status = partial.with_name(f"{partial.name}.json")
    done, features = _resume(partial, status, len(images))
    progress("encode", done, len(images))
    for number, start in enumerate(range(done, len(images), batch), 1):
        block = images[start : start + batch]
        z = encode(block if block.shape[1] == 3 else block[:, :1].expand(-1, 3, -1, -1)).float().cpu()
        if z.ndim != 2 or not z.isfinite().all():
            raise UserError(FIELD, partial.name, "the network returns values that are not finite; use another one")
        if features is None:
            _require_space(partial.parent, 4 * len(images) * z.shape[1])
            features = np.lib.format.open_memmap(partial, "w+", np.float32, (len(images), z.shape[1]))
        features[start : start + len(z)] = z.numpy()
        if number % SAVED == 0:
            features.flush()
            status.write_text(json.dumps({"done": start + len(z)}))
        progress("encode", start + len(z), len(images))
    assert features is not None
    features.flush()


def _resume(partial: Path, status: Path, count: int) -> tuple[int, np.memmap | None]:
    """Returns how many rows of the partial file are written, and the file; 0 and None if there is none."""
    try:
        done = int(json.loads(status.read_bytes())["done"])
        features = np.load(partial, mmap_mode="r+")
    except (OSError, ValueError, KeyError, TypeError):
        return 0, None
    return (done, features) if features.ndim == 2 and 0 < done <= len(features) == count else (0, None)


def _require_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        sizes = f"{size / 2**30:.1f} GB needed for features, {free / 2**30:.1f} GB free"
        raise UserError("cache folder", folder, f"{sizes}; set XDG_CACHE_HOME to a larger disk")


def _import_error(place: Path, package: str, error: Exception) -> UserError:
    """Returns the error for a package that is missing, or that a torchvision made for another torch has broken."""
    if isinstance(error, ImportError) and error.name == package:
        return UserError(FIELD, place, f"needs {package}; {EXTRA}", topic="extras")
    remedy = "reinstall it, with a torchvision for this version of torch"
    return UserError(FIELD, place, f"{package} cannot be imported ({reason(error)}); {remedy}")


def _open_transformers(place: Path, device: torch.device) -> Encode:
    """Opens AutoModel and AutoImageProcessor. Features are the model's pooled output."""
    try:
        from transformers import AutoImageProcessor, AutoModel
        from transformers.utils import logging
    except (ImportError, RuntimeError) as error:
        raise _import_error(place, "transformers", error) from None
    options = {"local_files_only": True, "trust_remote_code": False}
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it lists the weights of the classifier, which are not used
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with parser_errors("transformers image model", place, "copy the folder again", FIELD):
            processor = AutoImageProcessor.from_pretrained(place, **options)
            model, loading = AutoModel.from_pretrained(place, use_safetensors=True, output_loading_info=True, **options)
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    missing = [key for key in loading["missing_keys"] if "pooler" not in key]
    if missing:
        raise UserError(FIELD, place, f"its weights lack {len(missing)} tensors, first {missing[0]}; copy it again")
    has_pooler = not any("pooler" in key for key in loading["missing_keys"])
    model = model.eval().to(device)
    has_class_token = any(key.endswith("cls_token") for key, _ in model.named_parameters())
    call = model.get_image_features if hasattr(model, "get_image_features") else model

    @torch.inference_mode()
    def encode(images: Tensor) -> Tensor:
        arrays = list(images.numpy())
        pixels = processor(images=arrays, return_tensors="pt", input_data_format="channels_first")["pixel_values"]
        output = call(pixel_values=pixels.to(device))
        if isinstance(output, Tensor):
            return output.flatten(1)
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None and has_pooler:
            return pooled.flatten(1)
        hidden = output.last_hidden_state
        if hidden.ndim == 4:
            return hidden.mean((2, 3))
        return hidden[:, 0] if has_class_token else hidden.mean(1)

    return encode


def _open_timm(place: Path, device: torch.device) -> Encode:
    """Opens a model of timm without its classifier. Features are what the classifier would read."""
    try:
        import timm  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:
        raise _import_error(place, "timm", error) from None
    from safetensors.torch import load_file

    values = json.loads((place / "config.json").read_bytes())
    files = sorted(place.glob("*.safetensors"))
    with parser_errors("timm model", place, "copy the folder again", FIELD):
        arguments = {**values.get("model_args", {}), "num_classes": 0}
        model = timm.create_model(values["architecture"], pretrained=False, **arguments)
        weights = {key: tensor for file in files for key, tensor in load_file(file).items()}
        missing = model.load_state_dict(weights, strict=False).missing_keys
        recipe = {**_recipe(model.pretrained_cfg), **_recipe(values.get("pretrained_cfg", {}))}
        mean, std = (torch.tensor(recipe[key], device=device).view(1, 3, 1, 1) for key in ("mean", "std"))
        size = tuple(recipe["input_size"])[1:]
        mode = recipe.get("interpolation", "bicubic")
    if missing:
        raise UserError(FIELD, place, f"its weights lack {len(missing)} tensors, first {missing[0]}; copy it again")
    model = model.eval().to(device)
    mode = mode if mode in ("bilinear", "bicubic") else "bicubic"

    @torch.inference_mode()
    def encode(images: Tensor) -> Tensor:
        x = images.to(device).float() / 255
        if tuple(x.shape[2:]) != size:
            x = F.interpolate(x, size, mode=mode, antialias=True, align_corners=False).clamp(0, 1)
        return model((x - mean) / std).flatten(1)

    return encode


def _recipe(config: Any) -> dict[str, Any]:
    """Returns the entries of a pretrained_cfg, a dict or a dataclass, that have a value."""
    values = config if isinstance(config, dict) else vars(config)
    return {key: value for key, value in values.items() if value is not None}
