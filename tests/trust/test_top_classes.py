"""The loop on large sets: the likeliest classes of each sample give the verdicts of all probabilities."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from tadperf.config import NetConfig, TrustConfig
from tadperf.nets.problem import Problem
from tadperf.progress import silent
from tadperf.trust import large_audit, neighbours, posterior, top_classes
from tadperf.trust.evidence import Evidence, loop_signals
from tadperf.trust.loop import dual_loop
from tadperf.trust.proxies import OutputMeans, ProxyOutputs, compact_features, compact_outputs, predict_all
from tadperf.trust.state import as_given
from tadperf.trust.top_classes import TopClasses, concatenate, from_blocks, mean_of, one_hot
from tadperf.trust.verdicts import Judgement, judge

from .test_verdicts import LargeTensors

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
CLASSES, EACH = 40, 50


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sets are large; several blocks, a part of the samples for each fit, and fewer classes than there are."""
    monkeypatch.setattr(top_classes, "LARGE", 0)
    monkeypatch.setattr(top_classes, "BLOCK", 500 * CLASSES)
    monkeypatch.setattr(neighbours, "SELECTION_SIZE", 700 * CLASSES)
    monkeypatch.setattr(posterior, "SELECTION_SIZE", 700 * CLASSES)


def top(p: Tensor, kept: int = 16) -> TopClasses:
    result = from_blocks([(slice(None), p)], len(p), p.shape[1], CPU)
    return result._replace(classes=result.classes[:, :kept], values=result.values[:, :kept])


