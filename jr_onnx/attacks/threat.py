"""What the attacker may do: a ball around the example, inside the bounds, in raw input units.

Norms differ in three functions: how a ball is sampled (evenly, or for a start), how a gradient
becomes a step, and how a point is brought back into the ball.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from jr_onnx.errors import ParameterError

Array = np.ndarray[Any, Any]


class Norm(Protocol):
    """The three functions, and the distance itself."""

    def sample(self, shape: tuple[int, ...], epsilon: float, rng: np.random.Generator) -> Array:
        """Returns one random point of the ball around 0, float64."""

    def start(self, shape: tuple[int, ...], epsilon: float, rng: np.random.Generator) -> Array:
        """Returns one from which a search sets out."""

    def direction(self, gradient: Array) -> Array:
        """Returns a steep step of norm 1 for each example of a batch, 0 where the gradient is."""

    def project(self, delta: Array, epsilon: float) -> Array:
        """Returns the nearest perturbations inside the ball, for each example of a batch."""

    def distance(self, delta: Array) -> Array:
        """Returns the norm of each example's perturbation, `(batch,)`."""


class Linf:
    """The largest absolute change of any input element."""

    def sample(self, shape: tuple[int, ...], epsilon: float, rng: np.random.Generator) -> Array:
        """Uniform in the cube."""
        return rng.uniform(-epsilon, epsilon, shape)

    start = sample

    def direction(self, gradient: Array) -> Array:
        """The sign."""
        return np.sign(gradient)

    def project(self, delta: Array, epsilon: float) -> Array:
        """Clips every element."""
        return np.clip(delta, -epsilon, epsilon)

    def distance(self, delta: Array) -> Array:
        """Maximum of the absolute values."""
        largest: Array = np.abs(delta).max(axis=_all_but_first(delta), initial=0.0)
        return largest


