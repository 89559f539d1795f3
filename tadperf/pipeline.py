"""The main road: data -> trust -> experts -> matching -> one distilled file -> what it is worth."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tadperf import artifact, evaluate, nets, outcome, parallel, ranks, runs, seeds
from tadperf import experts as experts_room
from tadperf.artifact import DistilledSet
from tadperf.data.pick import pick_central, pick_real
from tadperf.evaluate import Examples, Student
from tadperf.experts.store import Experts
from tadperf.job import Arrays, Job, Samples, View, arrays, identity, other_experts, prepare, samples_of, view
from tadperf.matching import bases
from tadperf.matching import distil as matching
from tadperf.nets import FlatNet
from tadperf.outcome import INITIAL, REFINED, Early, Scores, package, student_recipe
from tadperf.progress import Progress, silent
from tadperf.refine import Refined, refine
from tadperf.refine import start as starts
from tadperf.runs import Run
from tadperf.trust import TrustState, dual_loop
from tadperf.trust.measure import growth
from tadperf.trust.state import RECALLED, TRUSTED

__all__ = ["distill", "prepare", "train_experts"]

CHECKERS = 2  # trained at every check on held-out samples; one alone varies by about a point on digits


def trusted_samples(job: Job, data: Arrays, run: Run, progress: Progress) -> tuple[Samples, dict[str, Any]]:
    """What is learned from: by the dual loop, by the true labels, or all as given; and what the report says of it."""
    train, mode = job.train, job.config.trust.mode
    everyone, rounds = torch.arange(len(train)), []
    if mode == "off":
        samples = samples_of(job, everyone, train.labels)
    elif mode == "oracle":
        assert train.clean_labels is not None
        samples = samples_of(job, everyone, train.clean_labels)
    else:
        rounds = find_trusted(job, data, run, progress)
        index, labels, weights = rounds[-1].view()
        certain = rounds[-1].verdict[index]
        samples = samples_of(job, index, labels, weights, (certain == TRUSTED) | (certain == RECALLED))
    return samples, outcome.trust_report(job, samples, rounds)


def find_trusted(job: Job, data: Arrays, run: Run, progress: Progress) -> list[TrustState]:
    """The stage "trust": the dual loop, round by round; a resumed run reads the rounds that are finished."""
    from tadperf.report.growth import save_growth

    config, train = job.config, job.train
    with run.stage("trust"):
        if config.refine.start and config.synthesis != "matching":
            state = starts.trusted(Path(config.refine.start), train)
            rounds = [state]
        else:
            state, rounds = dual_loop(
                data.train, train.labels, train.class_names, config.net, config.trust, config.data.augment, config.seed,
                job.device, run.path / "trust", progress,
            )  # fmt: skip
        state.save(run.path / "trust.safetensors")
        state.export(run.path / "labels.csv")
        save_growth(run.path / "trust.png", rounds)
        run.rewind("trust", 0)
        for record in growth(rounds, train.clean_labels):
            run.log("trust", record.pop("round"), **record)
    return rounds


def get_experts(job: Job, seen: View, run: Run, progress: Progress) -> Experts:
    """The run's own experts, trained where they are missing, or those of another run."""
    config, train = job.config, job.train
    if config.experts.path:
        folder = other_experts(job)
    else:
        folder = run.path / "experts"
        experts_room.train_experts(
            folder, seen.images, seen.labels, config.net, train.shape, train.num_classes, config.experts, job.epochs,
            config.data.augment, config.seed, job.device, identity(job), progress, seen.weights,
        )  # fmt: skip
    return Experts.open(folder, config.experts.count)


def train_experts(job: Job, run: Run, progress: Progress = silent) -> dict[str, Any]:
    """The experts alone, for runs to share."""
    data = load(job, run, progress)
    samples, _ = trusted_samples(job, data, run, progress)
    seen = view(data, samples)
    with run.stage("experts"):
        get_experts(job, seen, run, progress)
    accuracies = experts_room.store.scores(run.path / "experts", job.config.experts.count)
    result = {
        "experts": job.config.experts.count, "snapshots": job.epochs + 1, "path": str(run.path / "experts"),
        "train_accuracy": evaluate.summary(accuracies)["mean"], **run.stages()["experts"],
    }  # fmt: skip
    run.finish(result)
    return result


def first_state(job: Job, seen: View, net: FlatNet, experts: Experts, made: Refined | None = None) -> matching.State:
    """Synthetic images before the first iteration: real ones, random or central, or noise; or the refined ones."""
    match, classes = job.config.match, job.train.num_classes
    generator = seeds.generator(job.config.seed, "init")
    candidates = seen.labels.where(seen.certain, -1)
    if match.init_correct:
        rightly = bases.learned(net, experts, seen.images, candidates, job.epochs, match.ipc)
        candidates = candidates.where(rightly, -1)
    if made is not None:
        images = made.images.clone()
    else:
        if match.init == "kmeans":
            index = pick_central(seen.images, candidates, match.ipc, seeds.derive(job.config.seed, "kmeans"))
        else:
            index = pick_real(candidates, match.ipc, generator)
        images = seen.images[index].clone()
        if match.init == "noise":
            images = torch.randn(images.shape, generator=generator).to(images)
    labels = torch.arange(classes, device=job.device).repeat_interleave(match.ipc)
    if match.soft_labels:
        labels = matching.soft_labels(net, experts, images, job.epochs, labels if match.init_correct else None)
    return matching.begin(images, labels, match)


