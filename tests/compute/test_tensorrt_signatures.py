"""Every name and keyword of torch-tensorrt that tadperf uses exists in the sources of the supported versions.

TensorRT cannot be installed everywhere, but its sources can be read everywhere. The tests read the wheel, or the folder
of wheels, that TADPERF_TORCH_TENSORRT_WHEEL names (`pip download torch-tensorrt --no-deps -d DIR`). Or they read the
clone of github.com/pytorch/TensorRT that TADPERF_TORCH_TENSORRT_CLONE names: its releases from 2.11 on and its newest
commit. Without either they read the installed package. 2.11.0 to 2.13.0 and 2.14.0a0 (August 2026) passed.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tadperf.compute import compile

MUTABLE = "torch_tensorrt/dynamo/runtime/_MutableTorchTensorRTModule.py"
NAME = "MutableTorchTensorRTModule"
Read = Callable[[str], str]


def uses(source: str, name: str) -> list[tuple[int, set[str]]]:
    """Returns, for each call of `name` or `anything.name`, the number of positional arguments and the keywords."""
    calls = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", None)) == name:
            assert all(keyword.arg for keyword in node.keywords), f"{name}(**...) cannot be checked"
            calls.append((len(node.args), {keyword.arg for keyword in node.keywords if keyword.arg}))
    return calls


def signature(source: str, path: str) -> tuple[list[str], set[str], bool]:
    """Returns positional names without self, all names, and whether there is **kwargs; path: "f" or "Class.f"."""
    node: ast.AST = ast.parse(source)
    for part in path.split("."):
        node = next(n for n in ast.iter_child_nodes(node) if getattr(n, "name", None) == part)
    assert isinstance(node, ast.FunctionDef)
    positional = [a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg != "self"]
    return positional, {*positional, *(a.arg for a in node.args.kwonlyargs)}, node.args.kwarg is not None


def misuses(source: str, name: str, positional: list[str], known: set[str]) -> list[str]:
    """Returns the arguments in calls of `name` that its signature lacks."""
    wrong = []
    for count, keywords in uses(source, name):
        wrong += [f"{count} positional arguments"] if count > len(positional) else []
        wrong += sorted(keywords - (known - set(positional[:count])))
    return wrong


def test_the_checker_finds_wrong_calls():
    source = "import a\na.f(1, x=2)\nf(1, 2, y=3)\n"
    assert uses(source, "f") == [(1, {"x"}), (2, {"y"})]
    assert signature("def f(a, *, x=1, **more): ...", "f") == (["a"], {"a", "x"}, True)
    assert signature("class C:\n    def f(self, a, /, b): ...", "C.f") == (["a", "b"], {"a", "b"}, False)
    assert misuses(source, "f", ["a", "b"], {"a", "b", "x", "y"}) == []
    assert misuses(source, "f", ["a"], {"a", "x"}) == ["2 positional arguments", "y"]
    assert misuses("f(1, a=2)", "f", ["a"], {"a"}) == ["a"]  # twice the same
    with pytest.raises(AssertionError, match="cannot be checked"):
        uses("f(**options)", "f")


def test_the_checker_accepts_the_calls_of_pytorch():
    """Checks the calls of compile.py, and a call with a wrong keyword."""
    import torch

    ours = inspect.getsource(compile)
    for function in (torch.compile, torch.compiler.load_cache_artifacts, torch.cuda.device):
        named = list(inspect.signature(function).parameters)
        assert uses(ours, function.__name__)
        assert misuses(ours, function.__name__, named, set(named)) == []
    source = textwrap.dedent(inspect.getsource(torch.nn.Module.load_state_dict))
    positional, known, more = signature(source, "load_state_dict")
    assert (positional[0], more) == ("state_dict", False)
    assert uses(ours, "load_state_dict")
    assert misuses(ours, "load_state_dict", positional, known) == []
    assert misuses("net.load_state_dict({}, stict=False)", "load_state_dict", positional, known) == ["stict"]


def _git(folder: str, *arguments: str) -> str:
    return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True).stdout


def _numbers(version: str) -> tuple[int, ...]:
    """Returns the first two numbers of a version."""
    return tuple(map(int, version.split(".")[:2]))


def wheels() -> Iterator[tuple[str, Read]]:
    """Yields the version of each available torch-tensorrt, and a function that reads its files."""
    if place := os.environ.get("TADPERF_TORCH_TENSORRT_WHEEL"):
        files = sorted(Path(place).glob("torch_tensorrt-*.whl")) if Path(place).is_dir() else [Path(place)]
        for file in files:
            yield file.name.split("-")[1], lambda name, file=file: zipfile.ZipFile(file).read(name).decode()
    elif place := os.environ.get("TADPERF_TORCH_TENSORRT_CLONE"):
        for tag in [*_git(place, "tag").split(), "HEAD"]:
            if tag == "HEAD" or (re.fullmatch(r"v[\d.]+", tag) and _numbers(tag[1:]) >= (2, 11)):
                version = tag[1:] if tag != "HEAD" else _git(place, "show", "HEAD:version.txt").strip()
                yield version, lambda name, tag=tag: _git(place, "show", f"{tag}:py/{name}")
    elif (spec := importlib.util.find_spec("torch_tensorrt")) and spec.submodule_search_locations:
        root = Path(spec.submodule_search_locations[0]).parent
        version = (root / "torch_tensorrt" / "_version.py").read_text()
        yield re.findall(r"__version__ = [\"'](.+?)[\"']", version)[0], lambda name: (root / name).read_text()


FOUND = list(wheels())
REASON = "no sources of torch-tensorrt: install it, or set TADPERF_TORCH_TENSORRT_WHEEL or _CLONE"


@pytest.mark.skipif(not FOUND, reason=REASON)
@pytest.mark.parametrize(("version", "read"), FOUND, ids=[version for version, _ in FOUND])
def test_torch_tensorrt_has_every_name_that_is_used(version, read):
    ours, theirs = inspect.getsource(compile), read(MUTABLE)
    assert (2, 11) <= _numbers(version) < (2, 15)
    exported = ast.walk(ast.parse(read("torch_tensorrt/__init__.py")))
    assert any(NAME in [a.name for a in node.names] for node in exported if isinstance(node, ast.ImportFrom))
    positional, direct, more = signature(theirs, f"{NAME}.__init__")
    assert positional[0] == "pytorch_model"
    # other keywords are passed on to `compile`, which accepts anything, so a wrong keyword would raise no error
    assert more
    assert "from torch_tensorrt.dynamo._compiler import compile as dynamo_compile" in theirs
    assert "**self.additional_settings" in theirs
    _, passed_on, _ = signature(read("torch_tensorrt/dynamo/_compiler.py"), "compile")
    assert len(uses(ours, NAME)) == 1
    assert misuses(ours, NAME, positional, direct | passed_on) == []
    positional, known, _ = signature(theirs, f"{NAME}.load_state_dict")
    assert misuses(ours, "load_state_dict", positional, known) == []


@pytest.mark.skipif(not FOUND, reason=REASON)
@pytest.mark.parametrize(("version", "read"), FOUND, ids=[version for version, _ in FOUND])
def test_torch_tensorrt_behaves_as_compile_py_expects(version, read):
    source = read(MUTABLE)
    module = ast.parse(source)
    (mutable,) = (n for n in module.body if isinstance(n, ast.ClassDef) and n.name == NAME)
    bodies = {n.name: ast.unparse(n) for n in mutable.body if isinstance(n, ast.FunctionDef)}
    assert "NEEDS_REFIT" in bodies["load_state_dict"]  # new weights cause a refit
    assert "immutable_weights=False" in bodies["compile"]  # engines can be refitted
    assert "device=" not in bodies["compile"]  # so the engine is built under torch.cuda.device
    assert "deallocate_module(self.original_model)" in bodies["refit_gm"]  # so the weights are moved back
    assert "def __call__" in ast.unparse(mutable)  # in 2.11 to 2.14 only the call works, `forward` warns
    assert "enabled_precisions" not in inspect.getsource(compile)  # removed in 2.13; precision is set by casting
    defaults = read("torch_tensorrt/dynamo/_defaults.py")
    assert "USE_EXPLICIT_TYPING = True" in defaults or "EXPLICIT_TYPING" not in defaults
