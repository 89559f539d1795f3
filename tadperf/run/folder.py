"""The run folder: what a run was asked, where it ran, how it went and what came out; safe against a kill at any moment.

runs/<name>/: config.json, env.json, metrics.jsonl, stages.json, experts/, checkpoints, distilled.safetensors, grid.png,
result.json, DONE.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tadperf.compute import ranks
from tadperf.config import Config
from tadperf.config.schema import flatten_sections
from tadperf.errors import UserError
from tadperf.files import has_write_access, to_json_value, write_bytes, write_json
from tadperf.run.environment import describe_environment
from tadperf.run.stage_meter import StageMeter

if TYPE_CHECKING:
    pass

FREE_FIELDS = {"experts.workers"}  # may differ in a resumed run: they change no result
SAVE_STAGES_EVERY = 10.0  # seconds; a kill loses at most this much of a stage's measured time


def check_run_folder(path: Path | str, resume: bool) -> None:
    """Raises UserError where a run cannot be created (or, with `resume`, continued) at `path`; changes nothing."""
    path = Path(path)
    if resume:
        if not path.is_dir():
            raise UserError("--resume", path, "there is no such run folder; leave out --resume to start it")
        if not (path / "config.json").exists() and any(not entry.name.startswith(".") for entry in path.iterdir()):
            raise UserError("--resume", path, "is not a run folder: there is no config.json in it; check --out")
    elif path.exists() or path.is_symlink():
        raise UserError("--out", path, "exists already; continue that run with --resume, or choose another folder")
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError("--out", path, f"{nearest} is not a folder that can be written; choose another with --out")


def stored_config(path: Path | str) -> Config | None:
    """The config that the run at `path` was started with; None where it was killed before it could write it."""
    from pydantic import ValidationError

    file = Path(path) / "config.json"
    if not file.exists():
        return None
    try:
        return Config.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise UserError("--resume", file, f"{what}; it was written by another tadperf, or by hand") from None


def finished_result(path: Path | str, config: Config) -> dict[str, Any] | None:
    """The result of the run at `path`, or None where it is not done; raises UserError if it ran another config."""
    path = Path(path)
    stored = stored_config(path)
    if stored is None or not (path / "DONE").exists():
        return None
    _refuse_change(path, stored, config)
    return json.loads((path / "result.json").read_bytes())


@dataclass
class Run:
    """One run folder, locked for this process. Made by `Run.create`."""

    path: Path
    config: Config
    _lock: int
    _metrics: TextIO = field(init=False)
    _stages: dict[str, dict[str, float]] = field(init=False)
    _stage: StageMeter | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._metrics = _open_metrics(self.path / "metrics.jsonl")
        stages = self.path / "stages.json"
        self._stages = json.loads(stages.read_bytes()) if stages.exists() else {}

    @classmethod
    def create(cls, path: Path | str, config: Config, resume: bool = False) -> Run:
        """Makes the folder of a new run, or with `resume` opens that of a killed one.

        Of several ranks, rank 0 opens it and the others only look on. Raises UserError where a new run's folder exists,
        cannot be written or is in use by another process, and where a resumed run was started with another config.
        """
        path = Path(path)
        if not has_write_access():
            ranks.barrier()
            return RunReader(path, config, -1)
        check_run_folder(path, resume)
        stored = stored_config(path) if resume else None
        if stored is not None:
            _refuse_change(path, stored, config)
        env = describe_environment(config.device)
        try:
            path.mkdir(parents=True, exist_ok=resume)
            lock = _lock(path)
            for leftover in path.rglob(".*.tmp"):
                leftover.unlink(missing_ok=True)
            if stored is None:  # first of all, so that a run killed at once can be resumed
                write_json(path / "config.json", config.model_dump(mode="json"))
            _write_environment(path / "env.json", env)
            run = cls(path, config, lock)
            ranks.barrier()
            return run
        except OSError as error:
            raise UserError("--out", path, f"cannot be written: {error.strerror}; choose another with --out") from None

    def log(self, stage: str, step: int, **values: Any) -> None:
        """Appends one record to metrics.jsonl; it is on its way to the disk when this returns."""
        self._metrics.write(json.dumps(to_json_value({"stage": stage, "step": step, **values}), allow_nan=False) + "\n")
        if self._stage is not None and time.monotonic() - self._stage.saved > SAVE_STAGES_EVERY:
            self._save_stage(self._stage)

    def rewind(self, stage: str, step: int) -> None:
        """Drops the records of `stage` later than `step`: a resumed stage will write them again."""
        file = self.path / "metrics.jsonl"
        self._metrics.close()
        records = file.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in records if (record := json.loads(line))["stage"] != stage or record["step"] <= step]
        write_bytes(file, "".join(kept).encode())
        self._metrics = _open_metrics(file)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures a stage: wall seconds, adding up over resumes, and the peak memory of its largest process.

        On CUDA also the peak of the memory that PyTorch allocated there. Kept in stages.json.
        """
        assert self._stage is None, "stages do not nest"
        self._stage = stage = StageMeter(name, dict(self._stages.get(name, {})))
        try:
            yield
        finally:
            self._save_stage(stage)
            self._stage = None

    def _save_stage(self, stage: StageMeter) -> None:
        self._stages[stage.name] = stage.measured()
        write_json(self.path / "stages.json", self._stages)

    def stages(self) -> dict[str, dict[str, float]]:
        """Seconds, peak_memory_mb and, where CUDA was used, peak_cuda_mb of every stage so far (MB = 2**20 bytes)."""
        return {name: dict(values) for name, values in self._stages.items()}

    def finish(self, result: dict[str, Any]) -> None:
        """Writes result.json, and DONE after it."""
        write_json(self.path / "result.json", result)
        write_bytes(self.path / "DONE", b"")

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the metrics and lets other processes have the folder."""
        self._metrics.close()
        if self._lock in _held_locks:
            _held_locks.remove(self._lock)
            os.close(self._lock)


class RunReader(Run):
    """The run folder as ranks other than 0 have it: they read what is there and write nothing."""

    def __post_init__(self) -> None:
        self._metrics = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        self._stages = {}

    def rewind(self, stage: str, step: int) -> None:
        pass


def _open_metrics(path: Path) -> TextIO:
    """Opens metrics.jsonl to append, without the torn last line that a kill can leave."""
    data = path.read_bytes() if path.exists() else b""
    if data and not data.endswith(b"\n"):
        write_bytes(path, data[: data.rfind(b"\n") + 1])
    return open(path, "a", buffering=1, encoding="utf-8")


def _refuse_change(path: Path, stored: Config, config: Config) -> None:
    before, now = (flatten_sections(c.model_dump(mode="json")) for c in (stored, config))
    for name, value in now.items():
        if value != before[name] and name not in FREE_FIELDS:
            remedy = f"the run in {path} was started with {before[name]}; leave it so, or start another with --out"
            raise UserError(name, value, remedy)


def _write_environment(path: Path, env: dict[str, Any]) -> None:
    """The first process of a run describes itself; each later one is added under "resumed"."""
    if path.exists():
        first = json.loads(path.read_bytes())
        env = {**first, "resumed": [*first.get("resumed", []), env]}
    write_json(path, env)


_held_locks: set[int] = set()


def _lock(path: Path) -> int:
    """Takes the folder for this process; the system gives it back when the process ends, however it ends."""
    descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError("--out", path, "another process is running there; wait for it, or choose another") from None
    except OSError:  # some network file systems have no locks
        pass
    _held_locks.add(descriptor)
    return descriptor


def _drop_locks() -> None:
    """A forked worker must not keep the folder locked when its parent is killed."""
    while _held_locks:
        os.close(_held_locks.pop())


os.register_at_fork(after_in_child=_drop_locks)
