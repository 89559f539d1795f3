"""The frozen command line, the time of --help, and the messages about errors."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest
import typer

COMMON = [
    "DATA",
    "--noise",
    "--trust",
    "--labels",
    "--seed",
    "--device",
    "--image-size",
    "--skip-broken",
    "--format",
    "--preset",
    "--config",
    "--set",
]
OUTPUT = ["--json", "--quiet", "--debug"]
EVIDENCE = ["--features", "--probs", "--encoder"]
SCALES = ["--mean", "--std", "--constants"]
FROZEN = {  # a change here is a change for every user: add names, do not rename them
    "distill": [
        *COMMON,
        "--devices",
        "--ipc",
        "--method",
        "--synthesis",
        "--compare",
        "--compile",
        "--repeats",
        "--experts",
        "--out",
        "--resume",
        "--dry-run",
        "--estimate",
        *EVIDENCE,
        *OUTPUT,
    ],
    "refine": [
        *("RUN|DATA" if name == "DATA" else name for name in COMMON),
        "--devices",
        "--ipc",
        "--batch",
        "--backend",
        "--evaluate",
        "--out",
        "--resume",
        *OUTPUT,
    ],
    "sweep": ["FIELD=LIST", "--data", *COMMON[1:], "--synthesis", "--out", "--resume", *OUTPUT],
    "experts": [*COMMON, "--devices", "--method", "--out", "--resume", *OUTPUT],
    "audit": [
        *(name for name in COMMON if name != "--trust"),
        "--devices",
        "--out",
        "--apply",
        "--near-duplicates",
        "--dual-loop",
        "--estimate",
        *EVIDENCE,
        *OUTPUT,
    ],
    "apply": ["RUN|DATA", "OUT", "--labels", "--skip-broken", *OUTPUT],
    "evaluate": [
        "FILE",
        "DATA",
        "--protocol",
        "--verify",
        "--network",
        "--optimizer",
        "--repeats",
        "--seed",
        "--device",
        "--devices",
        *OUTPUT,
    ],
    "show": ["FILE|RUN", "--out", "--json", "--debug"],
    "export": ["FILE", "--to", "--out", *SCALES, "--json", "--debug"],
    "push": ["FILE", "TARGET", "--license", "--json", "--debug"],
    "pull": ["SOURCE", "--out", "--json", "--debug"],
    "import": [
        "PATH",
        "--data",
        "--out",
        *SCALES,
        "--zca",
        "--lr",
        "--probabilities",
        "--accuracy",
        "--image-size",
        "--config",
        "--set",
        *OUTPUT,
    ],
    "info": ["RUN", "--json", "--debug"],
    "config": [
        *COMMON,
        "--ipc",
        "--method",
        "--synthesis",
        "--compile",
        "--experts",
        "--repeats",
        "--schema",
        "--list",
        *EVIDENCE,
        *OUTPUT,
    ],
    "bench": [
        "OPERATOR|STAGE",
        "--device",
        "--sizes",
        "--dtypes",
        "--base",
        "--threads",
        "--repeats",
        "--json",
        "--plot",
        "--tune",
        "--list",
        "--debug",
    ],
}


FLAGS = {"--compare", "--evaluate", "--resume", "--skip-broken", *OUTPUT, "--schema", "--list", "--tune"}
FLAGS |= {"--zca", "--probabilities", "--verify", "--near-duplicates", "--dual-loop", "--estimate", "--dry-run"}
DEFAULTS = {  # the defaults of options that are not flags and have one
    "push": {"--license": "unknown"},
    "bench": {"--device": "auto", "--dtypes": "float32", "--repeats": "20"},
}


def commands() -> dict[str, dict[str, object]]:
    """Returns the defaults of all options, by command and option."""
    from tadperf.cli.app import app

    found = {}
    for name, command in typer.main.get_command(app).commands.items():  # pyright: ignore[reportAttributeAccessIssue]
        found[name] = {p.opts[0] if p.opts[0].startswith("-") else p.metavar: p.default for p in command.params}
    return found


def test_the_command_line_is_frozen():
    found = commands()
    assert {name: sorted(options) for name, options in found.items()} == {
        name: sorted(options) for name, options in FROZEN.items()
    }
    for name, options in found.items():
        flags = {option: False for option in options if option in FLAGS and (name, option) != ("bench", "--json")}
        expected = dict.fromkeys(options) | flags | DEFAULTS.get(name, {})
        assert options == expected, name


def test_the_shell_completes_options(tmp_path):
    words = {"_TADPERF_COMPLETE": "complete_bash", "COMP_WORDS": "tadperf audit --fe", "COMP_CWORD": "2"}
    script = "import sys; sys.argv[0] = 'tadperf'; from tadperf.cli.app import main; main()"
    command = [sys.executable, "-c", script]
    out = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **words}).stdout
    assert out.split() == ["--features"]


@pytest.mark.parametrize("arguments", [["--help"], ["distill", "--help"]])
def test_help_is_instant(tmp_path, arguments):
    command = [sys.executable, "-m", "tadperf", *arguments]
    seconds, out = [], ""
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        out = subprocess.run(command, capture_output=True, check=True, text=True, cwd=tmp_path).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert "Usage: " in out
    assert min(seconds) < 0.5  # processor time, which other programs hardly change; 0.11 s on a quiet machine, goal 0.2


def test_help_imports_nothing_heavy(tmp_path):
    script = "import sys, tadperf, tadperf.cli.app; print(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, text=True, cwd=tmp_path
    ).stdout
    assert not {"torch", "numpy", "pydantic", "rich", "sklearn", "PIL"} & set(out.split())


def test_no_arguments_and_version(tadperf):
    """Without arguments the program shows commands to start with, in lines of a terminal."""
    lines = tadperf().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("  tadperf")] == ["distill", "audit", "distill"]
    assert max(map(len, lines)) <= 80
    assert tadperf("--version").out.strip().count(".") >= 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("distill --ipc 0", "--ipc: 0: must be at least 1"),
        ("distill --ipc ten", "--ipc: ten: must be an integer"),
        ("distill --ipc 1000", "--ipc: 1000: class"),
        ("distill --preset cifar10-ipc2", "--preset: cifar10-ipc2: did you mean cifar10-ipc"),
        ("distill --set match.setps=3", "match.setps: 3: unknown key; did you mean match.steps?"),
        ("distill --config none.toml", "--config: none.toml: cannot be read"),
        ("distill --noise symmetric:1.5", "--noise: symmetric:1.5: "),
        ("distill --device cuda:99", "--device: cuda:99: "),
        ("distill --device tpu", "--device: tpu: must be auto, cpu, cuda or cuda:i"),
        ("distill --method dm", "--method: dm: must be 'mtt'"),
        ("distill nowhere", "DATA: nowhere: no such file or folder"),
        ("distill --out taken", "--out: taken: exists already; continue that run with --resume"),
        ("distill --out taken/file/run", "--out: taken/file/run: "),
        ("distill --out /proc/run", "--out: /proc/run: cannot be written"),
        ("distill --resume", "--resume: runs/digits-ipc10-seed0: there is no such run folder"),
        ("distill --resume --out taken", "--resume: taken: is not a run folder"),
        ("distill --experts none", "none: no such folder; give a run folder that holds experts"),
        ("distill --bogus", "No such option"),
        ("distill --ipc", "requires an argument"),
        ("distill one two", "two"),
        ("destill", "No such command 'destill'"),
        ("evaluate", "Missing argument"),
        ("evaluate none.safetensors", "file: none.safetensors: no such file"),
        ("evaluate taken/file", "file: taken/file: truncated, or not a safetensors file"),
        ("evaluate taken/file --network resnet19", "--network: resnet19: must be 'convnet'"),
        ("evaluate taken/file --repeats 0", "--repeats: 0: must be at least 1"),
        ("evaluate taken/file --protocol harsh", "--protocol: harsh: unknown protocol; choose one of hard, soft,"),
        ("show taken/file", "file: taken/file: truncated, or not a safetensors file"),
        ("sweep", 'FIELD=LIST: "": add a field and its values, such as match.ipc=1,10'),
        ("sweep match.ipc", "FIELD=LIST: match.ipc: must be section.key=value,value,..., such as match.ipc=1,10"),
        ("sweep match.ipc=", 'match.ipc: "": must be a list of values without empty ones, such as match.ipc=1,10'),
        ("sweep match.ipc=1,,2", "match.ipc: 1,,2: must be a list of values without empty ones"),
        ("sweep match.setps=3,4", "match.setps: 3: unknown key; did you mean match.steps?"),
        ("sweep match=3", "match: 3: is a section; set one of its keys, such as match.method"),
        (
            "sweep refine.beta=0,1 --synthesis matching",
            "--synthesis: matching: does not use refine.beta; choose generative or hybrid",
        ),
        ("sweep match.ipc=1 match.ipc=2", "match.ipc: 2: is given twice"),
        ("sweep match.lr_img=1,1.0", "match.lr_img: 1.0: is given twice; give every value once"),
        ("sweep match.ipc=1,zero", "match.ipc: zero: must be an integer"),
        ("sweep match.ipc=1,1000", "--ipc: 1000: class"),
        ("sweep seed=0,1 --seed 3", "FIELD=LIST: seed=0,1: --seed sets this field too; leave one of them out"),
        ("sweep seed=0,1 --out taken", "--out: taken: exists already; continue that run with --resume"),
        ("sweep --resume --out none", "--resume: none: there is no such folder; leave out --resume to start it"),
        ("sweep --resume --out taken", "--resume: taken: is not the folder of a sweep: there is no sweep.json in it"),
        ("experts --seed -1", "--seed: -1: must be at least 0"),
        ("config --seed x", "--seed: x: must be an integer"),
        ("bench persample", "OPERATOR|STAGE: persample: must be one of per_sample, "),
        ("bench per_sample --sizes 50000", "--sizes: 50000: per_sample takes NxC, such as 50000x10"),
        ("bench per_sample --sizes 50000x0", "--sizes: 50000x0: per_sample takes NxC"),
        ("bench --dtypes int8", "--dtypes: int8: must be one of float32, bfloat16, float16"),
        ("bench per_sample --base egaer", "--base: egaer: must be one of eager, inductor, peer, "),
        ("bench --threads 0", "--threads: 0: must be a positive integer"),
        ("bench --repeats many", "--repeats: many: must be a positive integer"),
        ("bench --device cpu --tune", "--tune: cpu: needs a CUDA device; use --device cuda"),
        ("bench --json none/rows.json", "--json: none/rows.json: there is no folder none"),
        ("bench --plot rows.pdf", "--plot: rows.pdf: must be a folder or a file that ends in .png"),
    ],
)
def test_wrong_use_is_one_line_and_writes_nothing(tadperf, tmp_path, arguments, line):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    code, out, err = tadperf(*arguments.split())
    assert (code, out) == (2, "")
    assert err.startswith("tadperf: ")
    assert err.count("\n") == 1
    assert line in err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "taken"]


WRONG = {  # a wrong value for every option that sets a field of the config
    "DATA": "nowhere",
    "--data": "nowhere",
    "--format": "gif",
    "--image-size": "0",
    "--labels": "none.csv",
    "--noise": "loud:1",
    "--features": "none.npy",
    "--probs": "none.npy",
    "--encoder": "none",
    "--ipc": "0",
    "--method": "dm",
    "--compile": "maybe",
    "--trust": "maybe",
    "--synthesis": "magic",
    "--experts": "none",
    "--optimizer": "adam",
    "--repeats": "0",
    "--network": "resnet19",
    "--seed": "x",
    "--device": "tpu",
    "--batch": "0",
    "--backend": "onnx",
    "--preset": "none",
    "--config": "none.toml",
    "--set": "a",
    "--devices": "0",
}
# Arguments that a command checks before its options.
FIXED = {"sweep": ["match.ipc=1"], "evaluate": ["file"], "apply": ["digits", "copy"], "import": [".", "--out=a"]}


def wrong_options() -> list[tuple[str, str]]:
    return [
        (command, option)
        for command, options in FROZEN.items()
        for option in options
        if option in WRONG and command not in ("config", "bench")  # these two do not open the data
    ]


@pytest.mark.parametrize(("command", "option"), wrong_options())
def test_an_error_names_the_option_that_was_typed(tadperf, tmp_path, command, option):
    (tmp_path / "file").touch()
    typed = [option, WRONG[option]] if option.startswith("-") else [WRONG[option]]
    if (command, option) == ("evaluate", "DATA"):
        pytest.skip("evaluate opens FILE first; a broken file is an error of its own")
    code, out, err = tadperf(command, *FIXED.get(command, []), *typed)
    assert (code, out) == (2, "")
    assert err.startswith(f"tadperf: {option}: "), err
    assert err.count("\n") == 1


def test_every_option_that_sets_a_field_is_tested_with_a_wrong_value():
    from tadperf.cli.options import OPTIONS

    assert {option.name for option in OPTIONS.values() if option.field and option.kind is not bool} <= set(WRONG)


def test_an_error_about_a_field_that_no_option_has_set_names_the_field(tadperf):
    assert tadperf("distill", "--set", "match.ipc=0").err.startswith("tadperf: match.ipc: 0: ")
    assert tadperf("refine", "nowhere").err.startswith("tadperf: DATA: nowhere: ")


def test_a_wrong_environment_variable_is_one_line_of_a_user(tmp_path):
    command = [sys.executable, "-m", "tadperf", "info"]
    env = {**os.environ, "TADPERF_KERNELS": "plain"}
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    expected = "tadperf: TADPERF_KERNELS: plain: must be reference, or not set\n"
    assert (result.returncode, result.stderr) == (2, expected)


def test_an_unexpected_failure_is_one_line_unless_debugged(tadperf, monkeypatch):
    from tadperf.cli.options import invocation
    from tadperf.config import merge

    def fails(config):
        raise RuntimeError("one\ntwo")

    monkeypatch.setattr(invocation, "debug", False)
    monkeypatch.setattr(merge, "to_toml", fails)
    code, out, err = tadperf("config", "--quiet")
    assert (code, out) == (1, "")
    assert err == "tadperf: failed: RuntimeError: one two (--debug shows the traceback)\n"
    code, out, err = tadperf("config", "--quiet", "--debug")
    assert code == 1
    assert "Traceback" in err
