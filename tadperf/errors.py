"""Errors and warnings for users, in one line each."""

from __future__ import annotations

import unicodedata
import warnings

# Categories of characters that a terminal may act on: control, format (also text direction) and surrogate characters,
# line and paragraph separators.
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"  # format characters that belong to words and emoji


class UserError(ValueError):
    """A mistake of the user. The message names the field, its value and the remedy.

    The command line prints `str(error)` after "tadperf: " and exits with 2. In Python, catch a ValueError. The text is
    one line without control characters, even if names in the data have some.
    topic: "extras", "resume" or "settings", if `field` does not tell what the error is about. With it the command line
    finds the page of the documentation that helps (tadperf.cli.pages).
    """

    def __init__(self, field: str, value: object, remedy: str, topic: str | None = None) -> None:
        self.value, self.topic = value, topic
        self.rename(field, remedy)

    def rename(self, field: str, remedy: str) -> None:
        """Replaces the names in the message."""
        self.field, self.remedy = field, remedy
        self.args = (printable(f"{field}: {self.value}: {remedy}"),)

    def __reduce__(self) -> tuple[type[UserError], tuple[str, object, str, str | None]]:
        return type(self), (self.field, self.value, self.remedy, self.topic)


class DataWarning(UserWarning):
    """Tells the user about a problem in the data that does not stop the work."""


def warn_user(text: str) -> None:
    """Issues a DataWarning of one line."""
    warnings.warn(printable(text), DataWarning, stacklevel=3)


def printable(text: str) -> str:
    """Returns the text with control characters and undecodable bytes as escapes, so that no terminal acts on them."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(c) if unicodedata.category(c) in _UNPRINTABLE and c not in _JOINERS else c for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
