"""HopSkipJump (Chen et al., arXiv:1904.02144): from the label alone, l2 and linf.

v       = mean of (phi(x_t + delta u) - mean phi) u,  u random of norm 1,  phi = +-1 by the label
x_t'    = x_t + size * direction(v),  size halved from distance / sqrt(t) until misclassified
x_{t+1} = the boundary between x and x_t', by bisection
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jr_onnx.attacks.attack import Attack, Classifier
from jr_onnx.attacks.batch import Goal, generators
from jr_onnx.attacks.nearest import (
    Nearest,
    check_at_least,
    check_positive,
)
from jr_onnx.attacks.threat import NORMS, ThreatModel, per_example
from jr_onnx.errors import ParameterError

Array = np.ndarray[Any, Any]

# Halvings of a step before it is given up.
_HALVINGS = 20
# Elements of one batch of evaluations.
_BATCH = 2**21


@dataclass(frozen=True, kw_only=True)
class HopSkipJump(Attack):
    """Walks along the boundary towards the example; with a finite epsilon, until inside the ball.

    Attributes:
        steps: iterations, 64.
        evaluations: for the first estimate of a gradient, 100; sqrt(t) times as many for the t-th.
        most_evaluations: and at most these, 10,000.
        gamma: the bisections end at gamma / n^1.5 (l2) or gamma / n^2 (linf) of the distance, in
            n dimensions; 1.
        starts: random images tried until one is misclassified; then constant ones and x mirrored.
        queries: forward passes of each example at most; None for what the steps need, some 35,000.
        target_classes: one for each example of the data, to be reached instead of any wrong class.
            Few random images are of a given class: give `starting_points`, too.
        starting_points: like the data, for each example a point to start from, tried first: of
            another class than its label, or of its target class.

    References:
        Chen et al.: HopSkipJumpAttack: A Query-Efficient Decision-Based Attack (arXiv:1904.02144).
    """

    name = "hopskipjump"
    uses_gradients = False
    norms = ("l2", "linf")
    steps: int = 64
    evaluations: int = 100
    most_evaluations: int = 10_000
    gamma: float = 1.0
    starts: int = 100
    queries: int | None = None
    target_classes: Sequence[int] | None = None
    starting_points: Array | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_at_least(
            1,
            steps=self.steps,
            evaluations=self.evaluations,
            most_evaluations=self.most_evaluations,
            starts=self.starts,
            queries=1 if self.queries is None else self.queries,
        )
        check_positive(gamma=self.gamma)

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
        """Returns the nearest point of each example that is misclassified, or at its target, or x.

        Raises:
            ParameterError: the norm is l1, or target classes or starting points do not fit.
        """
        goal = Goal.of(self.target_classes, target, x, y, indices)
        first = None
        if self.starting_points is not None:
            given, (low, high) = np.asarray(self.starting_points), threat.bounds
            if given.shape[1:] != x.shape[1:] or indices.max() >= len(given):
                raise ParameterError(
                    "starting_points must be one for each example of the data, got shape "
                    f"{given.shape} for example {indices.max()} of shape {x.shape[1:]}"
                )
            first = given[indices]
            if not (first.min() >= low and first.max() <= high):  # NaN fails, too
                raise ParameterError(
                    f"starting_points range over [{first.min():g}, {first.max():g}], outside the "
                    f"bounds [{low:g}, {high:g}]"
                )
        return _Walk(self, target, x, goal, threat, generators(seed, indices)).run(first)


class _Walk:
    """The state of each example: its point on the boundary, and the queries it has left."""

    def __init__(
        self,
        options: HopSkipJump,
        target: Classifier,
        x: Array,
        goal: Goal,
        threat: ThreatModel,
        streams: list[np.random.Generator],
    ) -> None:
        self._options, self._target, self._x, self._goal = options, target, x, goal
        self._threat, self._streams = threat, streams
        self._nearest, self._points = Nearest(x, threat), x.copy()
        self._left = np.full(len(x), np.inf if options.queries is None else options.queries)
        size, exponent = math.prod(x.shape[1:]), 1.5 if threat.norm == "l2" else 2
        wanted = math.ceil(math.log2(max(size**exponent / options.gamma, 2)))
        # Beyond the dtype's resolution nothing changes any more.
        self._bisections = min(wanted, np.finfo(x.dtype).nmant + 8)
        self._size, self._range = size, float(np.ptp(threat.bounds))

    def run(self, first: Array | None) -> Array:
        """Returns the nearest points; `first` are the points to start from, where there are any."""
        options, nearest = self._options, self._nearest
        rows = self._start(first)
        self._to_boundary(self._affordable(rows, self._bisections))
        for step in range(1, options.steps + 1):
            count = min(int(options.evaluations * math.sqrt(step)), options.most_evaluations)
            rows = np.intersect1d(rows, nearest.open)
            rows = self._affordable(rows, count + _HALVINGS + self._bisections)
            if not len(rows):
                break
            distance = self._threat.distance(self._points[rows], self._x[rows])
            radius = 0.1 * self._range if step == 1 else distance * options.gamma / self._size
            normal = self._normals(rows, np.broadcast_to(radius, len(rows)), count)
            self._step(rows, normal, distance / math.sqrt(step))
            self._to_boundary(rows)
        # Else it would be the last image of the start, which says nothing.
        return np.where(per_example(nearest.found, self._x), nearest.x_adv, self._x)

    def _affordable(self, rows: Array, queries: int) -> Array:
        return rows[self._left[rows] >= queries]

    def _wrong(self, rows: Array, points: Array) -> Array:
        """Asks the model; all that HopSkipJump learns from it."""
        np.subtract.at(self._left, rows, 1)
        return self._goal.reached(self._target.logits(points), rows)

    def _start(self, first: Array | None) -> Array:
        """Finds a misclassified point for each example; returns for which."""
        low, high = self._threat.bounds
        rows = np.arange(len(self._x))

        def attempt(points: Array) -> None:
            nonlocal rows
            able = self._left[rows] >= 1
            rows = rows[able]
            if not len(rows):
                return
            points = self._nearest.bounded(points[able], rows)
            wrong = self._wrong(rows, points)
            self._points[rows[wrong]] = points[wrong]
            self._nearest.offer(rows, points, wrong)
            rows = rows[~wrong]

        if first is not None:
            attempt(first)
        shape = self._x.shape[1:]
        for _ in range(self._options.starts):
            if not len(rows):
                break
            attempt(np.stack([self._streams[row].uniform(low, high, shape) for row in rows]))
        attempt(low + high - self._x[rows].astype(np.float64))
        for value in (low, high, (low + high) / 2):
            attempt(np.full(self._x[rows].shape, value))
        return np.flatnonzero(self._nearest.found)

    def _to_boundary(self, rows: Array) -> None:
        """Moves points towards their examples, as far as they stay misclassified."""
        if not len(rows):
            return
        x, far = self._x[rows].astype(np.float64), self._points[rows].astype(np.float64)
        whole = per_example(self._threat.distance(far, x), far)
        low, high = np.zeros(whole.shape), np.ones(whole.shape)
        for _ in range(self._bisections):
            share = (low + high) / 2
            if self._threat.norm == "l2":
                points = x + share * (far - x)
            else:
                points = np.clip(far, x - share * whole, x + share * whole)
            points = self._nearest.bounded(points, rows)
            wrong = self._wrong(rows, points)
            self._points[rows[wrong]] = points[wrong]
            wrong = per_example(wrong, far)
            low, high = np.where(wrong, low, share), np.where(wrong, share, high)
        self._nearest.offer(rows, self._points[rows], np.ones(len(rows), bool))

    def _normals(self, rows: Array, radius: Array, count: int) -> Array:
        """Returns estimates of the boundary's normal, towards the misclassified side."""
        # Below the dtype's resolution the decisions would be those of rounding.
        least = 4 * float(np.finfo(self._x.dtype).eps) * self._range * math.sqrt(self._size)
        each = zip(rows, np.maximum(radius, least), strict=True)
        return np.stack([self._normal(row, float(size), count) for row, size in each])

    def _normal(self, row: int, radius: float, count: int) -> Array:
        point, rng = self._points[row].astype(np.float64), self._streams[row]
        total, votes, decided = np.zeros(point.shape), np.zeros(point.shape), 0.0
        part = max(_BATCH // self._size, 1)
        for begin in range(0, count, part):
            shape = (min(part, count - begin), *point.shape)
            if self._threat.norm == "l2":
                noise = rng.standard_normal(shape)
            else:
                noise = rng.uniform(-1, 1, shape)
            length = np.maximum(NORMS["l2"].distance(noise), np.finfo(np.float64).tiny)
            same = np.full(len(noise), row)
            points = self._nearest.bounded(
                point + radius * noise / per_example(length, noise), same
            )
            vote = np.where(self._wrong(same, points), 1.0, -1.0)
            # As the model saw it: clipped to the bounds, rounded to its dtype.
            moved = (points - point) / radius
            total += moved.sum(axis=0)
            votes += (per_example(vote, moved) * moved).sum(axis=0)
            decided += vote.sum()
        mean = decided / count
        # Where all agree there is no contrast to be had: their mean direction has to do.
        return (votes if abs(mean) == 1 else votes - mean * total) / count

    def _step(self, rows: Array, normal: Array, size: Array) -> None:
        """Moves points along their normals, half as far until misclassified."""
        unit, size = NORMS[self._threat.norm].direction(normal), size.copy()
        open_ = np.arange(len(rows))
        for _ in range(_HALVINGS):
            far = self._points[rows[open_]] + per_example(size[open_], unit[open_]) * unit[open_]
            points = self._nearest.bounded(far, rows[open_])
            wrong = self._wrong(rows[open_], points)
            self._points[rows[open_[wrong]]] = points[wrong]
            open_ = open_[~wrong]
            size[open_] /= 2
            if not len(open_):
                break
