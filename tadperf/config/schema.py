"""The settings of a run: one frozen model per stage, and the form in which a run folder stores them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tadperf.config.presets import BASES
from tadperf.errors import UserError

# Version of config.json, stored under the key "schema". Raise it when a field is removed or changes its meaning.
# A file without the key has version 0: it was written before versions were stored.
SCHEMA = 1
MAX_FACTOR = 8  # of match.factor, and of the enlargement that a file may ask for

Network = Literal["convnet", "resnet10", "resnet18", "resnet18bn", "alexnet", "vgg11", "vgg11bn", "densenet121"]
Backend = Literal["auto", "eager", "inductor", "cudagraphs", "tensorrt"]  # for compute.compile.compile_for_inference


class Section(BaseModel):
    """A frozen part of the settings that refuses unknown keys, NaN and infinities."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(Section):
    """The images and their labels."""

    path: str = Field(
        default="digits",
        description="'digits', a file or folder (parquet, image folder, table, .tar shards, CIFAR, npz, safetensors, "
        "idx), or a data set of the Hugging Face hub (hf://user/name)",
    )
    format: str | None = Field(default=None, description="format of the path; by default it is detected")
    image_size: int | None = Field(
        default=None, ge=1, description="resize every image: shorter side to N pixels, then centre crop to N x N"
    )
    image_column: str | None = Field(
        default=None, description="column of the images in a table or parquet; by default it is detected"
    )
    label_column: str | None = Field(
        default=None, description="column of the labels in a table or parquet; by default it is detected"
    )
    label_pattern: str | None = Field(
        default=None,
        description="regular expression that finds the label in the path of an image; its first group is the label",
    )
    image_root: str | None = Field(
        default=None, description="folder that holds the images of a table; by default the folder of the table"
    )
    skip_broken: bool = Field(default=False, description="leave out images that cannot be decoded, and list them")
    labels: str | None = Field(
        default=None, description="file of labels to replace the given ones: CSV, JSON, .npy, CIFAR-N .pt (file.pt:key)"
    )
    noise: str = Field(
        default="none", description="label noise for studies: none, symmetric:P, asymmetric:P, instance:P"
    )
    normalise: Literal["meanstd", "zca"] = Field(
        default="meanstd", description="by mean and standard deviation per channel, or by ZCA whitening (eps 0.1)"
    )
    augment: str = Field(
        default="color_crop_cutout_flip_scale_rotate",
        description="differentiable augmentations joined with '_', or 'none'",
    )
    test_share: float = Field(
        default=0.2, gt=0, lt=1, description="share of each class that becomes the test split if the data have none"
    )
    holdout: float = Field(
        default=0.1, gt=0, lt=0.5, description="share of the training samples that is held out to choose the checkpoint"
    )


class TrustConfig(Section):
    """The dual loop that finds the labels to trust."""

    mode: Literal["on", "off", "oracle"] = Field(
        default="on",
        description="on: find the labels to trust; off: trust all labels; oracle: use the clean labels, for comparison",
    )
    rounds: int = Field(default=3, ge=1, description="largest number of rounds of the outer and inner loop")
    proxies: int = Field(default=4, ge=1, description="networks trained in each round")
    epochs: int = Field(
        default=12, ge=1, description="epochs of a proxy: enough to learn patterns, too few to learn label errors"
    )
    batch: int = Field(default=64, ge=1, description="batch size of the proxies")
    lr: float = Field(default=0.1, gt=0, description="learning rate of the proxies' SGD")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="momentum of the proxies' SGD")
    weight_decay: float = Field(default=0.0, ge=0, description="weight decay of the proxies' SGD")
    schedule: Literal["constant", "one-cycle"] = Field(
        default="constant", description="learning rate of the proxies; one-cycle: up to lr, then down to 0"
    )
    width: int | None = Field(default=None, ge=1, description="channels of the proxies; by default net.width")
    augment: str | None = Field(
        default=None, description="augmentation of the proxies' images; by default data.augment"
    )
    soft_targets: bool = Field(
        default=False, description="after the first round, proxies learn the pooled probabilities of all samples"
    )
    mixup: bool = Field(default=True, description="train proxies on mixed pairs of images")
    consistency: float = Field(default=0.0, ge=0, description="weight of the KL divergence between two augmented views")
    class_wise: bool = Field(default=True, description="one mixture of losses per class; false: one for all classes")
    budget: float = Field(
        default=0.05, gt=0, lt=0.5, description="expected share of wrong labels among those that are used, by class"
    )
    dynamic_threshold: bool = Field(default=True, description="a threshold per class and round; false: posterior 0.5")
    recall: bool = Field(default=True, description="let untrusted samples return with their given label")
    relabel: bool = Field(default=True, description="let untrusted samples return with another label")
    graph: bool = Field(default=True, description="use labels propagated over neighbours in feature space")
    transition: bool = Field(default=True, description="correct the neighbours' labels by estimated confusions")
    held_out: bool = Field(default=True, description="score each sample with the proxy that was not trained on it")
    memory: bool = Field(default=True, description="score each sample by its mean loss over all rounds so far")
    features: str | None = Field(
        default=None, description="file of features [N, D] of the training samples: .npy, .npz, .pt, .safetensors"
    )
    probs: str | None = Field(
        default=None, description="file of class probabilities [N, C] from models that have not seen the sample's label"
    )
    encoder: str | None = Field(
        default=None, description="folder of a transformers or timm image model that computes features of the images"
    )


