"""The page of the documentation that helps with an error."""

from __future__ import annotations

from tadperf.errors import UserError

DOCS = "https://github.com/tadperf/tadperf/blob/main/docs/"
DATA, LABELS = "data-and-labels.md#what-tadperf-opens", "data-and-labels.md#labels"
EVIDENCE = "wrong-labels.md#without-images-without-training"
EXCHANGE = "evaluation-and-exchange.md"
# Topic or field of an error, or the section of its field -> page and heading.
PAGES = {
    "extras": "index.md#install",
    "resume": "runs.md#stop-and-resume",
    "--resume": "runs.md#stop-and-resume",
    "--out": "runs.md#stop-and-resume",
    "--device": "troubleshooting.md#cuda",
    "device": "troubleshooting.md#cuda",
    "--devices": "scaling.md",
    "data": DATA,
    "--format": DATA,
    "--image-size": "data-and-labels.md#sizes-and-splits",
    "data.holdout": "data-and-labels.md#sizes-and-splits",
    "labels": LABELS,
    "data.labels": LABELS,
    "--labels": LABELS,
    "label": LABELS,
    "--noise": "data-and-labels.md#noise-for-studies",
    "data.noise": "data-and-labels.md#noise-for-studies",
    "--features": EVIDENCE,
    "--probs": EVIDENCE,
    "--encoder": EVIDENCE,
    "trust": "wrong-labels.md",
    "--trust": "wrong-labels.md",
    "--apply": "wrong-labels.md#audit-a-data-set",
    "--experts": "distilling.md#many-runs",
    "experts": "distilling.md#methods",
    "--method": "distilling.md#methods",
    "match": "distilling.md#methods",
    "--ipc": "troubleshooting.md",
    "detector": "refinement.md",
    "diffusion": "refinement.md",
    "refine": "refinement.md",
    "file": EXCHANGE,
    "--protocol": f"{EXCHANGE}#is-it-better-than-real-images",
    "--verify": f"{EXCHANGE}#measure-a-distilled-set",
    "SOURCE": f"{EXCHANGE}#use-it-elsewhere",
    "settings": "configuration.md#all-fields",
    "--preset": "configuration.md#presets",
    "--config": "configuration.md",
    "--set": "configuration.md",
    "FIELD=LIST": "distilling.md#many-runs",
}
SETTINGS = "configuration.md"  # for any other dotted field


def help_url(error: UserError) -> str | None:
    """Returns the address of the page that helps with an error; None if no page does."""
    field = error.topic or error.field
    section = field.partition(".")[0]
    page = PAGES.get(field) or PAGES.get(section) or (SETTINGS if "." in field else None)
    return f"{DOCS}{page}" if page else None
