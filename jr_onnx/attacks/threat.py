"""What the attacker may do: a ball around the example, inside the bounds, in raw input units.

Norms differ in three functions: how a ball is sampled, how a gradient becomes a step, and how a
point is brought back into the ball.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from jr_onnx.errors import ParameterError

Array = np.ndarray[Any, Any]


class Norm(Protocol):
    """The three functions, and the distance itself."""

    def sample(self, shape: tuple[int, ...], epsilon: float, rng: np.random.Generator) -> Array:
        """Returns one random point of the ball around 0, float64."""

    def direction(self, gradient: Array) -> Array:
        """Returns the steepest step of norm 1 for each example of a batch."""

    def project(self, delta: Array, epsilon: float) -> Array:
        """Returns the nearest perturbations inside the ball, for each example of a batch."""

    def distance(self, delta: Array) -> Array:
        """Returns the norm of each example's perturbation, `(batch,)`."""


class Linf:
    """The largest absolute change of any input element."""

    def sample(self, shape: tuple[int, ...], epsilon: float, rng: np.random.Generator) -> Array:
        """Uniform in the cube."""
        return rng.uniform(-epsilon, epsilon, shape)

    def direction(self, gradient: Array) -> Array:
        """The sign."""
        return np.sign(gradient)

    def project(self, delta: Array, epsilon: float) -> Array:
        """Clips every element."""
        return np.clip(delta, -epsilon, epsilon)

    def distance(self, delta: Array) -> Array:
        """Maximum of the absolute values."""
        largest: Array = np.abs(delta).max(axis=tuple(range(1, delta.ndim)), initial=0.0)
        return largest


NORMS: dict[str, Norm] = {"linf": Linf()}


@dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """The set of points an attack may return for an example.

    Attributes:
        norm: a name in `NORMS`.
        epsilon: radius of the ball, in raw input units (pixels of `[0, 1]`: 8 / 255 = 0.031).
        bounds: smallest and largest value of an input element.

    Raises:
        ParameterError: no such norm, epsilon not finite and positive, bounds empty, or an epsilon
            as wide as the bounds (0..255 units on `[0, 1]` data, mostly).
    """

    norm: str = "linf"
    epsilon: float
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ParameterError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        if not (np.isfinite(self.epsilon) and self.epsilon > 0):
            raise ParameterError(f"epsilon must be a finite number > 0, got {self.epsilon}")
        low, high = self.bounds
        if not (np.isfinite(low) and np.isfinite(high) and low < high):
            raise ParameterError(f"bounds must be finite and ascending, got {self.bounds}")
        if self.norm == "linf" and self.epsilon > high - low:
            raise ParameterError(
                f"epsilon {self.epsilon:g} is wider than the bounds [{low:g}, {high:g}]. Give it "
                "in the units of the input, say 8/255"
            )

    def random_start(self, x: Array, seed: int, indices: Array) -> Array:
        """Returns a random point for each example, inside ball and bounds.

        The point depends on the seed and the example's index alone, not on the batch it is in.
        """
        noise = np.stack(
            [
                NORMS[self.norm].sample(
                    x.shape[1:], self.epsilon, np.random.default_rng((seed, int(index)))
                )
                for index in indices
            ]
        )
        return self.project(x + noise, x)

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
        moved = np.clip(exact + delta, *self.bounds)
        rounded = moved.astype(x.dtype)
        outwards = np.abs(rounded.astype(np.float64) - exact) > np.abs(moved - exact)
        return np.where(outwards, np.nextafter(rounded, x), rounded)

    def contains(self, point: Array, x: Array) -> Array:
        """Whether each point is inside ball and bounds, judged in float64, `(batch,)`."""
        exact = point.astype(np.float64)
        axes = tuple(range(1, exact.ndim))
        low, high = self.bounds
        inside = np.logical_and(exact >= low, exact <= high).all(axis=axes)
        # What subtracting two float64 may round up; the points themselves lie inside.
        slack = np.finfo(np.float64).eps * max(abs(low), abs(high), 1.0)
        near = self.distance(point, x) <= self.epsilon + slack
        return np.logical_and(inside, near)

    def distance(self, point: Array, x: Array) -> Array:
        """Distance of each point from its example in float64, `(batch,)`."""
        return NORMS[self.norm].distance(point.astype(np.float64) - x.astype(np.float64))

    def to_json(self) -> dict[str, Any]:
        """Returns the entry `threat` of the result."""
        return {"norm": self.norm, "epsilon": self.epsilon, "bounds": list(self.bounds)}


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
