"""The order of the rooms of tadperf: imports go one way only and form no circle. Files and functions are short."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room may import its own files and the rooms above it in this list.
ROOMS = [
    "kernels",
    "errors",
    "seeds",
    "progress",
    "files",
    "config",
    "compute",
    "data",
    "nets",
    "trust",
    "experts",
    "artifact",
    "report",
    "run",
    "task",
    "matching",
    "refine",
    "pipeline",
    "bench",
    "cli",
    "__main__",
]
MOST_LINES, LONGEST_FUNCTION = 400, 50  # of a file and of a function, in lines
FOLDERS = {"kernels": ROOT / "kernels", "bench": ROOT / "bench", "cli": ROOT / "cli"}


def modules() -> dict[str, Path]:
    """Returns the file of every module, by its import name."""
    found = {}
    for folder, name in [(ROOT / "tadperf", "tadperf"), *((path, f"tadperf.{part}") for part, path in FOLDERS.items())]:
        for path in folder.rglob("*.py"):
            parts = [part for part in path.relative_to(folder).with_suffix("").parts if part != "__init__"]
            found[".".join([name, *parts])] = path
    return found


def imports(module: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Returns the modules of tadperf that a module imports anywhere: at its top, in a function, or only for types."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                full = f"{source}.{alias.name}"
                found.add(full if full in known else source)
    return {name for name in found if name in known and name != module}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


GRAPH = {name: imports(name, path, known) for known in [modules()] for name, path in known.items()}


def test_every_module_is_in_a_known_room():
    assert {room(name) for name in GRAPH} - {"", *ROOMS} == set()


def test_every_import_goes_to_a_room_above():
    upward = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        if module not in ("tadperf", "tadperf.__main__")  # the root imports names when they are first used (PEP 562)
        for other in others
        if other != "tadperf" and ROOMS.index(room(other)) > ROOMS.index(room(module))
    ]
    assert upward == []


def test_only_the_command_line_imports_the_package_root():
    assert [name for name, others in GRAPH.items() if "tadperf" in others and room(name) not in ("bench", "cli")] == []


def test_no_imports_form_a_circle():
    graph = {name: others - {"tadperf"} for name, others in GRAPH.items() if name != "tadperf"}
    assert circle(graph) == []


@pytest.mark.parametrize(
    ("graph", "expected"),
    [({"a": {"b"}, "b": {"c"}, "c": set()}, 0), ({"a": {"b"}, "b": {"c"}, "c": {"a"}}, 4), ({"a": {"a"}}, 2)],
)
def test_the_search_for_circles_finds_them(graph, expected):
    assert len(circle(graph)) == expected


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Returns the modules of one circle of imports, its first module twice. Returns an empty list if there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := walk(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := walk(name, []))), [])


def test_the_top_folder_of_the_library_stays_small():
    names = [path.name for path in (ROOT / "tadperf").iterdir() if path.name != "__pycache__"]
    assert len(names) <= 20, sorted(names)


def test_kernels_import_nothing_of_the_library():
    assert [
        name for name, others in GRAPH.items() if room(name) == "kernels" and {room(o) for o in others} - {"kernels"}
    ] == []


def test_files_and_functions_are_short():
    """Long ones hide their parts. A docstring counts."""
    long = []
    rooms = (ROOT / room for room in ("tadperf", "kernels", "cli", "bench", "tests", "examples", "docs"))
    for file in (file for room in rooms for file in sorted(room.rglob("*.py"))):
        text = file.read_text()
        if len(text.splitlines()) > MOST_LINES:
            long.append(f"{file.relative_to(ROOT)}: {len(text.splitlines())} lines")
        long += [
            f"{file.relative_to(ROOT)}: {node.name}"
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= LONGEST_FUNCTION
        ]
    assert not long
