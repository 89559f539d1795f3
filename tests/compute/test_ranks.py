"""Ranks exchange results, in two or more real processes."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tadperf import files
from tadperf.compute import launcher, ranks, work_progress
from tadperf.compute.device import resolve_device
from tadperf.compute.work_progress import add_trained, reporting, work
from tadperf.compute.workers import available_cores, run_parallel
from tadperf.config import MatchConfig
from tadperf.config.merge import merge
from tadperf.errors import UserError
from tadperf.matching.base import Base
from tadperf.matching.gradient import Gradient
from tadperf.matching.loop import mean_gradient
from tadperf.matching.state import MatchState, initial_state
from tadperf.run.folder import Run

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="tasks are forked on Linux only")


def run_ranks(world: int, work: Callable[[], Any], listener: socket.socket | None = None) -> list[Any]:
    """Calls `work` in `world` ranks; returns each rank's result, or the text of its exception."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = (listener or free).getsockname()[1]
    fork = multiprocessing.get_context("fork")

    def body(rank: int, end: Any) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GLOO_SOCKET_IFNAME": "lo"}
        if listener is not None and rank == 0:
            os.environ[ranks.STORE_FD] = str(listener.fileno())
        try:
            ranks.join()
            end.send(work())
            ranks.leave()
        except BaseException:
            end.send(traceback.format_exc())
        os._exit(0)

    pipes = [fork.Pipe(duplex=False) for _ in range(world)]
    processes = [fork.Process(target=body, args=(rank, pipes[rank][1])) for rank in range(world)]
    for process in processes:
        process.start()
    for _, end in pipes:
        end.close()
    results = []
    for ours, _ in pipes:
        try:
            results.append(ours.recv())
        except EOFError:  # noqa: PERF203
            results.append("died")
    for process in processes:
        process.join(30)
        assert process.exitcode is not None, "a rank hangs"
    return results


def test_a_single_process_exchanges_nothing():
    assert (ranks.rank(), ranks.world_size(), ranks.local_world_size()) == (0, 1, 1)
    assert ranks.once(lambda: 5) == 5
    results = ranks.divide_work(lambda positions: ((k, 10 * p) for k, p in enumerate(positions)), 3)
    assert list(results) == [(0, 0), (1, 10), (2, 20)]
    (same,) = ranks.mean([torch.tensor([3.0])], 1)
    assert same.tolist() == [3.0]


@linux
def test_ranks_divide_the_work_and_each_gets_all_results():
    def work() -> Any:
        parts = dict(run_parallel(lambda item: (item * item, ranks.rank()), [3, 1, 4, 1, 5]))
        again = sorted(run_parallel(lambda item: -item, [7], 1))
        return [parts[k][0] for k in range(5)], {parts[k][1] for k in (0, 2, 4)}, {parts[k][1] for k in (1, 3)}, again

    first, second = run_ranks(2, work)
    assert first == second
    assert first[0] == [9, 1, 16, 1, 25]
    assert first[1] == {0}
    assert first[2] == {1}
    assert first[3] == [(0, -7)]


@linux
def test_each_rank_reports_the_progress_of_its_own_tasks(monkeypatch):
    monkeypatch.setattr(work_progress, "START_DELAY", 0.1)
    monkeypatch.setattr(work_progress, "INTERVAL", 0.02)

    def train(images: int) -> None:
        for _ in range(images):
            time.sleep(0.05)
            add_trained(1)

    def job() -> Any:
        calls: list[tuple[int, int]] = []

        def record(stage: str, done: int, total: int, **values: object) -> None:
            calls.append((done, total))

        sizes = [9, 6, 8]
        with reporting(record, "stage", sum(work(sizes[position]) for position in ranks.assigned(3))):
            results = list(run_parallel(train, sizes, workers=2))
        return sorted(position for position, _ in results), {total for _, total in calls}, calls[-1][0]

    assert run_ranks(2, job) == [([0, 1, 2], {17}, 17), ([0, 1, 2], {6}, 6)]


def test_rank_0_decides_and_large_values_arrive_complete():
    def work() -> Any:
        values = torch.arange(3_000_000) + ranks.rank()  # 24 MB, several messages
        received = ranks.once(lambda: {"x": values, "who": ranks.rank()})
        ranks.barrier()
        none = ranks.once(lambda: None)
        inside = ranks.once(lambda: dict(run_parallel(lambda item: item, [1, 2], 1)))  # rank 0 works alone
        return int(received["x"].sum()), received["who"], none, inside

    assert run_ranks(3, work) == [(int(torch.arange(3_000_000).sum()), 0, None, {0: 1, 1: 2})] * 3


def test_the_mean_over_trajectories_does_not_depend_on_the_number_of_ranks():
    config = MatchConfig(trajectories=5)

    class RandomBase(Base):
        def __init__(self) -> None:
            pass

        def gradient(self, state: MatchState, number: int) -> Gradient:
            generator = torch.Generator().manual_seed(number)
            draw = [torch.randn(shape, generator=generator) for shape in ((), (4, 1, 3, 3), (4, 2), (), (7,))]
            return Gradient(*draw)

    state = initial_state(torch.zeros(4, 1, 3, 3), torch.zeros(4, 2), config)

    def work() -> Any:
        gradient = mean_gradient(state, RandomBase(), config.trajectories)
        return [part.double().numpy() for part in gradient[:4] if part is not None]

    draws = [RandomBase().gradient(state, number) for number in range(5)]
    parts = ([part for part in draw[:4] if part is not None] for draw in draws)
    exact = [torch.stack(column).double().mean(0) for column in zip(*parts, strict=True)]
    single_process = work()
    for world in (2, 7):  # two of seven ranks have no trajectory
        everyone = run_ranks(world, work)
        for results in everyone:
            for got, truth, single, leader in zip(results, exact, single_process, everyone[0], strict=True):
                assert abs(got - truth.numpy()).max() < 1e-6
                assert abs(got - single).max() < 1e-6
                assert (got == leader).all()  # all ranks continue with the same bits


