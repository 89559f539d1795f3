"""presets < TOML < --set < options, and what a user gets wrong in them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tadperf.config import Config, DataConfig, MatchConfig
from tadperf.errors import UserError
from tadperf.merge import default_preset, merge, to_toml
from tadperf.presets import PRESETS


def test_each_layer_wins_over_the_one_before(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[match]\niterations = 7\nsteps = 8\nipc = 9\n")
    preset = PRESETS["cifar10-ipc10"]["match"]
    assert merge("cifar10-ipc10").match.iterations == preset["iterations"] == 5000
    config = merge("cifar10-ipc10", file, ["match.steps=3", "match.ipc=4"], {"match.ipc": 5, "seed": None})
    assert (config.match.expert_epochs, config.match.iterations, config.match.steps, config.match.ipc) == (2, 7, 3, 5)
    assert config.seed == 0


def test_a_resumed_run_keeps_what_is_not_given():
    base = merge("digits", options={"match.ipc": 3, "seed": 7})
    assert merge(base=base) == base
    assert merge(sets=["seed=8"], base=base) == base.model_copy(update={"seed": 8})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name):
    config = merge(name)
    assert config.experts.epochs is None or config.match.max_start + config.match.expert_epochs <= config.experts.epochs


@pytest.mark.parametrize(
    ("name", "values"),
    [  # FTD's table: ipc, steps, expert_epochs, max_start, lr_img, depth
        ("cifar10-ipc1", (1, 50, 2, 2, 100, 3)),
        ("cifar10-ipc10", (10, 30, 2, 20, 100, 3)),
        ("cifar10-ipc50", (50, 30, 2, 40, 1000, 3)),
        ("cifar100-ipc1", (1, 40, 3, 20, 1000, 3)),
        ("cifar100-ipc10", (10, 20, 2, 40, 1000, 3)),
        ("cifar100-ipc50", (50, 80, 2, 40, 1000, 3)),
        ("tiny-ipc1", (1, 30, 2, 10, 10000, 4)),
        ("tiny-ipc10", (10, 20, 2, 40, 10000, 4)),
    ],
)
def test_published_values(name, values):
    config = merge(name)
    m = config.match
    assert (m.ipc, m.steps, m.expert_epochs, m.max_start, m.lr_img, config.net.depth) == values
    assert config.experts.count == 100
    assert config.net.width == 128
    assert config.data.normalise == ("meanstd" if name.startswith("tiny") else "zca")


def test_default_preset_follows_the_data(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('data.path = "images"\n')
    assert default_preset() == "digits"
    assert default_preset(options={"data.path": None}) == "digits"
    assert default_preset(file) == default_preset(sets=["data.path=x"]) == "quick"
    assert default_preset(file, options={"data.path": "digits"}) == "digits"
    assert merge(options={"data.path": "x"}).net.width == PRESETS["quick"]["net"]["width"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("data.labels=worse.csv", "worse.csv"),
        ('data.labels="a b"', "a b"),
        ("data.labels = a=b", "a=b"),
        ("data.labels=a\nb=2", "a\nb=2"),  # TOML would take the second line for another key
    ],
)
def test_set_reads_toml_else_text(text, value):
    assert merge(sets=[text]).data.labels == value


def test_set_reads_typed_values():
    config = merge(sets=["match.lr_img=1e3", "match.soft_labels=true", 'evaluate.networks=["convnet", "vgg11"]'])
    assert config.match.lr_img == 1000.0
    assert config.match.soft_labels is True
    assert config.evaluate.networks == ("convnet", "vgg11")


@pytest.mark.parametrize(
    ("arguments", "field", "value", "remedy"),
    [
        ({"options": {"match.ipc": "0"}}, "--ipc", "0", "greater than or equal to 1"),
        ({"options": {"match.ipc": "ten"}}, "--ipc", "ten", "valid integer"),
        ({"options": {"device": "gpu"}}, "--device", "gpu", "auto, cpu, cuda or cuda:i"),
        ({"options": {"match.method": "dm"}}, "--method", "dm", "'mtt'"),
        ({"sets": ["match.ipc=0"]}, "match.ipc", "0", "greater than or equal to 1"),
        ({"sets": ["match.lr_img=nan"]}, "match.lr_img", "nan", "finite"),
        ({"sets": ["match.lr_img=inf"]}, "match.lr_img", "inf", "finite"),
        ({"sets": ["match.ipcs=3"]}, "match.ipcs", "3", "did you mean match.ipc?"),
        ({"sets": ["mach.steps=3"]}, "mach.steps", "3", "did you mean match.steps?"),
        ({"sets": ["repeats=3"]}, "repeats", "3", "did you mean evaluate.repeats?"),
        ({"sets": ["zzzz=3"]}, "zzzz", "3", "tadperf config"),
        ({"sets": ["match=3"]}, "match", "3", "is a section"),
        ({"sets": ["seed.x=3"]}, "seed.x", "3", "did you mean seed?"),
        ({"sets": ["match.ipc"]}, "--set", "match.ipc", "section.key=value"),
        ({"sets": ["=3"]}, "--set", "=3", "section.key=value"),
        ({"preset": "cifar10"}, "--preset", "cifar10", "did you mean cifar10-ipc1?"),
        ({"preset": "zzz"}, "--preset", "zzz", "known are digits"),
        ({"toml_path": "/nowhere.toml"}, "--config", "/nowhere.toml", "cannot be read"),
    ],
)
def test_wrong_use_names_field_value_and_remedy(arguments, field, value, remedy):
    with pytest.raises(UserError) as caught:
        merge(**arguments)
    error = caught.value
    assert (error.field, str(error.value)) == (field, value)
    assert remedy in error.remedy
    assert "\n" not in str(error)


@pytest.mark.parametrize("text", [b"match = [", b"\xff", b"[match]\nipc = 1\nipc = 2\n"])
def test_broken_toml_is_refused(tmp_path, text):
    file = tmp_path / "c.toml"
    file.write_bytes(text)
    with pytest.raises(UserError, match="not valid TOML"):
        merge(toml_path=file)


def test_the_nearest_toml_key_is_suggested(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[expert]\ncount = 3\n")
    with pytest.raises(UserError, match=r"^expert.count: 3: unknown key; did you mean experts.count\?"):
        merge(toml_path=file)


@settings(max_examples=40)
@given(path=st.text(min_size=1), noise=st.text(), seed=st.integers(0, 2**60), lr=st.floats(1e-30, 1e30))
def test_toml_brings_back_the_same_config(tmp_path_factory, path, noise, seed, lr):
    data = DataConfig(path=path, noise=noise, image_size=32)  # pyright: ignore[reportCallIssue]
    match = MatchConfig(lr_img=lr, batch=5)  # pyright: ignore[reportCallIssue]
    config = Config(seed=seed, device="cuda:1", data=data, match=match)
    file = tmp_path_factory.mktemp("toml") / "c.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert merge(toml_path=file, base=Config()) == config  # pyright: ignore[reportCallIssue]
