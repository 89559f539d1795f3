"""The run folder: atomic files, refused folders and files, resume after a kill, measured stages."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tadperf.config.merge import merge
from tadperf.errors import UserError
from tadperf.files import load_tensors, save_tensors, write_bytes, write_json
from tadperf.run import folder
from tadperf.run.folder import Run, finished_result, stored_config

CONFIG = merge("digits")
TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3).T,  # not contiguous
    "a": torch.tensor([1, 2], dtype=torch.int64),
    "c": torch.ones(3, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 2),
}


def records(run: Run) -> list[dict[str, Any]]:
    """Returns the records of metrics.jsonl."""
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def test_files_follow_the_umask_and_no_temporary_file_remains(tmp_path):
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a", b"one", b"two")
        save_tensors(tmp_path / "t", TENSORS)
    finally:
        os.umask(before)
    assert (tmp_path / "a").read_bytes() == b"onetwo"
    assert [stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()] == [0o640, 0o640]
    assert {path.name for path in tmp_path.iterdir()} == {"a", "t"}


def test_a_failed_write_keeps_the_old_file(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"x": 1})
    with pytest.raises(TypeError):
        write_bytes(file, b"new", cast(Any, "not bytes"))
    assert json.loads(file.read_text()) == {"x": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_a_kill_while_writing_never_leaves_half_a_file(tmp_path):
    file = tmp_path / "a"
    script = f"""
from tadperf.files import write_bytes
print("ready", flush=True)
while True:
    for letter in (b"x", b"y"):
        write_bytes({str(file)!r}, letter * 3_000_000)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    for _ in range(20):
        time.sleep(0.01)
        data = file.read_bytes() if file.exists() else b""
        assert len(data) in (0, 3_000_000)
    process.kill()
    process.wait()
    assert file.read_bytes() in (b"x" * 3_000_000, b"y" * 3_000_000)


def test_json_files_contain_no_nan_and_no_infinity(tmp_path):
    value = {"nan": float("nan"), "tensor": torch.tensor([1.5, float("inf")]), "path": Path("a/b"), "tuple": (1, True)}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"nan": None, "tensor": [1.5, None], "path": "a/b", "tuple": [1, True]}


def test_tensors_and_metadata_are_read_as_written(tmp_path):
    file = tmp_path / "t.safetensors"
    save_tensors(file, TENSORS, {"who": "tadperf", "é": '{"a": "\\n"}'})
    tensors, metadata = load_tensors(file)
    assert metadata == {"who": "tadperf", "é": '{"a": "\\n"}'}
    for name, tensor in load_file(file).items():  # the reader of safetensors
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])
        assert torch.equal(tensor, tensors[name])


@settings(max_examples=25)
@given(st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=2), st.randoms())
def test_equal_tensors_and_metadata_give_equal_bytes(tmp_path_factory, metadata, random):
    folder = tmp_path_factory.getbasetemp()
    save_tensors(folder / "one", TENSORS, metadata)
    pairs, names = list(metadata.items()), list(TENSORS)
    random.shuffle(pairs)
    random.shuffle(names)
    save_tensors(folder / "two", {name: TENSORS[name].clone() for name in names}, dict(pairs))
    assert (folder / "one").read_bytes() == (folder / "two").read_bytes()
    assert load_tensors(folder / "one")[1] == metadata


@pytest.mark.parametrize("keep", [0, 7, 40, -1])
def test_a_damaged_tensor_file_is_refused(tmp_path, keep):
    file = tmp_path / "t.safetensors"
    save_tensors(file, TENSORS)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"^file: .*t.safetensors: truncated, or not a safetensors file"):
        load_tensors(file)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_tensors(tmp_path / "none")
    with pytest.raises(UserError, match=r"^file: "):
        load_tensors(tmp_path)


def test_a_new_run_stores_its_config_and_environment(tmp_path):
    with Run.create(tmp_path / "deep" / "run", CONFIG) as run:
        stored = stored_config(run.path)
        env = json.loads((run.path / "env.json").read_text())
    assert stored == CONFIG
    assert env["versions"]["torch"] == torch.__version__
    assert env["argv"] == sys.argv
    assert env["threads"] == torch.get_num_threads()
    assert env["device"] == "auto"
    assert time.strftime("%Y-%m-%d") in env["date"] or time.strftime("%H:%M") == "00:00"


