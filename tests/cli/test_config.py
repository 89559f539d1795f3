"""`tadperf config` and `tadperf info`."""

from __future__ import annotations

import json
import re

import torch

from tadperf.config import Config
from tadperf.config.merge import merge
from tadperf.kernels import implementations, per_sample
from tadperf.run.folder import Run


def test_the_printed_config_can_be_read_back(tadperf, tmp_path):
    first = tadperf("config", "--preset", "cifar100-ipc50", "--set", "match.steps=7", "--seed", "3")
    assert (first.code, first.err) == (0, "")
    (tmp_path / "c.toml").write_text(first.out)
    second = tadperf("config", "--config", "c.toml", "--json")
    assert second.err == "preset quick (--preset chooses another)\n"
    config = json.loads(second.out)
    assert (config["match"]["steps"], config["match"]["batch"], config["seed"]) == (7, 1000, 3)
    assert tadperf("config", "--config", "c.toml", "--quiet").out == first.out


def test_schema(tadperf):
    assert json.loads(tadperf("config", "--schema").out) == Config.model_json_schema()


def test_info_of_a_run_shows_the_code_of_each_stage(tadperf, tmp_path):
    folder = tmp_path / "run"
    with Run.create(folder, merge()) as run, run.stage("trust"):
        per_sample(torch.zeros(2, 3), torch.tensor([0, 1]))
    code = implementations()["per_sample"]["cpu"]
    assert json.loads(tadperf("info", folder, "--json").out)["stages"] == {"trust": {"per_sample": {code: 1}}}
    assert re.search(rf"trust +per_sample +{code} +1\b", tadperf("info", folder).out)


def test_info_of_a_folder_without_a_run_names_the_problem(tadperf, tmp_path):
    result = tadperf("info", tmp_path)
    assert result.code == 2
    assert "RUN" in result.err
    assert "stages.json: No such file or directory; give the folder of a run" in result.err
    (tmp_path / "stages.json").write_text("[1]")
    assert "stages.json is damaged" in tadperf("info", tmp_path).err


def test_info_as_json_and_as_tables(tadperf):
    facts = json.loads(tadperf("info", "--json").out)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["operators"]["per_sample"]["cpu"] in ("native", "reference")
    assert facts["operators"]["per_sample"]["cpu"] == ("native" if facts["native"]["available"] else "reference")
    assert set(facts["devices"]) == {"cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))}
    shown = tadperf("info").out
    assert all(word in shown for word in ("per_sample", torch.__version__, facts["devices"]["cpu"]))
