"""What a user got wrong, in one line."""

from __future__ import annotations


class UserError(ValueError):
    """Wrong use: which field, the value it had, and the remedy.

    The command line prints `str(error)` after "tadperf: " and exits with 2; a caller in Python catches a ValueError.
    """

    def __init__(self, field: str, value: object, remedy: str):
        self.field, self.value, self.remedy = field, value, remedy
        super().__init__(f"{field}: {value}: {remedy}")
