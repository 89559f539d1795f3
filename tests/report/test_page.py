"""The page of a run and of an audit: complete, self-contained, of limited size, and safe with hostile names."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tadperf.artifact import DistilledSet
from tadperf.config import NetConfig
from tadperf.data.normalise import Normaliser
from tadperf.nets.training import Recipe
from tadperf.report import page as page_module
from tadperf.report.page import ShownPairs, save_audit_page, save_run_page
from tadperf.report.page_images import ByteBudget, data_uri, distilled_rows, suspect_groups
from tadperf.report.page_values import percent, run_values, shown_name, shown_path
from tadperf.report.words import COLUMNS
from tadperf.trust.state import TrustState

pytestmark = pytest.mark.usefixtures("one_thread")
VOID = {"meta", "img", "br", "hr", "link", "input"}
HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "</style></title><svg onload=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    "gnp.\u202eexe",
    "x" * 10_000,
    "\udcff\ud800",
    "a\nb\x1b[31m\0c",
    "",
    "&amp;&lt;",
    "url(http://example.com/x)",
)
MAX_BYTES = 3_000_000
COUNTS = {"in_train": 0, "different_labels": 0, "exact": 0, "leaks": 50, "threshold": 0.98}


class Page(HTMLParser):
    """The parsed page: its elements with their attributes, its text and the ids of its headings."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text, self.prose, self.style = "", "", ""  # prose is the text without the lines of code
        self.feed(content.decode())
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            self.style += data
        else:
            self.text += data
            self.prose += "" if "pre" in self.open else data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def sections(self) -> list[str]:
        return [attributes["id"] or "" for attributes in self.all("h2")]


def check(file: Path) -> Page:
    """Parses a page and checks that it is self-contained, accessible and small."""
    content = file.read_bytes()
    assert len(content) < MAX_BYTES
    page = Page(content)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "link", "base", "form", "svg", "audio", "video"}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert not set(attributes) & {"href", "srcset", "action", "data", "poster", "background"}
        assert (attributes["src"] or "").startswith("data:image/") if "src" in attributes else tag != "img"
        style = attributes.get("style") or ""
        assert not any(word in style for word in ("url", "http", "expression"))
    assert not any(word in page.style for word in ("url(", "@import", "http"))
    assert all(image["alt"] for image in page.all("img"))
    assert all(cell.get("scope") in ("col", "row") for cell in page.all("th"))
    assert page.all("html") == [{"lang": "en"}]
    assert not any(character in page.text for character in "\u202e\u2066\x1b\0")
    return page


def pixels(count: int, shape: tuple[int, int, int]) -> Tensor:
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def distilled(labels: Tensor, shape: tuple[int, int, int], class_names: tuple[str, ...]) -> DistilledSet:
    normaliser = Normaliser(torch.zeros(shape[0]), torch.ones(shape[0]))
    net, recipe = NetConfig.model_validate({}), Recipe(1, 1, 0.1, 0.0, 0.0, "none")
    images = normaliser(pixels(len(labels), shape))
    return DistilledSet(images, labels, 0.01, class_names, normaliser, "none", net, recipe, {}, 0, {}, {})


def state(labels: Tensor, class_names: tuple[str, ...]) -> TrustState:
    """Returns a state in which half of the labels are suspected, each with the next class suggested."""
    verdict = (torch.arange(len(labels)) % 4).to(torch.uint8)
    suggested = torch.where(verdict >= 2, (labels + 1) % len(class_names), labels)
    working = torch.where(verdict == 2, suggested, labels)
    score = torch.linspace(0, 1, len(labels))
    return TrustState(labels, working, verdict, score, verdict.to(torch.int16), score, suggested, class_names)


def run_result(classes: int, name: str = "photos", **changes: Any) -> dict[str, Any]:
    sizes = {verdict: [k] * classes for k, verdict in enumerate(("trusted", "recalled", "relabelled", "untrusted"))}
    scores = {"mean": 0.9, "std": 0.02, "runs": [0.88, 0.92]}
    trust = {"mode": "on", "used_clean_labels": False, "coverage": 0.8}
    return {
        "data": {
            "name": name,
            "source": {"path": name},
            "train": 60,
            "test": 20,
            "classes": classes,
            "shape": [3, 8, 8],
        }
        | {"noise": "none"},
        "ipc": 1,
        "seed": 0,
        "synthesis": "matching",
        "method": "mtt",
        "trust": trust | {"rounds": [{"round": r, "sizes": sizes, "view_accuracy": None} for r in (1, 2)]},
        "accuracy": {"convnet": scores},
        "baselines": {"full_data": {"mean": 0.7, "std": 0.0, "runs": [0.7]}},
        "ladder": [
            scores | {"rung": "trusted", "row": "random_real"},
            scores | {"rung": "distilled", "row": "convnet", "gain": 0.003, "deviation": 0.03, "clear": False},
        ],
        "lr": 0.01,
        "stages": {"trust": {"seconds": 2.0, "peak_memory_mb": 300.0}, "matching": {"seconds": 9, "peak_memory_mb": 1}},
        "seconds": 11.0,
        "device": "cpu",
        "paths": {"run": f"runs/{name}", "distilled": f"runs/{name}/distilled.safetensors"},
    } | changes


