"""Trains a classifier with the Trainer of transformers on a distilled file: digits, 10 images per class.

It gains training in seconds on 100 images, with everything that Trainer brings: schedules, mixed precision, logging,
several devices. The file gives images, soft labels, augmentation and the count of classes. For your own file, leave out
`distil` and call tadperf.load("distilled.safetensors").

Needs: pip install transformers accelerate
"""

from __future__ import annotations

import argparse
import tempfile

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tadperf
from tadperf.config.merge import merge
from tadperf.data import augment

try:
    import accelerate  # noqa: F401  (Trainer needs it)
    from transformers import Trainer, TrainingArguments
except ImportError:
    raise SystemExit("this example needs the Trainer of transformers: pip install transformers accelerate") from None


def distil(folder: str, iterations: int) -> tadperf.DistilledSet:
    """Runs a short job on clean labels. A job of the default size has 150 iterations and 8 experts."""
    options = {"match.iterations": iterations, "match.check_every": iterations, "experts.count": 2}
    options |= {"evaluate.repeats": 1, "evaluate.epochs": 20, "evaluate.full_repeats": 0}
    return tadperf.distill(merge("digits", options=options | {"trust.mode": "off", "data.noise": "none"}), folder)


class Classifier(nn.Module):
    """Returns what Trainer expects: the loss and the logits. labels: label logits [B, C], as in the file."""

    def __init__(self, pixels: int, classes: int, strategy: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 128), nn.ReLU(), nn.Linear(128, classes))
        self.strategy, self.generator = strategy, torch.Generator().manual_seed(0)

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.training:
            drawn = augment.draw(self.strategy, len(images), images.shape[-1], self.generator)
            images = augment.apply(images, drawn)
        logits = self.net(images)
        return {"loss": F.cross_entropy(logits, labels.softmax(1)), "logits": logits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="10 iterations instead of 100")
    iterations = 10 if parser.parse_args().quick else 100
    with tempfile.TemporaryDirectory() as parent:
        ds = distil(f"{parent}/run", iterations)
        torch.manual_seed(0)
        model = Classifier(ds.images[0].numel(), ds.num_classes, ds.augment)
        arguments = TrainingArguments(
            output_dir=f"{parent}/trainer",
            num_train_epochs=200,
            per_device_train_batch_size=64,
            learning_rate=3e-3,  # not tuned
            lr_scheduler_type="cosine",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        rows = [{"images": image, "labels": label} for image, label in zip(ds.images, ds.labels, strict=True)]
        Trainer(model, arguments, train_dataset=rows).train()  # pyright: ignore[reportArgumentType]
    print(f"trained on {len(rows)} images: {ds.accuracy(model.net.eval(), 'digits'):.1%} of the test digits are right")


if __name__ == "__main__":
    main()
