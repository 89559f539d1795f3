"""One round's verdicts: who is in the view, who is recalled, who gets another label."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tadperf.config import TrustConfig
from tadperf.progress import silent
from tadperf.trust import neighbours, posterior
from tadperf.trust import verdicts as verdicts_module
from tadperf.trust.posterior import ClassPool
from tadperf.trust.proxies import ProxyOutputs
from tadperf.trust.state import RECALLED, RELABELLED, TRUSTED, UNTRUSTED, as_given
from tadperf.trust.verdicts import Decision, decide, judge, loss_to_score, score_to_loss, weigh_sources

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES, EACH = 3, 100


def clouds(spread: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """Returns features of three clouds, given labels with 20 % errors, and clean labels."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.arange(CLASSES).repeat(EACH)
    features = torch.eye(CLASSES, 8)[clean] + spread * torch.randn(len(clean), 8, generator=generator)
    return features, torch.where(torch.arange(len(clean)) % 5 == 0, (clean + 1) % CLASSES, clean), clean


def pool_of(clean: Tensor, confidence: Tensor) -> ClassPool:
    """Returns a pool that gives the clean class this probability [N], also without the label."""
    other = (1 - confidence) / (CLASSES - 1)
    p = other.unsqueeze(1).repeat(1, CLASSES).scatter(1, clean.unsqueeze(1), confidence.unsqueeze(1))
    return ClassPool(p, p, (1.0,), torch.eye(CLASSES))


def verdicts(confidence: Tensor, high_loss: Tensor | None = None, spread: float = 0.3, **values: Any) -> Decision:
    """Returns the decision on `clouds`. high_loss: bool [N], right labels that the outer partition must not trust."""
    features, labels, clean = clouds(spread)
    wrong = labels != clean if high_loss is None else (labels != clean) | high_loss
    jitter = 0.1 * torch.rand(len(clean), generator=torch.Generator().manual_seed(1))
    losses = torch.where(wrong, 4.0, 0.2) + jitter
    return decide(features, labels, pool_of(clean, confidence), losses, TrustConfig.model_validate(values))


def test_right_labels_are_trusted_and_wrong_ones_are_relabelled():
    _, labels, clean = clouds()
    verdict, candidate, strength = verdicts(torch.full((300,), 0.97))
    assert torch.equal(candidate, clean)
    assert (verdict[labels == clean] == TRUSTED).all()
    assert (verdict[labels != clean] == RELABELLED).float().mean() > 0.9
    assert ((strength > 0) & (strength <= 1)).all()


def test_a_right_label_with_a_high_loss_is_recalled():
    _, labels, clean = clouds()
    doubtful = (torch.arange(300) % 5 == 1) & (labels == clean)
    verdict = verdicts(torch.full((300,), 0.97), doubtful).verdict
    assert (verdict[doubtful] == RECALLED).float().mean() > 0.9
    without = verdicts(torch.full((300,), 0.97), doubtful, recall=False).verdict
    assert (without[verdict == RECALLED] == UNTRUSTED).all()
    assert torch.equal(without[verdict != RECALLED], verdict[verdict != RECALLED])


def test_only_labels_that_the_users_probabilities_name_are_recalled():
    features, labels, clean = clouds()
    doubtful = (torch.arange(300) % 5 == 1) & (labels == clean)
    jitter = 0.1 * torch.rand(300, generator=torch.Generator().manual_seed(1))
    losses = torch.where((labels != clean) | doubtful, 4.0, 0.2) + jitter
    arguments = features, labels, pool_of(clean, torch.full((300,), 0.97)), losses, TrustConfig()
    named = torch.arange(300) % 2 == 0
    verdict, only_named = decide(*arguments).verdict, decide(*arguments, named).verdict
    refused = (verdict == RECALLED) & ~named
    assert 0 < int(refused.sum()) < int((verdict == RECALLED).sum())
    assert (only_named[refused] == UNTRUSTED).all()
    assert torch.equal(only_named[~refused], verdict[~refused])


def test_the_users_probabilities_name_a_label_if_all_of_them_do(monkeypatch: pytest.MonkeyPatch):
    features, labels, clean = clouds()
    asked: list[Tensor | None] = []
    decide = verdicts_module.decide

    def record(*arguments: Any) -> Decision:
        asked.append(arguments[-1])
        return decide(*arguments)

    monkeypatch.setattr(verdicts_module, "decide", record)
    sure, given = torch.eye(CLASSES), as_given(labels, ("a", "b", "c"))
    for evidence in ((), (sure[labels], sure[clean])):
        judge(outputs(clean, labels, features), given, 1, TrustConfig(), 0, silent, evidence, None)
    assert asked[0] is None
    assert asked[1] is not None
    assert torch.equal(asked[1], labels == clean)


def test_nothing_is_relabelled_if_the_switch_is_off():
    verdict = verdicts(torch.full((300,), 0.97), relabel=False).verdict
    assert set(verdict.tolist()) == {TRUSTED, UNTRUSTED}


def test_the_expected_share_of_wrong_labels_in_the_view_stays_within_the_budget():
    confidence = torch.linspace(0.6, 1, 300)[torch.randperm(300, generator=torch.Generator().manual_seed(2))]
    verdict = verdicts(confidence).verdict
    for label in range(CLASSES):
        inside = (verdict != UNTRUSTED) & (clouds()[2] == label)
        assert 0.03 < float((1 - confidence[inside]).mean()) <= 0.051
    assert (verdict[confidence < 0.75] == UNTRUSTED).all()