class NetConfig(Section):
    """The network of the experts, of matching and of the students."""

    name: Network = Field(default="convnet", description="architecture")
    depth: int | None = Field(
        default=None, ge=1, le=8, description="ConvNet blocks; by default they reduce the image to 4 x 4"
    )
    width: int = Field(default=128, ge=1, description="ConvNet channels")
    norm: Literal["instance", "batch", "group", "layer", "none"] = Field(
        default="instance", description="normalisation layers"
    )


class ExpertConfig(Section):
    """The training trajectories that matching follows."""

    count: int = Field(default=100, ge=1, description="number of experts, each with its own seed and file")
    epochs: int | None = Field(
        default=None, ge=1, description="epochs to train and store; by default as many as matching can use"
    )
    batch: int = Field(default=256, ge=1, description="batch size")
    lr: float = Field(default=0.01, gt=0, description="learning rate of SGD")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="momentum of SGD")
    weight_decay: float = Field(default=0.0, ge=0, description="weight decay of SGD")
    rho: float = Field(default=0.0, ge=0, description="GSAM's radius, relative to each weight; 0 is plain SGD")
    alpha: float = Field(default=0.0, ge=0, description="GSAM's weight of the gap: loss at that radius - loss")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="type of the feature maps on CUDA; weights and sums are float32"
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="type of the stored snapshots")
    path: str | None = Field(
        default=None, description="experts of another run, or replay_buffer_*.pt of MTT; by default they are trained"
    )
    workers: int | None = Field(default=None, ge=1, description="processes on CPU; by default one per core")


class MatchConfig(Section):
    """Trajectory matching: the synthetic images and how they are optimised."""

    method: Literal["mtt", "ftd", "datm", "tgdd", "infmatch"] = Field(
        default="mtt",
        description="distillation method: trajectory matching (mtt, ftd, datm), feature matching (tgdd) or influence "
        "matching (infmatch); all but mtt have their own defaults for several fields",
    )
    ipc: int = Field(default=10, ge=1, description="synthetic images per class")
    factor: int = Field(
        default=1,
        ge=1,
        le=MAX_FACTOR,
        description="in the memory of an image, stores factor^2 small ones, enlarged for networks (multi-formation)",
    )
    iterations: int = Field(default=5000, ge=1, description="outer steps")
    steps: int = Field(default=30, ge=1, description="T: inner steps on synthetic images per outer step")
    expert_epochs: int = Field(
        default=2,
        ge=1,
        description="expert epochs that T inner steps must match; tgdd, infmatch: their two snapshots are at most this "
        "far apart",
    )
    trajectories: int = Field(default=1, ge=1, description="expert trajectories averaged per outer step")
    min_start: int = Field(default=0, ge=0, description="earliest expert epoch to start from")
    max_start: int = Field(default=20, ge=0, description="latest expert epoch to start from")
    easy: float = Field(default=1.0, ge=0, le=1, description="share of the start epochs, the earliest, used at first")
    widen: float = Field(
        default=0.0, ge=0, le=1, description="share of the iterations after which all start epochs are used"
    )
    batch: int | None = Field(default=None, ge=1, description="synthetic images per inner step; by default all")
    cross_entropy: float = Field(
        default=1.0, ge=0, description="tgdd, infmatch: weight of the images' cross-entropy under a later snapshot"
    )
    lr_img: float = Field(default=100.0, gt=0, description="learning rate of the images")
    lr_lr: float = Field(default=0.05, ge=0, description="learning rate of the log of the student's learning rate")
    lr_init: float = Field(default=0.01, gt=0, description="initial value of the student's learning rate")
    momentum: float = Field(default=0.5, ge=0, lt=1, description="momentum of the images' SGD")
    soft_labels: bool = Field(default=False, description="learn the labels as logits")
    lr_label: float = Field(default=1.0, gt=0, description="learning rate of the label logits")
    momentum_label: float | None = Field(
        default=None, ge=0, lt=1, description="momentum of the label logits' SGD; by default that of the images"
    )
    ema: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="decay of the images' moving average, which is the result; 0 returns the last images",
    )
    init: Literal["real", "kmeans", "noise"] = Field(
        default="real",
        description="initial images: random real images, the real images nearest to k-means centres, or noise",
    )
    init_correct: bool = Field(default=False, description="start only from samples that an expert classifies correctly")
    gradient: Literal["adjoint", "unroll", "tesla"] = Field(
        default="adjoint",
        description="adjoint: exact, constant memory; unroll: exact, more memory; tesla: TESLA's approximation",
    )
    compile: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="torch.compile for the inner step and its second derivatives; auto: if it saves time",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="type of the convolutions in matching, and on CUDA of all maps; sums and weights are float32",
    )
    check_every: int = Field(default=500, ge=1, description="outer steps between checks on held-out training samples")

    @property
    def seen(self) -> int:
        """Synthetic images per class that networks see."""
        return self.ipc * self.factor**2


