"""Square Attack (Andriushchenko et al., arXiv:1912.00049): random search with squares, linf and l2.

x_0      = x + epsilon * (vertical stripes in linf, tiles of bumps in l2)
x_{t+1}  = x_t changed inside a random square, if that makes the margin smaller

The square's area falls with the queries. No gradient is used: what masks gradients does not matter.

In l2 whole windows change hands, which ends 20% to 40% short of the best point even of a linear
model, in the authors' code too. `polish` spends the last queries on single elements instead.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jr_onnx.attacks.attack import Attack, Classifier
from jr_onnx.attacks.batch import Draws, Goal, Grid, generators, radius, scores
from jr_onnx.attacks.nearest import check_at_least, margin
from jr_onnx.attacks.threat import ThreatModel
from jr_onnx.errors import ParameterError

Array = np.ndarray[Any, Any]

# After so many of 10,000 queries the area is halved once more.
_HALVED = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
# Numbers drawn for a query besides one for each channel: two corners, a bump's direction.
_DRAWN = 5


@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Random search in the ball; sees nothing but the model's outputs.

    Where the authors' code never touches the last row and column, this one does. A flat vector is
    an image of height 1.

    Attributes:
        queries: forward passes of each example, at most.
        area: share of the image that the first squares cover; 0.8 in AutoAttack.
        polish: share of the queries, the last ones, that change a single position; none in
            AutoAttack. With 0.5, l2 comes within 5% of the best point of a linear model where
            there are some 80 queries for each element.
        target_classes: one for each example of the data, to be reached instead of any wrong class.

    References:
        Andriushchenko et al.: Square Attack (arXiv:1912.00049).
    """

    name = "square"
    uses_gradients = False
    norms = ("linf", "l2")
    queries: int = 5000
    area: float = 0.8
    polish: float = 0.0
    target_classes: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_at_least(1, queries=self.queries)
        if not 0 < self.area <= 1:
            raise ParameterError(f"area must be in (0, 1], got {self.area}")
        if not 0 <= self.polish <= 1:
            raise ParameterError(f"polish must be in [0, 1], got {self.polish}")

    def search(
        self,
        target: Classifier,
        x: Array,
        y: Array,
        threat: ThreatModel,
        *,
        seed: int,
        indices: Array,
    ) -> Array:
        """Returns the point of smallest margin of each example; with targets, of largest.

        Raises:
            ParameterError: the norm is l1, epsilon is inf, or target classes do not fit.
        """
        radius(self.name, threat)
        goal = Goal.of(self.target_classes, target, x, y, indices)
        grid, streams = Grid(x.shape[1:]), generators(seed, indices)
        kind = _Stripes if threat.norm == "linf" else _Bumps
        squares = kind(grid.images(x), threat)
        best = np.stack([squares.first(row, rng) for row, rng in enumerate(streams)])
        draws = Draws(streams, _DRAWN + best.shape[1])
        alive, lead = np.arange(len(x)), np.full(len(x), np.inf)
        candidates = best
        for query in range(self.queries):
            if query > self.queries * (1 - self.polish):
                candidates = squares.polish(alive, best[alive], draws.take(alive))
            elif query:
                share = self._share(query - 1)
                candidates = squares.next(alive, best[alive], draws.take(alive), share)
            z = scores(target, grid.restore(candidates))
            left = -goal.sign * margin(z, goal.classes[alive])
            there = goal.reached(z, alive)
            better = np.logical_or(left < lead[alive], there)
            best[alive[better]], lead[alive[better]] = candidates[better], left[better]
            alive = alive[~there]
            if not len(alive):
                break
        return grid.restore(best)

    def _share(self, query: int) -> float:
        at = int(query / self.queries * 10_000)
        return self.area * 0.5 ** sum(at > corner for corner in _HALVED)


class _Squares(ABC):
    """What a square does to an image.

    Args:
        images: `(batch, channels, height, width)`.
        threat: the threat model.
    """

    def __init__(self, images: Array, threat: ThreatModel) -> None:
        self._x, self._threat = images, threat
        self._channels, self._height, self._width = images.shape[1:]

    @abstractmethod
    def first(self, row: int, rng: np.random.Generator) -> Array:
        """Returns the first point of the example `row`."""

    @abstractmethod
    def next(self, rows: Array, best: Array, drawn: Array, share: float) -> Array:
        """Returns points to try.

        Args:
            rows: int `(n,)`, the examples.
            best: `(n, channels, height, width)`, their best points.
            drawn: `(n, _DRAWN + channels)`, uniform in [0, 1).
            share: of the image, to be covered.
        """

    @abstractmethod
    def polish(self, rows: Array, best: Array, drawn: Array) -> Array:
        """Returns points to try that differ at one position, given as to `next`."""

    def _sides(self, share: float, least: int = 1) -> tuple[int, int]:
        """Returns height and width of a square, or as near as the image lets it be one."""
        area = share * self._height * self._width
        side = max(round(area**0.5), least)
        # An odd side has a middle.
        side += least > 1 and side % 2 == 0
        height = min(side, self._height)
        # What an image less high than the square lacks in height goes into the width, and back.
        width = min(max(side, round(area / height)) if height < side else side, self._width)
        if width < side:
            height = min(max(height, round(area / width)), self._height)
        return height, width

    def _window(self, corner: Array, sides: tuple[int, int]) -> tuple[Array, ...]:
        """Returns the index of a window of each image, `(n, channels, *sides)`.

        Args:
            corner: `(n, 2)`, uniform in [0, 1).
            sides: height and width.
        """
        free = np.array([self._height - sides[0] + 1, self._width - sides[1] + 1])
        top, left = (corner * free).astype(int).T
        number, channel = np.arange(len(corner)), np.arange(self._channels)
        return (
            number[:, None, None, None],
            channel[None, :, None, None],
            (top[:, None] + np.arange(sides[0]))[:, None, :, None],
            (left[:, None] + np.arange(sides[1]))[:, None, None, :],
        )


