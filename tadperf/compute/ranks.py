"""Ranks: processes that share one job, one per device, in torchrun's environment.

Every rank runs the same program on the same data. Ranks divide independent work (`divide_work`); rank 0 alone makes
decisions (`once`) and writes to the run folder, which all ranks see. A rank that runs a task for all ranks writes the
file of that task itself. Results travel through torchrun's key-value store. Ranks poll it, so waits never time out and
can be interrupted with Ctrl-C. Only sums over large tensors use gloo or NCCL. With a single process these functions do
nothing.
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
CHUNK_BYTES = 4 << 20  # largest message to the store, which refuses more than 8 MiB
POLL_SECONDS = 0.005  # not tuned
PR_SET_PDEATHSIG = 1
STORE_FD = "TADPERF_STORE_FD"  # in the environment of a launched rank 0: the listening socket of the store


class RankLostError(RuntimeError):
    """The connection to the other ranks failed, for example because one of them died."""


@dataclass
class Team:
    """The ranks of one job, as one of them sees it after `join`."""

    rank: int
    world: int
    store: Any  # torch.distributed.Store
    has_group: bool = False  # whether `_all_reduce` has made the process group
    exchanges: int = 0  # numbers the keys; the same on every rank, because all ranks run the same program


# A process is in at most one job of several ranks, like PyTorch's default process group, so both values belong to the
# process. `join` and `leave` set the first, `working_alone` the second; all other functions only read them.
_team: Team | None = None
_alone = False


def environment_rank() -> int:
    """Returns the rank that the environment names, also before `join`; 0 if it names none."""
    return int(os.environ.get("RANK", 0)) if environment_world_size() > 1 else 0


def environment_world_size() -> int:
    """Returns the number of ranks that the environment names, also before `join`; 1 if it names none."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "MASTER_ADDR" in os.environ else 1


def local_rank() -> int:
    """Returns this process's number among the ranks of its machine, which is the number of its device."""
    return int(os.environ.get("LOCAL_RANK", 0)) if _team else 0


def local_world_size() -> int:
    """Returns the number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if _team else 1


def join() -> None:
    """Connects to the other ranks that the environment names. Before that, a process works alone.

    Raises RankLostError if the store of rank 0 cannot be opened or reached.
    """
    global _team
    if _team is not None or environment_world_size() == 1:
        return
    try:
        _team = _connect()
    except (RuntimeError, ValueError, OSError) as error:  # a port in use, a wrong address or a missing variable
        address = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '')}"
        reason = str(error).splitlines()[0]
        message = f"cannot connect the ranks at {address}: {reason}; check MASTER_ADDR, or choose another MASTER_PORT"
        raise RankLostError(message) from error
    files.set_write_access(_team.rank == 0)
    barrier()


def _connect() -> Team:
    from torch.distributed import TCPStore, rendezvous

    if STORE_FD not in os.environ:
        store, rank, world = next(rendezvous("env://"))
        return Team(rank, world, store)
    world, socket = environment_world_size(), int(os.environ.pop(STORE_FD))  # the store owns the socket from here
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return Team(0, world, TCPStore(*address, world, is_master=True, wait_for_workers=False, master_listen_fd=socket))


def leave() -> None:
    """Ends the common work. Rank 0, which may hold the store, waits for the other ranks."""
    global _team
    if _team is not None:
        _destroy_group(_team)
        with _errors_as_lost_rank():
            _team.store.add("left", 1)
            while rank() == 0 and _team.store.add("left", 0) < _team.world:
                time.sleep(POLL_SECONDS)
        _team = None
        files.set_write_access(True)


def _destroy_group(team: Team) -> None:
    """Ends the connections of `_all_reduce`, if it made any. Otherwise NCCL prints a warning when Python exits."""
    if team.has_group:
        import torch.distributed as dist

        barrier()  # no rank still waits for a message
        with _errors_as_lost_rank():
            dist.destroy_process_group()
        team.has_group = False


def rank() -> int:
    """Returns the number of this process; 0 if it works alone."""
    return _team.rank if _team else 0


def world_size() -> int:
    """Returns the number of processes that share the work."""
    return _team.world if _team else 1


@contextlib.contextmanager
def working_alone() -> Iterator[None]:
    """Inside the block this process exchanges nothing with other ranks and may write files."""
    global _alone
    _alone, before = True, _alone
    try:
        with files.write_access(True):
            yield
    finally:
        _alone = before


def _active_team() -> Team | None:
    return None if _alone else _team


def barrier() -> None:
    """Returns when every rank has called it."""
    if (team := _active_team()) is None:
        return
    key = _next_key(team, "barrier")
    with _errors_as_lost_rank():
        team.store.add(key, 1)
        while team.store.add(key, 0) < team.world:
            time.sleep(POLL_SECONDS)


def once(make: Callable[[], T]) -> T:
    """Calls `make` on rank 0 and returns its result on every rank; CUDA tensors arrive on the receiver's device."""
    if (team := _active_team()) is None:
        return make()
    key = _next_key(team, "once")
    if team.rank:
        return _receive(team, key)
    with working_alone():
        value = make()
    _send(team, key, value)
    return value


