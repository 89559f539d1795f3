"""The main road: data -> experts -> matching -> one distilled file -> what it is worth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tadperf import artifact, evaluate, nets, parallel, runs, seeds
from tadperf import device as devices
from tadperf import experts as experts_room
from tadperf.artifact import DistilledSet
from tadperf.config import Config
from tadperf.data import Dataset, Normaliser, add_noise, augment, fit, open_data, parse_noise
from tadperf.data import prepare as prepare_images
from tadperf.data.pick import hold_out, pick_central, pick_real
from tadperf.errors import UserError
from tadperf.evaluate import Recipe, Student
from tadperf.experts.store import Experts
from tadperf.matching import distil as matching
from tadperf.nets import FlatNet
from tadperf.progress import Progress, silent
from tadperf.runs import Run
from tadperf.training import Images

INITIAL = Path(
    "checkpoints", "initial.safetensors"
)  # the set before the first iteration, in the form of a distilled one
PLACES = {"experts": {"path", "workers"}}  # of the config: they change no result, so they are not in the file
CHECKERS = 2  # trained at every check on held-out samples; one alone varies by about a point on digits


@dataclass(frozen=True)
class Job:
    """A config with its data opened and every cheap mistake already refused."""

    config: Config
    train: Dataset  # as given, with the noise that was asked for
    test: Dataset
    kept: Tensor  # int64: training samples that experts and images may use
    held_out: Tensor  # int64: training samples that choose the checkpoint
    device: torch.device

    @property
    def epochs(self) -> int:
        """Expert epochs that are trained and stored: as many as matching can use, unless more were asked for."""
        match = self.config.match
        return self.config.experts.epochs or match.max_start + match.expert_epochs


def prepare(config: Config) -> Job:
    """Opens the data and refuses whatever can be known to be wrong, before anything is written or computed."""
    where = _refuse_config(config)
    d = config.data
    train, test = open_data(d.path, format=d.format, image_size=d.image_size, labels=d.labels)
    if test is None:
        raise UserError("data", d.path, "has no test split; put one beside the training images, in test/ or so named")
    if train.num_classes < 2:
        raise UserError("data", d.path, "has one class only; there is nothing to tell apart")
    _, height, width = train.shape
    if height != width:
        raise UserError("data", d.path, f"images are {height} x {width}, networks take squares; add --image-size")
    train = add_noise(train, d.noise, config.seed)
    kept, held_out = hold_out(train.labels, d.holdout, config.seed)
    if not len(held_out):
        raise UserError("data.holdout", d.holdout, f"leaves none of {len(train)} samples to choose by; raise it")
    sizes = torch.bincount(train.labels[kept], minlength=train.num_classes)
    least = int(sizes.min())
    if config.match.ipc > least:
        name = train.class_names[int(sizes.argmin())]
        raise UserError("--ipc", config.match.ipc, f"class {name!r} has only {least} samples to start from; take fewer")
    job = Job(config, train, test, kept, held_out, where)
    if config.experts.path:
        other_experts(job)
    return job


def _refuse_config(config: Config) -> torch.device:
    """Refuses what the config alone shows to be wrong; returns the device."""
    parse_noise(config.data.noise)
    augment.parse(config.data.augment)
    if config.net.norm == "batch":
        raise UserError("net.norm", "batch", "trajectories need a network without running statistics; use instance")
    needed, epochs = config.match.max_start + config.match.expert_epochs, config.experts.epochs
    if epochs is not None and epochs < needed:
        remedy = f"must be at least match.max_start + match.expert_epochs = {needed}"
        raise UserError("experts.epochs", epochs, remedy)
    return devices.resolve(config.device)


@dataclass(frozen=True)
class Arrays:
    """The data as networks see them, on the device."""

    normaliser: Normaliser
    train: Images  # all training images
    labels: Tensor  # of all training images
    kept: Images
    kept_labels: Tensor
    held_out: Images
    held_out_labels: Tensor
    test: Images
    test_labels: Tensor


def arrays(job: Job) -> Arrays:
    """Normalises the images; statistics come from the training split alone."""
    normaliser = fit(job.train.images, job.config.data.normalise)
    view = partial(prepare_images, normaliser, device=job.device)
    kept, held_out = job.train.subset(job.kept), job.train.subset(job.held_out)
    return Arrays(
        normaliser, view(job.train.images), job.train.labels, view(kept.images), kept.labels, view(held_out.images),
        held_out.labels, view(job.test.images), job.test.labels,
    )  # fmt: skip


def identity(job: Job) -> dict[str, Any]:
    """What makes an expert reusable: everything its trajectory depends on."""
    config = job.config
    recipe = config.experts.model_dump(mode="json", exclude={"count", "epochs", "path", "workers"})
    return {
        "data": job.train.subset(job.kept).fingerprint, "normalise": config.data.normalise,
        "augment": config.data.augment, "net": config.net.model_dump(mode="json"), "seed": config.seed, **recipe,
    }  # fmt: skip


def other_experts(job: Job) -> Path:
    """The folder of another run's experts; raises UserError where they are incomplete or were trained otherwise."""
    config, train = job.config.experts, job.train
    size = FlatNet(nets.build(job.config.net, train.shape, train.num_classes, 0)).num_parameters
    return experts_room.store.find(Path(config.path or ""), config.count, (job.epochs + 1, size), identity(job))


