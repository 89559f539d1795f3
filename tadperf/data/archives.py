"""Reads tar archives as streams. Nothing is extracted to disk, and no size in a header is trusted."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

from tadperf.data.parsing import parser_errors, require_size
from tadperf.errors import UserError

ENDINGS = (".tar", ".tar.gz", ".tgz")
MAX_HEADER = 1 << 20  # bytes of a long name or of extended attributes
_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class CheckedMember(tarfile.TarInfo):
    """A member whose extended headers are small: tarfile itself would read any size into memory."""

    def _proc_member(self, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTENDED and self.size > MAX_HEADER:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(tarfile_)  # pyright: ignore[reportAttributeAccessIssue]


def members(path: Path) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Yields the regular files of an archive, in order, with the archive, from which only the last one can be read."""
    with parser_errors("tar archive", path), tarfile.open(path, "r|*", tarinfo=CheckedMember) as archive:
        for member in archive:
            _require_stored(path, member)  # tarfile would skip 2**40 missing bytes one block after the other
            if member.isreg() and not member.issparse():
                yield member, archive
            archive.members = []  # pyright: ignore[reportAttributeAccessIssue]  # a stream needs no list of what it has read


def read_member(path: Path, member: tarfile.TarInfo, archive: tarfile.TarFile, most: int | None = None) -> bytes:
    """Reads the last member that `members` has yielded. Raises UserError above `most` bytes, or if it is cut off."""
    place = f"{path}: {member.name}"
    if most is not None and member.size > most:
        raise UserError("data", place, f"has {member.size} bytes; must have at most {most}")
    with parser_errors("file in a tar archive", place, file=path):
        file = archive.extractfile(member)
        assert file is not None  # a regular file
        data = file.read()
        if len(data) != member.size:
            raise ValueError(f"{len(data)} bytes; the header declares {member.size}")
    return data


def _require_stored(path: Path, member: tarfile.TarInfo) -> None:
    """Raises UserError if a member is larger than the archive can hold, or than the memory."""
    require_size(f"{path}: {member.name}", (member.size,), 1, path.stat().st_size, path.suffix != ".tar")