class DetectorConfig(NetConfig):
    """The network that classifies generated images, and how it is trained."""

    path: str | None = Field(
        default=None,
        description="safetensors file of its weights, with the names of the state_dict; by default it is trained",
    )
    epochs: int = Field(default=50, ge=1, description="epochs on the trusted samples")
    batch: int = Field(default=64, ge=1, description="batch size")
    lr: float = Field(default=0.05, gt=0, description="learning rate of SGD; a tenth of it after half of the epochs")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum of SGD")
    weight_decay: float = Field(default=5e-4, ge=0, description="weight decay of SGD")


class DiffusionConfig(Section):
    """The class-conditional diffusion model, which is trained if refine.source is train."""

    width: int = Field(
        default=32, ge=8, multiple_of=8, description="channels of the UNet's first level; the others have twice as many"
    )
    layers: int = Field(default=1, ge=1, description="residual blocks per level")
    iterations: int = Field(default=2000, ge=1, description="optimiser steps")
    batch: int = Field(default=128, ge=1, description="images per step")
    lr: float = Field(default=2e-3, gt=0, description="peak learning rate of AdamW, with warm-up and cosine decay to 0")
    ema: float = Field(
        default=0.995, ge=0, lt=1, description="decay of the moving average of the weights, which is the result"
    )
    drop: float = Field(default=0.1, ge=0, lt=1, description="share of labels dropped, for classifier-free guidance")
    weighting: Literal["draws", "loss"] = Field(default="draws", description="what the reliability of a label sets")


class RefineConfig(Section):
    """Generates images from prototypes with a diffusion model, and regenerates those that the detector rejects."""

    source: str = Field(
        default="train",
        description="the diffusion model: train, a folder in the format of diffusers, or a name on the hub",
    )
    prompt: str = Field(
        default="a photo of a {name}", description="Stable Diffusion's prompt for a class; {name} is its name"
    )
    classes: tuple[int, ...] | None = Field(
        default=None, description="the model's class for each class of the data; by default the same numbers"
    )
    prototypes: Literal["latents", "pixels"] = Field(
        default="latents",
        description="k-means per class: centres of latents, or the samples nearest to centres in pixel space",
    )
    outliers: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="share of each class that is left out before k-means, by local outlier factor",
    )
    strength: float = Field(default=0.7, gt=0, le=1, description="noise added to a prototype; 1 is pure noise")
    reach: float = Field(
        default=1.0, gt=0, le=1, description="strength in the last round; it grows to this value in equal steps"
    )
    steps: int = Field(default=25, ge=1, description="denoising steps from pure noise to an image (DDIM)")
    guidance: float = Field(default=2.0, ge=1, description="classifier-free guidance; 1 turns it off")
    attraction: float = Field(default=0.0, ge=0, description="pull toward a class's trusted features; 0 turns it off")
    repulsion: float = Field(default=0.0, ge=0, description="push between a class's images; 0 turns it off")
    beta: float = Field(
        default=0.7, ge=0, le=1, description="an image with the right label is rejected below this confidence"
    )
    candidates: int = Field(default=8, ge=1, description="N: candidates for each rejected image")
    top_k: int = Field(default=3, ge=1, description="choose the least similar of this many most confident candidates")
    weight: float | None = Field(default=None, ge=0, description="choose by confidence + weight * dissimilarity")
    rounds: int = Field(default=5, ge=0, description="largest number of refinement rounds; 0 keeps the first images")
    soft_labels: bool = Field(default=False, description="label the images with the detector's logits")
    batch: int = Field(default=100, ge=1, description="images generated at a time; limits the memory")
    backend: Backend = Field(default="auto", description="how the denoiser, the VAE decoder and the detector run")
    start: str | None = Field(
        default=None,
        description="folder of another run whose trusted samples, images, detector and diffusion model are used",
    )


