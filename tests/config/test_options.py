"""The table of options: every option sets a field that exists, and no field has two names."""

from __future__ import annotations

import pytest

from tadperf.config import Config
from tadperf.config.options import CONFIG_OPTIONS, option_name, python_names
from tadperf.config.presets import PRESETS, SUMMARIES
from tadperf.config.schema import flatten_sections
from tadperf.config.sources import ConfigSources
from tadperf.errors import UserError

FIELDS = flatten_sections(Config().model_dump())


def test_every_option_sets_an_existing_field_and_no_field_has_two_options():
    fields = [option.field for option in CONFIG_OPTIONS]
    assert set(fields) <= set(FIELDS)
    assert len(set(fields)) == len(fields) == len({option.name for option in CONFIG_OPTIONS})


@pytest.mark.parametrize("option", CONFIG_OPTIONS, ids=lambda option: option.name)
def test_a_wrong_type_is_an_error_about_the_option(option):
    with pytest.raises(UserError) as error:
        ConfigSources(options={option.field: object()}).config()
    assert error.value.field == option.name


def test_a_field_without_an_option_keeps_its_name():
    assert option_name("match.steps") == "match.steps"
    with pytest.raises(UserError) as error:
        ConfigSources(options={"match.steps": 0}).config()
    assert error.value.field == "match.steps"


@pytest.mark.parametrize(
    ("keywords", "remedy"),
    [
        (False, "use data.image_root=/a--b, data.image_size or resume=True; see --help"),
        (True, "use image_root=/a--b, image_size or resume=True; see --help"),
    ],
)
def test_in_python_an_error_names_fields_instead_of_options(keywords, remedy):
    with pytest.raises(UserError) as error, python_names(keywords):
        raise UserError("--ipc", "--ipc.png", "use --set data.image_root=/a--b, --image-size or --resume; see --help")
    assert str(error.value) == f"match.ipc: --ipc.png: {remedy}"


def test_sources_are_merged_and_name_their_preset(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("match.ipc = 3\n")
    sources = ConfigSources(None, file, ["seed=4"], {"match.method": "ftd"})
    config = sources.config()
    assert (config.match.ipc, config.seed, config.match.method) == (3, 4, "ftd")
    assert sources.preset_name() == "digits"
    assert ConfigSources("quick").preset_name() == "quick"


def test_every_preset_has_a_summary():
    assert list(SUMMARIES) == list(PRESETS)
    assert all(0 < len(line) <= 100 for line in SUMMARIES.values())
