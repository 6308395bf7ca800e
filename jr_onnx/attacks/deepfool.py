"""DeepFool (Moosavi-Dezfooli et al., arXiv:1511.04599), l2 and linf.

r = min over rivals t of (z[y] - z[t]) / dual norm(g_t),  g_t = gradient of z[t] - z[y]
x <- x + overshoot * (r + 1e-4) * direction(g_t),  until misclassified
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jr_onnx.attacks.attack import Attack, Classifier
from jr_onnx.attacks.nearest import (
    Nearest,
    check_at_least,
    misclassified,
    nearest_boundary,
    ranked_rivals,
)
from jr_onnx.attacks.threat import NORMS, ThreatModel, per_example

Array = np.ndarray[Any, Any]
# The step of the authors' code is longer by this, or it may end short of a boundary by rounding.
STABLE = 1e-4


@dataclass(frozen=True, kw_only=True)
class DeepFool(Attack):
    """Steps to the nearest of the linearised boundaries until the class changes.

    Attributes:
        steps: at most so many; the JumpReLU paper takes 40 (MNIST) and 7 (CIFAR-10).
        rivals: classes compared, the best other ones at x; 9 as in the authors' code.
        overshoot: factor of each step, at least 1.
        bisections: halvings of the way back to the boundary, which the overshoot crossed: the
            distance is exact to 2^-bisections of itself. 0 for the attack as published.

    References:
        Moosavi-Dezfooli et al.: DeepFool (arXiv:1511.04599).
    """

    name = "deepfool"
    norms = ("linf", "l2")
    steps: int = 50
    rivals: int = 9
    overshoot: float = 1.02
    bisections: int = 10

    def __post_init__(self) -> None:
        check_at_least(1, steps=self.steps, rivals=self.rivals, overshoot=self.overshoot)
        check_at_least(0, bisections=self.bisections)

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
        """Returns the first misclassified iterate of each example, moved back to the boundary.

        Raises:
            ParameterError: there is one class only.
        """
        # A model that ends in softmax may round the logits of far rivals to the same 0.
        z = target.differentiate(x, y, loss="margin").logits
        rivals = ranked_rivals(z, y, self.rivals)
        nearest, alive = Nearest(x, threat), np.arange(len(x))
        # In float64: a step may be smaller than a float16 model's points are apart.
        exact, x_adv = x.astype(np.float64), x.copy()
        for _ in range(self.steps):
            edge = nearest_boundary(target, x_adv[alive], y[alive], rivals[alive], threat.norm)
            sloped = np.isfinite(edge.ratio)
            alive = alive[sloped]
            if not len(alive):
                break
            direction = NORMS[threat.norm].direction(edge.gradient[sloped])
            length = self.overshoot * (edge.ratio[sloped] + STABLE)
            moved = exact[alive] + per_example(length, direction) * direction
            exact[alive] = np.clip(moved, *threat.bounds)
            x_adv[alive] = nearest.bounded(exact[alive], alive)
            wrong = misclassified(target.logits(x_adv[alive]), y[alive])
            nearest.offer(alive, x_adv[alive], wrong)
            alive = alive[~wrong]
        nearest.bisect(target, y, self.bisections)
        return nearest.x_adv
