"""The run folder: config, environment, metrics, stages and results of a run. A kill at any moment leaves it usable.

runs/<name>/: config.json, env.json, metrics.jsonl, stages.json, experts/, checkpoints, distilled.safetensors, grid.png,
result.json, DONE.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from tadperf.compute import ranks
from tadperf.config import Config
from tadperf.config.schema import config_from_json, config_to_json, flatten_sections
from tadperf.errors import UserError
from tadperf.files import has_write_access, to_json_value, write_bytes, write_json
from tadperf.progress import Progress
from tadperf.run.environment import describe_environment
from tadperf.run.stage_meter import StageMeter

FREE_FIELDS = {"experts.workers"}  # may differ in a resumed run, because they change no result
# Seconds; `log` and the calls of progress save the measured time this often. A kill loses the time since the last
# save. Not tuned.
SAVE_STAGES_EVERY = 10.0


def check_run_folder(path: Path | str, resume: bool) -> None:
    """Raises UserError if a run cannot be created at `path`, or with `resume` continued there. Changes nothing.

    A finished run is only read, so its folder may be read-only.
    """
    path = Path(path)
    if resume:
        if not path.is_dir():
            raise UserError("--resume", path, "there is no such run folder; leave out --resume to start it")
        if not (path / "config.json").exists() and any(not entry.name.startswith(".") for entry in path.iterdir()):
            raise UserError("--resume", path, "is not a run folder: it has no config.json; check --out")
        if not (path / "DONE").exists() and not os.access(path, os.W_OK | os.X_OK):
            raise UserError("--resume", path, "cannot be written; change its permissions, or resume a copy of it")
        return
    if path.exists() or path.is_symlink():
        raise UserError("--out", path, "exists already; continue that run with --resume, or choose another folder")
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError("--out", path, f"{nearest} is not a folder that can be written; choose another with --out")


def stored_config(path: Path | str) -> Config | None:
    """Returns the config that the run at `path` was started with; None if it was killed before it wrote the config.

    Raises UserError if config.json is damaged.
    """
    file = Path(path) / "config.json"
    return config_from_json(file.read_bytes(), "--resume", file) if file.exists() else None


def finished_result(path: Path | str, config: Config) -> dict[str, Any] | None:
    """Returns the result of the run at `path`; None if the run is not finished. Only reads.

    Raises UserError if the run has another config, or if its result is damaged.
    """
    path = Path(path)
    stored = stored_config(path)
    if stored is None or not (path / "DONE").exists():
        return None
    check_unchanged(path, stored, config)
    return read_json(path / "result.json", "delete the file DONE beside it, then use --resume to write it again")


class Run:
    """One run folder, locked for this process. Use `Run.create`, as a context manager.

    A process without write access, which is every rank but rank 0, has no lock and writes nothing. Its stages are
    measured but not saved.
    """

    def __init__(self, path: Path, config: Config, lock: int | None) -> None:
        """lock: the descriptor of the locked file; None in a process that writes nothing."""
        self.path, self.config, self._lock = path, config, lock
        self._metrics: TextIO | None = None
        self._stages: dict[str, dict[str, Any]] = {}
        self._stage: StageMeter | None = None
        self._saving = threading.Lock()
        if lock is not None:
            stages = path / "stages.json"
            if stages.exists():
                self._stages = read_json(stages, "delete it; the measured times of earlier stages are lost")
            self._metrics = _open_metrics(path / "metrics.jsonl")

    @classmethod
    def create(cls, path: Path | str, config: Config, resume: bool = False) -> Run:
        """Creates the folder of a new run and locks it; with `resume`, opens the folder of an unfinished run.

        Raises UserError if a new run's folder exists, cannot be written or is in use by another process; if a resumed
        run was started with another config; and if one of its files is damaged.
        """
        path = Path(path)
        if not has_write_access():
            ranks.barrier()
            return cls(path, config, None)
        check_run_folder(path, resume)
        stored = stored_config(path) if resume else None
        if stored is not None:
            check_unchanged(path, stored, config)
        environment = describe_environment(config.device)
        lock = None
        try:
            path.mkdir(parents=True, exist_ok=resume)
            lock = _lock(path)
            for leftover in path.rglob(".*.tmp"):
                leftover.unlink(missing_ok=True)
            if stored is None:  # the first file, so that a run that is killed at once can be resumed
                write_json(path / "config.json", config_to_json(config))
            _write_environment(path / "env.json", environment)
            run = cls(path, config, lock)
            ranks.barrier()
            return run
        except BaseException as error:
            _unlock(lock)
            if not isinstance(error, OSError):
                raise
            raise UserError("--out", path, f"cannot be written: {error.strerror}; choose another with --out") from None

    def log(self, stage: str, step: int, **values: Any) -> None:
        """Appends one record to metrics.jsonl and hands it to the operating system before it returns."""
        if self._metrics is not None:
            record = to_json_value({"stage": stage, "step": step, **values})
            try:
                self._metrics.write(json.dumps(record, allow_nan=False) + "\n")
            except OSError as error:  # a full disk; the error of `write` has no file name
                raise OSError(error.errno, error.strerror, self._metrics.name) from None
        self._save_time()

    def saving_time(self, progress: Progress) -> Progress:
        """Returns `progress` so that its calls also save the time of the running stage, at most every 10 s."""

        def report(stage: str, done: int, total: int, **values: object) -> None:
            progress(stage, done, total, **values)
            with contextlib.suppress(OSError):  # a full disk: the next checkpoint says so, a progress line ends no run
                self._save_time()

        return report

    def _save_time(self) -> None:
        stage = self._stage
        if stage is not None and time.monotonic() - stage.saved > SAVE_STAGES_EVERY:
            self._save_stage(stage)

    def rewind(self, stage: str, step: int) -> None:
        """Deletes the records of `stage` after `step`, because a resumed stage writes them again."""
        if self._metrics is None:
            return
        file = self.path / "metrics.jsonl"
        self._metrics.close()
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        write_bytes(file, "".join(line for line in lines if not _is_after(line, stage, step, file)).encode())
        self._metrics = _open_metrics(file)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures the stage inside the block and saves its values in stages.json.

        The values are wall seconds, summed over resumed processes; the peak memory of the stage's largest process; and
        with CUDA the peak memory that PyTorch allocated on one device; and how often each operator ran which code.
        """
        assert self._stage is None, "stages do not nest"
        self._stage = stage = StageMeter(name, dict(self._stages.get(name, {})))
        try:
            yield
        finally:
            self._save_stage(stage)
            self._stage = None

    def _save_stage(self, stage: StageMeter) -> None:
        with self._saving:  # a thread may report progress while this one ends the stage
            self._stages[stage.name] = stage.measured()
            write_json(self.path / "stages.json", self._stages)

    def stages(self) -> dict[str, dict[str, Any]]:
        """Returns the values of `StageMeter.measured` for each stage so far."""
        return {name: dict(values) for name, values in self._stages.items()}

    def finish(self, result: dict[str, Any]) -> None:
        """Writes result.json, and then the empty file DONE."""
        write_json(self.path / "result.json", result)
        write_bytes(self.path / "DONE", b"")

    def close(self) -> None:
        """Closes metrics.jsonl and unlocks the folder."""
        if self._metrics is not None:
            with contextlib.suppress(OSError):  # on a full disk; `log` has raised the same error before
                self._metrics.close()
        _unlock(self._lock)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _open_metrics(path: Path) -> TextIO:
    """Opens metrics.jsonl for appending. First removes an incomplete last line, which a kill can leave behind."""
    data = path.read_bytes() if path.exists() else b""
    if data and not data.endswith(b"\n"):
        write_bytes(path, data[: data.rfind(b"\n") + 1])
    return open(path, "a", buffering=1, encoding="utf-8")


