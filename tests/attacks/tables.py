"""Makes tables of images that name files elsewhere, devices and huge rows: python tables.py FOLDER."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from PIL import Image


def make(folder: Path) -> dict[str, Path]:
    """Writes one table per attack and returns their paths by name."""
    secret = folder / "secret" / "0.png"
    secret.parent.mkdir()
    Image.new("L", (4, 4)).save(secret)
    place = folder / "tables"
    place.mkdir()
    os.mkfifo(place / "pipe.png")
    names = {
        "a path with ..": "../secret/0.png",
        "a path with .. inside": "a/../../secret/0.png",
        "an absolute path": str(secret),
        "an absolute path with ..": f"{place}/../secret/0.png",
        "a device": "/dev/zero",
        "a pipe without a writer": "pipe.png",
        "the folder itself": ".",
        "a URL": "http://localhost:1/0.png",
        "a file URL": f"file://{secret}",
        "a zero byte": "0.png\0.txt",
        "a terminal command": "\x1b[31m.png",
        "a name of a megabyte": "x" * 1_000_000,
        "many folders": "a/" * 100_000 + "0.png",
    }
    sets = {}
    for k, (title, name) in enumerate(names.items()):
        sets[title] = place / f"{k}.csv"
        sets[title].write_text(f"path,label\n{name},a\n{name},b\n")
    sets["labels of a thousand digits"] = place / "digits.csv"
    sets["labels of a thousand digits"].write_text(f"path,label\n0.png,{'9' * 5000}\n")
    return sets


if __name__ == "__main__":
    print("\n".join(map(str, make(Path(sys.argv[1])).values())))
