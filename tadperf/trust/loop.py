"""The dual loop: an outer partition by losses and an inner recalibration by anchors (TAD, arXiv 2502.05027).

Every round starts from the given labels again, so a later round can undo an earlier mistake. A round inherits only the
trusted view, on which its proxies train (or, with `soft_targets`, the probabilities of all classes), and (with
`memory`) the scores.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tadperf import files, seeds
from tadperf.compute import ranks
from tadperf.config import TrustConfig
from tadperf.nets.problem import Problem
from tadperf.progress import Progress, silent
from tadperf.trust.proxies import SoftView, train_proxies
from tadperf.trust.state import TrustState, as_given
from tadperf.trust.top_classes import Probabilities, TopClasses, from_tensors
from tadperf.trust.verdicts import Judgement, judge

log = logging.getLogger(__name__)

TOP_FIELDS = TopClasses._fields[:3]  # the tensors in a file of soft labels of a large set
MIN_CHANGE = 0.005  # the loop stops when a round changes less than this share of the samples; not tuned


class DualLoopResult(NamedTuple):
    """The final state, the state after every round, and why the loop has stopped."""

    state: TrustState
    rounds: list[TrustState]
    stopped: str


def dual_loop(
    problem: Problem,
    config: TrustConfig,
    folder: Path | None = None,
    progress: Progress = silent,
    *,
    evidence: tuple[Probabilities, ...] = (),
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
        return DualLoopResult(state, [state], "no rounds: every label is trusted")
    rounds: list[TrustState] = []
    stopped = targets = None
    progress("trust", 0, config.rounds)  # starts the clock of the stage
    for number in range(1, config.rounds + 1):
        round_problem = replace(problem, seed=seeds.derive(problem.seed, "trust", number))
        run_round = partial(one_round, round_problem, state, targets, number, config, progress, evidence, features)
        new, targets = _stored_round(folder, number, config.soft_targets, problem.num_classes, run_round)
        rounds.append(new)
        progress("trust", number, config.rounds, trusted=_coverage(new), moved=_change(state, new))
        stopped = stop_reason(state, new, number, config)
        state = new
        if stopped is not None:
            break
    assert stopped is not None
    log.info("trust: done after round %d (%s)", len(rounds), stopped)
    if len(rounds) < config.rounds:
        progress("trust", config.rounds, config.rounds)
    return DualLoopResult(state, rounds, stopped)


def stop_reason(before: TrustState, new: TrustState, number: int, config: TrustConfig) -> str | None:
    """Returns why the loop stops after round `number`, or None if it goes on.

    The view should grow from round to round. The first round is compared with nothing: before it, all labels are
    trusted.
    """
    change = _change(before, new)
    if change < MIN_CHANGE:
        return f"it changed {change:.2%} of the samples, less than {MIN_CHANGE:.1%}"
    if number > 1 and _coverage(new) < _coverage(before) - MIN_CHANGE:
        return f"the view shrank from {_coverage(before):.1%} to {_coverage(new):.1%} of the samples"
    if number == config.rounds:
        return f"trust.rounds is {config.rounds}"
    return None


def _coverage(state: TrustState) -> float:
    return float(state.trusted.float().mean())


def _change(before: TrustState, new: TrustState) -> float:
    """Returns the share of samples that entered or left the view, or have another working label."""
    return float((new.working != before.working).logical_or(new.trusted != before.trusted).float().mean())


def _stored_round(
    folder: Path | None, number: int, soft_targets: bool, num_classes: int, run_round: Callable[[], Judgement]
) -> tuple[TrustState, Probabilities | None]:
    """Reads a round that an earlier process has finished; otherwise runs it and writes its files.

    Returns the state, and with `soft_targets` the soft labels for the next round.
    """
    if folder is None:
        new = run_round()
        return new.state, new.targets if soft_targets else None
    file, targets_file = folder / f"round-{number}.safetensors", folder / f"targets-{number}.safetensors"

    def read() -> tuple[TrustState, Probabilities | None] | None:
        if not file.exists() or (soft_targets and not targets_file.exists()):
            return None
        return TrustState.load(file), _load_targets(targets_file, num_classes) if soft_targets else None

    stored = ranks.once(read)
    if stored is not None:
        return stored
    new = run_round()
    folder.mkdir(parents=True, exist_ok=True)
    if soft_targets:
        _save_targets(targets_file, new.targets)
    new.state.save(file)
    return new.state, new.targets if soft_targets else None


def _save_targets(file: Path, targets: Probabilities) -> None:
    tensors = {"targets": targets} if isinstance(targets, Tensor) else dict(zip(TOP_FIELDS, targets[:3], strict=True))
    files.save_tensors(file, tensors, {})


def _load_targets(file: Path, num_classes: int) -> Probabilities:
    tensors = files.load_tensors(file)[0]
    if "targets" in tensors:
        return tensors["targets"]
    return from_tensors((tensors[name] for name in TOP_FIELDS), num_classes)


def one_round(
    problem: Problem,
    state: TrustState,
    targets: Probabilities | None,
    number: int,
    config: TrustConfig,
    progress: Progress,
    evidence: tuple[Probabilities, ...] = (),
    features: Tensor | None = None,
) -> Judgement:
    """Trains the proxies, then runs the outer partition and the inner recalibration.

    targets: soft labels [N, C] that the proxies learn; None means the trusted view with its labels.
    """
    view = state.view() if targets is None else soft_view(targets)
    outputs = train_proxies(problem, view, config, progress)
    return ranks.once(lambda: judge(outputs, state, number, config, problem.seed, progress, evidence, features))


def soft_view(targets: Probabilities) -> SoftView:
    """Returns all samples with soft labels: targets [N, C], not negative; the sum of a row is the sample's weight."""
    count = targets.shape[0]
    return SoftView(torch.arange(count, device="cpu"), targets, torch.ones(count, device="cpu"))
