"""Carlini and Wagner's attack (arXiv:1608.04644), l2.

x' = centre + half * tanh(w)   stays inside the bounds
minimise over w by Adam:  |x' - x|^2 + c * hinge(x')
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jr_onnx.attacks.nearest import Nearest
from jr_onnx.attacks.penalty import Hinge, Penalty, Plateau
from jr_onnx.attacks.threat import per_example

Array = np.ndarray[Any, Any]
# Of the way from the centre to the bounds, where the example starts: tanh(inf) has no gradient.
_INSIDE = 0.999999
# Adam's usual constants (Kingma and Ba, arXiv:1412.6980).
_BETA1, _BETA2, _TINY = 0.9, 0.999, 1e-8


@dataclass(frozen=True, kw_only=True)
class CarliniWagner(Penalty):
    """C&W on the logits.

    Options as in `Penalty`: 9 values of c from 1e-3, 1,000 Adam steps of 0.01 each (foolbox takes
    10,000), confidence 0.

    References:
        Carlini and Wagner: Towards Evaluating the Robustness of Neural Networks (arXiv:1608.04644).
    """

    name = "carlini_wagner"
    norms = ("l2",)

    def minimise(
        self,
        hinge: Hinge,
        nearest: Nearest,
        x: Array,
        const: Array,
        rows: Array,
        bounds: tuple[float, float],
    ) -> Array:
        """Adam in the variable w."""
        centre, half = sum(bounds) / 2, (bounds[1] - bounds[0]) / 2
        # Data at a bound may be rounded to beyond it.
        w = np.arctanh(np.clip((x.astype(np.float64) - centre) / half, -1, 1) * _INSIDE)
        start = centre + half * np.tanh(w)
        first, second = np.zeros_like(w), np.zeros_like(w)
        plateau = Plateau(len(x), self.steps, self.abort_early)
        found, alive = np.zeros(len(x), bool), np.arange(len(x))
        for step in range(self.steps):
            tanh = np.tanh(w[alive])
            moved = centre + half * tanh
            points = nearest.bounded(moved, rows[alive])
            value, slope, reached = hinge.of(alive).differentiate(points)
            nearest.offer(rows[alive], points, reached)
            found[alive] |= reached
            away, c = moved - start[alive], const[alive]
            objective = (away**2).reshape(len(alive), -1).sum(axis=1) + c * value
            gradient = (2 * away + per_example(c, slope) * slope) * half * (1 - tanh**2)
            first[alive] = _BETA1 * first[alive] + (1 - _BETA1) * gradient
            second[alive] = _BETA2 * second[alive] + (1 - _BETA2) * gradient**2
            mean = first[alive] / (1 - _BETA1 ** (step + 1))
            spread = np.sqrt(second[alive] / (1 - _BETA2 ** (step + 1)))
            w[alive] -= self.learning_rate * mean / (spread + _TINY)
            size = nearest.size[rows[alive]]
            kept = ~plateau.stalled(step, alive, objective, size)
            alive = alive[np.logical_and(kept, nearest.is_open(rows[alive]))]
            if not len(alive):
                break
        return found