def audit_result(verdicts: TrustState, name: str = "photos") -> dict[str, Any]:
    values = {"data": name, "source": name, "noise": "none", "samples": len(verdicts)}
    issues = int(verdicts.issues.sum())
    return values | {"issues": issues, "by_class": verdicts.counts(), "paths": {"labels": "labels.csv"}}


def test_a_run_has_every_section_and_names_each_file(tmp_path):
    names, labels = ("cat", "dog", "owl"), torch.arange(60) % 3
    files, images = [f"train/{k}.jpg" for k in range(60)], pixels(60, (3, 8, 8))
    result = run_result(3)
    save_run_page(
        tmp_path / "r.html", result, distilled(torch.arange(3), (3, 8, 8), names), images, files, state(labels, names)
    )
    page = check(tmp_path / "r.html")
    assert page.sections == ["summary", "accuracy", "ladder", "suspects", "trust", "distilled", "stages", "use"]
    assert "+0.3 (no clear gain)" in page.text
    for text in ("90.0 ± 2.0 %", "70.0 %", "distilled set, convnet", "all images, given labels", "round 2", "11 s"):
        assert text in page.text
    verdicts = state(labels, names)
    for index in verdicts.issues.nonzero().squeeze(1).tolist():
        assert f"train/{index}.jpg" in page.text
        assert f"{float(verdicts.score[index]):.3f}" in page.text
    assert "ds = tadperf.load('runs/photos/distilled.safetensors')" in page.text
    assert all(column in page.text and meaning in page.text for column, meaning in COLUMNS.items())
    alts = [image["alt"] or "" for image in page.all("img")]
    assert "train/58.jpg: given dog, suggested owl" in alts
    assert "distilled image 1 of 1 of class owl" in alts
    assert len(alts) == 30 + 3


@pytest.mark.parametrize(("factor", "text"), [({}, ""), ({"factor": 2}, ", each in the form of 4 small ones")])
def test_small_images_are_counted_by_their_memory(factor, text):
    cards = {
        title: (value, note) for title, value, note in run_values(run_result(3, **factor), ("a", "b", "c"))["cards"]
    }
    assert cards["distilled images"] == ("3", f"1 for each of 3 classes{text}")


def test_the_images_are_those_of_the_samples(tmp_path):
    labels, images = torch.arange(8) % 2, pixels(8, (1, 8, 8))
    save_audit_page(tmp_path / "a.html", audit_result(state(labels, ("a", "b"))), state(labels, ("a", "b")), images)
    shown = {image["alt"] or "": image["src"] or "" for image in check(tmp_path / "a.html").all("img")}
    assert set(shown) == {f"row {k}: given {'ab'[k % 2]}, suggested {'ba'[k % 2]}" for k in (2, 3, 6, 7)}
    for alt, source in shown.items():
        picture = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        expected = images[int(alt.split(":")[0].removeprefix("row "))]
        assert picture.format == "PNG"
        assert torch.equal(torch.from_numpy(np.array(picture)), expected[0])


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"trust": {"mode": "off", "used_clean_labels": False, "coverage": 1.0, "rounds": []}}, "trust"),
        ({"accuracy": {}, "baselines": {}}, "accuracy"),
        ({"ladder": []}, "ladder"),
        ({"stages": {}}, "stages"),
    ],
)
def test_runs_without_a_section(tmp_path, changes, missing):
    names = ("cat", "dog", "owl")
    save_run_page(tmp_path / "r.html", run_result(3, **changes), distilled(torch.arange(3), (3, 8, 8), names))
    page = check(tmp_path / "r.html")
    assert missing not in page.sections
    assert {"summary", "distilled", "use"} <= set(page.sections)


def test_oracle_and_refinement_are_shown(tmp_path):
    rounds = [
        {"anomalous": 3, "agreement": 0.7, "diversity": None},
        {"anomalous": 1, "agreement": 0.9, "diversity": 4.32},
    ]
    trust = {"mode": "oracle", "used_clean_labels": True, "coverage": 1.0, "rounds": []}
    result = run_result(3, synthesis="generative", refine={"rounds": rounds}, trust=trust)
    save_run_page(tmp_path / "r.html", result, distilled(torch.arange(3), (1, 8, 8), ("a", "b", "c")))
    page = check(tmp_path / "r.html")
    assert "refinement" in page.sections
    assert all(text in page.text for text in ("clean labels", "upper bound", "90.0 %", "4.32"))


def test_an_audit_without_images_is_a_table(tmp_path):
    labels = torch.arange(12) % 3
    verdicts = state(labels, ("a", "b", "c"))
    save_audit_page(tmp_path / "a.html", audit_result(verdicts), verdicts, None, [f"text {k}" for k in range(12)])
    page = check(tmp_path / "a.html")
    assert page.sections == ["summary", "suspects", "trust", "use"]
    assert page.all("img") == []
    assert all(f"text {k}" in page.text for k in (2, 3, 6, 7, 10, 11))
    assert "csv.DictReader" in page.text


