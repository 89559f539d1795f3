"""The order of the sources of settings, and the errors about wrong settings."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tadperf.config import Config, DataConfig, MatchConfig, TrustConfig
from tadperf.config.merge import default_preset, merge, to_toml
from tadperf.config.presets import METHODS, PRESETS
from tadperf.errors import UserError
from tadperf.matching.starts import start_range


def test_each_source_wins_over_the_one_before(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[match]\niterations = 7\nsteps = 8\nipc = 9\n")
    preset = PRESETS["cifar10-ipc10"]["match"]
    assert merge("cifar10-ipc10").match.iterations == preset["iterations"] == 5000
    config = merge("cifar10-ipc10", file, ["match.steps=3", "match.ipc=4"], {"match.ipc": 5, "seed": None})
    assert (config.match.expert_epochs, config.match.iterations, config.match.steps, config.match.ipc) == (2, 7, 3, 5)
    assert config.seed == 0


def test_a_resumed_run_keeps_settings_that_are_not_given():
    base = merge("digits", options={"match.ipc": 3, "seed": 7})
    assert merge(base=base) == base
    assert merge(sets=["seed=8"], base=base) == base.model_copy(update={"seed": 8})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name):
    config = merge(name)
    assert config.experts.epochs is None or config.match.max_start + config.match.expert_epochs <= config.experts.epochs


@pytest.mark.parametrize("name", PRESETS)
def test_presets_hold_the_measured_training_of_proxies(name):
    trust = merge(name).trust
    if name.startswith("digits"):  # the bytes of the default job depend on every field
        assert trust == TrustConfig()
        return
    recipe = (128, 0.1, 0.9, 5e-4, "one-cycle", False, True, "crop_flip")
    values = trust.batch, trust.lr, trust.momentum, trust.weight_decay, trust.schedule, trust.mixup
    assert (*values, trust.soft_targets, trust.augment) == recipe
    size = (2, 12, 2, None) if name == "quick" else (3, 16, 3, 64)  # None: net.width
    assert (trust.proxies, trust.epochs, trust.rounds, trust.width) == size


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


@pytest.mark.parametrize(
    ("name", "values"),
    [  # FTD's table 7: alpha, EMA decay, learning rate of the teacher
        ("cifar10-ipc1", (0.3, 0.9999, 0.01)),
        ("cifar10-ipc10", (0.3, 0.9995, 0.001)),
        ("cifar10-ipc50", (1, 0.999, 0.01)),
        ("cifar100-ipc1", (1, 0.9995, 0.01)),
        ("cifar100-ipc10", (1, 0.9995, 0.01)),
        ("cifar100-ipc50", (1, 0.999, 0.01)),
        ("tiny-ipc1", (1, 0.999, 0.01)),
        ("tiny-ipc10", (1, 0.999, 0.01)),
    ],
)
def test_published_values_of_ftd(name, values):
    config, plain = merge(name, options={"match.method": "ftd"}), merge(name)
    assert (config.experts.alpha, config.match.ema, config.match.lr_init) == values
    assert config.experts.rho == 0.01
    assert (plain.experts.rho, plain.match.ema) == (0, 0)
    same = ("ipc", "iterations", "steps", "expert_epochs", "max_start", "batch", "lr_img", "soft_labels")
    assert [getattr(config.match, field) for field in same] == [getattr(plain.match, field) for field in same]


@pytest.mark.parametrize(
    ("name", "values"),
    [  # DATM's configs: ipc, steps, expert_epochs, min_start, current_max_start, max_start, expansion_end, lr_img, lr_y
        ("cifar10-ipc1", (1, 80, 2, 0, 4, 4, 0, 100, 5)),
        ("cifar10-ipc10", (10, 80, 2, 0, 10, 20, 1000, 100, 2)),
        ("cifar10-ipc50", (50, 80, 2, 0, 20, 40, 2000, 1000, 2)),
        ("cifar100-ipc1", (1, 40, 3, 0, 10, 20, 1000, 1000, 10)),
        ("cifar100-ipc10", (10, 80, 2, 0, 30, 50, 2000, 1000, 10)),
        ("cifar100-ipc50", (50, 80, 2, 20, 70, 70, 0, 1000, 10)),
        ("tiny-ipc1", (1, 40, 2, 0, 15, 20, 2000, 10000, 10)),
        ("tiny-ipc10", (10, 40, 2, 10, 50, 50, 0, 100, 10)),
    ],
)
def test_published_values_of_datm(name, values):
    config = merge(name, sets=["match.method=datm"])
    m = config.match
    ends = (start_range(m, 0)[1], m.max_start, m.widen * m.iterations)
    assert (m.ipc, m.steps, m.expert_epochs, m.min_start, *ends, m.lr_img, m.lr_label) == values
    assert (m.iterations, m.momentum_label, m.soft_labels, m.init_correct) == (
        10000,
        0.9,
        True,
        name != "cifar100-ipc50",
    )
    assert (config.experts.rho, config.experts.alpha, config.experts.epochs) == (0.01, 0.3, 100)
    assert config.data.normalise == "zca"


def test_a_method_changes_its_preset_and_later_sources_win(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('match.method = "ftd"\nmatch.ema = 0.5\n')
    assert merge("cifar10-ipc50", file).match.ema == 0.5
    assert merge("cifar10-ipc50", file).experts.alpha == 1.0
    assert merge("cifar10-ipc50", file, ["match.method=datm"]).match.steps == 80  # the last one named
    assert merge("cifar10-ipc50", file, options={"match.method": "mtt"}).experts.rho == 0
    assert merge(None, file, ["data.path=x"]).match.max_start == PRESETS["quick"]["match"]["max_start"]
    base = merge("digits")
    resumed = merge(base=base, options={"match.method": "ftd"})
    assert resumed == base.model_copy(update={"match": base.match.model_copy(update={"method": "ftd"})})


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("method", ["mtt", "ftd", "datm", "tgdd", "infmatch"])
def test_every_preset_accepts_every_method(name, method):
    config = merge(name, options={"match.method": method})
    assert config.match.method == method
    assert (config.experts.rho > 0) == (method in ("ftd", "datm"))
    assert set(METHODS) <= set(PRESETS)
    if name in ("quick", "digits", "digits-ipc1"):  # a longer average would stay close to the initial images
        assert config.match.ema**config.match.iterations < 0.01 or config.match.ema == 0


def test_default_preset_follows_the_data(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('data.path = "images"\n')
    assert default_preset() == "digits"
    assert default_preset(options={"data.path": None}) == "digits"
    assert default_preset(file) == default_preset(sets=["data.path=x"]) == "quick"
    assert default_preset(file, options={"data.path": "digits"}) == "digits"
    assert merge(options={"data.path": "x"}).net.width == PRESETS["quick"]["net"]["width"]


@pytest.mark.parametrize("preset", [None, "digits", "digits-ipc1"])
def test_a_preset_adds_noise_to_the_built_in_digits_only(tmp_path, preset):
    assert merge(preset).data.noise == "asymmetric:0.4"
    assert merge(preset, options={"data.path": "mine.npz"}).data.noise == "none"
    assert merge(preset, options={"data.path": "mine.npz", "data.noise": "symmetric:0.1"}).data.noise == "symmetric:0.1"
    assert merge(preset, sets=["data.noise=none"]).data.noise == "none"
    file = tmp_path / "c.toml"
    file.write_text(to_toml(merge(preset)))
    assert merge(preset, file) == merge(preset)
    file.write_text(file.read_text().replace('path = "digits"', 'path = "mine"'))
    assert merge(preset, file).data.noise == "none"


@pytest.mark.parametrize("ipc", [1, "1", "01"])
def test_ipc_1_chooses_its_own_preset(ipc):
    assert default_preset(options={"match.ipc": ipc}) == "digits-ipc1"
    assert default_preset(options={"match.ipc": 10}) == default_preset(options={"match.ipc": "x"}) == "digits"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("data.labels=worse.csv", "worse.csv"),
        ('data.labels="a b"', "a b"),
        ("data.labels = a=b", "a=b"),
        ("data.labels=a\nb=2", "a\nb=2"),  # TOML would read the second line as another key
    ],
)
def test_set_reads_toml_or_text(text, value):
    assert merge(sets=[text]).data.labels == value


def test_set_reads_typed_values():
    config = merge(sets=["match.lr_img=1e3", "match.soft_labels=true", 'evaluate.networks=["convnet", "vgg11"]'])
    assert config.match.lr_img == 1000.0
    assert config.match.soft_labels is True
    assert config.evaluate.networks == ("convnet", "vgg11")


@pytest.mark.parametrize(
    ("arguments", "field", "value", "remedy"),
    [
        ({"options": {"match.ipc": "0"}}, "--ipc", "0", "must be at least 1"),
        ({"options": {"match.ipc": "ten"}}, "--ipc", "ten", "must be an integer"),
        ({"options": {"device": "gpu"}}, "--device", "gpu", "auto, cpu, cuda or cuda:i"),
        ({"options": {"match.method": "dm"}}, "--method", "dm", "'mtt'"),
        ({"sets": ["match.ipc=0"]}, "match.ipc", "0", "must be at least 1"),
        ({"sets": ["match.lr_img=nan"]}, "match.lr_img", "nan", "finite"),
        ({"sets": ["match.lr_img=inf"]}, "match.lr_img", "inf", "finite"),
        ({"sets": ["match.ipc=1.5"]}, "match.ipc", "1.5", "must be an integer"),
        ({"sets": ["match.lr_img=0"]}, "match.lr_img", "0", "must be greater than 0"),
        ({"sets": ["match.lr_img=fast"]}, "match.lr_img", "fast", "must be a number"),
        ({"sets": ["match.momentum=1"]}, "match.momentum", "1", "must be less than 1"),
        ({"sets": ["match.easy=2"]}, "match.easy", "2", "must be at most 1"),
        ({"sets": ["match.soft_labels=often"]}, "match.soft_labels", "often", "must be true or false"),
        ({"sets": ["diffusion.width=9"]}, "diffusion.width", "9", "must be a multiple of 8"),
        ({"sets": ["evaluate.networks=[]"]}, "evaluate.networks", "[]", "must have at least 1 value"),
        ({"sets": ["evaluate.networks=3"]}, "evaluate.networks", "3", "must be a list"),
        ({"sets": ["data.path=3"]}, "data.path", "3", "must be text"),
        ({"sets": ["match.ipcs=3"]}, "match.ipcs", "3", "did you mean match.ipc?"),
        ({"sets": ["mach.steps=3"]}, "mach.steps", "3", "did you mean match.steps?"),
        ({"sets": ["repeats=3"]}, "repeats", "3", "did you mean evaluate.repeats?"),
        ({"sets": ["zzzz=3"]}, "zzzz", "3", "tadperf config"),
        ({"sets": ["match=3"]}, "match", "3", "is a section"),
        ({"sets": ["seed.x=3"]}, "seed.x", "3", "did you mean seed?"),
        ({"sets": ["match.ipc"]}, "--set", "match.ipc", "section.key=value"),
        ({"sets": ["=3"]}, "--set", "=3", "section.key=value"),
        ({"preset": "cifar10"}, "--preset", "cifar10", "did you mean cifar10-ipc1?"),
        ({"preset": "zzz"}, "--preset", "zzz", "choose one of digits"),
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
def test_a_config_written_as_toml_is_read_back(tmp_path_factory, path, noise, seed, lr):
    data = DataConfig(path=path, noise=noise, image_size=32)
    match = MatchConfig(lr_img=lr, batch=5)
    config = Config(seed=seed, device="cuda:1", data=data, match=match)
    file = tmp_path_factory.mktemp("toml") / "c.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert merge(toml_path=file, base=Config()) == config