def assigned(count: int) -> range:
    """Returns the positions of `count` items that this rank works on in `divide_work`."""
    team = _active_team()
    return range(count) if team is None else range(team.rank, count, team.world)


def divide_work(work: Callable[[Sequence[int]], Iterator[tuple[int, T]]], count: int) -> Iterator[tuple[int, T]]:
    """Yields (position, result) for positions 0 to count - 1. Each rank works on every `world_size`-th position.

    work: takes a list of positions; yields (index into this list, result) for each of them, in any order.
    """
    if (team := _active_team()) is None:
        yield from work(range(count))
        return
    key = _next_key(team, "shared")
    own = assigned(count)
    awaited = {position for position in range(count) if position not in own}
    for index, result in work(own):
        _send(team, f"{key}/{own[index]}", result)
        yield own[index], result
        yield from _arrived(team, key, awaited)
    while awaited:
        yield from _arrived(team, key, awaited)
        time.sleep(POLL_SECONDS)


def mean(tensors: Sequence[Tensor], count: int) -> list[Tensor]:
    """Sums each tensor over the ranks, all in one message, and divides it by `count`."""
    import torch

    packed = torch.cat([tensor.reshape(-1) for tensor in tensors])
    if _team is not None:
        _all_reduce(_team, packed)
    parts = (packed / count).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _all_reduce(team: Team, values: Tensor) -> None:
    import torch.distributed as dist

    with _errors_as_lost_rank():
        if not dist.is_initialized():  # as late as possible: most forks then happen before gloo starts its threads
            backend = "nccl" if values.is_cuda else "gloo"
            store = dist.PrefixStore("sum", team.store)
            dist.init_process_group(backend, store=store, rank=team.rank, world_size=team.world)
            team.has_group = True
        dist.all_reduce(values)


def _next_key(team: Team, purpose: str) -> str:
    team.exchanges += 1
    return f"{purpose}{team.exchanges}"


def _arrived(team: Team, key: str, awaited: set[int]) -> Iterator[tuple[int, Any]]:
    """Yields the results of other ranks that are in the store, and removes their positions from `awaited`."""
    for position in sorted(awaited):
        with _errors_as_lost_rank():
            arrived = team.store.check([f"{key}/{position}"])
        if arrived:
            awaited.remove(position)
            yield position, _receive(team, f"{key}/{position}")


def _send(team: Team, key: str, value: object) -> None:
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    data = buffer.getbuffer()
    chunks = [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]
    with _errors_as_lost_rank():
        for number, chunk in enumerate(chunks):
            team.store.set(f"{key}.{number}", bytes(chunk))
        team.store.set(key, pickle.dumps(len(chunks)))


def _receive(team: Team, key: str) -> Any:
    import torch

    store = team.store
    with _errors_as_lost_rank():
        while not store.check([key]):
            time.sleep(POLL_SECONDS)
        count = pickle.loads(store.get(key))
        data = b"".join(store.get(f"{key}.{number}") for number in range(count))
        if store.add(f"{key}.read", 1) == team.world - 1:  # the last reader deletes the value
            for name in (*(f"{key}.{number}" for number in range(count)), f"{key}.read"):
                store.delete_key(name)
    devices = {f"cuda:{i}": f"cuda:{local_rank()}" for i in range(64)} if torch.cuda.is_available() else None
    return torch.load(io.BytesIO(data), map_location=devices, weights_only=False)


@contextlib.contextmanager
def _errors_as_lost_rank() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # the type of c10d's and gloo's errors
        raise RankLostError(f"lost the connection to the other ranks: {str(error).splitlines()[0]}") from error


def exit_with_parent(parent: int) -> None:
    """Makes the system kill this process when its parent ends for any reason, so that it stops writing. Linux only.

    parent: process id of the expected parent. If the process has another parent by now, it ends at once.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