class _Stripes(_Squares):
    """linf: every element is at a corner of the ball; a square has one sign for each channel."""

    def __init__(self, images: Array, threat: ThreatModel) -> None:
        super().__init__(images, threat)
        exact = images.astype(np.float64)
        self._below = threat.project(exact - threat.epsilon, images)
        self._above = threat.project(exact + threat.epsilon, images)

    def first(self, row: int, rng: np.random.Generator) -> Array:
        up = rng.random((self._channels, 1, self._width)) < 0.5
        stripes: Array = np.where(up, self._above[row], self._below[row])
        return stripes

    def next(self, rows: Array, best: Array, drawn: Array, share: float) -> Array:
        window = self._window(drawn[:, :2], self._sides(share))
        inside = (rows[window[0]], *window[1:])
        up = (drawn[:, _DRAWN:] < 0.5)[:, :, None, None]
        points = best.copy()
        points[window] = np.where(up, self._above[inside], self._below[inside])
        return points

    def polish(self, rows: Array, best: Array, drawn: Array) -> Array:
        return self.next(rows, best, drawn, share=0)


class _Bumps(_Squares):
    """l2: one window's norm moves into a bump in another; what clipping left over, too."""

    def first(self, row: int, rng: np.random.Generator) -> Array:
        sides = max(self._height // 5, 1), max(self._width // 5, 1)
        free = [
            max(0, (self._height - 5 * sides[0]) // 2),
            max(0, (self._width - 5 * sides[1]) // 2),
        ]
        delta = np.zeros(self._x.shape[1:])
        for top in range(free[0], self._height - sides[0] + 1, sides[0]):
            for left in range(free[1], self._width - sides[1] + 1, sides[1]):
                bump = _bump(*sides, across=rng.random() < 0.5)
                sign = rng.choice([-1.0, 1.0], (self._channels, 1, 1))
                delta[:, top : top + sides[0], left : left + sides[1]] = sign * bump
        points: Array = self._at_radius(np.array([row]), delta[None])[0]
        return points

    def next(self, rows: Array, best: Array, drawn: Array, share: float) -> Array:
        sides = self._sides(share, least=3)
        into, out_of = self._window(drawn[:, :2], sides), self._window(drawn[:, 2:4], sides)
        delta = best.astype(np.float64) - self._x[rows]
        old = delta[into]
        touched = np.zeros_like(delta)
        touched[into] = touched[out_of] = 1
        within = ((delta * touched) ** 2).sum(axis=(2, 3), keepdims=True)
        unused = self._threat.epsilon**2 - (delta**2).sum(axis=(1, 2, 3), keepdims=True)
        across = (drawn[:, 4] < 0.5)[:, None, None, None]
        bump = np.where(across, _bump(*sides, across=True), _bump(*sides, across=False))
        sign = np.where(drawn[:, _DRAWN:] < 0.5, -1.0, 1.0)[:, :, None, None]
        new = _unit(sign * bump + _unit(old, (2, 3)), (2, 3))
        delta[out_of] = 0
        delta[into] = new * np.sqrt(np.maximum(unused, 0) / self._channels + within)
        return self._at_radius(rows, delta)

    def polish(self, rows: Array, best: Array, drawn: Array) -> Array:
        at = self._window(drawn[:, :2], (1, 1))
        delta = best.astype(np.float64) - self._x[rows]
        sign = np.where(drawn[:, _DRAWN:] < 0.5, -1.0, 1.0)[:, :, None, None]
        # Of every size: the nearer to the optimum, the smaller the steps that still help.
        size = self._threat.epsilon * drawn[:, 2, None, None, None] ** 2
        delta[at] += sign * size
        return self._at_radius(rows, delta)

    def _at_radius(self, rows: Array, delta: Array) -> Array:
        x = self._x[rows]
        points: Array = self._threat.project(x + self._threat.epsilon * _unit(delta, (1, 2, 3)), x)
        return points


def _unit(values: Array, axes: tuple[int, ...]) -> Array:
    length = np.sqrt((values**2).sum(axis=axes, keepdims=True))
    scaled: Array = values / np.where(length > 0, length, 1)
    return scaled


def _bump(height: int, width: int, *, across: bool) -> Array:
    """Returns two heaps of opposite signs, one over the other or side by side, of norm 1."""
    if (across and width > 1) or height == 1 < width:
        turned: Array = _bump(width, height, across=False).T
        return turned
    if height == 1:
        return np.ones((1, 1))
    half = height // 2
    heaps = np.concatenate([_heap(half, width), -_heap(height - half, width)])
    return _unit(heaps, (0, 1))


def _heap(height: int, width: int) -> Array:
    """Returns sum over k of 1 / (k + 1)^2 on the frame k elements around the middle, of norm 1."""
    heap = np.zeros((height, width))
    row, column = height // 2, width // 2
    for around in range(max(row, column) + 1):
        rows = slice(max(row - around, 0), row + around + 1)
        columns = slice(max(column - around, 0), column + around + 1)
        heap[rows, columns] += 1 / (around + 1) ** 2
    return _unit(heap, (0, 1))
