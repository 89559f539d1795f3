"""The study of methods: its table and its paired differences."""

from __future__ import annotations

import statistics
from pathlib import Path

from tadperf.bench.studies import bases


def test_the_table_pairs_by_seed_and_takes_the_coreset_with_the_highest_mean() -> None:
    seeds = [
        {"k_means": 0.80, "k_centres": 0.70, "random": 0.60, "mtt": 0.84},
        {"k_means": 0.60, "k_centres": 0.69, "random": 0.61, "mtt": 0.66},
        {"k_means": 0.80, "k_centres": 0.71, "random": 0.62, "mtt": 0.85},
    ]
    differences = [100 * (figures["mtt"] - figures["k_means"]) for figures in seeds]
    cell = bases.against(seeds, "mtt")
    assert cell.startswith(f"{statistics.fmean(differences):+.1f} (")
    assert cell.endswith("p 0.250, k_means")
    table = bases.table({"IPC 1, hard": dict(enumerate([{"initial": 0.5, **figures} for figures in seeds]))}, ["mtt"])
    assert "| mtt | 78.3 ± 10.7 |" in table
    assert f"| mtt | {cell} |" in table


def test_methods_without_an_unroll_use_the_experts_of_trajectory_matching(tmp_path: Path) -> None:
    config = bases.run_config("symmetric:0.2", 3, 10, "tgdd", tmp_path, ["evaluate.epochs=7"])
    assert config.experts.path == str(tmp_path / "mtt-10-3")
    assert (config.seed, config.match.ipc, config.evaluate.epochs) == (3, 10, 7)
    assert bases.run_config("symmetric:0.2", 3, 10, "ftd", tmp_path, []).experts.path is None