def clouds(noise: float = 0.2) -> tuple[ProxyOutputs, Tensor, Tensor]:
    """Returns outputs of proxies that are right for 3 of 4 samples, the given labels and the clean labels."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.arange(CLASSES).repeat_interleave(EACH)
    centres = torch.randn(CLASSES, 32, generator=generator)
    points = centres[clean] + 1.3 * torch.randn(len(clean), 32, generator=generator)
    wrong = torch.rand(len(clean), generator=generator) < noise
    labels = torch.where(wrong, (clean + torch.randint(1, CLASSES, clean.shape, generator=generator)) % CLASSES, clean)
    p = (points @ centres.T / 8).softmax(1)
    losses = -p.gather(1, labels.unsqueeze(1)).squeeze(1).log()
    return ProxyOutputs(losses, p, compact_features(points, 64, 0)), labels, clean


def verdicts(outputs: ProxyOutputs, labels: Tensor, evidence: Any = (), **values: Any) -> Judgement:
    before = as_given(labels, tuple(map(str, range(CLASSES))))
    return judge(outputs, before, 1, TrustConfig.model_validate(values), 0, silent, evidence, None)


def test_rows_hold_the_likeliest_classes_and_share_the_rest():
    p = torch.rand(9, 40, generator=torch.Generator().manual_seed(0)).square()
    rows = torch.tensor([4, 0])
    found = top(p).dense(rows)
    torch.testing.assert_close(found.sum(1), p[rows].sum(1))
    kept = top(p).classes[rows].long()
    assert torch.equal(found.gather(1, kept), p[rows].topk(16, 1).values)
    others = found.scatter(1, kept, torch.nan)
    assert (others.nan_to_num(torch.inf).amin(1) == others.nan_to_num(-torch.inf).amax(1)).all()


def test_all_classes_are_exact_where_there_are_few():
    p = torch.rand(9, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(top(p).dense(slice(2, 5)), p[2:5])
    torch.testing.assert_close(mean_of([top(p), top(2 * p)]).dense(slice(None)), 1.5 * p)
    torch.testing.assert_close(concatenate([top(p[:4]), top(p[4:])]).dense(slice(None)), p)


def test_one_hot_rows_times_weights():
    labels, weights = torch.tensor([3, 0, 3]), torch.tensor([0.5, 1.0, 0.0])
    expected = torch.nn.functional.one_hot(labels, 5) * weights.unsqueeze(1)
    assert torch.equal(one_hot(labels, 5).scaled(weights).dense(slice(None)), expected)


def test_means_over_epochs_keep_the_likeliest_classes_of_the_sum():
    logits = 6 * torch.randn(2, 30, 100, generator=torch.Generator().manual_seed(0))
    labels, index = torch.arange(30), torch.arange(30)
    exact, kept = OutputMeans(labels, 100, 2), OutputMeans(labels, 100, 2, large=True)
    for means in (exact, kept):
        for epoch in logits:
            means.add(lambda x: x, epoch, index)
    assert torch.equal(exact.losses, kept.losses)
    assert isinstance(exact.probabilities, Tensor)
    assert isinstance(kept.probabilities, TopClasses)
    assert (exact.probabilities - kept.probabilities.dense(slice(None))).abs().max() < 0.01


@pytest.mark.parametrize("width", [8, 200])
def test_projected_features_equal_those_of_all_outputs(width: int):
    images = torch.rand(1500, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 40), torch.nn.ReLU())
    expected = compact_features(predict_all(module, images, CPU), width, 3)
    torch.testing.assert_close(compact_outputs(module, images, CPU, width, 3), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("graph", "held_out"), [(True, True), (False, True), (True, False)])
def test_a_large_set_gets_the_verdicts_of_all_probabilities(
    graph: bool, held_out: bool, monkeypatch: pytest.MonkeyPatch, large: None
):
    outputs, labels, clean = clouds()
    p = outputs.probabilities
    assert isinstance(p, Tensor)
    evidence = ((0.7 * p + 0.3 * torch.eye(CLASSES)[clean]),)
    values = {"graph": graph, "held_out": held_out}
    ours = verdicts(outputs._replace(probabilities=top(p)), labels, evidence, **values)
    monkeypatch.setattr(top_classes, "LARGE", 2**28)
    monkeypatch.setattr(neighbours, "FOLD_SIZE", 0)  # the sources of large sets, in full
    theirs = verdicts(outputs, labels, evidence, **values)
    assert (ours.state.verdict == theirs.state.verdict).float().mean() > 0.98
    assert (ours.state.working == theirs.state.working).float().mean() > 0.99
    precision = [average_precision_score(labels != clean, one.state.score) for one in (ours, theirs)]
    assert precision[1] > (0.9 if held_out else 0.6)
    assert abs(precision[0] - precision[1]) < 0.01
    assert isinstance(ours.targets, TopClasses)
    assert isinstance(theirs.targets, Tensor)
    assert (ours.targets.dense(slice(None)) - theirs.targets).abs().mean() < 1e-3


def test_a_round_of_a_large_set_holds_no_matrix_of_all_samples_and_classes(monkeypatch: pytest.MonkeyPatch):
    count, classes = 6000, 170  # the fit takes 2 x 170 samples; the graph has 20 entries a sample
    for module, name, value in (
        (top_classes, "LARGE", 0),
        (top_classes, "BLOCK", 250 * classes),
        (large_audit, "BLOCK", 250 * classes),
        (neighbours, "CPU_BLOCK", 100 * count),
        (neighbours, "SELECTION_SIZE", 100 * classes),
        (posterior, "SELECTION_SIZE", 100 * classes),
        (posterior, "FIT_STEPS", 5),
    ):
        monkeypatch.setattr(module, name, value)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (count,), generator=generator)
    logits = torch.randn(count, classes, generator=generator) + 6 * torch.eye(classes)[labels]
    features = torch.eye(classes, 16)[labels] + 0.1 * torch.randn(count, 16, generator=generator)
    outputs = ProxyOutputs(torch.zeros(count), top(logits.softmax(1)), features)
    state, matrix = as_given(labels, tuple(map(str, range(classes)))), 4 * count * classes
    with LargeTensors(matrix // 2) as tensors:
        new = judge(outputs, state, 1, TrustConfig(proxies=2), 0, silent, (), None).state
    assert tensors.peak < matrix
    assert new.trusted.any()


def problem() -> Problem:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % 20
    noise = 0.3 * torch.randn(240, 1, 8, 8, generator=generator)
    images = torch.randn(20, 1, 8, 8, generator=generator)[labels] + noise
    labels = torch.where(torch.arange(240) % 7 == 0, (labels + 3) % 20, labels)
    net = NetConfig.model_validate({"depth": 1, "width": 8})
    return Problem(images, labels, tuple(map(str, range(20))), net, "none", 0, CPU)


@pytest.mark.parametrize("values", [{"soft_targets": True}, {"held_out": False, "rounds": 1}])
def test_a_loop_over_a_large_set_ends_and_resumes(values: dict[str, Any], tmp_path: Path, large: None):
    settings = {"rounds": 2, "proxies": 2, "epochs": 4, "batch": 32, "mixup": False, **values}
    config = TrustConfig.model_validate(settings)
    first = dual_loop(problem(), config, tmp_path)
    assert first.state.trusted.float().mean() > 0.3
    assert (first.state.working == problem().labels).float().mean() > 0.7
    again = dual_loop(replace(problem(), images=torch.zeros(240, 1, 8, 8)), config, tmp_path)  # reads the rounds
    assert torch.equal(first.state.score, again.state.score)
    last = tmp_path / f"round-{len(first.rounds)}.safetensors"
    last.unlink()
    resumed = dual_loop(problem(), config, tmp_path)
    assert torch.equal(first.state.score, resumed.state.score)


def test_signals_of_a_user_stay_as_they_are_and_features_give_likeliest_classes(large: None):
    outputs, labels, clean = clouds()
    p = outputs.probabilities
    assert isinstance(p, Tensor)
    (given, pooled), features = loop_signals(Evidence(p.half(), outputs.features.half()), labels, CLASSES)
    assert isinstance(given, Tensor)
    assert given.dtype == torch.float16
    assert isinstance(pooled, TopClasses)
    assert features is not None
    assert (pooled.classes[:, 0] == clean).float().mean() > 0.5
    state = verdicts(outputs._replace(probabilities=top(p)), labels, (given, pooled)).state
    assert (state.suggested == clean).float().mean() > 0.8
    with pytest.raises(ValueError, match=r"evidence: \[2000, 39\] of source 0: must be \[2000, 40\]"):
        verdicts(outputs, labels, (pooled._replace(num_classes=39),))