class EvalConfig(Section):
    """The students that are trained on the distilled set to measure it."""

    networks: tuple[Network, ...] = Field(default=("convnet",), min_length=1, description="networks to train")
    repeats: int = Field(default=5, ge=1, description="students per network")
    epochs: int = Field(default=1000, ge=1, description="epochs on the distilled set")
    batch: int = Field(default=256, ge=1, description="batch size")
    optimizer: Literal["sgd", "muon"] = Field(default="sgd", description="optimiser of the students and baselines")
    lr: float | None = Field(default=None, gt=0, description="learning rate; by default the one learned by matching")
    real_lr: float = Field(default=0.01, gt=0, description="learning rate of the baselines trained on real images")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum of SGD")
    weight_decay: float = Field(default=5e-4, ge=0, description="weight decay of SGD")
    full_epochs: int = Field(default=50, ge=1, description="epochs on all images; trusted ones get as many steps")
    full_repeats: int = Field(default=3, ge=0, description="repeats of the full-data baseline; 0 skips it")


class Config(Section):
    """All settings of a run. A field that is not set takes the value of the method, else its default."""

    seed: int = Field(default=0, ge=0, description="random seed; equal seeds give equal results")
    synthesis: Literal["matching", "generative", "hybrid"] = Field(
        default="matching",
        description="matching; generative: diffusion and refinement; hybrid: matching from generated images",
    )
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:i")
    tf32: bool = Field(
        default=True, description="on CUDA, compute float32 matrix products and convolutions in TensorFloat-32"
    )
    data: DataConfig = DataConfig()
    net: NetConfig = NetConfig()
    trust: TrustConfig = TrustConfig()
    experts: ExpertConfig = ExpertConfig()
    match: MatchConfig = MatchConfig()
    detector: DetectorConfig = DetectorConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    refine: RefineConfig = RefineConfig()
    evaluate: EvalConfig = EvalConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_method(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = {name: v.model_dump(exclude_unset=True) if isinstance(v, Section) else v for name, v in values.items()}
        match = given.get("match")
        method = match.get("method") if isinstance(match, dict) else None
        for section, defaults in BASES.get(method, {}).items() if isinstance(method, str) else ():
            if isinstance(fields := given.get(section, {}), dict):
                given[section] = defaults | fields
        return given


def flatten_sections(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested sections to dotted fields: {"match": {"ipc": 1}} -> {"match.ipc": 1}."""
    fields: dict[str, Any] = {}
    for name, value in values.items():
        fields |= flatten_sections(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return fields


def config_to_json(config: Config) -> dict[str, Any]:
    """Returns the content of config.json: the schema version and all settings."""
    return {"schema": SCHEMA, **config.model_dump(mode="json")}


def config_from_json(text: bytes | str, field: str, file: Path | str) -> Config:
    """Reads the content of config.json, of this version or an older one.

    field, file: named in the error message. Raises UserError if the file is damaged or has a newer version.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(field, file, f"not valid JSON ({error}); restore the file or start a new run") from None
    version = values.pop("schema", 0) if isinstance(values, dict) else 0
    if type(version) is not int or not 0 <= version <= SCHEMA:
        remedy = f"has schema version {version!r}; this tadperf reads up to {SCHEMA}: use the tadperf that wrote it"
        raise UserError(field, file, remedy)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(field, file, f"{name}: {first['msg']}; restore it or use the tadperf that wrote it") from None
