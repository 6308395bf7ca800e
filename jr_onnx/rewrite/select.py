"""Which of the sites get a jump, and the file that says which jump."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from jr_onnx.errors import ParameterError
from jr_onnx.rewrite.sites import Site, Skipped


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A choice of sites.

    >>> Selection(include=["layer1*"], first=2)
    Selection(include=['layer1*'], exclude=(), first=2, last=None)

    Attributes:
        include: globs on site paths; a site must match one, if there are any.
        exclude: globs on site paths; a site must match none.
        first: of those, only the first so many, in the order of the model.
        last: of those, only the last so many; with `first`, both ends.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    first: int | None = None
    last: int | None = None

    def __post_init__(self) -> None:
        for name, count in (("first", self.first), ("last", self.last)):
            if count is not None and count < 1:
                raise ParameterError(f"{name} must be at least 1, got {count}")

    def split(self, sites: Sequence[Site]) -> tuple[tuple[Site, ...], tuple[Skipped, ...]]:
        """Returns the sites chosen, and the others with the reason.

        Raises:
            ParameterError: a pattern matches no site, which is mostly a typing error.
        """
        for pattern in (*self.include, *self.exclude):
            if not any(fnmatchcase(site.path, pattern) for site in sites):
                raise ParameterError(
                    f"pattern {pattern!r} matches no site. `jr-onnx inspect` lists their paths"
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

    def _reason(self, site: Site) -> str | None:
        if self.include and not any(fnmatchcase(site.path, glob) for glob in self.include):
            return "not included"
        excluding = next((glob for glob in self.exclude if fnmatchcase(site.path, glob)), None)
        return f"excluded by {excluding!r}" if excluding else None

    def _ends(self) -> str:
        ends = [f"first {self.first}"] if self.first else []
        return " or ".join([*ends, f"last {self.last}"] if self.last else ends)


def load_jumps(path: Path) -> dict[str, float | list[float]]:
    """Reads a jumps file: TOML or JSON, site path to number or list of numbers (one a channel).

    Raises:
        ParameterError: the file cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ParameterError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise ParameterError(f"{path}: not valid {kind} ({error})") from error
    found = found.get("jumps", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not found:
        raise ParameterError(f"{path}: expected site paths with their jumps, got {found!r:.80}")
    for site, jump in found.items():
        numbers = jump if isinstance(jump, list) and jump else [jump]
        if not all(type(number) in (int, float) for number in numbers):
            raise ParameterError(
                f"{path}: the jump of {site!r} must be a number or a list of numbers, got {jump!r}"
            )
    return found
