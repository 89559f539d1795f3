"""Compares the methods of distillation with each other and with coresets, over several seeds of the whole job.

Run `python -m tadperf.bench.studies.bases --out DIR`. For each seed and number of images per class (IPC) every method
distils the digits with wrong labels. Then students learn all sets of that seed by the protocols hard and soft of
`tadperf evaluate --protocol`: same labels, network, steps and augmentation for each row; the learning rate of each row
is chosen on held-out samples. A table has the mean over the seeds of the mean over the students, with the sample
deviation over the seeds. Differences are paired by seed; p is from the exact sign-flip test, and cannot be below
2 / 2^seeds. DIR keeps runs and figures, and a later call reuses them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from tadperf import artifact, files
from tadperf.bench.studies.generative import run_distilled
from tadperf.compute.versions import versions
from tadperf.config import Config
from tadperf.config.merge import merge
from tadperf.data.images import normalise_images
from tadperf.nets.students import Examples
from tadperf.pipeline.package import INITIAL
from tadperf.pipeline.paired import interval, sign_flip_p
from tadperf.pipeline.protocol import ImageSet, ProtocolRun, full_recipe, image_sets, measure
from tadperf.pipeline.protocol_scorers import TEACHERS, train_teacher
from tadperf.pipeline.scoring import class_labels
from tadperf.pipeline.trusted_view import open_trusted_view
from tadperf.progress import silent

METHODS = ("mtt", "ftd", "datm", "tgdd")
SAME_EXPERTS = ("tgdd", "infmatch")  # use the experts of mtt
CORESETS = ("k_means", "k_centres", "random")
Figures = dict[str, float]  # row -> mean accuracy of its students


def run_config(noise: str, seed: int, ipc: int, method: str, out: Path, sets: Sequence[str]) -> Config:
    """Returns the settings of a run. IPC 1 has a preset of its own."""
    options = {"data.noise": noise, "seed": seed, "device": "cpu", "match.method": method, "match.ipc": ipc}
    if method in SAME_EXPERTS:
        options["experts.path"] = str(out / f"mtt-{ipc}-{seed}")
    return merge("digits-ipc1" if ipc == 1 else "digits", None, list(sets), options)


def measure_rows(places: dict[str, Path], protocol: str, repeats: int, seed: int) -> Figures:
    """Returns the mean test accuracy of each method's set, of the images that mtt started from, and of the coresets."""
    first = next(iter(places))
    sets = {method: artifact.load(place / "distilled.safetensors") for method, place in places.items()}
    distilled, device = sets[first], torch.device("cpu")
    test = distilled.test_split(None, silent)
    config = Config.model_validate(distilled.config)
    _, samples = open_trusted_view(distilled, places[first], device, silent)
    teacher = None
    if protocol == "soft":
        known = Examples(samples.images, samples.labels, samples.weights)
        recipe = full_recipe(distilled, config.evaluate)
        teacher = train_teacher(known, distilled.num_classes, distilled.net, recipe, TEACHERS, seed, device)
    assert (places[first] / INITIAL).exists()
    rows = image_sets(distilled, samples, places[first], seed)
    for method, given in sets.items():
        assert given.normaliser == distilled.normaliser, "students would see differently normalised images"
        rows[method] = lambda _, given=given: ImageSet(given.images, class_labels(given))
    del rows["distilled"]
    rows = {"distilled": rows.pop(first), **rows}  # the protocol needs a row of this name
    images = normalise_images(distilled.normaliser, test.images, device)
    run = ProtocolRun(
        protocol,
        distilled,
        samples,
        rows,
        teacher,
        (images, test.labels),
        config.evaluate,
        repeats,
        seed,
        device,
        silent,
    )
    found = measure(run, distilled.net)["rows"]
    named = {first: found["distilled"], **{row: found[row] for row in rows if row != "distilled"}}
    return {row: values["mean"] for row, values in named.items()} | {"full": found["full"]["mean"]}


def cell(values: Sequence[float]) -> str:
    return f"{100 * statistics.fmean(values):.1f} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""


def table(found: dict[str, dict[int, Figures]], methods: Sequence[str]) -> str:
    """Returns Markdown: a row for each set, a column for each case; then the difference to the best other set.

    found: case such as "IPC 1, hard" -> seed -> figures.
    """
    cases = {case: seeds for case, seeds in found.items() if len(seeds) > 1}
    if not cases:
        return ""
    rows = list(next(iter(next(iter(cases.values())).values())))
    lines = [f"| | {' | '.join(cases)} |", f"|{' --- |' * (len(cases) + 1)}"]
    for row in rows:
        cells = [cell([figures[row] for figures in seeds.values()]) for seeds in cases.values()]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    lines += ["", f"| minus the best coreset |{' |' * len(cases)}", f"|{' --- |' * (len(cases) + 1)}"]
    for row in ("initial", *methods):
        lines.append(f"| {row} | {' | '.join(against(list(seeds.values()), row) for seeds in cases.values())} |")
    return "\n".join(lines)


def against(seeds: Sequence[Figures], row: str) -> str:
    """Returns the mean difference to the coreset with the highest mean, its 95 % interval, and p."""
    best = max(CORESETS, key=lambda name: statistics.fmean(figures[name] for figures in seeds))
    differences = [100 * (figures[row] - figures[best]) for figures in seeds]
    low, high = interval(differences) or (float("nan"),) * 2
    return f"{statistics.fmean(differences):+.1f} ({low:+.1f} to {high:+.1f}), p {sign_flip_p(differences):.3f}, {best}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--noise", default="asymmetric:0.4")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--ipc", nargs="+", type=int, default=[1, 3, 10])
    parser.add_argument("--methods", nargs="+", default=METHODS, help="the first gives the initial images")
    parser.add_argument("--protocols", nargs="+", default=("hard", "soft"))
    parser.add_argument("--repeats", type=int, default=5, help="students for each row and seed")
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="A.B=C")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, and of bases.md and bases.json")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    head = f"{options.noise}, {options.repeats} students a seed, {date.today()}, torch {torch.__version__}"
    store = options.out / "bases.json"
    known = json.loads(store.read_text())["found"] if store.exists() else {}
    found = {case: {int(seed): figures for seed, figures in seeds.items()} for case, seeds in known.items()}
    for seed in options.seeds:  # all cases of a seed first, so that an interrupted study has a whole table
        for ipc in options.ipc:
            places: dict[str, Path] = {}
            for method in options.methods:
                place = options.out / f"{method}-{ipc}-{seed}"
                run_distilled(run_config(options.noise, seed, ipc, method, options.out, options.sets), place)
                places[method] = place
            for protocol in options.protocols:
                figures = found.setdefault(f"IPC {ipc}, {protocol}", {})
                if seed not in figures or not set(options.methods) <= set(figures[seed]):
                    figures[seed] = measure_rows(places, protocol, options.repeats, seed)
                files.write_json(store, {"what": head, "versions": versions(), "found": found})
            files.write_bytes(options.out / "bases.md", f"{head}\n\n{table(found, options.methods)}\n".encode())
            print(f"seed {seed}, IPC {ipc}: done", flush=True)
    print((options.out / "bases.md").read_text())


if __name__ == "__main__":
    main()
