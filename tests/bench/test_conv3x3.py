"""The bench of conv3x3 runs, and the implementations that it compares agree."""

from __future__ import annotations

import torch

from tadperf.bench.operators import conv3x3


def test_both_implementations_agree(one_thread, capsys, monkeypatch):
    for ours, direct in conv3x3.passes(*conv3x3.inputs(3, 32, 5)).values():
        torch.testing.assert_close(ours(), direct(), rtol=1e-4, atol=1e-3)
    monkeypatch.setattr(conv3x3, "SIZES", ((2, 32, 4),))
    conv3x3.main(["--threads", "1", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in lines[1:]] == ["y", "input", "kernel"]
