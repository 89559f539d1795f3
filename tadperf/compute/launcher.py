"""`--devices K`: starts K ranks of this command on this machine and reports one exit code or error for all."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO

from tadperf.compute import ranks
from tadperf.errors import UserError

LOST = 75  # exit code of a rank that ends because another rank ended
GRACE = 2.0  # seconds to wait after the first failure, to find out which rank failed first; not tuned
POLL = 0.02  # seconds; not tuned
LAUNCHER = "TADPERF_LAUNCHER"  # in the environment of a rank: the launcher's process id
# The program of a rank. It takes the current folder off sys.path, because it may hold the sources of tadperf.
COMMAND = "import sys; sys.path = [p for p in sys.path if p]; from tadperf.cli.app import main; main()"


class RankDiedError(RuntimeError):
    """A rank ended without printing the reason."""


def num_ranks(devices: str | None) -> int:
    """Returns the number of ranks to start for `--devices`; 1 without the option, or if this process already is a rank.

    Raises UserError if it is not a positive whole number, or differs from torchrun's number of ranks.
    """
    if devices is None:
        return 1
    if not devices.isdecimal() or int(devices) < 1:
        raise UserError("--devices", devices, "must be a whole number from 1 up")
    world = ranks.environment_world_size()
    if world > 1:
        if int(devices) != world:
            raise UserError("--devices", devices, f"torchrun has started {world} ranks; leave out --devices")
        return 1
    return int(devices)


def follow_launcher() -> None:
    """Makes this process end with its launcher, if a launcher started it."""
    if LAUNCHER in os.environ:
        ranks.exit_with_parent(int(os.environ[LAUNCHER]))


def is_launched() -> bool:
    """Returns whether a launcher started this process; the launcher then prints the reason for a failure."""
    return LAUNCHER in os.environ


def launch_ranks(world: int, arguments: Sequence[str]) -> int:
    """Runs `tadperf` with these arguments in `world` ranks. Returns rank 0's exit code; rank 0 itself prints its error.

    Rank 0 inherits stdout and stderr; of the others only stderr is kept. Ctrl-C and SIGTERM arrive here as
    KeyboardInterrupt and are sent on to all ranks. If a rank ends early, the others are killed and RankDiedError says
    which rank ended and how.
    """
    logs = [tempfile.TemporaryFile() for _ in range(world)]  # noqa: SIM115
    processes: list[subprocess.Popen] = []
    try:
        with _listen() as store:
            for rank in range(world):  # one by one, so that Ctrl-C finds those started so far in the list
                processes.append(_start(rank, world, store, arguments, logs))  # noqa: PERF401
        return _wait(processes, logs)
    except KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for process in processes:
            process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + 10
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            time.sleep(POLL)
        if not processes or processes[0].poll() != 130:
            raise  # rank 0 had no time to print how to continue
        return 130
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _listen() -> socket.socket:
    """Opens the socket of the ranks' store on a free port. Rank 0 inherits it, so no other program takes the port."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(socket.SOMAXCONN)
    return listener


def _start(
    rank: int, world: int, store: socket.socket, arguments: Sequence[str], logs: Sequence[IO[bytes]]
) -> subprocess.Popen:
    environment = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.getsockname()[1],
        LAUNCHER: os.getpid(),
    }
    if rank == 0:
        environment[ranks.STORE_FD] = store.fileno()
    if sys.platform.startswith("linux"):
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments],
        env=os.environ | {name: str(value) for name, value in environment.items()},
        stdout=None if rank == 0 else subprocess.DEVNULL,
        stderr=None if rank == 0 else logs[rank],
        pass_fds=(store.fileno(),) if rank == 0 else (),
        start_new_session=True,  # a terminal's Ctrl-C reaches only the launcher, which sends it on once
    )


def _wait(processes: Sequence[subprocess.Popen], logs: Sequence[IO[bytes]]) -> int:
    """Returns 0 if all ranks succeed, else rank 0's exit code; raises RankDiedError if another rank failed first."""
    failed: list[int] = []
    deadline = float("inf")
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        for rank, process in enumerate(processes):
            if process.poll() and rank not in failed:
                failed.append(rank)
                deadline = min(deadline, time.monotonic() + GRACE)
        if any(rank == 0 or processes[rank].returncode < 0 for rank in failed if processes[rank].returncode != LOST):
            break  # no need to wait: rank 0 has printed the reason, and a killed rank prints none
        time.sleep(POLL)
    failed += [rank for rank, process in enumerate(processes) if process.poll() and rank not in failed]
    if not failed:
        return 0
    leader = processes[0].poll()
    if leader and leader > 0 and leader != LOST:
        return leader  # rank 0 has printed the reason
    rank = next((rank for rank in failed if processes[rank].returncode != LOST), failed[0])
    raise RankDiedError(f"rank {rank} of {len(processes)} {_describe_end(processes[rank].returncode, logs[rank])}")


def _describe_end(code: int, log: IO[bytes]) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()
    return f"failed: {lines[-1].removeprefix('tadperf: ')}" if lines else f"ended with exit code {code}"