def test_an_existing_folder_is_refused_and_not_changed(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    for resume, field in ((False, "--out"), (True, "--resume")):
        with pytest.raises(UserError) as caught:
            Run.create(tmp_path, CONFIG, resume)
        assert caught.value.field == field
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_resume_needs_a_folder(tmp_path):
    with pytest.raises(UserError, match="there is no such run folder"):
        Run.create(tmp_path / "run", CONFIG, resume=True)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^--out: .*not a folder that can be written"):
        Run.create(tmp_path / "file" / "run", CONFIG)
    if os.geteuid() != 0:  # root can write everywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(UserError, match="can be written"):
            Run.create(tmp_path / "locked" / "run", CONFIG)
    with pytest.raises(UserError, match="cannot be written"):
        Run.create("/proc/run", CONFIG)


def test_a_resumed_run_must_have_the_same_config(tmp_path):
    Run.create(tmp_path / "run", CONFIG).close()
    changed = merge(sets=["match.ipc=1"], base=CONFIG)
    with pytest.raises(UserError, match=r"^match.ipc: 1: the run in .* was started with 10"):
        Run.create(tmp_path / "run", changed, resume=True)
    Run.create(tmp_path / "run", merge(sets=["experts.workers=3"], base=CONFIG), resume=True).close()
    assert stored_config(tmp_path / "run") == CONFIG
    assert len(json.loads((tmp_path / "run" / "env.json").read_text())["resumed"]) == 1


def test_a_damaged_config_is_refused(tmp_path):
    Run.create(tmp_path / "run", CONFIG).close()
    (tmp_path / "run" / "config.json").write_text('{"seed": -1}')
    with pytest.raises(UserError, match=r"^--resume: .*config.json: seed: "):
        Run.create(tmp_path / "run", CONFIG, resume=True)


def test_a_run_without_a_schema_version_opens_and_a_newer_one_is_refused(tmp_path):
    Run.create(tmp_path / "run", CONFIG).close()
    file = tmp_path / "run" / "config.json"
    values = json.loads(file.read_text())
    assert values.pop("schema") == 1
    for name in ("image_column", "label_column"):  # fields that an old run does not have
        del values["data"][name]
    file.write_text(json.dumps(values))
    assert stored_config(tmp_path / "run") == CONFIG
    Run.create(tmp_path / "run", CONFIG, resume=True).close()
    file.write_text(json.dumps({**values, "schema": 2}))
    with pytest.raises(UserError, match=r"^--resume: .*config.json: has schema version 2"):
        Run.create(tmp_path / "run", CONFIG, resume=True)


def test_a_run_killed_before_its_first_file_can_be_resumed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / ".config.json.ab.tmp").touch()
    with Run.create(tmp_path / "run", CONFIG, resume=True) as run:
        assert stored_config(run.path) == CONFIG
    assert not list(run.path.glob(".*.tmp"))


