"""Trust region attack of the first order (Yao et al., arXiv:1812.06371), l2 and linf.

    t fixed: the rival whose linearised boundary is nearest to the example
    r = (z[y] - z[t]) / dual norm(g),  g = gradient of z[t] - z[y]
    x <- x + overshoot * (min(r, radius) + 1e-4) * direction(g),  until misclassified

adaptive: gain = (growth of z[t] - z[y]) / (growth that g predicted)
          radius <- radius * 1.2 if gain > 0.9;  radius / 1.2 if gain < 0.5;  inside its range
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jr_onnx.attacks.attack import Attack, Classifier
from jr_onnx.attacks.deepfool import STABLE
from jr_onnx.attacks.nearest import (
    DUAL,
    Nearest,
    check_at_least,
    check_positive,
    misclassified,
    nearest_boundary,
    ranked_rivals,
)
from jr_onnx.attacks.threat import NORMS, ThreatModel, per_example

Array = np.ndarray[Any, Any]
# Smallest and largest radius, in input units, as in the authors' code.
RANGES = {"l2": (5e-4, 0.05), "linf": (1e-4, 0.01)}


@dataclass(frozen=True, kw_only=True)
class TrustRegion(Attack):
    """Steps of a fixed radius towards one rival, whose linearisation is trusted no further.

    Attributes:
        steps: at most so many; a radius of 0.01 needs 100 for a distance of 1.
        radius: longest step before the overshoot, in input units.
        rivals: classes compared for the target, the best other ones at x.
        overshoot: factor of each step, at least 1.
        bisections: halvings of the way back to the boundary; 0 for the attack as published.

    References:
        Yao et al.: Trust Region Based Adversarial Attack on Neural Networks (arXiv:1812.06371).
    """

    name = "trust_region"
    norms = ("linf", "l2")
    steps: int = 1000
    radius: float = 0.01
    rivals: int = 9
    overshoot: float = 1.02
    bisections: int = 10

    def __post_init__(self) -> None:
        check_at_least(1, steps=self.steps, rivals=self.rivals, overshoot=self.overshoot)
        check_at_least(0, bisections=self.bisections)
        check_positive(radius=self.radius)

    def adapt(self, radius: Array, gain: Array, norm: str) -> Array:
        """Returns the next radius of each example, `(batch,)`."""
        return radius

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
        z = target.differentiate(x, y, loss="margin").logits
        rivals = ranked_rivals(z, y, self.rivals)
        rival = nearest_boundary(target, x, y, rivals, threat.norm).rival
        nearest, alive = Nearest(x, threat), np.arange(len(x))
        # In float64: a step may be smaller than a float16 model's points are apart.
        exact, x_adv = x.astype(np.float64), x.copy()
        radius = np.full(len(x), self.radius)
        before, predicted = np.full((2, len(x)), np.nan)
        for _ in range(self.steps):
            here = target.differentiate(
                x_adv[alive], y[alive], loss="logit_difference", targets=rival[alive]
            )
            wrong = misclassified(here.logits, y[alive])
            nearest.offer(alive, x_adv[alive], wrong)
            gradient, loss = here.gradient.astype(np.float64), here.loss.astype(np.float64)
            slope = DUAL[threat.norm].distance(gradient)
            kept = np.logical_and(~wrong, np.logical_and(slope > 0, np.isfinite(slope)))
            alive, gradient, loss, slope = alive[kept], gradient[kept], loss[kept], slope[kept]
            if not len(alive):
                break
            gain = np.full(len(alive), np.nan)
            np.divide(loss - before[alive], predicted[alive], out=gain, where=predicted[alive] > 0)
            radius[alive] = self.adapt(radius[alive], gain, threat.norm)
            length = self.overshoot * (np.minimum(np.abs(loss) / slope, radius[alive]) + STABLE)
            direction = NORMS[threat.norm].direction(gradient)
            moved = exact[alive] + per_example(length, direction) * direction
            moved = np.clip(moved, *threat.bounds)
            # of the step that the bounds allow: what they cut off, the gradient did not promise
            step = (gradient * (moved - exact[alive])).reshape(len(alive), -1)
            before[alive], predicted[alive], exact[alive] = loss, step.sum(axis=1), moved
            x_adv[alive] = nearest.bounded(moved, alive)
        if len(alive):
            wrong = misclassified(target.logits(x_adv[alive]), y[alive])
            nearest.offer(alive, x_adv[alive], wrong)
        nearest.bisect(target, y, self.bisections)
        return nearest.x_adv


@dataclass(frozen=True, kw_only=True)
class AdaptiveTrustRegion(TrustRegion):
    """Steps whose radius grows while the linearisation predicts well, and shrinks where not.

    Attributes:
        grow: gain above which the radius grows.
        shrink: gain below which it shrinks.
        factor: by which it does.
    """

    name = "trust_region_adaptive"
    grow: float = 0.9
    shrink: float = 0.5
    factor: float = 1.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, factor=self.factor)
        check_at_least(self.shrink, grow=self.grow)

    def adapt(self, radius: Array, gain: Array, norm: str) -> Array:
        """Compares the gain with its limits; a gain of NaN (the first step) changes nothing."""
        up, down = gain > self.grow, gain < self.shrink
        least, most = RANGES[norm]
        changed = np.where(up, radius * self.factor, np.where(down, radius / self.factor, radius))
        # A start outside the range is the user's wish until the first change.
        return np.where(up | down, np.clip(changed, least, most), radius)
