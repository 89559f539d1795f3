"""What a run is asked to do: one frozen model per stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tadperf.config.presets import BASES

if TYPE_CHECKING:
    pass

Backend = Literal[
    "auto", "eager", "inductor", "cudagraphs", "tensorrt"
]  # of tadperf.compute.compile.compile_for_inference


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


class TrustConfig(Section):
    """Which labels to believe: the dual loop of trust."""

    mode: Literal["on", "off", "oracle"] = Field(
        "on",
        description="find the labels to trust; take them as given; or oracle: use the clean labels, as a yardstick",
    )
    rounds: int = Field(3, ge=1, description="rounds of outer and inner loop, at most")
    proxies: int = Field(4, ge=1, description="networks trained in each round")
    epochs: int = Field(12, ge=1, description="epochs of a proxy: few, so that patterns are learned and errors not yet")
    batch: int = Field(64, ge=1, description="batch size of the proxies")
    lr: float = Field(0.1, gt=0, description="learning rate of the proxies' SGD")
    mixup: bool = Field(True, description="train proxies on mixed pairs of images")
    consistency: float = Field(0.0, ge=0, description="weight of KL between two augmented views, over all samples")
    class_wise: bool = Field(True, description="split the losses class by class; False: all classes together")
    dynamic_threshold: bool = Field(True, description="each class's own threshold, by round; False: posterior 0.5")
    recall: bool = Field(True, description="let untrusted samples return under their given label")
    relabel: bool = Field(True, description="let untrusted samples return under another label")
    graph: bool = Field(True, description="use labels spread over the neighbours in feature space")
    transition: bool = Field(True, description="use the estimated confusion of labels when reading the neighbours")
    held_out: bool = Field(True, description="judge a sample by the proxy that was not trained on it")
    memory: bool = Field(True, description="score suspicion by the mean loss of all rounds so far")


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
    rho: float = Field(0.0, ge=0, description="GSAM's radius, a share of each weight; 0 is plain SGD")
    alpha: float = Field(0.0, ge=0, description="GSAM's weight of closing the gap to the loss at that radius")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="type of the stored snapshots")
    path: str | None = Field(None, description="folder of another run, whose experts are used instead of training some")
    workers: int | None = Field(None, ge=1, description="processes on CPU; by default one per core")


class MatchConfig(Section):
    """Trajectory matching: the synthetic images and how they are learned."""

    method: Literal["mtt", "ftd", "datm"] = Field(
        "mtt", description="distillation method; ftd and datm bring their own values for fields that are not set"
    )
    ipc: int = Field(10, ge=1, description="synthetic images per class")
    iterations: int = Field(5000, ge=1, description="outer steps")
    steps: int = Field(30, ge=1, description="T: inner steps on synthetic images per outer step")
    expert_epochs: int = Field(2, ge=1, description="expert epochs that T inner steps have to match")
    trajectories: int = Field(
        1, ge=1, description="expert trajectories matched per outer step, averaged; ranks divide them"
    )
    min_start: int = Field(0, ge=0, description="earliest expert epoch to start from")
    max_start: int = Field(20, ge=0, description="latest expert epoch to start from")
    easy: float = Field(
        1.0, ge=0, le=1, description="share of the starts, the early and easy ones, that is open at first"
    )
    widen: float = Field(0.0, ge=0, le=1, description="share of the iterations after which all starts are open")
    batch: int | None = Field(None, ge=1, description="synthetic images per inner step; by default all")
    lr_img: float = Field(100.0, gt=0, description="learning rate of the images")
    lr_lr: float = Field(0.05, ge=0, description="learning rate of the logarithm of the student's learning rate")
    lr_init: float = Field(0.01, gt=0, description="the student's learning rate before it is learned")
    momentum: float = Field(0.5, ge=0, lt=1, description="momentum of the images' SGD")
    soft_labels: bool = Field(False, description="learn the labels as logits")
    lr_label: float = Field(1.0, gt=0, description="learning rate of the label logits")
    momentum_label: float | None = Field(
        None, ge=0, lt=1, description="momentum of the label logits' SGD; by default that of the images"
    )
    ema: float = Field(
        0.0, ge=0, lt=1, description="decay of the images' moving average, which is what is kept; 0 keeps the last ones"
    )
    init: Literal["real", "kmeans", "noise"] = Field(
        "real", description="what the images start from: random real ones, those nearest to k-means centres, noise"
    )
    init_correct: bool = Field(False, description="start only from samples that an expert classifies rightly")
    gradient: Literal["adjoint", "unroll", "tesla"] = Field(
        "adjoint", description="exact at constant memory; exact by full unroll; TESLA's approximation"
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="torch.compile for the inner step and its second derivatives; auto where that pays"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="type of the convolutions in matching; sums and weights stay float32"
    )
    check_every: int = Field(500, ge=1, description="outer steps between checks on held-out training samples")


class DetectorConfig(NetConfig):
    """The network that judges generated images, and how it is trained."""

    path: str | None = Field(
        None, description="its weights as safetensors, named as the network's own state, instead of training it"
    )
    epochs: int = Field(50, ge=1, description="epochs on the trusted samples")
    batch: int = Field(64, ge=1, description="batch size")
    lr: float = Field(0.05, gt=0, description="learning rate of SGD, x 0.1 after half of the epochs")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of SGD")
    weight_decay: float = Field(5e-4, ge=0, description="weight decay of SGD")


class DiffusionConfig(Section):
    """The class-conditional diffusion model that is trained where refine.source is train."""

    width: int = Field(32, ge=8, multiple_of=8, description="channels of the UNet's first level; the others have twice")
    layers: int = Field(1, ge=1, description="residual blocks per level")
    iterations: int = Field(2000, ge=1, description="optimiser steps")
    batch: int = Field(128, ge=1, description="images per step")
    lr: float = Field(2e-3, gt=0, description="peak learning rate of AdamW; warmed up, then a half cosine down to 0")
    ema: float = Field(0.995, ge=0, lt=1, description="decay of the weights' moving average, which is what is kept")
    drop: float = Field(0.1, ge=0, lt=1, description="share of labels left out, for classifier-free guidance")


class RefineConfig(Section):
    """Images made by a diffusion model from prototypes, judged by the detector and made again where it objects."""

    source: str = Field(
        "train", description="the diffusion model: train, or a local folder or hub name of diffusers' format"
    )
    prompt: str = Field("a photo of a {name}", description="a class as text, for Stable Diffusion; {name} is its name")
    classes: tuple[int, ...] | None = Field(
        None, description="the model's class for each class of the data, where it knows others; by default the same"
    )
    prototypes: Literal["latents", "pixels"] = Field(
        "latents",
        description="k-means centres per class in the model's space; or the samples nearest to such centres of pixels",
    )
    outliers: float = Field(
        0.0, ge=0, lt=0.5, description="share of each class left out before k-means, by local outlier factor"
    )
    strength: float = Field(0.7, gt=0, le=1, description="how far a prototype is noised: 1 is all the way")
    reach: float = Field(
        1.0, gt=0, le=1, description="strength of the last round's candidates, which grows to it by equal parts"
    )
    steps: int = Field(25, ge=1, description="denoising steps of the whole way (DDIM)")
    guidance: float = Field(2.0, ge=1, description="classifier-free guidance; 1 is none")
    beta: float = Field(0.7, ge=0, le=1, description="an image of the right label is anomalous below this confidence")
    candidates: int = Field(8, ge=1, description="N: candidates for each anomalous image")
    top_k: int = Field(3, ge=1, description="candidates of highest confidence that the least similar is taken from")
    weight: float | None = Field(
        None, ge=0, description="lambda: take the largest confidence + lambda * dissimilarity instead"
    )
    rounds: int = Field(5, ge=0, description="most rounds of refinement; 0 keeps the images as first generated")
    soft_labels: bool = Field(False, description="label the images with the detector's logits")
    batch: int = Field(100, ge=1, description="images generated at a time; bounds the memory")
    backend: Backend = Field(
        "auto", description="how denoiser, VAE decoder and detector run: auto, eager, inductor, cudagraphs or tensorrt"
    )
    start: str | None = Field(
        None, description="folder of another run: its trusted view, images, detector and diffusion model are taken"
    )


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
    """A whole run. Fields that are not set take the method's values, and then the defaults."""

    seed: int = Field(0, ge=0, description="one seed gives one result")
    synthesis: Literal["matching", "generative", "hybrid"] = Field(
        "matching",
        description="how images are made: matching, diffusion and refinement, or matching that starts from these",
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:i")
    tf32: bool = Field(
        True, description="on CUDA, float32 products and convolutions by TensorFloat-32; false: by IEEE float32"
    )
    data: DataConfig = DataConfig()  # pyright: ignore[reportCallIssue]
    net: NetConfig = NetConfig()  # pyright: ignore[reportCallIssue]
    trust: TrustConfig = TrustConfig()  # pyright: ignore[reportCallIssue]
    experts: ExpertConfig = ExpertConfig()  # pyright: ignore[reportCallIssue]
    match: MatchConfig = MatchConfig()  # pyright: ignore[reportCallIssue]
    detector: DetectorConfig = DetectorConfig()  # pyright: ignore[reportCallIssue]
    diffusion: DiffusionConfig = DiffusionConfig()  # pyright: ignore[reportCallIssue]
    refine: RefineConfig = RefineConfig()  # pyright: ignore[reportCallIssue]
    evaluate: EvalConfig = EvalConfig()  # pyright: ignore[reportCallIssue]

    @model_validator(mode="before")
    @classmethod
    def _fill_method(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = {name: v.model_dump(exclude_unset=True) if isinstance(v, Section) else v for name, v in values.items()}
        match = given.get("match")
        method = match.get("method") if isinstance(match, dict) else None
        for section, own in BASES.get(method, {}).items() if isinstance(method, str) else ():
            if isinstance(under := given.get(section, {}), dict):
                given[section] = own | under
        return given


def flatten_sections(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted fields: {"match": {"ipc": 1}} -> {"match.ipc": 1}."""
    fields: dict[str, Any] = {}
    for name, value in values.items():
        fields |= flatten_sections(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return fields
