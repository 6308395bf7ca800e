"""TOML text -> the line of each key, for messages.

No statement of TOML can be cut off and still be one, so the text is read line by line, and a
statement ends with the line at which what was read so far parses.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from typing import Any

Path = tuple[str | int, ...]


def lines_of(text: str) -> dict[Path, int]:
    r"""Returns the line of every key, table and array element, from 1.

    >>> lines_of("seed = 1\n[[models]]\n[models.gates]\nmax_opset = 21")[("models", 0, "gates")]
    3

    Args:
        text: valid TOML.
    """
    found: dict[Path, int] = {}
    prefix: Path = ()
    pending, start = "", 1
    for number, line in enumerate(text.split("\n"), 1):
        start = start if pending else number
        pending += f"{line}\n"
        try:
            statement = tomllib.loads(pending)
        except tomllib.TOMLDecodeError:
            continue
        header, pending = pending.lstrip(), ""
        if not header.startswith("["):
            paths = list(_paths(statement))
        else:
            prefix = _opened(statement, header.startswith("[["), found)
            paths = [()]
        for path in paths:
            found.setdefault((*prefix, *path), start)
    return found


def line_of(path: Path, lines: dict[Path, int]) -> int:
    """Returns the line of a key, or of the nearest one around it; 1 where there is none."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)


def _opened(statement: dict[str, Any], is_array: bool, found: dict[Path, int]) -> Path:
    """Returns the path of the table that a header opens."""
    path: Path = ()
    here: Any = statement
    while isinstance(here, dict) and here:
        (name, here), *_ = here.items()
        # A name of an array of tables stands for its last element.
        path = _last((*path, name), found)
    if not is_array:
        return path
    return (*path, 0) if not isinstance(path[-1], int) else (*path[:-1], path[-1] + 1)


def _last(path: Path, found: dict[Path, int]) -> Path:
    count = 0
    while (*path, count) in found:
        count += 1
    return (*path, count - 1) if count else path


def _paths(value: Any) -> Iterator[Path]:
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for name, inner in items:
        yield (name,)
        for path in _paths(inner):
            yield (name, *path)
