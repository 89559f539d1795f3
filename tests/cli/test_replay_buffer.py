"""`tadperf distill --experts replay_buffer_0.pt` equals a run with the same experts in tadperf's own files."""

from __future__ import annotations

from tadperf.config import NetConfig
from tadperf.experts.store import Experts
from tadperf.nets.architectures import build
from tadperf.nets.flat import FlatNet


def test_a_replay_buffer_gives_the_bytes_of_the_same_experts(tadperf, tiny, tmp_path):
    import torch

    tiny = [*tiny, "--set=experts.epochs=2"]
    options = [option for option in tiny if not option.startswith(("--ipc", "--repeats"))]
    assert tadperf("experts", *options, "--out", "shared", "--quiet").code == 0
    stored = Experts.open(tmp_path / "shared" / "experts", 2)
    net = FlatNet(build(NetConfig(width=8, depth=1), (1, 8, 8), 10, 0))
    snapshots = [[stored.snapshot(expert, epoch) for epoch in range(3)] for expert in range(2)]
    torch.save(
        [[[p.clone() for p in net.views(theta).values()] for theta in expert] for expert in snapshots],
        tmp_path / "replay_buffer_0.pt",
    )
    own = tadperf("distill", *tiny, "--experts=shared", "--out=a", "--quiet")
    foreign = tadperf("distill", *tiny, "--experts=replay_buffer_0.pt", "--out=b", "--quiet")
    assert (own.code, foreign.code) == (0, 0), foreign.err
    assert not (tmp_path / "b" / "experts").exists()
    first, second = ((tmp_path / run / "distilled.safetensors").read_bytes() for run in "ab")
    assert first == second
    wide = tadperf("distill", *tiny, "--experts=replay_buffer_0.pt", "--out=c", "--set=net.width=16")
    assert wide.code == 2
    assert "parameter 0 of shape [8, 1, 3, 3], not [16, 1, 3, 3]; set net.width" in wide.err
    assert wide.err.count("\n") == 1
    assert not (tmp_path / "c").exists()
