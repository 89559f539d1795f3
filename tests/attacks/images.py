"""Makes image files that ask a decoder for huge memory or for another program: python images.py FOLDER."""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path


def png(width: int, height: int, data: bytes) -> bytes:
    """Returns a grey PNG whose header declares this size, right or wrong."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def make(folder: Path) -> dict[str, Path]:
    """Writes one data set per attack and returns their paths by name."""
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(it_ran) (w) file closefile\nshowpage\n"
    contents = {
        "bomb: 60000 x 60000 pixels in 100 bytes": png(60000, 60000, zlib.compress(bytes(1000))),
        "bomb below Pillow's limit: 13000 x 13000 pixels in 100 bytes": png(13000, 13000, zlib.compress(bytes(1000))),
        "2 billion x 2 billion pixels": png(2**31 - 1, 2**31 - 1, b""),
        "zero pixels": png(0, 0, b""),
        "PostScript under the name of a PNG": postscript,
        "PDF under the name of a PNG": b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n",
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n",
        "nothing": b"",
    }
    sets = {}
    for k, (name, content) in enumerate(contents.items()):
        for label in "ab":
            file = folder / f"images-{k}" / label / "0.png"
            file.parent.mkdir(parents=True)
            file.write_bytes(content)
        sets[name] = folder / f"images-{k}"
    return sets


if __name__ == "__main__":
    print("\n".join(map(str, make(Path(sys.argv[1])).values())))