class L2:
    """The Euclidean length."""

    def sample(self, shape: tuple[int, ...], epsilon: float, rng: np.random.Generator) -> Array:
        """Uniform in the ball: a direction, and a radius of density r^(n - 1)."""
        way = self._way(shape, rng)
        drawn: Array = way * (epsilon * rng.random() ** (1 / max(way.size, 1)))
        return drawn

    def start(self, shape: tuple[int, ...], epsilon: float, rng: np.random.Generator) -> Array:
        """A direction, and a radius of even density (Rice et al., arXiv:2002.11569).

        In many dimensions a uniform point of the ball is at its surface, and a search that starts
        there spends many of its steps on turning.
        """
        drawn: Array = self._way(shape, rng) * (epsilon * rng.random())
        return drawn

    def _way(self, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
        point = rng.standard_normal(shape)
        way: Array = point / max(float(np.linalg.norm(point)), _TINY)
        return way

    def direction(self, gradient: Array) -> Array:
        """The gradient, scaled to length 1; 0 stays 0."""
        # Scaled first: squares of gradients below 1e-19 vanish in float32.
        largest = per_example(Linf().distance(gradient), gradient)
        scaled = gradient / np.where(largest > 0, largest, 1)
        length = per_example(self.distance(scaled), scaled)
        unit: Array = scaled / np.where(length > 0, length, 1)
        return unit

    def project(self, delta: Array, epsilon: float) -> Array:
        """Shortens what is too long."""
        length = per_example(self.distance(delta), delta)
        shorter: Array = delta * np.minimum(1, epsilon * _INSIDE / np.maximum(length, _TINY))
        return shorter

    def distance(self, delta: Array) -> Array:
        """Square root of the sum of squares."""
        length: Array = np.sqrt((delta**2).sum(axis=_all_but_first(delta)))
        return length


class L1:
    """The sum of the absolute changes."""

    # Share of the elements that a step moves: SLIDE (Tramer and Boneh, arXiv:1904.13000).
    moved = 0.01

    def sample(self, shape: tuple[int, ...], epsilon: float, rng: np.random.Generator) -> Array:
        """Uniform in the ball: a point of the simplex, signs, and a radius."""
        point = rng.standard_exponential(shape) * rng.choice([-1.0, 1.0], shape)
        radius = epsilon * rng.random() ** (1 / max(point.size, 1))
        drawn: Array = point * (radius / max(float(np.abs(point).sum()), _TINY))
        return drawn

    start = sample

    def direction(self, gradient: Array) -> Array:
        """Equal steps along the largest elements.

        The steepest step of norm 1 would move one element alone, and reach its bound soon.
        """
        flat = _flat(np.abs(gradient))
        count = max(1, round(self.moved * flat.shape[1]))
        least = np.partition(flat, -count, axis=1)[:, -count:].min(axis=1)
        chosen = np.sign(gradient) * (np.abs(gradient) >= per_example(least, gradient))
        unit: Array = chosen / per_example(np.maximum(self.distance(chosen), 1), gradient)
        return unit

    def project(self, delta: Array, epsilon: float) -> Array:
        """Makes all elements smaller by one amount (Duchi et al., 2008)."""
        flat = _flat(np.abs(delta))
        falling = -np.sort(-flat, axis=1)
        over = np.cumsum(falling, axis=1) - epsilon * _INSIDE
        count = np.arange(1, flat.shape[1] + 1)
        last = (falling * count > over).sum(axis=1, keepdims=True)
        at = np.maximum(last - 1, 0)
        amount = np.maximum(np.take_along_axis(over, at, axis=1) / (at + 1), 0)
        size = np.maximum(np.abs(delta) - per_example(amount[:, 0], delta), 0)
        shorter: Array = np.sign(delta) * size
        return shorter

    def distance(self, delta: Array) -> Array:
        """Sum of the absolute values."""
        total: Array = np.abs(delta).sum(axis=_all_but_first(delta))
        return total


# A sum of float64 may be rounded up: what is scaled to epsilon must stay inside when measured.
_INSIDE, _TINY = 1 - 1e-12, 1e-300


def _all_but_first(array: Array) -> tuple[int, ...]:
    return tuple(range(1, array.ndim))


def _flat(array: Array) -> Array:
    # -1 is no shape for an empty batch.
    return array.reshape(len(array), math.prod(array.shape[1:]))


def per_example(values: Array, like: Array) -> Array:
    """Shapes `(batch,)` so that it meets `(batch, ...)`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


NORMS: dict[str, Norm] = {"linf": Linf(), "l2": L2(), "l1": L1()}


@dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """The set of points an attack may return for an example.

    Attributes:
        norm: a name in `NORMS`.
        epsilon: radius of the ball, in raw input units (pixels of `[0, 1]`: 8 / 255 = 0.031);
            inf leaves only the bounds, for attacks that look for the smallest perturbation.
        bounds: smallest and largest value of an input element.

    Raises:
        ParameterError: no such norm, epsilon not positive, bounds empty, or a linf epsilon
            as wide as the bounds (0..255 units on `[0, 1]` data, mostly).
    """

    norm: str = "linf"
    epsilon: float
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ParameterError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        if not self.epsilon > 0:
            raise ParameterError(f"epsilon must be a number > 0, or inf, got {self.epsilon}")
        low, high = self.bounds
        if not (np.isfinite(low) and np.isfinite(high) and low < high):
            raise ParameterError(f"bounds must be finite and ascending, got {self.bounds}")
        if self.norm == "linf" and high - low < self.epsilon < np.inf:
            raise ParameterError(
                f"epsilon {self.epsilon:g} is wider than the bounds [{low:g}, {high:g}]. Give it "
                "in the units of the input, say 8/255"
            )

    def random_start(self, x: Array, seed: int, indices: Array) -> Array:
        """Returns a random point for each example, inside ball and bounds.

        The point depends on the seed and the example's index alone, not on the batch it is in.
        """
        points = []
        for each, index in zip(x, indices, strict=True):
            rng = np.random.default_rng((seed, int(index)))
            if np.isinf(self.epsilon):
                points.append(rng.uniform(*self.bounds, x.shape[1:]))
            else:
                points.append(each + NORMS[self.norm].start(x.shape[1:], self.epsilon, rng))
        return self.project(np.stack(points), x)

    def project(self, point: Array, x: Array) -> Array:
        """Returns the points brought back into ball and bounds.

        Args:
            point: `(batch, ...)`, anything.
            x: the examples, inside the bounds; its dtype is the result's.

        Returns:
            Like x. Rounding to the dtype goes inwards, so that the result is inside in exact
            arithmetic too.
        """
        exact = x.astype(np.float64)
        delta = NORMS[self.norm].project(point.astype(np.float64) - exact, self.epsilon)
        moved = np.clip(exact + delta, *self.bounds_in(x.dtype))
        rounded = moved.astype(x.dtype)
        outwards = np.abs(rounded.astype(np.float64) - exact) > np.abs(moved - exact)
        return np.where(outwards, np.nextafter(rounded, x), rounded)

    def contains(self, point: Array, x: Array) -> Array:
        """Whether each point is inside ball and bounds, judged in float64, `(batch,)`."""
        exact = point.astype(np.float64)
        axes = tuple(range(1, exact.ndim))
        low, high = self.bounds_in(point.dtype)
        inside = np.logical_and(exact >= low, exact <= high).all(axis=axes)
        # What subtracting two float64 may round up; the points themselves lie inside.
        slack = np.finfo(np.float64).eps * max(abs(low), abs(high), 1.0)
        near = self.distance(point, x) <= self.epsilon + slack
        return np.logical_and(inside, near)

    def bounds_in(self, dtype: np.dtype[Any]) -> tuple[float, float]:
        """Returns the bounds as a dtype holds them: data at a bound was rounded like the bound."""
        low, high = (float(np.asarray(bound, dtype)) for bound in self.bounds)
        return low, high

    def distance(self, point: Array, x: Array) -> Array:
        """Distance of each point from its example in float64, `(batch,)`."""
        return NORMS[self.norm].distance(point.astype(np.float64) - x.astype(np.float64))

    def to_json(self) -> dict[str, Any]:
        """Returns the entry `threat` of the result."""
        epsilon = self.epsilon if np.isfinite(self.epsilon) else None
        return {"norm": self.norm, "epsilon": epsilon, "bounds": list(self.bounds)}


def parse_epsilon(text: str) -> float:
    """Reads `0.03` or `8/255`.

    >>> round(parse_epsilon("8/255"), 6)
    0.031373

    Raises:
        ParameterError: it is neither.
    """
    numerator, _, denominator = text.partition("/")
    try:
        return float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError) as error:
        raise ParameterError(
            f"epsilon must be a number or a fraction such as 8/255, got {text!r}"
        ) from error
