"""One interface for all diffusion models: encode images to the model's space, and denoise prototypes to images."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tadperf.compute import ranks
from tadperf.compute.compile import compile_for_inference
from tadperf.config import RefineConfig
from tadperf.errors import UserError
from tadperf.progress import Progress, silent

KINDS = {
    "DDIM": "unet",
    "DDPM": "unet",
    "StableDiffusion": "stable",
    "DiT": "dit",
}  # the kind of model by the start of its pipeline class


class Target(NamedTuple):
    """The images that a model must generate: their shape (channels, height, width), classes and device.

    batches: the expected number of batches; None if it is not known.
    trusted: uint8 images [N, channels, height, width] and their classes int64 [N], for guidance; every class has some.
    """

    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    device: torch.device
    batches: int | None = None
    trusted: tuple[Tensor, Tensor] | None = None


class DiffusionModel(NamedTuple):
    """A diffusion model as two functions.

    encode: takes uint8 images [B, C, H, W] and returns them in the model's space, float32 [B, c, h, w].
    denoise: takes prototypes [B, c, h, w], labels int64 [B], one seed per image and the strength, and returns uint8
    images [B, C, H, W] in the data's shape.
    joint: the images of one call depend on each other.
    """

    encode: Callable[[Tensor], Tensor]
    denoise: Callable[[Tensor, Tensor, Sequence[int], float], Tensor]
    joint: bool = False


def generate(
    model: DiffusionModel,
    prototypes: Tensor,
    labels: Tensor,
    image_seeds: Sequence[int],
    strength: float,
    batch: int,
    progress: Progress = silent,
    stage: str = "generate",
) -> Tensor:
    """Generates uint8 images [M, C, H, W] from prototypes [M, ...], labels int64 [M] and M seeds (tadperf).

    strength: how far the prototypes are noised, as a share of the steps in (0, 1]. batch: images at a time. Processes
    share the batches. The last batch is padded, so that shapes are static. An image depends on its own prototype, label
    and seed only; another batch size changes no more than the rounding of sums. For a joint model, an image depends on
    its batch too, which is not padded.
    """
    generated, count = {}, len(prototypes)
    progress(stage, 0, count)

    def work(numbers: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        for place, number in enumerate(numbers):
            start = number * batch
            end = min(start + batch, count) if model.joint else start + batch
            index = torch.arange(start, end).clamp(max=count - 1)
            batch_seeds = [image_seeds[i] for i in index.tolist()]
            yield place, model.denoise(prototypes[index], labels[index], batch_seeds, strength)[: count - start].cpu()

    for number, images in ranks.divide_work(work, -(-count // batch)):
        generated[number] = images
        progress(stage, sum(map(len, generated.values())), count)
    return torch.cat([generated[number] for number in range(len(generated))])


def encode(model: DiffusionModel, images: Tensor, batch: int) -> Tensor:
    """Encodes uint8 images [N, C, H, W] to the model's space, float32 [N, c, h, w], `batch` images at a time."""
    return torch.cat([model.encode(part).cpu() for part in images.split(batch)])


def model_kind(place: str) -> str:
    """Returns the kind of model in a local folder or hub repository, from its model_index.json: unet, stable or dit."""
    name = _pipeline_class(place)
    model = next((value for start, value in KINDS.items() if name.startswith(start)), None)
    if model is None:
        raise UserError(
            "refine.source", place, f"holds a {name or 'model without a class'}; must be one of {', '.join(KINDS)}"
        )
    return model


def _pipeline_class(place: str) -> str:
    file = Path(place).expanduser() / "model_index.json"
    if not Path(place).expanduser().is_dir():
        if Path(place).expanduser().exists() or place.startswith((".", "/", "~")) or place.count("/") != 1:
            remedy = "no such folder; give a folder saved by diffusers, a hub name (owner/name), or train"
            raise UserError("refine.source", place, remedy)
        file = _from_hub(place)
    if not file.exists():
        raise UserError(
            "refine.source", place, "model_index.json is missing; give a folder saved by diffusers' save_pretrained"
        )
    try:
        return str(json.loads(file.read_text(encoding="utf-8")).get("_class_name", ""))
    except (ValueError, AttributeError) as error:
        raise UserError("refine.source", file, f"is not a JSON object ({error}); save the folder again") from None


def _from_hub(name: str) -> Path:
    """Returns a hub repository's model_index.json, downloaded or from the cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import HFValidationError

    try:
        return Path(hf_hub_download(name, "model_index.json"))
    except HFValidationError as error:
        raise UserError(
            "refine.source", name, f"is not a valid hub name ({error}); give a local folder, or train"
        ) from None
    except Exception as error:  # no network, unknown name, no access: many types, one remedy
        why = (str(error).splitlines() or [type(error).__name__])[0][:120]
        remedy = f"cannot be downloaded ({why}); give a local folder that holds model_index.json, or train"
        raise UserError("refine.source", name, remedy) from None


def class_map(config: RefineConfig, target: Target, known: int) -> Tensor:
    """Returns the model's class for each class of the data, int64 [C]; known: the number of the model's classes."""
    expected = len(target.class_names)
    if config.classes is None:
        if known != expected:
            remedy = f"the model has {known} classes, the data have {expected}; map them with refine.classes"
            raise UserError("refine.source", config.source, remedy)
        return torch.arange(expected, device=target.device)
    if len(config.classes) != expected or not all(0 <= c < known for c in config.classes):
        shown = ", ".join(map(str, config.classes[:8])) or "none"
        raise UserError(
            "refine.classes", shown, f"must be {expected} numbers, one per class of the data, in 0..{known - 1}"
        )
    return torch.tensor(config.classes, device=target.device)


def compile_part(module: nn.Module, config: RefineConfig, target: Target, rows: int, calls: int) -> None:
    """Makes `module` run on refine.backend, with `rows` rows in a call and `calls` calls for a batch of images."""
    expected = None if target.batches is None else target.batches * calls
    compile_for_inference(module, config.backend, batch=rows, calls=expected)


def load_pipeline(place: str, pipeline_class: Any, **options: object) -> Any:
    """Loads a diffusers pipeline from a folder or hub name. Raises UserError if that fails."""
    from diffusers.utils import logging

    logging.disable_progress_bar()  # and the warning about accelerate: stderr belongs to the command line
    try:
        folder = Path(place).expanduser()
        source = folder if folder.is_dir() else place
        pipeline = pipeline_class.from_pretrained(source, low_cpu_mem_usage=False, **options)
    except Exception as error:  # diffusers raises almost any type on a damaged folder
        why = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise UserError("refine.source", place, f"cannot be loaded ({why}); give a complete local folder") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
