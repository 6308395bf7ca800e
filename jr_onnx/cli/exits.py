"""The exit codes."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Every exit code there is."""

    OK = 0
    REFUSED = 1
    USAGE = 2
    ERROR = 3
    BUG = 4
    INCONCLUSIVE = 5
    INTERRUPTED = 130
