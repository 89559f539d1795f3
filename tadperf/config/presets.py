"""Presets: named sets of settings, and the settings that each method changes in them. Holds data only.

`tadperf config --preset NAME --method METHOD` prints all settings of a preset.
"""

from __future__ import annotations

from typing import Any

Sections = dict[str, dict[str, Any]]

# The training of proxies on photographs, measured on CIFAR-10N (bench/results/real.md). The digits keep the defaults.
PROXIES: dict[str, Any] = {
    "batch": 128,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "schedule": "one-cycle",
    "mixup": False,
    "soft_targets": True,
    "augment": "crop_flip",
}
# 50 000 images take 33 s on an H100.
LARGE_PROXIES = PROXIES | {"proxies": 3, "epochs": 16, "rounds": 3, "width": 64}
# 50 000 images take 369 CPU seconds a round at net.width 32. On 8000, a third round made the view less accurate.
SMALL_PROXIES = PROXIES | {"proxies": 2, "epochs": 12, "rounds": 2}


def _ftd(path: str, ipc: int, steps: int, expert_epochs: int, max_start: int, lr_img: float, **match: Any) -> Sections:
    """Returns trajectory matching with the values in FTD's public code (Du et al., 2023) and experts trained by SGD.

    The proxies of trust were measured on CIFAR-10 only. Leaves out FTD's learning rate of the student's learning rate,
    because tadperf learns its logarithm.
    """
    return {
        "data": {"path": path, "normalise": "meanstd" if path == "tiny-imagenet" else "zca"},
        "trust": LARGE_PROXIES,
        "net": {"name": "convnet", "depth": 4 if path == "tiny-imagenet" else 3, "width": 128},
        "experts": {"count": 100},
        "match": {
            "ipc": ipc,
            "iterations": 5000,
            "steps": steps,
            "expert_epochs": expert_epochs,
            "max_start": max_start,
            "lr_img": lr_img,
            **match,
        },
    }


def _ftd_method(alpha: float, ema: float, **match: Any) -> Sections:
    """Returns what FTD adds: experts in flat minima, and the decay of the images' average (its table 7)."""
    return {"experts": {"alpha": alpha}, "match": {"ema": ema, **match}}


def _datm(
    steps: int,
    expert_epochs: int,
    starts: tuple[int, int, int],
    widen: float,
    lr_img: float,
    lr_label: float,
    **match: Any,
) -> Sections:
    """Returns what DATM (Guo et al., 2024) changes: the values in its public configs.

    starts: the earliest start epoch, and the latest start epoch at the beginning and at the end.
    widen: share of the iterations after which the final latest epoch is used.
    Leaves out two parts of DATM: its learning rate of the student's learning rate (see `_ftd`), and the rule that
    skips a step with a matching loss above 1.
    """
    low, first, high = starts
    return {
        "data": {"normalise": "zca"},
        "experts": {"epochs": 100},  # 13 GB for CIFAR-10; the last epoch gives the soft labels
        "match": {
            "iterations": 10000,
            "steps": steps,
            "expert_epochs": expert_epochs,
            "min_start": low,
            "max_start": high,
            "easy": (first - low) / (high - low),
            "widen": widen,
            "lr_img": lr_img,
            "lr_label": lr_label,
            **match,
        },
        "evaluate": {"batch": 128},
    }


def _tgdd(images: int) -> Sections:
    """Returns feature matching with the values in TGDD's public code (Ran et al., 2026), as far as they carry over.

    5 experts of 60 epochs with momentum, snapshots at most 6 epochs apart, 10000 iterations on all images.
    The learning rate grows with the number of synthetic images, as there. Its factor 10 is not tuned: the public code
    learns pixels from 0 to 1 by a loss that is not relative. Leaves out its drops of the experts' learning rate.
    """
    return {
        "experts": {"count": 5, "momentum": 0.9, "weight_decay": 5e-4},
        "match": {"iterations": 10000, "expert_epochs": 6, "max_start": 54, "batch": None, "lr_img": 10.0 * images},
    }