def _is_after(line: str, stage: str, step: int, file: Path) -> bool:
    """Returns whether a line of metrics.jsonl belongs to `stage` and is later than `step`."""
    try:
        record = json.loads(line)
        return record["stage"] == stage and record["step"] > step
    except (ValueError, KeyError, TypeError):
        remedy = f"has a damaged line: {line.strip()[:40]!r}; delete this line, then use --resume"
        raise UserError("--resume", file, remedy) from None


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Reads a JSON object; raises UserError with `remedy` if the file is damaged."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError("--resume", path, f"is missing; {remedy}") from None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError("--resume", path, f"is damaged; {remedy}")
    return value


def check_unchanged(path: Path, stored: Config, config: Config) -> None:
    """Raises UserError if `config` differs from the config that the run was started with."""
    before, now = (flatten_sections(c.model_dump(mode="json")) for c in (stored, config))
    for name, value in now.items():
        if value != before[name] and name not in FREE_FIELDS:
            remedy = f"the run in {path} was started with {before[name]}; use that, or start a new run with --out"
            raise UserError(name, value, remedy, topic="resume")


def _write_environment(path: Path, environment: dict[str, Any]) -> None:
    """Writes env.json: the first process describes itself; later processes are added under "resumed"."""
    if path.exists():
        first = read_json(path, "delete it; the description of the first process is lost")
        environment = {**first, "resumed": [*first.get("resumed", []), environment]}
    write_json(path, environment)


# Descriptors of the locks that this process holds. A forked worker inherits them, and an inherited lock would keep the
# folder locked after the parent was killed. So every child of a fork closes them first (`os.register_at_fork` below).
_held_locks: set[int] = set()


def _lock(path: Path) -> int:
    """Locks the folder for this process; the system unlocks it when the process ends for any reason."""
    descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        remedy = "another process is running there; wait until it ends, or choose another folder"
        raise UserError("--out", path, remedy) from None
    except OSError:  # some network file systems have no locks
        pass
    _held_locks.add(descriptor)
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock in _held_locks:
        _held_locks.remove(lock)
        os.close(lock)


def _close_inherited_locks() -> None:
    while _held_locks:
        os.close(_held_locks.pop())


os.register_at_fork(after_in_child=_close_inherited_locks)