def match(
    job: Job, data: Arrays, seen: View, experts: Experts, run: Run, progress: Progress, made: Refined | None = None,
    beside: Callable[[int], Callable[[], None]] | None = None,
) -> matching.State:  # fmt: skip
    """Learns the synthetic set, from refined images where there are some; held-out samples choose the checkpoint.

    beside: begins other work on so many idle cores, as soon as the first state is there; what it gives is called often.
    """
    config, train = job.config, job.train
    net = FlatNet(nets.build(config.net, train.shape, train.num_classes, 0).to(job.device))
    count = config.match.ipc * train.num_classes
    batch = min(config.match.batch or count, count)
    threads = parallel.threads_for(batch * config.net.width * train.shape[1] * train.shape[2])
    torch.set_num_threads(threads)

    def check(images: Tensor, labels: Tensor, lr: float, iteration: int) -> float:
        recipe, seed = student_recipe(config, lr), seeds.derive(config.seed, "check", iteration)
        pupils = [
            Student("check", repeat, config.net, recipe, lambda: Examples(images, labels)) for repeat in range(CHECKERS)
        ]
        held, scores = (seen.held_out, seen.held_out_labels), []
        evaluate.evaluate(pupils, *held, train.num_classes, seed, job.device, lambda _, score: scores.append(score))
        return sum(sorted(scores)) / len(scores)

    state = ranks.once(lambda: first_state(job, seen, net, experts, made))
    package(job, data, state, config.evaluate.real_lr).save(run.path / INITIAL)
    collect = beside(parallel.cores() - threads) if beside else None

    def watched(stage: str, done: int, total: int, **values: object) -> None:
        if collect:
            collect()
        progress(stage, done, total, **values)

    return matching.distil(state, net, experts, config.match, config.data.augment, config.seed, check, run, watched)


def load(job: Job, run: Run, progress: Progress) -> Arrays:
    """The stage "data"."""
    with run.stage("data"):
        progress("data", 0, 1)
        data = arrays(job)
        progress("data", 1, 1)
    return data


def synthesise(
    job: Job, data: Arrays, seen: View, run: Run, progress: Progress,
    beside: Callable[[int], Callable[[], None]] | None = None,
) -> DistilledSet:  # fmt: skip
    """The synthetic set: by matching, by the diffusion model, or by matching from the diffusion model's images."""
    config, made = job.config, None
    if config.synthesis != "matching":
        made = refine(job, data, seen, run, progress)
        runs.write_json(run.path / REFINED, made.report)
    if made is not None and config.synthesis == "generative":
        lr = made.lr or config.evaluate.real_lr
        first, final = (matching.begin(*pair, config.match) for pair in (made.first, (made.images, made.labels)))
        package(job, data, first, lr).save(run.path / INITIAL)
        return package(job, data, final, lr)
    with run.stage("experts"):
        trained = get_experts(job, seen, run, progress)
    with run.stage("matching"):
        return package(job, data, match(job, data, seen, trained, run, progress, made, beside))


def distill(
    job: Job, run: Run, progress: Progress = silent, data: Arrays | None = None,
    known: Mapping[str, Sequence[float]] = MappingProxyType({}), tested: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """The whole job in a run folder; returns what result.json holds. A resumed run skips what is done.

    data: the arrays of `job`, where they are there already; known: accuracies of rows that need no new students.
    tested: whether students tell what the set is worth.
    """
    from tadperf.report.grid import save_grid

    config = job.config
    (run.path / "checkpoints").mkdir(exist_ok=True)
    file = run.path / "distilled.safetensors"
    data = data or load(job, run, progress)
    samples, trust = trusted_samples(job, data, run, progress)
    seen = view(data, samples)
    with parallel.Beside() as pool:
        early = Early(pool, Scores(run, known))

        def beside(idle: int) -> Callable[[], None]:
            others = outcome.baselines(job, data, samples, seen, artifact.load(run.path / INITIAL))
            early.start(job, data, others, idle)
            return early.collect

        if not ranks.once(file.exists):
            alone = job.device.type == "cpu" and ranks.world() == 1 and sys.platform.startswith("linux")
            synthesise(job, data, seen, run, progress, beside if alone else None).save(file)
            ranks.barrier()
        distilled, initial = artifact.load(file), artifact.load(run.path / INITIAL)
        save_grid(run.path / "grid.png", distilled)
        scores: dict[str, list[float]] = {}
        if tested:
            with run.stage("evaluate"):
                e = config.evaluate
                everyone = outcome.distilled_students(distilled, e.networks, e.repeats, job.device)
                everyone += outcome.baselines(job, data, samples, seen, initial)
                scores = outcome.worth(job, data, everyone, early, progress)
    result = outcome.report(job, distilled, scores, run, trust)
    run.finish(result)
    return result
