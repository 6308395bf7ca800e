"""SimBA (Guo et al., arXiv:1905.07121): one basis vector after another, pixels or cosines.

x <- x - step_size q  or  x + step_size q,  the first that makes p(y) smaller;  each q once

With targets it is the first that makes the target's probability larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jr_onnx.attacks.attack import Attack, Classifier
from jr_onnx.attacks.batch import Goal, Grid, generators, scores
from jr_onnx.attacks.nearest import check_at_least, check_positive
from jr_onnx.attacks.threat import ThreatModel, per_example
from jr_onnx.errors import ParameterError

Array = np.ndarray[Any, Any]
BASES = ("pixel", "dct")


@dataclass(frozen=True, kw_only=True)
class SimBA(Attack):
    """Coordinate search that asks only for the label's probability.

    When every vector has been tried and queries are left, it starts over in another order.

    Attributes:
        basis: `pixel`, or `dct`: cosines of low frequency, which natural images are made of.
        step_size: in input units, along a vector of norm 1; 0.2 in the paper, for l2.
        queries: forward passes of each example, at most; 20,000 in the paper.
        frequencies: of `dct`, the lowest along each side; 28 in the paper, of ImageNet's 224.
        target_classes: one for each example of the data, to be reached instead of any wrong class.

    References:
        Guo et al.: Simple Black-box Adversarial Attacks (arXiv:1905.07121).
    """

    name = "simba"
    uses_gradients = False
    basis: str = "pixel"
    step_size: float = 0.2
    queries: int = 20_000
    frequencies: int = 28
    target_classes: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.basis not in BASES:
            raise ParameterError(f"basis must be one of {', '.join(BASES)}, got {self.basis!r}")
        check_positive(step_size=self.step_size)
        check_at_least(1, queries=self.queries, frequencies=self.frequencies)

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
        """Returns the least probable point found of each example; with targets, the most.

        Raises:
            ParameterError: target classes do not fit.
        """
        goal = Goal.of(self.target_classes, target, x, y, indices)
        grid = Grid(x.shape[1:])
        vectors = _Vectors(grid.images(x).shape[1:], self)
        streams = generators(seed, indices)
        orders = np.zeros((len(x), vectors.count), int)
        best, left = x.copy(), np.full(len(x), self.queries - 1)
        alive = np.arange(len(x))
        _, lead = _ask(target, x, goal, alive)
        # A step that the ball or the bounds undo costs no query: the rounds are bounded, too.
        for turn in range(self.queries):
            at = turn % vectors.count
            if at == 0:
                for row in alive:
                    orders[row] = streams[row].permutation(vectors.count)
            step = self.step_size * grid.restore(vectors.take(orders[alive, at]))
            improved = np.zeros(len(alive), bool)
            ended = np.zeros(len(alive), bool)
            for sign in (-1.0, 1.0):
                rows = alive
                points = threat.project(best[rows] + sign * step, x[rows])
                moved = (points != best[rows]).reshape(len(rows), -1).any(axis=1)
                tried = np.flatnonzero(moved & ~improved & (left[rows] > 0))
                if not len(tried):
                    continue
                rows, points = rows[tried], points[tried]
                left[rows] -= 1
                there, odds = _ask(target, points, goal, rows)
                better = np.logical_or(odds < lead[rows], there)
                best[rows[better]], lead[rows[better]] = points[better], odds[better]
                improved[tried], ended[tried] = better, there
            alive = alive[~ended]
            alive = alive[left[alive] > 0]
            if not len(alive):
                break
        return best


class _Vectors:
    """An orthonormal basis, or the part of it with low frequencies.

    Args:
        shape: `(channels, height, width)`.
        options: which basis.
    """

    def __init__(self, shape: tuple[int, ...], options: SimBA) -> None:
        channels, *sides = shape
        if options.basis == "pixel":
            self._rows, self._columns = (np.eye(side) for side in sides)
        else:
            self._rows, self._columns = (cosines(side)[: options.frequencies] for side in sides)
        self._channels = np.eye(channels)
        self._shape = (channels, len(self._rows), len(self._columns))
        self.count = int(np.prod(self._shape))

    def take(self, numbers: Array) -> Array:
        """Returns the vectors of these numbers, `(n, channels, height, width)`."""
        channel, row, column = np.unravel_index(numbers, self._shape)
        plane = self._rows[row][:, :, None] * self._columns[column][:, None, :]
        taken: Array = self._channels[channel][:, :, None, None] * plane[:, None]
        return taken


def cosines(size: int) -> Array:
    """Returns the orthonormal basis of the DCT-II, `(frequency, position)`.

    c_k[i] = sqrt(2 / n) cos(pi k (2 i + 1) / (2 n)),  c_0 = sqrt(1 / n)
    """
    frequency, position = np.arange(size)[:, None], np.arange(size)[None]
    basis = np.sqrt(2 / size) * np.cos(np.pi * frequency * (2 * position + 1) / (2 * size))
    basis[0] = np.sqrt(1 / size)
    waves: Array = basis
    return waves


def _ask(target: Classifier, x: Array, goal: Goal, rows: Array) -> tuple[Array, Array]:
    """Returns which are at their goal, and what is to fall: log-odds, which never saturate."""
    z, classes = scores(target, x), goal.classes[rows]
    others = z.copy()
    others[np.arange(len(z)), classes] = -np.inf
    largest = others.max(axis=1)
    rest = largest + np.log(np.exp(others - per_example(largest, others)).sum(axis=1))
    return goal.reached(z, rows), goal.sign * (z[np.arange(len(z)), classes] - rest)