def test_leaving_ends_the_connections_of_the_sums():
    def work() -> Any:
        import torch.distributed as dist

        (mean,) = ranks.mean([torch.full((1000,), float(ranks.rank()))], ranks.world_size())
        before = dist.is_initialized()
        ranks.leave()
        return float(mean[0]), before, dist.is_initialized(), ranks.world_size()

    assert run_ranks(2, work) == [(0.5, True, False, 1)] * 2


def test_leaving_keeps_a_process_group_of_the_caller():
    def work() -> Any:
        import torch.distributed as dist

        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        ranks.leave()
        return dist.is_initialized()

    assert run_ranks(2, work) == [True, True]


def test_only_rank_0_writes_except_in_divided_tasks(tmp_path):
    config = merge("digits")

    def task(item: int) -> int:
        files.write_bytes(tmp_path / "run" / f"item-{item}", str(ranks.rank()).encode())
        return item

    def work() -> Any:
        with Run.create(tmp_path / "run", config) as run:
            run.log("experts", ranks.rank())
            with run.stage("experts"):
                list(run_parallel(task, [0, 1], 1))
            run.rewind("experts", 5)
            files.write_bytes(tmp_path / "run" / f"rank-{ranks.rank()}", b"")
            run.finish({"rank": ranks.rank()})
            ranks.barrier()
        return sorted(run.stages())

    assert run_ranks(2, work) == [["experts"], ["experts"]]
    names = {file.name for file in (tmp_path / "run").iterdir()}
    assert {"item-0", "item-1", "rank-0", "result.json", "DONE"} <= names
    assert "rank-1" not in names
    assert (tmp_path / "run" / "item-1").read_text() == "1"
    assert '"rank": 0' in (tmp_path / "run" / "result.json").read_text()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_the_death_of_rank_0_raises_an_error():
    def work() -> Any:
        if ranks.rank() == 0:
            os._exit(1)  # this rank holds the store
        start = time.monotonic()
        with pytest.raises(ranks.RankLostError, match="lost the connection to the other ranks: "):
            ranks.once(lambda: 1)
        return time.monotonic() - start < 20

    results = run_ranks(2, work)
    assert results[0] == "died"
    assert results[1] is True or "RankLostError" in str(results[1])  # or at the end, in `leave`


def test_the_error_names_a_port_in_use(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ranks.RankLostError, match=rf"^cannot connect the ranks at 127.0.0.1:{port}: .*MASTER_PORT"):
            ranks.join()
    assert ranks.world_size() == 1


def test_the_error_names_a_missing_rank(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ranks.RankLostError, match=r"^cannot connect the ranks at 127.0.0.1:1: .*RANK"):
        ranks.join()


def test_rank_0_takes_over_the_socket_of_its_launcher():
    """The launcher listens before any rank starts, so no other program can take the port before rank 0."""
    with launcher._listen() as listener:
        port = listener.getsockname()[1]

        def work() -> Any:
            return ranks.once(ranks.rank), ranks.world_size()

        with socket.socket() as rival, pytest.raises(OSError, match="in use"):
            rival.bind(("127.0.0.1", port))
        assert run_ranks(2, work, listener) == [(0, 2), (0, 2)]


def test_each_rank_has_its_own_cuda_device(monkeypatch):
    devices: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(ranks, "_team", ranks.Team(1, 2, None))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert resolve_device("auto") == torch.device("cuda", 1)
    assert devices == [1]
    with pytest.raises(UserError, match=r"^--device: cuda:3: is one device for 2 ranks"):
        resolve_device("cuda:3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    with pytest.raises(UserError, match=r"^--devices: 5: only 4 CUDA devices found; use --devices 4$"):
        resolve_device("cuda")
    assert resolve_device("cpu") == torch.device("cpu")


def test_ranks_divide_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert available_cores() == 8
    monkeypatch.setattr(ranks, "_team", ranks.Team(1, 3, None))
    assert available_cores() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert available_cores() == 1


@pytest.mark.parametrize("devices", ["0", "-1", "two", "1.5", ""])
def test_a_wrong_number_of_devices_is_refused(devices):
    with pytest.raises(UserError, match=r"^--devices: .*: must be a whole number from 1 up"):
        launcher.num_ranks(devices)


def test_the_number_of_ranks_to_start_with_and_without_torchrun(monkeypatch):
    assert (launcher.num_ranks(None), launcher.num_ranks("1"), launcher.num_ranks("3")) == (1, 1, 3)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (launcher.num_ranks(None), launcher.num_ranks("2")) == (1, 1)
    with pytest.raises(UserError, match="torchrun has started 2 ranks; leave out --devices"):
        launcher.num_ranks("3")
