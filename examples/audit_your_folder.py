"""Finds wrong labels in a folder of images and writes a cleaned copy, so that your next training sees fewer of them.

python audit_your_folder.py photos/ cleaned/   audits your folder, which holds one folder of images per class
python audit_your_folder.py                    makes a folder of digits with 10 % wrong labels and audits that

The same on the command line, with a page for a browser:
    tadperf audit photos/ --out wrong.csv --apply cleaned/

If your images differ in size, add --image-size 32 to either command.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

import tadperf
from tadperf.config.merge import merge
from tadperf.pipeline.repair import apply_verdicts

WRONG = 0.1  # share of wrong labels in the made folder


def make_folder(folder: Path, count: int) -> set[str]:
    """Writes digits as train/<class>/<number>.png, some in a wrong class. Returns the names of the wrong ones."""
    digits, rng = load_digits(), np.random.default_rng(0)
    wrong = rng.random(count) < WRONG
    classes = np.where(wrong, (digits.target[:count] + rng.integers(1, 10, count)) % 10, digits.target[:count])
    names = [f"train/{label}/{i:04}.png" for i, label in enumerate(classes)]
    for name, image in zip(names, digits.images, strict=False):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255 / 16).astype(np.uint8)).save(path)
    return {name for name, is_wrong in zip(names, wrong, strict=True) if is_wrong}


def audit(folder: Path, copy: Path, preset: str | None = None, image_size: int | None = None) -> set[str]:
    """Prints the most suspicious images, writes the list and the cleaned copy, and returns the suspected names."""
    data = tadperf.open_data(folder, image_size=image_size).train
    state = tadperf.audit(folder, merge(preset, options={"data.path": str(folder), "data.image_size": image_size}))
    assert data.file_names is not None  # a folder has names; other formats may have none

    state.export(copy.with_suffix(".csv"), data.file_names)  # open it in a spreadsheet, correct its column label
    done = apply_verdicts(copy, data, state)  # links, so the copy needs no space; the data do not change

    for row in state.worst()[:3].tolist():
        given, suggested = (state.class_names[int(part[row])] for part in (state.given, state.suggested))
        print(f"  {data.file_names[row]}: given {given}, suggested {suggested}, score {state.score[row]:.2f}")
    print(f"{done['kept']} labels kept, {done['relabelled']} corrected, {done['left_out']} images left out in {copy}")
    return {data.file_names[row] for row in state.issues.nonzero()[:, 0].tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", type=Path, help="folder with one folder of images per class")
    parser.add_argument("copy", nargs="?", type=Path, default=Path("cleaned"), help="new folder (default: cleaned)")
    parser.add_argument("--image-size", type=int, metavar="N", help="scale the shorter side to N, crop the centre")
    parser.add_argument("--quick", action="store_true", help="800 digits instead of 1797")
    options = parser.parse_args()
    if options.data:
        audit(options.data, options.copy, image_size=options.image_size)
        return
    with tempfile.TemporaryDirectory() as parent:
        data, copy = Path(parent) / "digits", Path(parent) / "cleaned"
        wrong = make_folder(data, 800 if options.quick else 1797)
        suspected = audit(data, copy, preset="digits")
    found = len(wrong & suspected)
    print(f"{len(wrong)} wrong labels, {len(suspected)} suspected")
    print(f"precision {found / len(suspected):.3f}, recall {found / len(wrong):.3f}")


if __name__ == "__main__":
    main()
