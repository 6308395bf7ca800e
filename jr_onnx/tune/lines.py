"""One number for all sites: its clean-accuracy curve, its limit at the budget, and candidates.

global     every site gets the jump v                                   arXiv:1904.03750
quantile   every site gets the v-quantile of its positive pre-activations

      clean accuracy
      ──────────────╮                   forward passes only: a grid, then bisection where it
      - - budget - -╰──╮- - - - - -     first falls below the budget
                    |  ╰───────
      0  .  .  .  limit         top     attacked are evenly spaced points up to the limit
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jr_onnx.activations import Activations
from jr_onnx.rewrite import Jump, Site

# Points of the grid; the curve costs as many passes over the data.
GRID = 50
# The limit is known to 1% of its value, in so many halvings at most.
_WIDTH, _HALVINGS = 0.01, 30
# The largest jump worth a look silences so much of a site.
_TOP = 0.99


@dataclass(frozen=True)
class Line:
    """A family of candidates with one parameter.

    Attributes:
        name: `global`, `quantile`, or a site's path.
        top: the largest value to look at.
        jumps: makes the jumps of a value; 0 leaves the model as it is.
    """

    name: str
    top: float
    jumps: Callable[[float], dict[str, Jump]]


@dataclass(frozen=True)
class CleanCurve:
    """Clean accuracy along a line, on the part to tune on.

    Attributes:
        name: of the line.
        values: ascending, from 0.
        accuracy: of each.
        limit: the largest value that meets the budget, as do all tried below it; 0 if none does.
    """

    name: str
    values: tuple[float, ...]
    accuracy: tuple[float, ...]
    limit: float

    def candidates(self, count: int) -> list[float]:
        """Returns evenly spaced values up to the limit, 0 left out."""
        if self.limit <= 0:
            return []
        return [float(each) for each in np.linspace(0, self.limit, count + 1)[1:]]

    def to_json(self) -> dict[str, object]:
        """Returns the entry of `curves` in the result."""
        return {
            "name": self.name,
            "limit": self.limit,
            "values": list(self.values),
            "clean_accuracy": list(self.accuracy),
        }


def global_line(sites: Sequence[Site], seen: Mapping[str, Activations]) -> Line:
    """Returns the line of one jump for all sites, until one of them is silenced."""
    top = min(min(seen[site.path].quantile(_TOP), largest_jump(site)) for site in sites)
    return Line("global", top, lambda jump: _set({site.path: jump for site in sites}))


def quantile_line(sites: Sequence[Site], seen: Mapping[str, Activations]) -> Line:
    """Returns the line of one quantile for all sites."""

    def jumps(q: float) -> dict[str, Jump]:
        if q == 0:
            return {}
        return _set(
            {site.path: min(seen[site.path].quantile(q), largest_jump(site)) for site in sites}
        )

    return Line("quantile", _TOP, jumps)


def site_line(site: Site, seen: Activations) -> Line:
    """Returns the line of one site's own jump, the others as they are."""
    top = min(seen.quantile(_TOP), largest_jump(site))
    return Line(site.path, top, lambda jump: _set({site.path: jump}))


def clean_curve(
    line: Line, accuracy: Callable[[Mapping[str, Jump]], float], least: float, *, grid: int = GRID
) -> CleanCurve:
    """Measures clean accuracy along a line and finds where it falls below the budget.

    Args:
        line: the candidates.
        accuracy: the clean accuracy at some jumps.
        least: what it must be.
        grid: how many evenly spaced values to try first.
    """
    known = {0.0: accuracy(line.jumps(0.0))}
    for value in np.linspace(0, line.top, grid + 1)[1:].tolist():
        known[value] = accuracy(line.jumps(value))
    low, high = 0.0, None
    for value in sorted(known):
        if known[value] < least:
            high = value
            break
        low = value
    if high is not None:
        low = bisect(
            lambda value: known.setdefault(value, accuracy(line.jumps(value))) >= least, low, high
        )
    values = tuple(sorted(known))
    return CleanCurve(line.name, values, tuple(known[value] for value in values), low)


def bisect(meets: Callable[[float], bool], low: float, high: float) -> float:
    """Returns the largest value found that meets a condition which `low` meets and `high` not."""
    for _ in range(_HALVINGS):
        if high - low <= _WIDTH * high:
            break
        middle = (low + high) / 2
        low, high = (middle, high) if meets(middle) else (low, middle)
    return low


def largest_jump(site: Site) -> float:
    """Returns the largest jump that a site takes: what its type holds, below its cap."""
    if site.cap is None:
        return float(np.finfo(site.tensor.dtype).max)
    cap = np.asarray(site.cap, site.tensor.dtype)
    return float(np.nextafter(cap, np.zeros_like(cap)))


def _set(jumps: dict[str, Jump]) -> dict[str, Jump]:
    """Drops jumps of 0: such a site stays as it is."""
    return {path: jump for path, jump in jumps.items() if jump}
