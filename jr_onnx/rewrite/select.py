"""Which of the sites get a jump, and the file that says which jump."""

from __future__ import annotations

import json
import os
import tomllib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from jr_onnx.errors import ParameterError
from jr_onnx.rewrite.forms import as_jump
from jr_onnx.rewrite.sites import Site, Skipped


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A choice of sites.

    >>> Selection(include=["layer1*"], first=2)
    Selection(include=['layer1*'], exclude=(), first=2, last=None)

    Attributes:
        include: site paths, or globs on them; a site must match one, if there are any.
        exclude: site paths, or globs on them; a site must match none.
        first: of those, only the first so many, in the order of the model.
        last: of those, only the last so many; with `first`, both ends.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    first: int | None = None
    last: int | None = None

    def __post_init__(self) -> None:
        for name, count in (("first", self.first), ("last", self.last)):
            if count is not None and (type(count) is not int or count < 1):
                raise ParameterError(f"{name} must be a whole number, at least 1, got {count!r}")
        for name, patterns in (("include", self.include), ("exclude", self.exclude)):
            # A string is a collection of strings, too: of its letters.
            several = isinstance(patterns, Collection) and not isinstance(patterns, str)
            if not several or not all(isinstance(each, str) for each in patterns):
                raise ParameterError(f"{name} must be a list of globs, got {patterns!r}")

    def split(self, sites: Sequence[Site]) -> tuple[tuple[Site, ...], tuple[Skipped, ...]]:
        """Returns the sites chosen, and the others with the reason.

        Raises:
            ParameterError: a pattern matches no site, which is mostly a typing error.
        """
        for pattern in (*self.include, *self.exclude):
            if not any(_matches(site.path, pattern) for site in sites):
                hint = " (in a glob, [ is written [[])" if "[" in pattern else ""
                raise ParameterError(
                    f"pattern {pattern!r} matches no site{hint}. `jr-onnx inspect` lists their "
                    "paths"
                )
        reasons = {site.path: self._reason(site) for site in sites}
        matching = [site.path for site in sites if reasons[site.path] is None]
        if self.first is not None or self.last is not None:
            ends = {*matching[: self.first or 0], *matching[-(self.last or 0) or len(matching) :]}
            for path in matching:
                if path not in ends:
                    reasons[path] = f"not among the {self._ends()}"
        chosen = tuple(site for site in sites if reasons[site.path] is None)
        left = tuple(
            Skipped(site.path, site.op_type, reason)
            for site in sites
            if (reason := reasons[site.path]) is not None
        )
        return chosen, left

    def excluding(self, path: str) -> str | None:
        """Returns the pattern of `exclude` that a site's path matches, None if there is none."""
        return next((pattern for pattern in self.exclude if _matches(path, pattern)), None)

    def _reason(self, site: Site) -> str | None:
        if self.include and not any(_matches(site.path, pattern) for pattern in self.include):
            return "not included"
        excluding = self.excluding(site.path)
        return None if excluding is None else f"excluded by {excluding!r}"

    def _ends(self) -> str:
        ends = [f"first {self.first}"] if self.first else []
        return " or ".join([*ends, f"last {self.last}"] if self.last else ends)


def load_jumps(path: str | os.PathLike[str]) -> dict[str, float | list[float]]:
    """Reads a jumps file: TOML or JSON, site path to number or list of numbers (one a channel).

    Raises:
        ParameterError: the file cannot be read, or holds something else.
    """
    path = Path(path)
    found = _read(path)
    jumps = found.get("jumps") if isinstance(found, dict) else None
    jumps = jumps if isinstance(jumps, dict) else found
    if not isinstance(jumps, dict) or not jumps:
        raise ParameterError(f"{path}: expected site paths with their jumps, got {found!r:.80}")
    return {site: _jump(value, f"{path}: the jump of {site!r}") for site, value in jumps.items()}


def _read(path: Path) -> Any:
    kind = "TOML"
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json" or text.lstrip().startswith("{"):  # no TOML starts so
            kind = "JSON"
            return json.loads(text, object_pairs_hook=_distinct)
        return tomllib.loads(text)
    except OSError as error:
        raise ParameterError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ParameterError(f"{path}: not valid {kind} ({error})") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} is given twice")
    return found


def _jump(value: Any, what: str) -> float | list[float]:
    if isinstance(value, dict):
        raise ParameterError(
            f"{what} is a table. In TOML a dot makes one: quote a path that has dots, "
            "'layer1.relu' = 0.5"
        )
    jump = as_jump(value, what)
    return list(jump) if isinstance(jump, tuple) else jump


def _matches(path: str, pattern: str) -> bool:
    # A path may have brackets, which a glob takes for a set of characters.
    return path == pattern or fnmatchcase(path, pattern)
