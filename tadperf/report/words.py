"""The words that the tables of the command line and the page share. Imports nothing, so `--help` stays fast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

USE = """import tadperf
ds = tadperf.load({path!r})
net = ds.train()  # or your own loop on ds.images, ds.labels
print(ds.accuracy(net, {data!r}))"""
BASELINES = {  # rows of the table of accuracies, by their name in the result
    "initial": "images it started from",
    "initial_hard": "images it started from, hard labels",
    "random_real": "random {kind} images, {ipc} per class",
    "random_given": "random images, given labels, {ipc} per class",
    "full_trusted": "all {kind} images, labels after trust",
    "full_data": "all images, given labels",
}
RUNGS = {  # rows of the ladder, by their name in the result
    "given": "random images, labels as given",
    "trusted": "random {kind} images",
    "selected": "images it started from",
    "labelled": "the same, soft labels",
    "distilled": "distilled set",
    "all": "all {kind} images",
}
PROTOCOL_ROWS = {  # rows of the table of `tadperf evaluate --protocol`
    "distilled": "distilled set",
    "initial": "images it started from",
    "k_means": "k-means coreset",
    "k_centres": "k-centre coreset",
    "random": "random trusted images",
    "distilled_hard": "set, class labels",
    "distilled_plain": "set, no augmentation",
    "random_plain": "random, no augmentation",
    "full": "all trusted images",
}
KINDS = {"on": "trusted", "off": "real", "oracle": "correctly labelled"}  # images of a baseline, by trust mode
VERDICTS = {  # rows of the table of trust, by their name in the result
    "trusted": "trusted at once",
    "recalled": "recalled: given label confirmed",
    "relabelled": "relabelled: new label",
    "untrusted": "untrusted: not used",
}
SHARES = {  # further rows of that table, if the clean labels are known
    "view_accuracy": "correct among kept, %",
    "precision": "correct among trusted, %",
    "recall": "correct labels that are trusted, %",
    "recalled_accuracy": "correct among recalled, %",
    "relabel_accuracy": "correct among relabelled, %",
}
COLUMNS = {  # of labels.csv, in the order of the file; tadperf.trust.state writes them
    "file": "path of the image below the folder that was opened; only for sets of files",
    "index": "row of the sample in the training split, from 0",
    "verdict": "trusted, recalled (given label confirmed), relabelled (new label) or untrusted (not used)",
    "score": "how suspicious the given label is, from 0 to 1; the list starts with the highest",
    "given_label": "class name of the label in the data",
    "suggested_label": "most probable class; equal to given_label if no other class is more probable",
    "label": "label to train with, empty if untrusted; correct it by hand, or empty it to leave the sample out",
    "reliability": "probability that the column label is right, used as the weight of the sample",
    "round": "round of the trust loop that set the verdict",
    "given_number": "class number of given_label, from 0",
    "suggested_number": "class number of suggested_label",
    "label_number": "class number of label, empty if untrusted; --labels reads the column label only",
}


def gain(rung: Mapping[str, Any]) -> str:
    """Formats the gain of a rung of the ladder over the rung below: "+1.3", "+0.2 (no clear gain)", or "".

    A gain is clear if it exceeds the deviation of the difference.
    """
    if "gain" not in rung:
        return ""
    return f"{100 * rung['gain']:+.1f}" + (" (no clear gain)" if rung["clear"] is False else "")


def duration(seconds: float) -> str:
    """Formats a time as "0.8 s", "42 s", "3 min 05 s" or "2 h 07 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60:02} min"
