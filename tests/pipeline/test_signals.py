"""A distillation with trust.features, trust.probs and trust.encoder: they reach the dual loop, and a run resumes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tadperf.data.open import open_data
from tadperf.errors import UserError
from tadperf.pipeline.distill import distill_task
from tadperf.pipeline.prepare import prepare
from tadperf.run.folder import Run
from tadperf.trust.state import TrustState

pytestmark = pytest.mark.usefixtures("one_thread")


def run(config, folder) -> TrustState:
    """Runs the job in the folder and returns its trust state."""
    task = prepare(config)
    with Run.create(folder, config, folder.exists()) as opened:
        distill_task(task, opened)
    return TrustState.load(folder / "trust.safetensors")


@pytest.mark.parametrize("signal", ["features", "probs"])
def test_a_file_that_knows_the_classes_improves_trust(tiny_config, tmp_path, signal):
    """The proxies of this tiny job learn little in one epoch."""
    train = open_data("digits").train
    onehot = torch.eye(10)[train.labels]
    noise = torch.randn(1400, 10, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "features.npy", (7 * onehot + noise).numpy())
    np.save(tmp_path / "probs.npy", (2 * (7 * onehot + noise)).softmax(1).numpy())
    options = {"trust__mode": "on", "data__noise": "symmetric:0.3", "trust__proxies": 2}
    options["trust__graph"] = signal == "features"  # without neighbours, probabilities alone decide
    signals = {f"trust__{signal}": str(tmp_path / f"{signal}.npy")}
    missed, state = {}, None
    for name, fields in (("without", options), ("with", options | signals)):
        state = run(tiny_config(**fields), tmp_path / name)
        wrong = state.given != train.labels
        missed[name] = 1 - float(wrong[state.worst()[: int(wrong.sum())]].float().mean())
    assert missed["with"] < missed["without"] / 2, missed
    again = run(tiny_config(**options, **signals), tmp_path / "with")
    assert state is not None
    assert torch.equal(again.score, state.score)


def test_a_wrong_file_is_refused_before_the_run(tiny_config, tmp_path):
    np.save(tmp_path / "z.npy", np.zeros((5, 3), np.float32))
    config = tiny_config(trust__mode="on", trust__features=str(tmp_path / "z.npy"))
    with pytest.raises(UserError, match=r"--features: .*z\.npy: has 5 rows; digits has 1400 samples"):
        prepare(config)
    prepare(config.model_copy(update={"trust": config.trust.model_copy(update={"mode": "off"})}))
