"""Lists the images that were left out because they cannot be decoded."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from tadperf.data.dataset import Dataset
from tadperf.files import write_bytes

COLUMNS = ("split", "row", "file", "reason")


def save_broken(path: Path, *splits: Dataset) -> bool:
    """Writes a CSV file with a row for each broken image. Writes none if there are none. Returns whether it wrote one.

    row counts all images of the split, in the order of the data. file is the path of the image, or its row in a shard.
    """
    rows = [(split.source.get("split", split.name), *image) for split in splits for image in split.broken]
    if not rows:
        return False
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode(errors="backslashreplace"))
    return True
