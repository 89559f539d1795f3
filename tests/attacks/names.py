"""Makes data sets whose names carry terminal commands, line breaks and loops: python names.py FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

RED, TITLE, UP = "\x1b[31m", "\x1b]0;title\x07", "\x1b[1A\x1b[2K"


def make(folder: Path) -> dict[str, Path]:
    """Writes one data set per attack and returns their paths by name. All are damaged, so that a message names them."""
    sets = {}
    for k, name in enumerate(
        (f"a{RED}", f"b{TITLE}", f"c{UP}tadperf: all is well", "d\nsecond line", "e\u202egnp.exe")
    ):
        place = folder / f"names-{k}"
        for label in (name, "other"):
            (place / label).mkdir(parents=True)
            (place / label / "0.png").write_bytes(b"no image")
        sets[f"a class named {name!r}"] = place
    label = folder / "names-label.npz"
    np.savez(
        label, images=np.zeros((2, 8, 8), np.uint8), labels=np.array([f"x{RED}", "y"]), class_names=np.array(["y"])
    )
    sets["a label with a colour"] = label
    key = folder / "names-key.npz"
    np.savez(key, **{f"images{UP}": np.zeros(3)})  # pyright: ignore[reportArgumentType]
    sets["a key with a command"] = key
    loop = folder / "names-loop"
    (loop / "a" / "inner").mkdir(parents=True)
    (loop / "b").mkdir()
    (loop / "a" / "inner" / "again").symlink_to(loop / "a")
    (loop / "a" / "inner" / "self").symlink_to(loop / "a" / "inner" / "self")
    sets["links that form a loop"] = loop
    return sets


if __name__ == "__main__":
    print("\n".join(map(str, make(Path(sys.argv[1])).values())))
