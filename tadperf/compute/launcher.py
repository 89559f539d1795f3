"""`--devices K`: K ranks of this command on this machine, and one clear end for all of them."""

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

LOST = 75  # exit code of a rank that ends because another one did
GRACE = 2.0  # seconds in which ranks that fail alike may all say so, or the one that failed first be found
POLL = 0.02
LAUNCHER = "TADPERF_LAUNCHER"  # in a rank's environment: the launcher's process id
# What runs in a rank. Python puts the current folder first, where the sources of tadperf may lie.
COMMAND = "import sys; sys.path = [p for p in sys.path if p]; from tadperf.cli.app import main; main()"


class RankDiedError(RuntimeError):
    """A rank has ended without saying why itself."""


def num_ranks(devices: str | None) -> int:
    """How many ranks to start for `--devices`: 1 where none are wanted, or where this process is itself a rank.

    Raises UserError where it is no positive whole number, or another one than torchrun's.
    """
    if devices is None:
        return 1
    if not devices.isdecimal() or int(devices) < 1:
        raise UserError("--devices", devices, "must be a whole number from 1 up")
    if ranks.environment_world_size() > 1:
        if int(devices) != ranks.environment_world_size():
            raise UserError(
                "--devices", devices, f"there are {ranks.environment_world_size()} ranks already; leave it out"
            )
        return 1
    return int(devices)


def follow_launcher() -> None:
    """In a rank that a launcher has started: ends with the launcher."""
    if LAUNCHER in os.environ:
        ranks.exit_with_parent(int(os.environ[LAUNCHER]))


def is_launched() -> bool:
    """Whether a launcher has started this process and speaks for it."""
    return LAUNCHER in os.environ


def launch_ranks(world: int, arguments: Sequence[str]) -> int:
    """Runs `tadperf` with these arguments in `world` ranks; returns the exit code that rank 0 has explained itself.

    Rank 0 has this process's output, of the others the last words are kept. Ctrl-C and SIGTERM (as KeyboardInterrupt)
    go to all ranks. Where one ends early the others are killed, and RankDiedError tells which and how.
    """
    words = [tempfile.TemporaryFile() for _ in range(world)]  # noqa: SIM115
    processes: list[subprocess.Popen] = []
    port = _free_port()
    try:
        for rank in range(world):  # one by one, so that those started are known when Ctrl-C comes
            processes.append(_start(rank, world, port, arguments, words))  # noqa: PERF401
        return _wait(processes, words)
    except KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for process in processes:
            process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + 10
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            time.sleep(POLL)
        if processes[0].poll() != 130:
            raise  # it had no time to say how to continue
        return 130
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _start(rank: int, world: int, port: int, arguments: Sequence[str], words: Sequence[IO[bytes]]) -> subprocess.Popen:
    environment = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        LAUNCHER: os.getpid(),
    }
    if sys.platform.startswith("linux"):
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments],
        env=os.environ | {k: str(v) for k, v in environment.items()},
        stdout=None if rank == 0 else subprocess.DEVNULL,
        stderr=None if rank == 0 else words[rank],
        start_new_session=True,  # a terminal's Ctrl-C reaches the launcher alone, which passes it on once
    )


def _wait(processes: Sequence[subprocess.Popen], words: Sequence[IO[bytes]]) -> int:
    """0 when all ranks ended well, or what rank 0 ended with; raises RankDiedError where another one is to blame."""
    failed: list[int] = []
    deadline = float("inf")
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        for rank, process in enumerate(processes):
            if process.poll() and rank not in failed:
                failed.append(rank)
                deadline = min(deadline, time.monotonic() + GRACE)
        if any(rank == 0 or processes[rank].returncode < 0 for rank in failed if processes[rank].returncode != LOST):
            break  # rank 0 has said why, and who was killed says nothing
        time.sleep(POLL)
    failed += [rank for rank, process in enumerate(processes) if process.poll() and rank not in failed]
    if not failed:
        return 0
    own = processes[0].poll()
    if own and own > 0 and own != LOST:
        return own  # and it has said why
    rank = next((rank for rank in failed if processes[rank].returncode != LOST), failed[0])
    raise RankDiedError(f"rank {rank} of {len(processes)} {_end(processes[rank].returncode, words[rank])}")


def _end(code: int, words: IO[bytes]) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    words.seek(0)
    lines = words.read().decode(errors="replace").splitlines()
    return f"failed: {lines[-1].removeprefix('tadperf: ')}" if lines else f"ended with exit code {code}"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