@pytest.mark.parametrize(("values", "low", "high"), [({}, 0.05, 0.2), ({"dynamic_threshold": False}, 0.9, 1)])
def test_a_class_with_doubtful_samples_has_a_threshold_of_its_own(values, low, high):
    clean = clouds()[2]
    confidence = torch.where(clean == 0, 0.85, 0.999) - 0.01 * torch.rand(
        300, generator=torch.Generator().manual_seed(3)
    )
    verdict = verdicts(confidence, **values).verdict
    assert low <= float((verdict[clean == 0] != UNTRUSTED).float().mean()) <= high
    assert (verdict[clean != 0] != UNTRUSTED).float().mean() > 0.9
    together = verdicts(confidence, class_wise=False, **values).verdict
    assert (together[clean == 0] != UNTRUSTED).float().mean() > 0.5  # the sure classes leave room in the budget


def test_no_label_is_changed_where_the_anchors_disagree():
    """The features tell nothing, so the anchors name other classes for most samples."""
    _, labels, clean = clouds()
    verdict = verdicts(torch.full((300,), 0.97), spread=50.0).verdict
    assert (verdict[labels != clean] == RELABELLED).float().mean() < 0.2


def outputs(clean: Tensor, labels: Tensor, features: Tensor) -> ProxyOutputs:
    p = pool_of(clean, torch.full((300,), 0.8)).posterior
    return ProxyOutputs(-p.gather(1, labels.unsqueeze(1)).squeeze(1).log(), p, features)


def test_soft_targets_are_the_posterior_times_the_strength_of_the_votes():
    features, labels, clean = clouds()
    before = as_given(labels, ("a", "b", "c"))
    state, targets = judge(outputs(clean, labels, features), before, 1, TrustConfig(), 0, silent, (), None)
    assert isinstance(targets, torch.Tensor)
    assert targets.shape == (300, CLASSES)
    assert ((targets >= 0) & (targets.sum(1, keepdim=True) <= 1.0001)).all()
    assert (targets.argmax(1) == clean).float().mean() > 0.95
    inside = state.trusted
    torch.testing.assert_close(state.reliability[inside], targets.amax(1)[inside])
    assert (state.reliability[~inside] == 0).all()


def test_proxies_that_have_seen_the_labels_are_not_weighed_by_likelihood():
    features, labels, clean = clouds()
    for values, fitted in (({}, True), ({"held_out": False}, False), ({"proxies": 1}, False)):
        config = TrustConfig.model_validate(values)
        pool, losses = weigh_sources(outputs(clean, labels, features), labels, CLASSES, 0, config, silent, ())
        assert (pool.weights != (1.0, 1.0)) == fitted
        assert losses[labels != clean].mean() > losses[labels == clean].mean() + 1


def test_scores_are_losses_and_back():
    losses = torch.tensor([0.0, 0.1, 2.0, 14.0])
    torch.testing.assert_close(score_to_loss(loss_to_score(losses)), losses, rtol=1e-2, atol=1e-6)


class LargeTensors(TorchDispatchMode):
    """Measures how many bytes the tensors of at least `smallest` bytes hold at a time."""

    def __init__(self, smallest: int) -> None:
        super().__init__()
        self.smallest, self.live, self.peak = smallest, {}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in results if isinstance(results, tuple | list) else (results,):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                if storage.nbytes() >= self.smallest and storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return results


def test_a_round_holds_few_matrices_of_all_samples_and_classes(monkeypatch: pytest.MonkeyPatch):
    count, classes = 2000, 100
    monkeypatch.setattr(neighbours, "FOLD_SIZE", 0)  # as for large sets
    monkeypatch.setattr(neighbours, "CPU_BLOCK", 10 * count)
    monkeypatch.setattr(neighbours, "SELECTION_SIZE", 100 * classes)
    monkeypatch.setattr(posterior, "SELECTION_SIZE", 100 * classes)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (count,), generator=generator)
    logits = torch.randn(count, classes, generator=generator) + 6 * torch.eye(classes)[labels]
    features = torch.eye(classes, 16)[labels] + 0.1 * torch.randn(count, 16, generator=generator)
    outputs = ProxyOutputs(torch.zeros(count), logits.softmax(1), features)
    state, matrix = as_given(labels, tuple(map(str, range(classes)))), 4 * count * classes
    with LargeTensors(matrix // 2) as tensors:
        judge(outputs, state, 1, TrustConfig(proxies=2), 0, silent, (), None)
    assert 2 * matrix < tensors.peak < 4.6 * matrix  # beside the proxies' probabilities


def test_a_larger_budget_trusts_more():
    confidence = torch.linspace(0.5, 1, 300)
    sizes = []
    for budget in (0.01, 0.05, 0.2):
        verdict = verdicts(confidence, budget=budget).verdict
        inside = verdict != UNTRUSTED
        assert (1 - confidence)[inside].mean() <= budget + 0.02
        sizes.append(int(inside.sum()))
    assert sizes[0] < sizes[1] < sizes[2]
