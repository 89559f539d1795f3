"""Checks that a wheel holds what users need and nothing else.

Usage: check_wheel.py WHEEL native|pure, in an environment with torch and numpy.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"tadperf": "tadperf", "kernels": "tadperf/kernels", "cli": "tadperf/cli", "bench": "tadperf/bench"}
LICENCES = ("LICENSE", "kernels/cpu/licenses/nanobind.txt", "kernels/cpu/licenses/robin-map.txt")
IMPORT = """
import sys
sys.path[:0] = sys.argv[1:]
from tadperf.kernels import native
print(native.available(), native.isa(), native.__file__, native.reason(), sep=" | ")
"""


def check_files(wheel: Path, native: bool) -> list[str]:
    """Returns one line for each fault in the wheel's list of files."""
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"{installed}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, installed in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".json", ".html", ".css") and ROOT / "bench/results" not in path.parents
    }
    expected.add("tadperf/py.typed")  # tells type checkers that tadperf has type hints
    tops = {name.partition("/")[0] for name in names}
    compiled = [name for name in names if name.startswith("tadperf/kernels/_native.") and name.endswith(".so")]
    sources = sorted(name for name in names if name.endswith((".cpp", ".h", ".o", ".a", ".pyc")))
    return [
        *(f"missing: {name}" for name in sorted(expected - names)),
        *(f"not in the repository: {name}" for name in sorted(names - expected) if name.endswith(".py")),
        *(f"not for users: {name}" for name in sources),
        *(f"at the top level: {top}" for top in tops if top != "tadperf" and not top.endswith(".dist-info")),
        *([] if len(compiled) == native else [f"compiled modules: {compiled}, expected {int(native)}"]),
        *(f"missing: {text}" for text in LICENCES if not any(name.endswith(f"licenses/{text}") for name in names)),
    ]


def describe_native_part(wheel: Path) -> str:
    """Imports tadperf.kernels from the wheel alone and returns its description of the native part."""
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        # -S keeps an editable install out
        command = [sys.executable, "-S", "-c", IMPORT, folder, sysconfig.get_path("purelib")]
        return subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def main() -> None:
    wheel, native = Path(sys.argv[1]), sys.argv[2] == "native"
    faults = check_files(wheel, native)
    description = describe_native_part(wheel)
    if description.startswith("True") != native:
        faults.append(f"imported: {description}")
    print(f"{wheel.name}: {description}")
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
