"""Projected gradient descent (Madry et al., arXiv:1706.06083).

x_0 = x + uniform noise in the ball;  x_{t+1} = project(x_t + step_size * direction(gradient))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jr_onnx.attacks.attack import Attack, Classifier
from jr_onnx.attacks.threat import NORMS, ThreatModel
from jr_onnx.errors import ParameterError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """PGD on the cross-entropy with the model's exact gradient.

    An example leaves the batch at its first misclassified iterate.

    Attributes:
        steps: gradient steps, at least 1.
        step_size: in input units; 2.5 epsilon / steps if None (Madry's robustness library), which
            can cross the ball.
        random_start: start at a random point of the ball instead of at x.

    References:
        Madry et al.: Towards Deep Learning Models Resistant to Adversarial Attacks
        (arXiv:1706.06083).
    """

    name = "pgd"
    steps: int = 40
    step_size: float | None = None
    random_start: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ParameterError(f"steps must be at least 1, got {self.steps}")
        if self.step_size is not None and not self.step_size > 0:
            raise ParameterError(f"step_size must be > 0, got {self.step_size}")

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
        """Returns the first misclassified iterate of each example, or its last."""
        step_size = self.step_size or 2.5 * threat.epsilon / self.steps
        x_adv = threat.random_start(x, seed, indices) if self.random_start else x.copy()
        alive = np.arange(len(x))
        for _ in range(self.steps):
            found = target.differentiate(x_adv[alive], y[alive])
            unbroken = found.logits.argmax(axis=1) == y[alive]
            alive = alive[unbroken]
            if not len(alive):
                break
            direction = NORMS[threat.norm].direction(found.gradient[unbroken])
            moved = x_adv[alive] + (step_size * direction).astype(x.dtype)
            x_adv[alive] = threat.project(moved, x[alive])
        return x_adv
