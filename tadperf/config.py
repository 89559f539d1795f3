"""What a run is asked to do: one frozen model per stage."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(Section):
    """Which images and labels."""

    path: str = Field(
        "digits",
        description="'digits', or a file or folder: parquet, image folder, CIFAR pickles, npz, safetensors, idx.gz",
    )
    format: str | None = Field(None, description="format of the path where detection is not wanted")
    image_size: int | None = Field(None, ge=1, description="resize every image to this height and width")
    labels: str | None = Field(
        None, description="file of labels that replace the given ones: CSV, .npy, CIFAR-N .pt (file.pt:key)"
    )
    noise: str = Field("none", description="label noise for studies: none, symmetric:P, asymmetric:P, instance:P")
    normalise: Literal["meanstd", "zca"] = Field(
        "meanstd", description="per-channel mean and deviation, or ZCA whitening (eps 0.1)"
    )
    augment: str = Field(
        "color_crop_cutout_flip_scale_rotate", description="differentiable augmentations joined by '_', or 'none'"
    )
    holdout: float = Field(
        0.1, gt=0, lt=0.5, description="share of the training samples held out to choose the checkpoint"
    )


class NetConfig(Section):
    """The network of experts, matching and students."""

    name: Literal["convnet", "resnet18", "alexnet", "vgg11"] = Field("convnet", description="architecture")
    depth: int | None = Field(None, ge=1, le=8, description="ConvNet blocks; by default until the image is 4 x 4")
    width: int = Field(128, ge=1, description="ConvNet channels")
    norm: Literal["instance", "batch", "group", "layer", "none"] = Field("instance", description="normalisation layers")


class ExpertConfig(Section):
    """Training trajectories to be matched."""

    count: int = Field(100, ge=1, description="experts, one seed and one file each")
    epochs: int | None = Field(
        None, ge=1, description="epochs trained and stored; by default as many as matching can use"
    )
    batch: int = Field(256, ge=1, description="batch size")
    lr: float = Field(0.01, gt=0, description="learning rate of SGD")
    momentum: float = Field(0.0, ge=0, lt=1, description="momentum of SGD")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of SGD")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="type of the stored snapshots")
    path: str | None = Field(None, description="folder of another run, whose experts are used instead of training some")
    workers: int | None = Field(None, ge=1, description="processes on CPU; by default one per core")


class MatchConfig(Section):
    """Trajectory matching: the synthetic images and how they are learned."""

    method: Literal["mtt"] = Field("mtt", description="distillation method")
    ipc: int = Field(10, ge=1, description="synthetic images per class")
    iterations: int = Field(5000, ge=1, description="outer steps")
    steps: int = Field(30, ge=1, description="T: inner steps on synthetic images per outer step")
    expert_epochs: int = Field(2, ge=1, description="expert epochs that T inner steps have to match")
    max_start: int = Field(20, ge=0, description="latest expert epoch to start from")
    batch: int | None = Field(None, ge=1, description="synthetic images per inner step; by default all")
    lr_img: float = Field(100.0, gt=0, description="learning rate of the images")
    lr_lr: float = Field(0.05, ge=0, description="learning rate of the logarithm of the student's learning rate")
    lr_init: float = Field(0.01, gt=0, description="the student's learning rate before it is learned")
    momentum: float = Field(0.5, ge=0, lt=1, description="momentum of the images' SGD")
    soft_labels: bool = Field(False, description="learn the labels as logits")
    lr_label: float = Field(1.0, gt=0, description="learning rate of the label logits")
    init: Literal["real", "kmeans", "noise"] = Field(
        "real", description="what the images start from: random real ones, those nearest to k-means centres, noise"
    )
    gradient: Literal["adjoint", "unroll", "tesla"] = Field(
        "adjoint", description="exact at constant memory; exact by full unroll; TESLA's approximation"
    )
    check_every: int = Field(500, ge=1, description="outer steps between checks on held-out training samples")


class EvalConfig(Section):
    """Students trained on the distilled set."""

    networks: tuple[Literal["convnet", "resnet18", "alexnet", "vgg11"], ...] = Field(
        ("convnet",), min_length=1, description="networks to train"
    )
    repeats: int = Field(5, ge=1, description="fresh students per network")
    epochs: int = Field(1000, ge=1, description="epochs on the distilled set")
    batch: int = Field(256, ge=1, description="batch size")
    lr: float | None = Field(None, gt=0, description="learning rate; by default the learned one")
    real_lr: float = Field(0.01, gt=0, description="learning rate of the baselines trained on real images")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of SGD")
    weight_decay: float = Field(5e-4, ge=0, description="weight decay of SGD")
    full_epochs: int = Field(50, ge=1, description="epochs of the full-data baseline")
    full_repeats: int = Field(3, ge=0, description="repeats of the full-data baseline; 0 leaves it out")


class Config(Section):
    """A whole run."""

    seed: int = Field(0, ge=0, description="one seed gives one result")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:i")
    data: DataConfig = DataConfig()  # pyright: ignore[reportCallIssue]
    net: NetConfig = NetConfig()  # pyright: ignore[reportCallIssue]
    experts: ExpertConfig = ExpertConfig()  # pyright: ignore[reportCallIssue]
    match: MatchConfig = MatchConfig()  # pyright: ignore[reportCallIssue]
    evaluate: EvalConfig = EvalConfig()  # pyright: ignore[reportCallIssue]