def get_experts(job: Job, data: Arrays, run: Run, progress: Progress) -> Experts:
    """The run's own experts, trained where they are missing, or those of another run."""
    config, train = job.config, job.train
    if config.experts.path:
        folder = other_experts(job)
    else:
        folder = run.path / "experts"
        experts_room.train_experts(
            folder, data.kept, data.kept_labels, config.net, train.shape, train.num_classes, config.experts, job.epochs,
            config.data.augment, config.seed, job.device, identity(job), progress,
        )  # fmt: skip
    return Experts.open(folder, config.experts.count)


def train_experts(job: Job, run: Run, progress: Progress = silent) -> dict[str, Any]:
    """The experts alone, for runs to share."""
    with run.stage("experts"):
        get_experts(job, arrays(job), run, progress)
    accuracies = experts_room.store.scores(run.path / "experts", job.config.experts.count)
    result = {
        "experts": job.config.experts.count, "snapshots": job.epochs + 1, "path": str(run.path / "experts"),
        "train_accuracy": evaluate.summary(accuracies)["mean"], **run.stages()["experts"],
    }  # fmt: skip
    run.finish(result)
    return result


def first_state(job: Job, data: Arrays, net: FlatNet, experts: Experts) -> matching.State:
    """Synthetic images before the first iteration: real ones, random or central, or noise."""
    match, classes = job.config.match, job.train.num_classes
    generator = seeds.generator(job.config.seed, "init")
    if match.init == "kmeans":
        index = pick_central(data.kept, data.kept_labels, match.ipc, seeds.derive(job.config.seed, "kmeans"))
    else:
        index = pick_real(data.kept_labels, match.ipc, generator)
    images = data.kept[index].clone()
    if match.init == "noise":
        images = torch.randn(images.shape, generator=generator).to(images)
    labels = torch.arange(classes, device=job.device).repeat_interleave(match.ipc)
    if match.soft_labels:
        labels = matching.soft_labels(net, experts, images, job.epochs)
    return matching.begin(images, labels, match)


def student_recipe(config: Config, lr: float) -> Recipe:
    """How students are trained: the learned learning rate unless one is set."""
    e = config.evaluate
    return Recipe(e.epochs, e.batch, e.lr or lr, e.momentum, e.weight_decay, config.data.augment)


