"""The dual loop: an outer partition by losses and an inner recalibration by anchors (TAD, arXiv 2502.05027).

Every round starts from the given labels again, so a later round can undo an earlier mistake. A round inherits only the
trusted view, on which its proxies train, and (with `memory`) the scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tadperf import seeds
from tadperf.compute import ranks
from tadperf.compute.torch_settings import torch_settings
from tadperf.compute.transfer import upload_all
from tadperf.config import TrustConfig
from tadperf.errors import UserError
from tadperf.nets.problem import Problem
from tadperf.progress import Progress, silent
from tadperf.trust.neighbours import estimate_from_neighbours
from tadperf.trust.partition import partition
from tadperf.trust.proxies import ProxyOutputs, train_proxies
from tadperf.trust.recalibrate import recalibrate
from tadperf.trust.signals import MIN_PROBABILITY, join_signals, label_loss
from tadperf.trust.state import RECALLED, RELABELLED, TRUSTED, UNTRUSTED, TrustState, as_given

# What remembers earlier rounds: the score (`memory`), not the partition. On 3000 CIFAR-10 images with CIFAR-10N's worse
# labels, the average precision of the score after two rounds is 0.64 with memory and 0.60 without. On digits with
# symmetric:0.8, 91 % of the labels in the view are right at 61 % coverage if the partition uses this round's losses;
# with the mean loss, 83 % at 41 % (2 seeds).
MAX_LOSS = 15.0  # nats; a float32 score, 1 - exp(-loss), cannot tell larger losses apart
MIN_CHANGE = 0.005  # the loop stops when a round changes less than this share of the samples; not tuned


class DualLoopResult(NamedTuple):
    """The final state, and the state after every round."""

    state: TrustState
    rounds: list[TrustState]


def dual_loop(
    problem: Problem,
    config: TrustConfig,
    folder: Path | None = None,
    progress: Progress = silent,
    *,
    evidence: tuple[Tensor, ...] = (),
    features: Tensor | None = None,
) -> DualLoopResult:
    """Gives every sample a verdict: trusted, recalled, relabelled or untrusted.

    Source: TAD, arXiv 2502.05027. Only its abstract is public; the parts that it leaves open are tadperf's.

    problem: its labels are the given labels, int64 [N]. The loop never needs clean labels.
    folder: stores each finished round, so that a killed run continues after the last one. One seed gives one result.
    evidence, features: further sources for all rounds (`join_signals`): out-of-fold probabilities [N, C], and [N, D].
    With mode "off" or a single class, nothing is trained and every label is trusted. Raises ValueError for mode
    "oracle" (use `as_given(labels, class_names, clean)` instead), and UserError if the proxies diverge.
    """
    if config.mode == "oracle":
        raise ValueError("config.mode: oracle: must be on or off: the loop takes no clean labels; use as_given instead")
    state = as_given(problem.labels, problem.class_names)
    if config.mode == "off" or problem.num_classes == 1:
        return DualLoopResult(state, [state])
    rounds: list[TrustState] = []
    for number in range(1, config.rounds + 1):
        file = None if folder is None else folder / f"round-{number}.safetensors"
        round_problem = replace(problem, seed=seeds.derive(problem.seed, "trust", number))
        new = _stored_round(
            file, partial(one_round, round_problem, state, number, config, progress, evidence, features)
        )
        rounds.append(new)
        changed = float((new.working != state.working).logical_or(new.trusted != state.trusted).float().mean())
        state = new
        progress("trust", number, config.rounds, trusted=float(new.trusted.float().mean()), moved=changed)
        if changed < MIN_CHANGE:
            break
    if len(rounds) < config.rounds:
        progress("trust", config.rounds, config.rounds)
    return DualLoopResult(state, rounds)


def _stored_round(file: Path | None, run_round: Callable[[], TrustState]) -> TrustState:
    """Reads a round that an earlier process has finished; otherwise runs it and writes the file."""
    if file is None:
        return run_round()
    stored = ranks.once(lambda: TrustState.load(file) if file.exists() else None)
    if stored is not None:
        return stored
    new = run_round()
    file.parent.mkdir(parents=True, exist_ok=True)
    new.save(file)
    return new


def one_round(
    problem: Problem,
    state: TrustState,
    number: int,
    config: TrustConfig,
    progress: Progress,
    evidence: tuple[Tensor, ...] = (),
    features: Tensor | None = None,
) -> TrustState:
    """Trains the proxies on the trusted view, then runs the outer partition and the inner recalibration."""
    outputs = train_proxies(problem, state.view(), config, progress)
    return ranks.once(
        lambda: assign_verdicts(outputs, state, number, config, problem.seed, progress, evidence, features)
    )


@torch_settings(tf32=False)  # on CUDA too, verdicts depend on products of full precision
def assign_verdicts(
    outputs: ProxyOutputs,
    before: TrustState,
    number: int,
    config: TrustConfig,
    seed: int,
    progress: Progress = silent,
    evidence: tuple[Tensor, ...] = (),
    features: Tensor | None = None,
) -> TrustState:
    """Returns one round's verdicts: a pure function of the proxies' losses, probabilities and features.

    Runs on the device of the outputs; the state is on the CPU. On CUDA the last bits of a score may change from run to
    run, because some sums have no fixed order.
    before: the state after the previous round. number: the number of this round, from 1. seed: for the neighbours.
    The loss of a sample is the mean of the proxies' and the neighbours' loss. The partition uses this round's losses;
    with `config.memory`, the score comes from the mean loss of all rounds (figures at the top of this file).
    """
    _refuse_diverged(outputs, config)
    classes, device = len(before.class_names), outputs.losses.device
    old = before.given, before.working, before.verdict, before.decided, before.score
    given, old_working, old_verdict, old_decided, old_score = upload_all(old, device)
    outputs = join_signals(outputs, given, evidence, features, seed)
    losses, class_scores, neighbours = _losses(outputs, given, classes, seed, config, progress)
    outer = partition(losses, given, classes, class_wise=config.class_wise, dynamic_threshold=config.dynamic_threshold)
    inner = recalibrate(outputs.features, given, outer.trusted, outer.posterior, classes)
    candidate, strength = inner.candidate, inner.strength
    if neighbours is not None:  # both must name the same class
        candidate = torch.where(candidate == neighbours.argmax(1), candidate, -1)
        strength = strength * neighbours.gather(1, candidate.clamp(min=0).unsqueeze(1)).squeeze(1)
    outside = ~outer.trusted & (candidate >= 0)
    recalled = outside & (candidate == given) & config.recall
    relabelled = outside & (candidate != given) & config.relabel
    verdict, working = _verdict_codes(outer.trusted, recalled, relabelled), torch.where(relabelled, candidate, given)
    weight = torch.where(outer.trusted, inner.reliability, torch.where(recalled | relabelled, strength, 0.0))
    unchanged = (verdict == old_verdict) & (working == old_working) & (number > 1)
    share = 1 / number if config.memory else 1.0
    return TrustState(
        given=before.given.cpu(),
        working=working.cpu(),
        verdict=verdict.cpu(),
        reliability=weight.clamp(0, 1).float().cpu(),
        decided=torch.where(unchanged, old_decided, number).to(torch.int16).cpu(),
        score=loss_to_score(torch.lerp(score_to_loss(old_score), losses, share)).cpu(),
        suggested=torch.where(verdict == UNTRUSTED, class_scores.argmax(1), working).cpu(),
        class_names=before.class_names,
    )


def _losses(
    outputs: ProxyOutputs, given: Tensor, classes: int, seed: int, config: TrustConfig, progress: Progress
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the losses [N], class scores [N, C], and the neighbours' classes [N, C] (None without the graph)."""
    class_scores, losses = outputs.probabilities, outputs.losses.clamp(max=-math.log(MIN_PROBABILITY))
    if not config.graph:
        return losses, class_scores, None
    neighbours = estimate_from_neighbours(outputs.features, given, classes, seed, config.transition, progress).posterior
    losses = (losses + label_loss(neighbours, given)) / 2
    class_scores = class_scores.clamp(min=MIN_PROBABILITY) * neighbours.clamp(min=MIN_PROBABILITY)
    return losses, class_scores, neighbours


def _verdict_codes(trusted: Tensor, recalled: Tensor, relabelled: Tensor) -> Tensor:
    """Returns the verdict of each sample, uint8 [N], from three masks that exclude each other."""
    verdict = torch.full(trusted.shape, UNTRUSTED, dtype=torch.uint8, device=trusted.device)
    for code, samples in ((TRUSTED, trusted), (RECALLED, recalled), (RELABELLED, relabelled)):
        verdict.masked_fill_(samples, code)
    return verdict


def _refuse_diverged(outputs: ProxyOutputs, config: TrustConfig) -> None:
    diverged = torch.stack([values.isnan().any() for values in outputs]).cpu().tolist()
    for name, is_nan in zip(outputs._fields, diverged, strict=True):
        if is_nan:
            raise UserError("trust.lr", config.lr, f"the proxies have diverged ({name}: NaN); use a lower value")


def loss_to_score(losses: Tensor) -> Tensor:
    """Maps losses in nats to a score in [0, 1): 1 - exp(-loss)."""
    return -torch.expm1(-losses.clamp(max=MAX_LOSS)).float()


def score_to_loss(score: Tensor) -> Tensor:
    """Maps a score back to a loss; inverts `loss_to_score`."""
    return -torch.log1p(-score)
