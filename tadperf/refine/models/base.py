"""Diffusion models behind one interface: images into the model's space, and prototypes to images."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tadperf.compute import ranks
from tadperf.compute.compile import compile_for_inference
from tadperf.config import RefineConfig
from tadperf.errors import UserError
from tadperf.progress import Progress, silent

KINDS = {"DDIM": "unet", "DDPM": "unet", "StableDiffusion": "stable", "DiT": "dit"}  # pipeline class begins with


class Target(NamedTuple):
    """What images a source is wanted for: their shape (channels, height, width), classes and device.

    batches: how many batches of them are to be expected; None where that is not known.
    """

    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    device: torch.device
    batches: int | None = None


class DiffusionModel(NamedTuple):
    """A diffusion model.

    encode: uint8 images [B, C, H, W] to its space, float32 [B, c, h, w]. denoise: prototypes [B, c, h, w], labels int64
    [B], one seed per image and the strength to uint8 images [B, C, H, W] in the data's shape.
    """

    encode: Callable[[Tensor], Tensor]
    denoise: Callable[[Tensor, Tensor, Sequence[int], float], Tensor]


def generate(
    source: DiffusionModel,
    prototypes: Tensor,
    labels: Tensor,
    image_seeds: Sequence[int],
    strength: float,
    batch: int,
    progress: Progress = silent,
    stage: str = "generate",
) -> Tensor:
    """uint8 images [M, C, H, W] from prototypes [M, ...], labels int64 [M] and M seeds, `batch` at a time (tadperf).

    strength: how far the prototypes are noised, a share of the steps in (0, 1].

    The last batch is filled up, so that shapes are static; ranks divide the batches.
    An image depends on its own prototype, label and seed;
    its place and its neighbours change nothing, another batch size no more than the rounding of sums.
    """
    made, count = {}, len(prototypes)
    progress(stage, 0, count)

    def work(own: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        for place, number in enumerate(own):
            start = number * batch
            index = torch.arange(start, start + batch).clamp(max=count - 1)
            drawn = [image_seeds[i] for i in index.tolist()]
            yield place, source.denoise(prototypes[index], labels[index], drawn, strength)[: count - start].cpu()

    for number, images in ranks.divide_work(work, -(-count // batch)):
        made[number] = images
        progress(stage, sum(map(len, made.values())), count)
    return torch.cat([made[number] for number in range(len(made))])


def encode(source: DiffusionModel, images: Tensor, batch: int) -> Tensor:
    """uint8 images [N, C, H, W] in the source's space, float32 [N, c, h, w], `batch` at a time."""
    return torch.cat([source.encode(part).cpu() for part in images.split(batch)])


def kind(place: str) -> str:
    """What model a local folder or hub name holds, by its model_index.json: unet, stable or dit."""
    name = _pipeline_class(place)
    found = next((value for start, value in KINDS.items() if name.startswith(start)), None)
    if found is None:
        raise UserError(
            "refine.source", place, f"is a {name or 'folder of no class'}; must be one of {', '.join(KINDS)}"
        )
    return found


def _pipeline_class(place: str) -> str:
    file = Path(place).expanduser() / "model_index.json"
    if not Path(place).expanduser().is_dir():
        if Path(place).expanduser().exists() or place.startswith((".", "/", "~")) or place.count("/") != 1:
            remedy = "there is no such folder; give one of diffusers' format, a hub name (owner/name), or train"
            raise UserError("refine.source", place, remedy)
        file = _from_hub(place)
    if not file.exists():
        raise UserError("refine.source", place, "has no model_index.json; give a folder of diffusers' save_pretrained")
    try:
        return str(json.loads(file.read_text(encoding="utf-8")).get("_class_name", ""))
    except (ValueError, AttributeError) as error:
        raise UserError("refine.source", file, f"is no JSON object ({error}); write the folder again") from None


def _from_hub(name: str) -> Path:
    """A hub repository's model_index.json, fetched or from the cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import HFValidationError

    try:
        return Path(hf_hub_download(name, "model_index.json"))
    except HFValidationError as error:
        raise UserError("refine.source", name, f"is no hub name ({error}); give a local folder, or train") from None
    except Exception as error:  # no network, no such name, no right to it: of many types, the remedy is one
        why = (str(error).splitlines() or [type(error).__name__])[0][:120]
        remedy = f"cannot be fetched ({why}); give a local folder that holds model_index.json, or train"
        raise UserError("refine.source", name, remedy) from None


def class_map(config: RefineConfig, target: Target, known: int) -> Tensor:
    """The model's class for each class of the data, int64 [C]; known: how many classes the model tells apart."""
    wanted = len(target.class_names)
    if config.classes is None:
        if known != wanted:
            remedy = f"knows {known} classes, the data have {wanted}; say which of them are meant with refine.classes"
            raise UserError("refine.source", config.source, remedy)
        return torch.arange(wanted, device=target.device)
    if len(config.classes) != wanted or not all(0 <= c < known for c in config.classes):
        shown = ", ".join(map(str, config.classes[:8])) or "none"
        raise UserError(
            "refine.classes", shown, f"must be {wanted} numbers, one per class of the data, in 0..{known - 1}"
        )
    return torch.tensor(config.classes, device=target.device)


def speed_up(module: nn.Module, config: RefineConfig, target: Target, rows: int, calls: int) -> None:
    """Lets `module` run by the config's backend, `rows` rows at a time, `calls` times for a batch of images."""
    expected = None if target.batches is None else target.batches * calls
    compile_for_inference(module, config.backend, batch=rows, calls=expected)


def load_pipeline(place: str, pipeline_class: type, **options: object):
    """A pipeline of diffusers from a folder or hub name; raises UserError where it cannot be loaded."""
    from diffusers.utils import logging

    logging.disable_progress_bar()  # and the warning that accelerate is absent: stderr is the command line's
    try:
        local = Path(place).expanduser()
        where = local if local.is_dir() else place
        loaded = pipeline_class.from_pretrained(where, low_cpu_mem_usage=False, **options)  # pyright: ignore
    except Exception as error:  # diffusers raises nearly anything on a damaged folder
        why = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise UserError("refine.source", place, f"cannot be loaded ({why}); give a complete local folder") from None
    loaded.set_progress_bar_config(disable=True)
    return loaded
