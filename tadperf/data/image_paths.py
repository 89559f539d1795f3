"""Finds the image files that a table or a parquet file names. They must lie in one folder."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path, PurePosixPath

from tadperf.data.path_ends import ends_of_paths
from tadperf.data.text import display_name, nfc
from tadperf.data.walk import is_image, walk
from tadperf.errors import UserError

LONGEST = 4096  # bytes in a path on Linux
REMEDY = "name the folder that holds the images with --set data.image_root"


class ImageFinder:
    """Finds image files below a folder.

    A name is a path relative to the folder, an absolute path into it, or the end of the path of exactly one image in
    it, with or without suffix. An absolute path to another place may end in the relative path of an image. Files
    outside of the folder are never opened, except through a symbolic link in it.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UserError("data.image_root", root, "is no folder; name the folder that holds the images")
        self.root = root
        self._tables: dict[tuple[int, bool], dict[str, list[int]]] = {}

    def find(self, name: str, place: str) -> Path:
        """Returns the image file that a name means. place: where the name stands, for messages.

        Raises UserError on a name that means no image or several, and on a path that leaves the folder.
        """
        root = self.root
        if len(name) > LONGEST:
            raise UserError("data", place, f"'{name[:40]}...' has {len(name)} characters; must be the path of a file")
        if "://" in name:
            raise UserError("data", place, f"{name!r} is a URL; download the images and name the files")
        path = PurePosixPath(re.sub(r"^[A-Za-z]:(?=[\\/])", "", name).replace("\\", "/"))
        if not path.parts or "\0" in name or ".." in path.parts:
            raise UserError("data", place, f"{name!r} must be the path of a file inside {root}, without '..'")
        if path.is_absolute() and not path.is_relative_to(root):
            return self._on_another_machine(path, place)
        relative = path.relative_to(root) if path.is_absolute() else path
        for spelling in (str(relative), nfc(str(relative))):
            if (root / spelling).is_file():
                return root / spelling
        found = self._ending_in(relative)
        if len(found) == 1:
            return found[0]
        if found:
            both = " or ".join(str(file.relative_to(root)) for file in found[:2])
            raise UserError("data", place, f"{name!r} could be {both}; write the folder too")
        raise UserError("data", place, f"{name!r}: no such image in {root}; {REMEDY}=FOLDER")

    @cached_property
    def _paths(self) -> list[Path]:
        if self.root == Path(self.root.anchor):  # the whole disk
            return []
        return sorted(file for file in walk(self.root) if is_image(file.name))

    @cached_property
    def _names(self) -> list[str]:
        return [display_name(file.relative_to(self.root).as_posix()) for file in self._paths]

    def _ending_in(self, path: PurePosixPath) -> list[Path]:
        """Returns the images whose path ends in all parts of `path`, with its suffix or, if there are none, without."""
        length, end = len(path.parts), nfc(str(path))
        for with_suffix in (True, False):
            if (length, with_suffix) not in self._tables:
                self._tables[length, with_suffix] = ends_of_paths(self._names, length, with_suffix)
            if found := self._tables[length, with_suffix].get(end):
                return [self._paths[i] for i in found]
        return []

    def _on_another_machine(self, path: PurePosixPath, place: str) -> Path:
        """Returns the image whose whole path below the folder is the end of an absolute path to another place."""
        for start in range(1, len(path.parts)):
            file = self.root.joinpath(*path.parts[start:])
            if file.is_file():
                return file
        if Path(path).is_file():
            remedy = f"lies outside of {self.root}; allow it with --set data.image_root={path.parent}"
            raise UserError("data", place, f"'{path}' {remedy}")
        raise UserError("data", place, f"'{path}': no such image; {REMEDY}=FOLDER")