# Feature matching on any data on a CPU. On CIFAR-10 at IPC 10, factor 2 gains 13 points on held-out images; a weight
# of 4 for the cross-entropy suits experts of 15 epochs (bench/results/bases.md).
QUICK_TGDD: Sections = {
    "experts": {"epochs": 15, "momentum": 0.9, "weight_decay": 5e-4},
    "match": {
        "factor": 2,
        "cross_entropy": 4.0,
        "iterations": 1000,
        "check_every": 1000,
        "expert_epochs": 5,
        "max_start": 10,
        "lr_img": 1000.0,
    },
    "evaluate": {"epochs": 500, "batch": 128},
}


def _digits(ipc: int, **match: Any) -> Sections:
    """Returns settings for the digits.

    Experts reach 98.8 % on held-out samples. Soft labels and k-means starts matter most.
    """
    return {
        "data": {"path": "digits", "augment": "crop_scale_rotate"},
        "net": {"depth": 2, "width": 32},
        "experts": {"count": 8, "epochs": 33, "batch": 64, "lr": 0.1},
        "match": {
            "ipc": ipc,
            "iterations": 150,
            "check_every": 50,
            "lr_img": 10.0,
            "lr_init": 0.03,
            "init": "kmeans",
            "soft_labels": True,
            "lr_label": 2.0,
            **match,
        },
        "detector": {"depth": 2, "width": 32, "epochs": 30},
        "diffusion": {"width": 32, "batch": 64, "iterations": 1000},
        "refine": {"strength": 0.3},
        "evaluate": {"epochs": 300, "repeats": 5, "real_lr": 0.03, "full_epochs": 30, "full_repeats": 3},
    }


# The label noise of the default job. It is added to the built-in digits only, never to a user's data.
DIGITS_NOISE = "asymmetric:0.4"

PRESETS: dict[str, Sections] = {
    # The default job: scikit-learn's digits, minutes on two CPU cores. Values tuned on 400 of the training samples.
    "digits": _digits(10, steps=10, expert_epochs=3, max_start=30, batch=50),
    "digits-ipc1": _digits(1, steps=20, expert_epochs=2, max_start=5),
    # Any other data on a CPU: a small network, few experts, short matching.
    "quick": {
        "trust": SMALL_PROXIES,
        "net": {"width": 32},
        "experts": {"count": 4},
        "match": {
            "ipc": 1,
            "iterations": 500,
            "steps": 20,
            "expert_epochs": 2,
            "max_start": 2,
            "lr_img": 100.0,
            "check_every": 100,
        },
        "evaluate": {"epochs": 300, "repeats": 3, "full_epochs": 5, "full_repeats": 1},
    },
    "cifar10-ipc1": _ftd("cifar10", 1, 50, 2, 2, 100.0),
    "cifar10-ipc10": _ftd("cifar10", 10, 30, 2, 20, 100.0),
    "cifar10-ipc50": _ftd("cifar10", 50, 30, 2, 40, 1000.0),
    "cifar100-ipc1": _ftd("cifar100", 1, 40, 3, 20, 1000.0),
    "cifar100-ipc10": _ftd("cifar100", 10, 20, 2, 40, 1000.0),
    "cifar100-ipc50": _ftd("cifar100", 50, 80, 2, 40, 1000.0, batch=1000),
    "tiny-ipc1": _ftd("tiny-imagenet", 1, 30, 2, 10, 1e4),
    "tiny-ipc10": _ftd("tiny-imagenet", 10, 20, 2, 40, 1e4, batch=500),
}

SUMMARIES = {  # preset -> one line for `tadperf config --list`
    "digits": "the built-in digits, 10 images per class, minutes on a CPU; adds asymmetric label noise of 40 %",
    "digits-ipc1": "the built-in digits, 1 image per class, otherwise as digits",
    "quick": "any data on a CPU, 1 image per class: a small network, few experts, short matching",
    **{
        f"{name}-ipc{ipc}": f"{title}, {ipc} image{'s' * (ipc > 1)} per class, published settings; for a GPU"
        for name, title, sizes in (
            ("cifar10", "CIFAR-10", (1, 10, 50)),
            ("cifar100", "CIFAR-100", (1, 10, 50)),
            ("tiny", "Tiny ImageNet", (1, 10)),
        )
        for ipc in sizes
    },
}

