"""The options of the command line and the config fields that they set. No other place connects them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tadperf.errors import UserError


class Option(NamedTuple):
    """An option ("--ipc") or an argument ("DATA") of the command line."""

    name: str
    metavar: str
    help: str
    field: str = ""  # the dotted field of the config that it sets; empty for an option that sets none
    kind: type = str  # str, Path, bool or list. Numbers are text: the config checks them


DATA_HELP = (
    "'digits', or images: parquet, folder, table (.csv), .tar shards, CIFAR, npz, safetensors, idx, hf://user/name"
)
CONFIG_OPTIONS = (
    Option("DATA", "DATA", DATA_HELP, "data.path"),
    Option("--format", "NAME", "Format of DATA; by default it is detected.", "data.format"),
    Option("--image-size", "N", "Scale the shorter side to N, then crop the centre.", "data.image_size"),
    Option("--labels", "FILE", "Labels that replace the given ones: CSV, JSON, .npy, .pt:key.", "data.labels"),
    Option("--skip-broken", "", "Leave out images that cannot be decoded, and list them.", "data.skip_broken", bool),
    Option("--noise", "KIND:P", "Add label noise: symmetric:P, asymmetric:P, instance:P.", "data.noise"),
    Option("--ipc", "N", "Synthetic images per class.", "match.ipc"),
    Option("--method", "NAME", "Distillation method: mtt, ftd, datm, tgdd or infmatch.", "match.method"),
    Option("--compile", "MODE", "auto, on or off: torch.compile for the steps of matching.", "match.compile"),
    Option("--trust", "MODE", "on, off, or oracle (uses the clean labels, for comparison).", "trust.mode"),
    Option("--features", "FILE", "Features, a row per sample: .npy, .npz, .pt, .safetensors.", "trust.features", Path),
    Option("--probs", "FILE", "Class probabilities, out of fold, a row per sample.", "trust.probs", Path),
    Option("--encoder", "DIR", "A transformers or timm image model, to compute features.", "trust.encoder", Path),
    Option("--synthesis", "KIND", "matching, generative (diffusion), or hybrid.", "synthesis"),
    Option("--experts", "PATH", "Experts of another run, or replay_buffer_*.pt of MTT.", "experts.path", Path),
    Option("--repeats", "N", "Networks trained for each accuracy.", "evaluate.repeats"),
    Option("--optimizer", "NAME", "Optimizer of the students: sgd or muon.", "evaluate.optimizer"),
    Option("--network", "NAME", "Network to train, such as resnet18bn; may be repeated.", "evaluate.networks", list),
    Option("--seed", "N", "Random seed: same seed, same result.", "seed"),
    Option("--device", "NAME", "auto, cpu, cuda or cuda:i.", "device"),
    Option("--batch", "N", "Images to generate at a time; limits the memory.", "refine.batch"),
    Option("--backend", "NAME", "auto, eager, inductor, cudagraphs or tensorrt.", "refine.backend"),
)
_BY_FIELD = {option.field: option for option in CONFIG_OPTIONS}
_PYTHON_NAMES = {option.name: option.field for option in CONFIG_OPTIONS} | {"--out": "out", "--resume": "resume=True"}
_OPTION = re.compile(r"--set (?=\w)(?:data\.)?|(?<!\S)--[a-z]+(?:-[a-z]+)*")


def option_name(field: str) -> str:
    """Returns the option that sets a dotted field of the config, or the field itself if no option sets it."""
    return _BY_FIELD[field].name if field in _BY_FIELD else field


@contextmanager
def python_names(keywords: bool = False) -> Iterator[None]:
    """Replaces options in the text of a UserError by fields of the config, for functions that users call from Python.

    keywords: the function takes the fields of the section "data" as arguments: image_size, not data.image_size.
    """

    def python_name(found: re.Match[str]) -> str:
        if found[0].startswith("--set "):
            return "" if keywords else found[0].removeprefix("--set ")
        name = _PYTHON_NAMES.get(found[0], found[0])
        return name.removeprefix("data.") if keywords else name

    try:
        yield
    except UserError as error:
        error.rename(*(_OPTION.sub(python_name, text) for text in (error.field, error.remedy)))
        raise