def test_two_processes_cannot_share_a_folder(tmp_path):
    script = f"""
import os, sys, time
from tadperf.config.merge import merge
from tadperf.run.folder import Run
run = Run.create({str(tmp_path / "run")!r}, merge("digits"))
if os.fork() == 0:  # a worker that outlives its parent must not keep the folder locked
    print("locked", flush=True)
    time.sleep(60)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match=r"^--out: .*: another process is running there"):
            Run.create(tmp_path / "run", CONFIG, resume=True)
        process.kill()
        process.wait()
        Run.create(tmp_path / "run", CONFIG, resume=True).close()
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_metrics_survive_an_incomplete_line_and_a_rewind(tmp_path):
    with Run.create(tmp_path / "run", CONFIG) as run:
        run.log("experts", 9, accuracy=0.5)
        for step in range(4):
            run.log("matching", step, loss=float("nan") if step == 1 else torch.tensor(step / 2))
        assert [r["step"] for r in records(run)] == [9, 0, 1, 2, 3]  # readable during the run
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "matching", "st')
    with Run.create(run.path, CONFIG, resume=True) as run:
        assert len(records(run)) == 5
        run.rewind("matching", 1)
        run.log("matching", 2, loss=7)
    assert records(run) == [
        {"stage": "experts", "step": 9, "accuracy": 0.5},
        {"stage": "matching", "step": 0, "loss": 0.0},
        {"stage": "matching", "step": 1, "loss": None},
        {"stage": "matching", "step": 2, "loss": 7},
    ]


def test_the_result_of_a_finished_run_can_be_read(tmp_path):
    with Run.create(tmp_path / "run", CONFIG) as run:
        assert finished_result(run.path, CONFIG) is None
        run.finish({"accuracy": 0.5})
    assert finished_result(run.path, CONFIG) == {"accuracy": 0.5}
    with pytest.raises(UserError, match=r"^seed: 1: "):
        finished_result(run.path, merge(sets=["seed=1"], base=CONFIG))


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\x00"])
def test_damaged_files_are_refused_in_one_line(tmp_path, text):
    with Run.create(tmp_path / "run", CONFIG) as run:
        run.log("experts", 1)
        with run.stage("experts"):
            pass
        run.finish({"accuracy": 0.5})

    def read_and_resume() -> None:
        finished_result(run.path, CONFIG)
        Run.create(run.path, CONFIG, resume=True)

    for name in ("config.json", "stages.json", "env.json", "result.json"):
        file = run.path / name
        before = file.read_bytes()
        file.write_text(text)
        with pytest.raises(UserError, match=rf"^--resume: .*{name}: ") as caught:
            read_and_resume()
        assert "\n" not in str(caught.value)
        file.write_bytes(before)
    Run.create(run.path, CONFIG, resume=True).close()  # the failed attempts have unlocked the folder


@pytest.mark.parametrize("line", ["{", "[]", '{"stage": "matching"}', '{"stage": "matching", "step": "x"}'])
def test_a_damaged_line_of_the_metrics_is_refused(tmp_path, line):
    with Run.create(tmp_path / "run", CONFIG) as run:
        run.log("matching", 1)
        with open(run.path / "metrics.jsonl", "a") as file:
            file.write(line + "\n")
        with pytest.raises(UserError, match=r"^--resume: .*metrics.jsonl: has a damaged line: '.*'; delete this line"):
            run.rewind("matching", 0)


def test_a_missing_result_is_refused(tmp_path):
    with Run.create(tmp_path / "run", CONFIG) as run:
        run.finish({})
    (run.path / "result.json").unlink()
    with pytest.raises(UserError, match=r"result.json: is missing; delete the file DONE beside it"):
        finished_result(run.path, CONFIG)


def test_a_failed_start_unlocks_the_folder(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "write_json", full)
    with pytest.raises(UserError, match=r"^--out: .*: cannot be written: No space left on device"):
        Run.create(tmp_path / "run", CONFIG)
    monkeypatch.undo()
    Run.create(tmp_path / "run", CONFIG, resume=True).close()
    assert not folder._held_locks


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a file on a full disk")
def test_the_error_for_a_full_disk_names_the_file(tmp_path):
    with Run.create(tmp_path / "run", CONFIG) as run:
        assert run._metrics is not None
        run._metrics.close()
        run._metrics = open("/dev/full", "a", buffering=1)  # noqa: SIM115
        with pytest.raises(OSError, match="No space left on device") as caught:
            run.log("matching", 1)
        assert caught.value.filename == "/dev/full"
    Run.create(tmp_path / "run", CONFIG, resume=True).close()  # the folder was unlocked


def test_a_failed_write_names_its_file(tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*result.json'$"):
        write_json(tmp_path / "result.json", {})
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match=r"No such file or directory: '.*absent/a'$"):
        write_bytes(tmp_path / "absent" / "a", b"")


def test_the_result_of_a_finished_run_can_be_read_in_a_read_only_folder(tmp_path, monkeypatch):
    with Run.create(tmp_path / "run", CONFIG) as run:
        run.finish({"accuracy": 0.5})
    times = {path: path.stat().st_mtime_ns for path in [run.path, *run.path.iterdir()]}
    run.path.chmod(0o500)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root ignores the mode
    try:
        folder.check_run_folder(run.path, resume=True)
        assert finished_result(run.path, CONFIG) == {"accuracy": 0.5}
    finally:
        run.path.chmod(0o700)
    assert times == {path: path.stat().st_mtime_ns for path in [run.path, *run.path.iterdir()]}
