"""An audit from probabilities, features or both: verdicts, files, and the rows of a set with samples left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tadperf.config import TrustConfig
from tadperf.config.merge import merge
from tadperf.data.dataset import BrokenImage, Dataset
from tadperf.data.open import open_data
from tadperf.errors import DataWarning, UserError
from tadperf.trust import audit, audit_labels, find_label_issues, label_quality_scores
from tadperf.trust.channel import noise_channel
from tadperf.trust.evidence import Evidence, check_evidence, loop_signals, open_evidence, rankable

from .simulated import simulated_labels

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.mark.parametrize("inputs", ["probabilities", "features", "both"])
def test_wrong_labels_are_issues_and_get_a_suggestion(inputs):
    labels, p, z, clean = simulated_labels()
    p, features = (None if inputs == "features" else p), (None if inputs == "probabilities" else z)
    state = audit_labels(labels, p, features, ["a", "b", "c", "d"])
    issues, wrong = state.issues.numpy(), labels != clean
    assert np.array_equal(issues, find_label_issues(labels, p, features))
    assert (issues & wrong).sum() / issues.sum() > 0.9
    assert (state.suggested.numpy() == clean)[issues & wrong].mean() > 0.9
    assert torch.equal(state.suggested[~state.issues], state.given[~state.issues])
    assert (state.suggested != state.given)[state.issues].all()
    quality = torch.from_numpy(label_quality_scores(labels, p, features)).float()
    kept = state.working == state.given
    torch.testing.assert_close(state.reliability[kept], quality[kept])
    torch.testing.assert_close(state.score, 1 - quality, atol=1e-4, rtol=0)  # spread where it is close to 1
    assert state.class_names == ("a", "b", "c", "d")
    counts = np.add(state.counts()["untrusted"], state.counts()["relabelled"])
    assert counts.tolist() == np.bincount(labels[issues], minlength=4).tolist()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pred_probs": None}, "pred_probs: None: give pred_probs"),
        ({"labels": [0, 5, 1]}, "labels: 5 at sample 1: must be in 0..1"),
        ({"labels": [0.0, 1.0, 1.0]}, r"labels: float64 \[3\]: must be integers"),
        ({"features": np.ones((2, 4))}, r"features: float64 \[2, 4\]: has 2 rows for 3 labels"),
        ({"pred_probs": np.zeros((3, 2))}, "pred_probs: .*: row 0 sums to 0"),
        ({"class_names": ["a", "b", "c"]}, "pred_probs: .*: has 2 columns; must have 3 columns"),
    ],
    ids=str,
)
def test_wrong_use(change, words):
    with pytest.raises(UserError, match=words):
        audit_labels(**{"labels": [0, 1, 1], "pred_probs": np.full((3, 2), 0.5), **change})


def images(count: int, **fields) -> Dataset:
    pixels = torch.zeros(count, 1, 4, 4, dtype=torch.uint8)
    return Dataset(pixels, torch.arange(count) % 2, ("a", "b"), "set", **fields)


def test_rows_of_samples_that_are_left_out_are_skipped(tmp_path):
    """Of seven images, row 2 is broken, and the fourth readable one (row 4) has an empty label."""
    np.save(tmp_path / "z.npy", np.arange(7, dtype=np.float32)[:, None])
    config = TrustConfig(features=str(tmp_path / "z.npy"))
    readable = images(6, broken=(BrokenImage(2, "2.png", "damaged"),))
    labelled = readable.subset(torch.tensor([0, 1, 2, 4, 5]))
    for data, rows in ((readable, [0, 1, 3, 4, 5, 6]), (labelled, [0, 1, 3, 5, 6])):
        features = open_evidence(config, data, CPU).features
        assert features is not None
        assert features[:, 0].tolist() == rows
    with pytest.raises(UserError, match="has 7 rows; set has 5 samples: every sample needs one row"):
        open_evidence(config, images(5), CPU)
    np.save(tmp_path / "z.npy", np.zeros((6, 2), np.float32))
    with pytest.raises(UserError, match=r"has 6 rows; set has 5 samples \(7 with those left out\)"):
        open_evidence(config, labelled, CPU)


def test_probabilities_in_another_order_are_warned_about(tmp_path):
    p = np.eye(2)[np.arange(40) // 20] * 0.8 + 0.1
    np.save(tmp_path / "p.npy", p)
    with pytest.warns(DataWarning, match=r"the likeliest class is the given label for 50% of the samples, by chance"):
        open_evidence(TrustConfig(probs=str(tmp_path / "p.npy")), images(40), CPU)


def test_files_are_checked_before_a_run_only_if_trust_is_on(tmp_path):
    config = TrustConfig(features=str(tmp_path / "none.npy"))
    with pytest.raises(UserError, match=r"--features: .*none\.npy: no such file"):
        check_evidence(config, images(4))
    check_evidence(config.model_copy(update={"mode": "off"}), images(4))
    with pytest.raises(UserError, match=r"--encoder: .*none: no such folder"):
        check_evidence(TrustConfig(encoder=str(tmp_path / "none")), images(4))


def test_signals_of_the_dual_loop_are_probabilities_and_features():
    labels, p, z, clean = (torch.from_numpy(part) for part in simulated_labels())
    probabilities, features = loop_signals(Evidence(p, z), labels, 4)
    assert [tuple(part.shape) for part in probabilities] == [(600, 4), (600, 4)]
    assert features is not None
    assert features.dtype == torch.float32
    assert isinstance(probabilities[1], torch.Tensor)
    assert (probabilities[1].argmax(1) == clean).float().mean() > 0.9
    assert loop_signals(Evidence(), labels, 4) == ((), None)


@pytest.mark.parametrize("networks", [False, True])
def test_an_audit_of_images_uses_features(tmp_path, networks):
    """Features that name the true class make the audit right, with networks that learn nothing."""
    data = open_data("digits").train.subset(torch.arange(400))
    wrong = torch.arange(400) % 5 == 0
    labels = torch.where(wrong, (data.labels + 1) % 10, data.labels)
    noise = torch.randn(400, 10, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "z.npy", (4 * torch.eye(10)[data.labels] + noise).numpy())
    options = {"trust.rounds": 1, "trust.proxies": 2, "trust.epochs": 1, "net.width": 4}
    config = merge("digits", options={**options, "trust.features": str(tmp_path / "z.npy")})
    data = data.with_labels(labels, None)
    state = audit(data, config, networks=networks)
    found = wrong[state.worst()[: int(wrong.sum())]].float().mean()
    assert found > (0.8 if networks else 0.9)


def test_labels_with_extreme_odds_keep_their_order():
    odds = torch.linspace(-60, 80, 1001)
    score = rankable(odds)
    assert (score.diff() > 0).all()
    assert score.max() < 1
    torch.testing.assert_close(score[odds < 9], odds[odds < 9].sigmoid())


def test_a_list_ranks_labels_that_are_wrong_for_certain():
    labels = torch.arange(300) % 3
    p = 0.98 * torch.nn.functional.one_hot(labels, 3) + 0.01
    wrong = torch.arange(0, 300, 10)
    p[wrong, labels[wrong]] = 10.0 ** -torch.linspace(8, 30, 30)
    p /= p.sum(1, keepdim=True)
    state, odds = audit_labels(labels, p), noise_channel(p, labels).odds
    assert torch.equal(state.issues.nonzero().squeeze(1), wrong)
    assert torch.equal(odds[state.worst()[:30]].sort(descending=True).values, odds[state.worst()[:30]])
