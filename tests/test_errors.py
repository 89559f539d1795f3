"""Messages for users are one line without control characters."""

from __future__ import annotations

import pickle

import pytest

from tadperf.errors import DataWarning, UserError, printable, warn_user


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("caf\u00e9 \u732b \U0001f468\u200d\U0001f469", "caf\u00e9 \u732b \U0001f468\u200d\U0001f469"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("two\nlines\r\t", "two\\nlines\\r\\t"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\u2028", "\\u2028"),
        ("\x9b1A", "\\x9b1A"),
        ("caf\udce9", "caf\\udce9"),
        ("non-breaking\u00a0space", "non-breaking\u00a0space"),
    ],
)
def test_control_characters_become_escapes(text, shown):
    assert printable(text) == shown
    error = UserError("data", text, "repair it")
    assert str(error) == f"data: {shown}: repair it"
    assert error.value == text
    str(error).encode()  # can be written to a terminal


def test_an_error_survives_the_way_from_another_process():
    error = pickle.loads(pickle.dumps(UserError("--ipc", 0, "must be at least 1")))
    assert (str(error), error.field, error.value, error.topic) == ("--ipc: 0: must be at least 1", "--ipc", 0, None)
    assert pickle.loads(pickle.dumps(UserError("seed", 1, "use 0", topic="resume"))).topic == "resume"


def test_a_warning_is_one_line():
    with pytest.warns(DataWarning, match=r"^a\\nb$"):
        warn_user("a\nb")
