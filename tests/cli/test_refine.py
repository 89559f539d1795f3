"""`tadperf refine`: generates images for data, refines those of a run, and answers wrong use with one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

REFINE = [
    f"--set={s}"
    for s in (
        "detector.depth=1",
        "detector.width=8",
        "detector.epochs=2",
        "refine.steps=4",
        "refine.rounds=1",
        "refine.candidates=3",
        "refine.top_k=2",
        "diffusion.width=8",
        "diffusion.iterations=3",
        "diffusion.batch=8",
    )
]
PICTURES = ("refined.png", "gradcam.png", "labels.csv")


@pytest.fixture
def options(tiny) -> list[str]:
    return [option for option in tiny if option != "--repeats=2"] + REFINE


def test_refining_a_data_set_and_a_run(tadperf, options, tmp_path):
    code, out, err = tadperf("refine", "digits", *options, "--batch=7", "--out", "first", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert "preset digits-ipc1" in err
    assert (result["synthesis"], result["accuracy"]) == ("generative", {})
    assert {"trust", "detector", "diffusion", "refine"} <= result["stages"].keys()
    assert json.loads((tmp_path / "first" / "config.json").read_text())["refine"]["batch"] == 7
    assert len(result["refine"]["rounds"]) in (1, 2)
    for name in PICTURES:
        assert str(Path("first", name)) in result["paths"].values()
        assert (tmp_path / "first" / name).exists(), name

    again = tadperf("refine", "first", "--set=refine.beta=0.9", "--backend=eager", "--evaluate", "--repeats=1")
    assert "No such option: --repeats" in again.err
    again = tadperf("refine", "first", "--set=refine.beta=0.9", "--set=evaluate.repeats=1", "--evaluate")
    assert again.code == 0, again.err
    assert "preset" not in again.err
    assert "rejected images" in again.out
    assert "images it started from" in again.out
    config = json.loads((tmp_path / "runs" / "first-refined" / "config.json").read_text())
    assert (config["refine"]["beta"], config["refine"]["batch"]) == (0.9, 7)
    resumed = tadperf("refine", "--resume", "--out", "runs/first-refined", "--json")
    assert json.loads(resumed.out)["refine"]["start"] == str(tmp_path / "first")
    refused = tadperf("refine", "first", "--seed", "3", "--out", "other")
    assert refused.code == 2
    assert refused.err.startswith("tadperf: --seed: 3: the run to refine used 0; only refine, detector, diffusion")

    from tadperf.trust.state import TrustState

    state = TrustState.load(tmp_path / "first" / "trust.safetensors")
    verdict = state.verdict.masked_fill(state.working == 3, 3)  # no trusted sample in one class
    replace(state, verdict=verdict).save(tmp_path / "first" / "trust.safetensors")
    check(tadperf("refine", "first", "--quiet", "--out", "other"), "--ipc: 1: class '3' has only 0 samples")


def test_a_sweep_of_refinement_generates(tadperf, options, tmp_path):
    job = [option for option in options if option != "--ipc=1"]
    code, out, err = tadperf("sweep", "refine.beta=0,.9", *job, "--set=match.ipc=1", "--out", "swept", "--json")
    assert code == 0, err
    assert "generating images, because matching does not use refine.beta" in err
    rows = json.loads(out)["rows"]
    assert [row["refine.beta"] for row in rows] == [0, 0.9]
    for row in rows:
        result = json.loads((tmp_path / "swept" / row["folder"] / "result.json").read_text())
        assert (result["synthesis"], result["refine"]["beta"]) == ("generative", row["refine.beta"])
    metrics = [(tmp_path / "swept" / row["folder"] / "metrics.jsonl").read_text() for row in rows]
    assert [text.count('"stage": "diffusion"') for text in metrics] == [3, 0]  # trained once


def check(outcome, words: str) -> None:
    """Asserts exit code 2 and one line with these words."""
    assert outcome.code == 2, outcome.err
    assert outcome.err.startswith("tadperf: ")
    assert outcome.err.count("\n") == 1, outcome.err
    assert words in outcome.err


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Path:
    """Returns folders that cannot generate digits: without an index, with 7 classes, with latents that do not fit."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    from tadperf.config.schema import DiffusionConfig
    from tadperf.refine.models import unet

    place = tmp_path_factory.mktemp("checkpoints")
    (place / "empty").mkdir()
    model = unet.build(DiffusionConfig.model_validate({"width": 8}), (1, 8, 8), 7, 0)
    unet.save(place / "seven", model, unet.schedulers()[1])
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(latent_channels=3, block_out_channels=(4,), norm_num_groups=2)
    DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(place / "latents")  # pyright: ignore
    return place


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--set refine.source={}/empty", "model_index.json is missing; give a folder saved by diffusers"),
        ("--set refine.source={}/seven", "the model has 7 classes, the data have 10; map them with refine.classes"),
        ("--set refine.source={}/latents", "its transformer takes 4 latent channels, its VAE makes 3"),
        ("--set refine.source={}/none", "no such folder"),
        ("--set refine.top_k=9", "refine.top_k: 9: must not be above refine.candidates = 8"),
        ("--set refine.beta=1.5", "refine.beta: 1.5: must be at most 1"),
        ("--set refine.beta=-0.1", "refine.beta: -0.1: must be at least 0"),
        ("--batch 0", "--batch: 0: must be at least 1"),
        ("--backend onnx", "--backend: onnx: must be 'auto', 'eager'"),
        ("--ipc 1000", "--ipc: 1000: class"),
        ("--set refine.start=none", "RUN: none: is not a run folder: config.json is missing"),
        ("--resume --out none", "--resume: none: there is no such run folder"),
    ],
)
def test_wrong_use_is_one_line(tadperf, checkpoints, arguments, words):
    given = ["--device=cpu", "--trust=off", "--quiet", "--set=detector.epochs=1"]
    check(tadperf("refine", *given, *arguments.format(checkpoints).split()), words)


def test_a_hub_name_without_a_network_says_what_to_do(tadperf, monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__):
        raise OSError("Could not reach the hub\nand more lines")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    words = "cannot be downloaded (Could not reach the hub); give a local folder that holds model_index.json"
    check(tadperf("refine", "--trust=off", "--quiet", "--set=refine.source=owner/name"), words)
    check(tadperf("distill", "--synthesis=generative", "--trust=off", "--set=refine.source=owner/name"), words)