METHODS: dict[str, dict[str, Sections]] = {  # preset -> method -> what the method changes
    "digits": {
        "ftd": {"match": {"ema": 0.9}},
        "tgdd": {"match": {"batch": None, "lr_img": 3.0}},
        "infmatch": {"match": {"batch": None, "lr_img": 3.0}},
    },
    "digits-ipc1": {
        "ftd": {"match": {"ema": 0.9}},
        "tgdd": {"match": {"lr_img": 1.0}},
        "infmatch": {"match": {"lr_img": 1.0}},
    },
    "quick": {
        "ftd": {"match": {"ema": 0.99}},  # FTD's 0.9995 is for ten times as many iterations
        "tgdd": QUICK_TGDD,
    },
    "cifar10-ipc1": {
        "ftd": _ftd_method(0.3, 0.9999),
        "datm": _datm(80, 2, (0, 4, 4), 0.0, 100.0, 5.0),
        "tgdd": _tgdd(10),
    },
    "cifar10-ipc10": {
        "ftd": _ftd_method(0.3, 0.9995, lr_init=0.001),
        "datm": _datm(80, 2, (0, 10, 20), 0.1, 100.0, 2.0),
        "tgdd": _tgdd(100),
    },
    "cifar10-ipc50": {
        "ftd": _ftd_method(1.0, 0.999),
        "datm": _datm(80, 2, (0, 20, 40), 0.2, 1000.0, 2.0),
        "tgdd": _tgdd(500),
    },
    "cifar100-ipc1": {
        "ftd": _ftd_method(1.0, 0.9995),
        "datm": _datm(40, 3, (0, 10, 20), 0.1, 1000.0, 10.0),
        "tgdd": _tgdd(100),
    },
    "cifar100-ipc10": {
        "ftd": _ftd_method(1.0, 0.9995),
        "datm": _datm(80, 2, (0, 30, 50), 0.2, 1000.0, 10.0, batch=1000),
        "tgdd": _tgdd(1000),
    },
    "cifar100-ipc50": {
        "ftd": _ftd_method(1.0, 0.999),
        "datm": _datm(80, 2, (20, 70, 70), 0.0, 1000.0, 10.0, batch=1000, init_correct=False),
        "tgdd": _tgdd(5000),
    },
    "tiny-ipc1": {
        "ftd": _ftd_method(1.0, 0.999),
        "datm": _datm(40, 2, (0, 15, 20), 0.2, 1e4, 10.0),
        "tgdd": _tgdd(200),
    },
    "tiny-ipc10": {
        "ftd": _ftd_method(1.0, 0.999),
        "datm": _datm(40, 2, (10, 50, 50), 0.0, 100.0, 10.0, batch=500),
        "tgdd": _tgdd(2000),
    },
}

# rho and alpha from DATM's public code, which uses them for both methods. FTD's table has alpha 0.3 or 1 and ema 0.999
# to 0.9999.
FLAT_MINIMA = {"rho": 0.01, "alpha": 0.3}
BASES: dict[str, dict[str, dict[str, Any]]] = {
    "mtt": {},
    "ftd": {"experts": FLAT_MINIMA, "match": {"ema": 0.9995}},
    "datm": {
        "experts": FLAT_MINIMA,
        "match": {
            "easy": 0.5,
            "widen": 0.1,
            "init_correct": True,
            "soft_labels": True,
            "lr_label": 2.0,
            "momentum_label": 0.9,
        },
    },
    "infmatch": {"match": {"cross_entropy": 0.1}},  # not tuned
    "tgdd": {"experts": {"count": 5}, "match": {"expert_epochs": 6}},  # as in TGDD's public code
}
