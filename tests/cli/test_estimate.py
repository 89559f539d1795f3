"""`--estimate`: its table, its JSON object, and that it starts nothing."""

from __future__ import annotations

import json
import resource


def cpu_seconds() -> float:
    usage = [resource.getrusage(kind) for kind in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def test_the_default_job_is_estimated_in_less_than_20_seconds_and_starts_nothing(tadperf, tmp_path):
    before = cpu_seconds()
    code, out, err = tadperf("distill", "--device=cpu", "--estimate", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert list(result["stages"]) == ["data", "trust", "experts", "matching", "evaluate"]
    assert result.keys() == {
        "stages", "seconds", "memory_bytes", "disk", "disk_bytes", "counts", "device", "processes",
    }  # fmt: skip
    assert result["counts"] == {"train": 1400, "test": 397, "parameters": 10986}
    assert 11.5e6 < result["disk"]["experts"] < 12.5e6
    assert list(tmp_path.iterdir()) == []
    # CPU seconds, because a busy machine takes longer. Two workers of a probe run at the same time.
    assert cpu_seconds() - before < 40


def test_the_table_names_every_stage(tadperf, tiny, tmp_path):
    code, out, err = tadperf("distill", *tiny, "--estimate")
    assert code == 0, err
    for word in ("trust", "experts", "matching", "evaluate", "total", "memory", "disk"):
        assert word in out
    assert list(tmp_path.iterdir()) == []


def test_an_audit(tadperf, tmp_path):
    code, out, err = tadperf("audit", "digits", "--device=cpu", "--estimate", "--json", "--quiet")
    assert (code, err) == (0, "")
    assert list(json.loads(out)["stages"]) == ["data", "trust"]
    assert list(tmp_path.iterdir()) == []


def test_an_audit_without_networks_has_no_estimate(tadperf):
    code, _, err = tadperf("audit", "--labels=a.csv", "--probs=p.npy", "--estimate")
    assert code == 2
    assert err.startswith("tadperf: --estimate")