def match(job: Job, data: Arrays, experts: Experts, run: Run, progress: Progress) -> matching.State:
    """Learns the synthetic set; the checkpoint is chosen on held-out training samples."""
    config, train = job.config, job.train
    net = FlatNet(nets.build(config.net, train.shape, train.num_classes, 0).to(job.device))
    count = config.match.ipc * train.num_classes
    batch = min(config.match.batch or count, count)
    torch.set_num_threads(parallel.threads_for(batch * config.net.width * train.shape[1] * train.shape[2]))

    def check(images: Tensor, labels: Tensor, lr: float, iteration: int) -> float:
        recipe, seed = student_recipe(config, lr), seeds.derive(config.seed, "check", iteration)
        pupils = [Student("check", repeat, config.net, recipe, lambda: (images, labels)) for repeat in range(CHECKERS)]
        held, scores = (data.held_out, data.held_out_labels), []
        evaluate.evaluate(pupils, *held, train.num_classes, seed, job.device, lambda _, score: scores.append(score))
        return sum(sorted(scores)) / len(scores)

    state = first_state(job, data, net, experts)
    package(job, data, state, config.evaluate.real_lr).save(run.path / INITIAL)
    return matching.distil(state, net, experts, config.match, config.data.augment, config.seed, check, run, progress)


def package(job: Job, data: Arrays, state: matching.State, lr: float | None = None) -> DistilledSet:
    """The synthetic set of a state with everything needed to use it; `lr` in place of the learned one."""
    config, lr = job.config, lr or float(state.log_lr.exp())
    return DistilledSet(
        state.images.cpu(), state.labels.cpu(), lr, job.train.class_names, data.normaliser, config.data.augment,
        config.net, student_recipe(config, lr), config.model_dump(mode="json", exclude=PLACES), config.seed,
        runs.versions(), {"name": job.train.name, "source": job.train.source, "fingerprint": job.train.fingerprint},
    )  # fmt: skip


def distilled_students(
    distilled: DistilledSet, networks: Sequence[str], repeats: int, where: torch.device
) -> list[Student]:
    """The students of one distilled set: every network, `repeats` times."""
    data = distilled.images.to(where), distilled.labels
    named = {name: distilled.net.model_copy(update={"name": name}) for name in networks}
    return [
        Student(name, r, net, distilled.recipe, lambda: data) for name, net in named.items() for r in range(repeats)
    ]


def students(job: Job, data: Arrays, distilled: DistilledSet, initial: DistilledSet) -> list[Student]:
    """Who is trained for the report: on the distilled set, what it started from, random real and all real images."""
    config, e = job.config, job.config.evaluate
    real = student_recipe(config, e.real_lr)._replace(lr=e.real_lr)
    full = real._replace(epochs=e.full_epochs)

    def random_real(repeat: int) -> tuple[Images, Tensor]:
        index = pick_real(data.kept_labels, config.match.ipc, seeds.generator(config.seed, "random real", repeat))
        return data.kept[index], data.kept_labels[index]

    rows = distilled_students(distilled, e.networks, e.repeats, job.device)
    rows += [s._replace(row="initial") for s in distilled_students(initial, [config.net.name], e.repeats, job.device)]
    rows += [Student("random_real", r, config.net, real, partial(random_real, r)) for r in range(e.repeats)]
    rows += [
        Student("full_data", r, config.net, full, lambda: (data.train, data.labels)) for r in range(e.full_repeats)
    ]
    return rows


def worth(
    job: Job, data: Arrays, distilled: DistilledSet, initial: DistilledSet, run: Run, progress: Progress
) -> dict[str, list[float]]:
    """Test accuracies by row of the report; a student that a killed run had finished is not trained again."""
    note = run.path / "checkpoints" / "evaluate.json"
    known: dict[str, dict[str, float]] = json.loads(note.read_text()) if note.exists() else {}
    everyone = students(job, data, distilled, initial)
    missing = [s for s in everyone if str(s.repeat) not in known.get(s.row, {})]
    finished = len(everyone) - len(missing)

    def done(student: Student, score: float) -> None:
        nonlocal finished
        known.setdefault(student.row, {})[str(student.repeat)] = score
        finished += 1
        runs.write_json(note, known)
        run.log("evaluate", finished, row=student.row, repeat=student.repeat, accuracy=score)
        progress("evaluate", finished, len(everyone), **{student.row: score})

    progress("evaluate", finished, len(everyone))
    evaluate.evaluate(missing, data.test, data.test_labels, job.train.num_classes, job.config.seed, job.device, done)
    rows = dict.fromkeys(s.row for s in everyone)
    return {row: [known[row][str(repeat)] for repeat in range(len(known[row]))] for row in rows}


