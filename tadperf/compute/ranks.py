"""Ranks: the processes, one for each device, that divide one job among them (torchrun's environment).

Every rank runs the same program on the same data. What is independent is divided (`shared`), what must be decided once
is decided by rank 0 (`once`), and rank 0 alone writes to the run folder, which all of them see; a task that one rank
runs for all writes its own file. Results cross through torchrun's key-value store, by polling: no wait has a time limit
and Ctrl-C reaches it; only sums over large tensors go through gloo or NCCL. With one rank all of this is nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from tadperf import files

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
PIECE = 4 << 20  # bytes of one value; the store takes no more than 8 MiB at a time
SLEEP = 0.005  # seconds between two looks into the store
PR_SET_PDEATHSIG = 1


class RankLostError(RuntimeError):
    """The connection to the other ranks is gone: one of them has died."""


@dataclass
class Team:
    """What this process knows of the others once it has joined."""

    rank: int
    world_size: int
    store: Any
    exchanges: int = 0  # so far; the same on every rank, since all run the same program


_team: Team | None = None
_in_task = False


def environment_rank() -> int:
    """The rank that the environment gives this process; 0 without one."""
    return int(os.environ.get("RANK", 0)) if environment_world_size() > 1 else 0


def environment_world_size() -> int:
    """How many ranks the environment speaks of."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "MASTER_ADDR" in os.environ else 1


def local_rank() -> int:
    """This process's number among the ranks on its machine: that of its device."""
    return int(os.environ.get("LOCAL_RANK", 0)) if _team else 0


def local_world_size() -> int:
    """Ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if _team else 1


def join() -> None:
    """Meets the other ranks, where the environment (torchrun's) names any; before that a process works alone."""
    global _team
    if _team is not None or environment_world_size() == 1:
        return
    from torch.distributed import rendezvous

    with _lost():
        store, rank, world = next(rendezvous("env://"))
        _team = Team(rank, world, store)
    files.set_write_access(rank == 0)
    barrier()


def leave() -> None:
    """The end of the common work; rank 0, which may hold the store, waits for the others."""
    global _team
    if _team is not None:
        with _lost():
            _team.store.add("left", 1)
            while rank() == 0 and _team.store.add("left", 0) < _team.world:
                time.sleep(SLEEP)
        _team = None
        files.set_write_access(True)


def rank() -> int:
    """This process's number; 0 where it works alone."""
    return _team.rank if _team else 0


def world_size() -> int:
    """How many processes divide the work."""
    return _team.world if _team else 1


@contextlib.contextmanager
def task() -> Iterator[None]:
    """Inside, this process works alone and writes what it makes."""
    global _in_task
    _in_task, before = True, _in_task
    try:
        with files.write_access(True):
            yield
    finally:
        _in_task = before


def _together() -> Team | None:
    return None if _in_task else _team


def barrier() -> None:
    """Returns when every rank has come here."""
    if (team := _together()) is None:
        return
    key = _next("barrier")
    with _lost():
        team.store.add(key, 1)
        while team.store.add(key, 0) < team.world:
            time.sleep(SLEEP)


def once(make: Callable[[], T]) -> T:
    """What `make` gives on rank 0, on every rank; tensors on its device arrive on the receiver's own."""
    if (team := _together()) is None:
        return make()
    key = _next("once")
    if team.rank:
        return _receive(key)
    with task():
        value = make()
    _send(key, value)
    return value


def divide_work(work: Callable[[Sequence[int]], Iterator[tuple[int, T]]], count: int) -> Iterator[tuple[int, T]]:
    """Yields (position, result) for positions 0 ... count - 1, of which this rank works on every world-th one.

    work: yields (place, result) for each of the positions it is given, by their places in that list.
    """
    if (team := _together()) is None:
        yield from work(range(count))
        return
    key = _next("shared")
    own = range(team.rank, count, team.world)
    awaited = {position for position in range(count) if position not in own}
    for place, result in work(own):
        _send(f"{key}/{own[place]}", result)
        yield own[place], result
        yield from _arrived(key, awaited)
    while awaited:
        yield from _arrived(key, awaited)
        time.sleep(SLEEP)


def mean(tensors: Sequence[Tensor], count: int) -> list[Tensor]:
    """The tensors' sums over the ranks, in one message, divided by `count`."""
    import torch

    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    if _team is not None:
        _sum(flat)
    parts = (flat / count).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _sum(flat: Tensor) -> None:
    import torch.distributed as dist

    assert _team is not None
    with _lost():
        if not dist.is_initialized():  # late, so that most forks happen before gloo has threads
            backend = "nccl" if flat.is_cuda else "gloo"
            dist.init_process_group(
                backend, store=dist.PrefixStore("sum", _team.store), rank=_team.rank, world_size=_team.world
            )
        dist.all_reduce(flat)


def _next(what: str) -> str:
    assert _team is not None
    _team.exchanges += 1
    return f"{what}{_team.exchanges}"


def _arrived(key: str, awaited: set[int]) -> Iterator[tuple[int, Any]]:
    assert _team is not None
    for position in sorted(awaited):
        with _lost():
            there = _team.store.check([f"{key}/{position}"])
        if there:
            awaited.remove(position)
            yield position, _receive(f"{key}/{position}")


def _send(key: str, value: object) -> None:
    import torch

    assert _team is not None
    buffer = io.BytesIO()
    torch.save(value, buffer)
    data = buffer.getbuffer()
    pieces = [data[start : start + PIECE] for start in range(0, len(data), PIECE)]
    with _lost():
        for number, piece in enumerate(pieces):
            _team.store.set(f"{key}.{number}", bytes(piece))
        _team.store.set(key, pickle.dumps(len(pieces)))


def _receive(key: str) -> Any:
    import torch

    assert _team is not None
    store = _team.store
    with _lost():
        while not store.check([key]):
            time.sleep(SLEEP)
        count = pickle.loads(store.get(key))
        data = b"".join(store.get(f"{key}.{number}") for number in range(count))
        if store.add(f"{key}.read", 1) == _team.world - 1:  # the last one tidies up
            for name in (*(f"{key}.{number}" for number in range(count)), f"{key}.read"):
                store.delete_key(name)
    place = {f"cuda:{i}": f"cuda:{local_rank()}" for i in range(64)} if torch.cuda.is_available() else None
    return torch.load(io.BytesIO(data), map_location=place, weights_only=False)


@contextlib.contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # c10d's and gloo's errors are of this type
        raise RankLostError(str(error).splitlines()[0]) from error


def exit_with_parent(parent: int) -> None:
    """Ends this process by SIGKILL when its parent ends, however that ends: nothing goes on writing (Linux)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
