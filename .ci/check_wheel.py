"""Is this wheel what a user should get? `check_wheel.py WHEEL native|pure` in an environment with torch and numpy."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"tadperf": "tadperf", "kernels": "tadperf/kernels", "cli": "tadperf/cli", "bench": "tadperf/bench"}
IMPORT = """
import sys
sys.path[:0] = sys.argv[1:]
from tadperf.kernels import native
print(native.available(), native.isa(), native.__file__, native.reason(), sep=" | ")
"""


def contents(wheel: Path, native: bool) -> list[str]:
    """What is wrong with the wheel's list of files."""
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"{installed}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, installed in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    tops = {name.partition("/")[0] for name in names}
    compiled = [name for name in names if name.startswith("tadperf/kernels/_native.") and name.endswith(".so")]
    sources = sorted(name for name in names if name.endswith((".cpp", ".h", ".o", ".a", ".pyc")))
    return [
        *(f"missing: {name}" for name in sorted(expected - names)),
        *(f"not in the repository: {name}" for name in sorted(names - expected) if name.endswith(".py")),
        *(f"not for users: {name}" for name in sources),
        *(f"at the top level: {top}" for top in tops if top != "tadperf" and not top.endswith(".dist-info")),
        *([] if len(compiled) == native else [f"compiled modules: {compiled}, expected {int(native)}"]),
        *([] if any(name.endswith("licenses/LICENSE") for name in names) else ["no LICENSE"]),
    ]


def imported(wheel: Path) -> str:
    """What tadperf.kernels says of itself, imported from the wheel alone; -S keeps an editable install out."""
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        command = [sys.executable, "-S", "-c", IMPORT, folder, sysconfig.get_path("purelib")]
        return subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def main() -> None:
    wheel, native = Path(sys.argv[1]), sys.argv[2] == "native"
    wrong = contents(wheel, native)
    said = imported(wheel)
    if said.startswith("True") != native:
        wrong.append(f"imported: {said}")
    print(f"{wheel.name}: {said}")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