def distill(job: Job, run: Run, progress: Progress = silent) -> dict[str, Any]:
    """The whole job in a run folder; returns what result.json holds. A resumed run skips what is done."""
    from tadperf.report.grid import save_grid

    (run.path / "checkpoints").mkdir(exist_ok=True)
    file = run.path / "distilled.safetensors"
    with run.stage("data"):
        progress("data", 0, 1)
        data = arrays(job)
        progress("data", 1, 1)
    if not file.exists():
        with run.stage("experts"):
            trained = get_experts(job, data, run, progress)
        with run.stage("matching"):
            package(job, data, match(job, data, trained, run, progress)).save(file)
    distilled, initial = artifact.load(file), artifact.load(run.path / INITIAL)
    save_grid(run.path / "grid.png", distilled)
    with run.stage("evaluate"):
        scores = worth(job, data, distilled, initial, run, progress)
    result = report(job, distilled, scores, run)
    run.finish(result)
    return result


def report(job: Job, distilled: DistilledSet, scores: dict[str, list[float]], run: Run) -> dict[str, Any]:
    """What a run says at its end: result.json, and the JSON of the command line."""
    config, stages = job.config, run.stages()
    baselines = {row: evaluate.summary(scores[row]) for row in ("initial", "random_real", "full_data") if row in scores}
    return {
        "data": {
            **distilled.data, "train": len(job.train), "test": len(job.test), "classes": job.train.num_classes,
            "shape": list(job.train.shape), "noise": config.data.noise,
        },
        "ipc": config.match.ipc,
        "seed": config.seed,
        "method": config.match.method,
        "accuracy": {row: evaluate.summary(runs_) for row, runs_ in scores.items() if row not in baselines},
        "baselines": baselines,
        "lr": distilled.lr,
        "stages": stages,
        "seconds": sum(stage["seconds"] for stage in stages.values()),
        "device": devices.describe(job.device),
        "paths": {
            "run": str(run.path), "distilled": str(run.path / "distilled.safetensors"),
            "grid": str(run.path / "grid.png"), "metrics": str(run.path / "metrics.jsonl"),
        },
    }  # fmt: skip


def evaluate_file(
    path: Path, data: str | None = None, networks: Sequence[str] | None = None, repeats: int | None = None,
    seed: int = 0, device: str = "auto", progress: Progress = silent,
) -> dict[str, Any]:  # fmt: skip
    """Test accuracy of a distilled file, from nothing but the file and its test data."""
    distilled = artifact.load(path)
    where = devices.resolve(device)
    test = distilled.test_split(data)
    images = prepare_images(distilled.normaliser, test.images, where)
    chosen = Config.model_validate(distilled.config).evaluate
    everyone = distilled_students(distilled, networks or chosen.networks, repeats or chosen.repeats, where)
    rows: dict[str, dict[int, float]] = {}

    def done(student: Student, score: float) -> None:
        rows.setdefault(student.row, {})[student.repeat] = score
        progress("evaluate", sum(map(len, rows.values())), len(everyone), **{student.row: score})

    progress("evaluate", 0, len(everyone))
    evaluate.evaluate(everyone, images, test.labels, distilled.num_classes, seed, where, done)
    accuracy = {row: evaluate.summary([by[r] for r in sorted(by)]) for row, by in rows.items()}
    return {"file": str(path), "data": test.name, "accuracy": accuracy}
