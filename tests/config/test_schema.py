"""config.json: its schema version, and files of older and newer versions."""

from __future__ import annotations

import json

import pytest

from tadperf.config import Config
from tadperf.config.merge import merge
from tadperf.config.schema import SCHEMA, config_from_json, config_to_json, flatten_sections
from tadperf.errors import UserError


def test_a_config_is_read_back_with_its_version():
    config = merge("digits", options={"seed": 3})
    text = json.dumps(config_to_json(config))
    assert json.loads(text)["schema"] == SCHEMA == 1
    assert config_from_json(text, "--resume", "config.json") == config


def test_a_file_without_version_has_version_0_and_newer_fields_get_defaults():
    config = merge("digits")
    values = config.model_dump(mode="json")
    for name in ("image_column", "label_column"):  # added after version 0
        del values["data"][name]
    assert config_from_json(json.dumps(values), "--resume", "config.json") == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"schema": 2}', "has schema version 2; this tadperf reads up to 1"),
        ('{"schema": "1"}', "has schema version '1'"),
        ('{"schema": true}', "has schema version True"),
        ('{"schema": -1}', "has schema version -1"),
        (
            '{"seed": -1}',
            "seed: Input should be greater than or equal to 0; restore it or use the tadperf that wrote it",
        ),
        ('{"sed": 1}', "sed: Extra inputs are not permitted"),
        ("[]", "the file: "),
        ("{", "not valid JSON"),
        ("[" * 100000, "not valid JSON"),
        (b"\xff", "not valid JSON"),
    ],
)
def test_newer_and_damaged_files_are_refused_in_one_line(text, words):
    with pytest.raises(UserError) as caught:
        config_from_json(text, "--resume", "run/config.json")
    assert str(caught.value).startswith(f"--resume: run/config.json: {words}")
    assert "\n" not in str(caught.value)


def test_every_field_has_a_description():
    def reference(value: dict) -> str:
        return value.get("$ref") or value.get("allOf", [{}])[0].get("$ref", "")  # pydantic 2.7 writes allOf

    def undescribed(model: dict, definitions: dict) -> list[str]:
        values = model["properties"]
        sections = [definitions[reference(value).split("/")[-1]] for value in values.values() if reference(value)]
        plain = [name for name, value in values.items() if not reference(value) and "description" not in value]
        return plain + [name for section in sections for name in undescribed(section, definitions)]

    schema = Config.model_json_schema()
    assert [name for name in undescribed(schema, schema["$defs"]) if name not in schema["$defs"]] == []
    assert flatten_sections({"match": {"ipc": 1}, "seed": 2}) == {"match.ipc": 1, "seed": 2}
