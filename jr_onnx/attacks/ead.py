"""Elastic-net attack to deep networks, EAD (Chen et al., arXiv:1709.04114), l1.

minimise over x' by FISTA:  |x' - x|^2 + beta * l1(x' - x) + c * hinge(x')

x_{k+1}  = shrink(y_k - rate_k * gradient of the smooth part),   rate_k = rate * sqrt(1 - k / steps)
y_{k+1}  = x_{k+1} + k / (k + 3) * (x_{k+1} - x_k)
shrink(v) = v moved by beta towards x, or x where it is nearer than that;  clipped to the bounds
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jr_onnx.attacks.nearest import Nearest, check_positive
from jr_onnx.attacks.penalty import Hinge, Penalty, Plateau
from jr_onnx.attacks.threat import per_example
from jr_onnx.errors import ParameterError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class EAD(Penalty):
    """Changes few elements: the l1 counterpart of C&W; the search for c is the same.

    It takes all its steps by default: l1 still falls where the objective does not any more.

    Attributes:
        beta: weight of l1, and the amount of the shrinkage.
        decision: what the nearest point is judged by: `l1`, or `en`, |d|^2 + beta * l1(d). The
            paper reports both; l1 is what the threat model measures.

    References:
        Chen et al.: EAD: Elastic-Net Attacks to Deep Neural Networks (arXiv:1709.04114).
    """

    name = "ead"
    norms = ("l1",)
    abort_early: bool = False
    beta: float = 0.01
    decision: str = "l1"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(beta=self.beta)
        if self.decision not in ("l1", "en"):
            raise ParameterError(f"decision must be l1 or en, got {self.decision!r}")

    def minimise(
        self,
        hinge: Hinge,
        nearest: Nearest,
        x: Array,
        const: Array,
        rows: Array,
        bounds: tuple[float, float],
    ) -> Array:
        """FISTA with a falling rate."""
        start = x.astype(np.float64)
        sparse, ahead = start.copy(), start.copy()
        plateau = Plateau(len(x), self.steps, self.abort_early)
        found, alive = np.zeros(len(x), bool), np.arange(len(x))
        for step in range(self.steps):
            here, c = hinge.of(alive), const[alive]
            points = nearest.bounded(ahead[alive], rows[alive])
            value, slope, _ = here.differentiate(points)
            away = ahead[alive] - start[alive]
            objective = (away**2).reshape(len(alive), -1).sum(axis=1) + c * value
            # At the goal nothing but the shrinkage is at work: |d|^2 would take from the large
            # elements only, and that is not what makes l1 smaller. ART does so, too.
            gradient = per_example(value > 0, slope) * (2 * away + per_example(c, slope) * slope)
            rate = self.learning_rate * np.sqrt(1 - step / self.steps)
            before = sparse[alive]
            sparse[alive] = self._shrink(ahead[alive] - rate * gradient, start[alive], bounds)
            ahead[alive] = sparse[alive] + step / (step + 3) * (sparse[alive] - before)
            points = nearest.bounded(sparse[alive], rows[alive])
            reached = here.reached(hinge.target.logits(points))
            nearest.offer(rows[alive], points, reached, self._size(points - start[alive]))
            found[alive] |= reached
            size = nearest.size[rows[alive]]
            kept = ~plateau.stalled(step, alive, objective, size)
            alive = alive[np.logical_and(kept, nearest.is_open(rows[alive]))]
            if not len(alive):
                break
        return found

    def _shrink(self, v: Array, x: Array, bounds: tuple[float, float]) -> Array:
        away = v - x
        shrunk = np.sign(away) * np.maximum(np.abs(away) - self.beta, 0)
        inside: Array = np.clip(x + shrunk, *bounds)
        return inside

    def _size(self, delta: Array) -> Array:
        flat = delta.reshape(len(delta), -1)
        l1: Array = np.abs(flat).sum(axis=1)
        elastic: Array = self.beta * l1 + (flat**2).sum(axis=1)
        return l1 if self.decision == "l1" else elastic
