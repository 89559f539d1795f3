"""`tadperf bench`: options, table, files, exit codes."""

from __future__ import annotations

import json
import os

import pytest
import torch


@pytest.fixture(autouse=True)
def light(monkeypatch):
    from tadperf.bench.operators import engine, peak

    monkeypatch.setattr(engine, "COPY_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(peak, "measure_peaks", lambda *_: {})  # the real one starts a process


def test_list(tadperf):
    from tadperf.bench.operators import catalogue
    from tadperf.bench.stages import runner

    code, out, err = tadperf("bench", "--list", "--device", "cpu")
    assert (code, err) == (0, "")
    named = [line.split(":")[0] for line in out.splitlines() if not line.startswith(" ")]
    assert named == [*catalogue.NAMES, *runner.STAGES, *catalogue.OWN_COMMANDS]
    assert "  inductor         runs here" in out


def test_rows_table_and_pictures(tadperf, tmp_path):
    command = [
        "bench",
        "per_sample",
        "trajectory_distance",
        "--sizes",
        "50x10,20x7",
        "--base",
        "eager",
        "--repeats",
        "2",
    ]
    before = torch.get_num_threads()
    code, out, err = tadperf(*command, "--device", "cpu", "--threads", "1", "--json", tmp_path, "--plot", tmp_path)
    assert code == 0, err
    assert torch.get_num_threads() == before
    assert "per_sample (" in out
    assert "trajectory_distance 20x7" in err
    (file,) = tmp_path.glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    assert {(row["operator"], row["shape"]) for row in rows} == {
        (name, shape) for name in ("per_sample", "trajectory_distance") for shape in ("50x10", "20x7")
    }
    assert {row["family"] for row in rows} == {"tadperf", "eager"}
    for row in rows:
        assert row["threads"] == 1
        assert row["versions"]["torch"] == torch.__version__
        assert row["command"].startswith("tadperf bench per_sample ")
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        f"{file.stem}-{name}.png" for name in ("per_sample", "trajectory_distance")
    ]


def test_a_wrong_provider_gives_exit_code_1(tadperf, monkeypatch):
    from tadperf.bench.operators import (
        engine,
        per_sample,
    )

    def wrong(logits, labels):
        return {"loss": logits[:, 0]}

    monkeypatch.setitem(per_sample.BENCH.providers, "eager", engine.Provider("eager", lambda: wrong))
    code, out, _ = tadperf("bench", "per_sample", "--sizes", "50x10", "--base", "eager", "--repeats", "1")
    assert code == 1
    assert "50x10 float32 eager: loss: " in out


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_place_that_cannot_be_written_is_refused_before_the_measurement(tadperf, tmp_path, monkeypatch, option):
    from tadperf.bench.operators import report

    monkeypatch.setattr(report.os, "access", lambda path, mode: mode != os.W_OK)
    code, out, err = tadperf("bench", "per_sample", "--device", "cpu", option, tmp_path)
    assert (code, out) == (2, "")
    assert err == f"tadperf: {option}: {tmp_path}: cannot be written; choose another place, or change its permissions\n"


def test_a_missing_package_has_a_remedy(monkeypatch):
    from tadperf.bench.operators import (
        catalogue,
        engine,
    )

    provider = catalogue.load("per_sample").providers["cleanlab"]
    missing = provider._replace(package="no_such_package")
    assert engine.skip_reason(missing) == "not installed: pip install 'tadperf[peers]' installs no_such_package"
    assert engine.skip_reason(provider, device="cuda") == "runs on the CPU only"
    installed = provider._replace(package="sklearn")
    assert engine.skip_reason(installed, (2**27, 10)) == "would take minutes at this size"


def test_a_stage(tadperf, tmp_path, monkeypatch, one_thread):
    from tadperf.bench.stages import (
        matching,
        runner,
    )

    net = matching.SIZES["digits"].net.model_copy(update={"width": 5})
    small = matching.SIZES["digits"]._replace(batch=7, steps=2, net=net, providers=("tadperf", "published"))
    monkeypatch.setitem(matching.SIZES, "tiny", small)
    monkeypatch.setattr(runner, "peak_memory", lambda *_: None)  # the real one starts a process
    file = tmp_path / "rows.json"
    code, out, err = tadperf(
        "bench", "matching", "--sizes", "tiny", "--repeats", "1", "--device", "cpu", "--json", file
    )
    assert (code, err) == (0, "matching tiny\n")
    assert "over published" in out
    rows = json.loads(file.read_text())["rows"]
    assert [row["provider"] for row in rows] == ["tadperf", "published"]
    assert {row["stage"] for row in rows} == {"matching"}
    assert rows[0]["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["matching", "--sizes", "cifar"], "--sizes: cifar: must be one of digits, cifar10"),
        (["matching", "--base", "eager"], "--base: eager: is for operators only"),
        (["matching", "--dtypes", "float16"], "--dtypes: float16: is for operators only"),
        (["matching", "--plot", "."], "--plot: .: is for operators only"),
        (["matching", "per_sample", "--dtypes", "float16"], "--dtypes: float16: is for operators only"),
        (["matching", "per_sample", "--sizes", "50x10"], "--sizes: 50x10: operators and stages have other sizes"),
        (["per_sample", "matching", "--sizes", "digits"], "--sizes: digits: operators and stages have other sizes"),
        (["distil"], "OPERATOR|STAGE: distil: this stage is now called matching"),
        (["evaluate"], "OPERATOR|STAGE: evaluate: this stage is now called students"),
        (["conv3x3"], "OPERATOR|STAGE: conv3x3: is measured by python -m tadperf.bench.operators.conv3x3"),
        (["nothing"], "OPERATOR|STAGE: nothing: must be one of per_sample"),
    ],
)
def test_wrong_use_of_a_stage(tadperf, options, message):
    code, out, err = tadperf("bench", *options, "--device", "cpu")
    assert (code, out) == (2, "")
    assert err.startswith(f"tadperf: {message}")
    assert err.count("\n") == 1