def test_no_suspects(tmp_path):
    labels = torch.zeros(3, dtype=torch.int64)
    zeros = torch.zeros(3)
    verdicts = TrustState(labels, labels, labels.to(torch.uint8), zeros, labels.to(torch.int16), zeros, labels, ("a",))
    save_audit_page(tmp_path / "a.html", audit_result(verdicts), verdicts, pixels(3, (1, 8, 8)))
    assert "No label is suspected." in check(tmp_path / "a.html").text


def test_hostile_names_are_text(tmp_path):
    count = 4 * len(HOSTILE)
    labels = torch.arange(count) % len(HOSTILE)
    verdicts, images = state(labels, HOSTILE), pixels(count, (3, 8, 8))
    files = [HOSTILE[k % len(HOSTILE)] for k in range(count)]
    images_of_run = distilled(torch.arange(len(HOSTILE)), (3, 8, 8), HOSTILE)
    for name in HOSTILE:
        save_run_page(tmp_path / "r.html", run_result(len(HOSTILE), name), images_of_run, images, files, verdicts)
        row: dict[str, Any] = {"kind": "leak", "different_labels": True, "exact": False, "similarity": 0.99}
        row |= {"first": name, "second": name, "first_label": name, "second_label": name}
        values = audit_result(verdicts, name) | {"near_duplicates": COUNTS}
        shown = ShownPairs([row] * 50, [(0, 1)] * 50, images)
        save_audit_page(tmp_path / "a.html", values, verdicts, images, files, shown)
        for page in (check(tmp_path / "r.html"), check(tmp_path / "a.html")):
            for text in (
                "<script>alert(1)</script>",
                "{{ 7 * 7 }}{% raw %}",
                "&amp;&lt;",
                "gnp.\ufffdexe",
                "a b [31m c",
            ):
                assert text in page.text
            assert "x" * 161 not in page.prose


@pytest.mark.parametrize(("shape", "classes"), [((3, 200, 200), 60), ((3, 64, 64), 700), ((1, 28, 28), 1000)])
def test_large_sets_of_noise_stay_below_the_limit(tmp_path, shape, classes):
    """Noise is the worst case for PNG and JPEG."""
    names = tuple(f"class {c} " + "x" * 300 for c in range(classes))
    labels = torch.arange(2000) % classes
    verdicts, images = state(labels, names), pixels(1, shape).expand(2000, -1, -1, -1)
    files = [f"folder/{'y' * 400}/{k}.png" for k in range(2000)]
    synthetic = distilled(torch.arange(classes).repeat_interleave(2), shape, names)
    save_run_page(tmp_path / "r.html", run_result(classes), synthetic, images, files, verdicts)
    page = check(tmp_path / "r.html")
    assert "more are not shown" in page.text
    assert "of them are not shown here" in page.text


def test_images_left_out_are_counted():
    images = pixels(30, (1, 8, 8))
    rows = distilled_rows(images, torch.arange(30) % 3, 3)
    assert [(c, count, len(uris)) for c, count, uris in rows] == [(0, 10, 10), (1, 10, 10), (2, 10, 10)]
    budget = ByteBudget(len(data_uri(images[0, 0].numpy())))
    assert budget.uri(images[0, 0].numpy())
    assert budget.uri(images[0, 0].numpy()) == ""
    verdicts = state(torch.zeros(2000, dtype=torch.int64), ("a", "b"))
    (group,) = suspect_groups(verdicts, None)
    assert (group.given, group.suggested, group.total, len(group.samples)) == (0, 1, 1000, 24)
    assert [suspect.sample for suspect in group.samples[:2]] == [1999, 1998]


def luminance(colour: str) -> float:
    """The relative luminance of "#rrggbb" (WCAG 2.2)."""
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_enough_contrast_in_both_schemes():
    """At least 4.5 to 1, level AA of WCAG 2.2."""
    style = (Path(page_module.__file__).parent / "page.css").read_text()
    schemes = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root {(.*?)}", style, re.S)
    ]
    assert len(schemes) == 2
    for colours in schemes:
        for text in ("ink", "faint"):
            for ground in ("ground", "sheet", "code"):
                low, high = sorted(luminance(colours[name]) for name in (text, ground))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


def test_text_helpers():
    assert percent(None) == percent(float("nan")) == "-"
    assert percent(0.123) == "12.3 %"
    assert shown_name("x" * 100) == "x" * 60 + "…"
    assert shown_path("a/" * 200 + "last.png").endswith("a/last.png")
    assert shown_name("") == "(empty name)"


def test_the_page_needs_neither_matplotlib_nor_pyarrow():
    names = "('matplotlib', 'pyarrow', 'diffusers')"
    code = f"import sys, tadperf.report.page; print([name for name in {names} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout == "[]\n"
