"""The engine times correct providers and refuses wrong ones."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from tadperf.bench.operators import catalogue, cuda, engine, peak, plot, report
from tadperf.bench.operators.measure import measure_case, working_providers
from tadperf.bench.tools import tune
from tadperf.errors import UserError

CPU = torch.device("cpu")
MEASURE_PEAKS = peak.measure_peaks


def doubled(x):
    return {"y": 2 * x, "n": x.argmax()}


def make_bench(**others) -> engine.Bench:
    """Returns a bench whose operator doubles N numbers."""
    return engine.Bench(
        name="per_sample",  # a name that the process for peak memory knows
        axes=("N", "C"),
        sizes={"cpu": ((64, 4),)},
        inputs=lambda size, dtype, device, seed: (torch.arange(float(size[0])),),
        moved=lambda size, dtype: 8 * size[0],
        reference=doubled,
        providers={
            "tadperf": engine.Provider("tadperf", lambda: doubled),
            **{name: engine.Provider("eager", lambda f=f: f) for name, f in others.items()},
        },
        tolerance={"y": (1e-6, 0.0)},
    )


@pytest.fixture(autouse=True)
def light(monkeypatch):
    monkeypatch.setattr(engine, "COPY_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(peak, "measure_peaks", lambda *_: {})  # the real one starts a process


def test_rows_of_a_case(one_thread):
    bench = make_bench(eager=lambda x: {"y": x + x, "n": x.argmax()})
    rows = measure_case(bench, (64, 4), torch.float32, CPU, list(bench.providers), 5)
    assert [row["provider"] for row in rows] == ["tadperf", "eager"]
    for row in rows:
        assert (row["shape"], row["dtype"], row["error"], row["launches"], row["rounds"]) == (
            "64x4",
            "float32",
            None,
            None,
            5,
        )
        assert 0 < row["q20_ms"] <= row["median_ms"] <= row["q80_ms"]
        assert row["gb_s"] == pytest.approx(8 * 64 / row["median_ms"] / 1e6)
        assert row["share_of_copy"] == pytest.approx(row["gb_s"] / row["copy_gb_s"])
        assert row["over_eager"] == pytest.approx(rows[1]["median_ms"] / row["median_ms"])
        assert row["over_inductor"] is None


def test_a_wrong_or_failing_provider_is_not_timed(one_thread):
    def broken(x):
        raise RuntimeError("no such thing\nsecond line")

    bench = make_bench(wrong=lambda x: {"y": 2.001 * x}, broken=broken, right=lambda x: {"y": 2 * x})
    rows = {row["provider"]: row for row in measure_case(bench, (64, 4), torch.float32, CPU, list(bench.providers), 3)}
    assert rows["wrong"]["error"].startswith("y: 63 of 64 differ, first at 1: 2.00")
    assert rows["broken"]["error"] == "RuntimeError: no such thing"
    assert rows["wrong"]["median_ms"] is rows["broken"]["median_ms"] is None
    assert rows["right"]["error"] is None
    assert rows["right"]["over_eager"] == 1


def test_mismatch():
    bench = make_bench()
    truth = {"y": torch.tensor([1.0, float("nan")]), "n": torch.zeros(20_000, dtype=torch.long)}
    few, many = torch.zeros(20_000, dtype=torch.long), torch.zeros(20_000, dtype=torch.long)
    few[:2], many[:3] = 1, 1
    assert engine.mismatch(truth, truth, bench) == ""
    assert engine.mismatch(truth, {"n": few}, bench) == ""
    assert engine.mismatch(truth, {"n": many}, bench) == "n: 3 of 20000 differ, first at 0: 1 instead of 0"
    assert engine.mismatch(truth, {"y": torch.ones(3)}, bench) == "y: (3,) instead of (2,)"
    assert "1.0 instead of nan" in engine.mismatch(truth, {"y": torch.ones(2)}, bench)
    rough = engine.Provider("peer", lambda: doubled, tolerance=(0.0, 0.5), slack=0.5)
    assert engine.mismatch(truth, {"y": torch.tensor([1.4, 0])}, bench, rough) == ""
    assert engine.mismatch(truth, {"y": torch.tensor([1.6, 0])}, bench, rough) != ""
    skipped = bench._replace(tolerance={"y": None})
    assert engine.mismatch(truth, {"y": torch.zeros(2)}, skipped) == ""


def test_functions_take_turns_until_their_patience_ends(monkeypatch):
    order = []

    def slow():
        order.append("slow")
        time.sleep(0.02)

    times = engine.interleaved({"quick": lambda: order.append("quick"), "slow": slow}, repeats=6, patience=0.05)
    assert (len(times["quick"]), len(times["slow"])) == (6, 3)
    assert times["slow"].min() >= 20
    assert "quick" in order[order.index("slow") + 1 : len(order) - 1 - order[::-1].index("slow")]
    once = engine.interleaved({"slow": slow}, repeats=6, patience=0.01)
    assert len(once["slow"]) == 1


def test_the_number_of_threads_changes_only_inside_the_block():
    before = torch.get_num_threads()
    with engine.threads(before + 1) as count:
        assert count == torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("name", catalogue.NAMES)
def test_every_provider_of_every_bench_agrees_with_the_reference(name, one_thread):
    from tadperf.bench.operators import cases

    bench = catalogue.load(name)
    assert bench.name == name
    size = cases.SMALL[name]
    assert len(size) == len(bench.axes) == len(bench.sizes["cuda"][0])
    for dtype in (torch.float32, torch.bfloat16):
        inputs = bench.inputs(size, dtype, CPU, 0)
        assert all(x.is_contiguous() for x in inputs if isinstance(x, torch.Tensor))
        eager = [key for key, provider in bench.providers.items() if provider.family in ("tadperf", "eager", "peer")]
        if dtype != torch.float32:
            eager = ["tadperf"]
        functions, errors = working_providers(bench, eager, size, inputs)
        assert errors == {}
        assert "tadperf" in functions
    other = bench.inputs(size, torch.float32, CPU, 1)
    assert not torch.equal(other[0], bench.inputs(size, torch.float32, CPU, 0)[0])
    assert bench.moved(size, torch.float32) > bench.moved(size, torch.bfloat16) > 0


def test_peak_memory_counts_results_and_temporaries():
    peaks = MEASURE_PEAKS("trajectory_distance", (8, 320_010), torch.float32, ["tadperf", "eager"])
    if peaks:  # empty on a system that cannot reset the peak
        one = 8 * 320_010 * 4 / 2**20
        assert peaks["tadperf"] < 0.2 * one
        assert one < peaks["eager"] < 4 * one


def test_report_and_picture(tmp_path, one_thread):
    bench = make_bench(eager=doubled)
    rows = measure_case(bench, (64, 4), torch.float32, CPU, list(bench.providers), 3)
    facts = report.facts("per_sample", CPU, 1, "tadperf bench")
    rows = [row | facts for row in rows]
    assert facts["device"] in report.title(rows[0])
    assert "1 thread" in report.title(rows[0])
    table = report.lines([*rows, {**rows[0], "error": "is wrong", "median_ms": None}])
    assert table[0].split()[:3] == ["shape", "dtype", "provider"]
    assert table[-1].endswith("tadperf: is wrong")
    assert max(map(len, table[:-1])) <= 80
    assert len({len(line) for line in table[: 1 + len(rows)]}) == 1  # the first block: its head and a line per row
    plot.plot(tmp_path / "p.png", rows)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    plot.plot(tmp_path / "empty.png", [])
    file = report.output_file("--json", tmp_path, CPU, ".json")
    assert file == tmp_path / f"{report.slug(facts['device'])}.json"
    assert report.slug("NVIDIA H200") == "nvidia-h200"
    with pytest.raises(UserError, match="there is no folder"):
        report.output_file("--json", tmp_path / "no" / "x.json", CPU, ".json")


def test_tuning_descends_to_the_best_entry_and_avoids_failures():
    def cost(entry):
        if entry["block"] * entry["num_warps"] > 4096:
            return float("inf")  # needs too much memory
        return 1 + abs(np.log2(entry["block"] / 256)) + abs(np.log2(entry["num_warps"] / 4)) + entry["num_stages"] / 9

    start = {"block": 64, "num_warps": 16, "num_stages": 3, "odd": 5}
    assert tune.descend(start, cost) == {"block": 256, "num_warps": 4, "num_stages": 1, "odd": 5}
    assert {"block": 64, "num_warps": 64, "num_stages": 3, "odd": 5} not in list(tune.neighbours(start))


def test_rotated_inputs_do_not_fit_the_cache():
    cache = 50 * 2**20
    assert cuda.rotation(2**20, cache) * 2**20 >= 4 * cache
    assert cuda.rotation(10 * cache, cache) == 2
    assert cuda.rotation(1, cache) == cuda.MAX_SETS
