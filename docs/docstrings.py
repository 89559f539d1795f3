"""Extension of griffe: turns the plain text of every docstring into Markdown before mkdocstrings shows it."""

from __future__ import annotations

from typing import Any

import griffe
from hooks import as_markdown  # hooks.on_startup puts this folder on the path


class PlainText(griffe.Extension):
    """Shows the arguments of a docstring as paragraphs."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Changes the docstring of an object that was read. Called by griffe."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
