"""Names of files and classes as text that can be compared, stored and printed."""

from __future__ import annotations

import os
import unicodedata


def nfc(text: str) -> str:
    """Returns the text in Unicode form NFC: macOS stores file names in form NFD, which looks the same."""
    return unicodedata.normalize("NFC", text)


def display_name(name: str) -> str:
    """Returns a file name as text in form NFC. Bytes that are not UTF-8 become escapes: "caf\\xe9.png"."""
    return nfc(os.fsencode(name).decode("utf-8", "backslashreplace"))
