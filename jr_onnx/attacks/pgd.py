"""Projected gradient descent (Madry et al., arXiv:1706.06083).

x_0 = x + uniform noise in the ball;  x_{t+1} = project(x_t + step_size * direction(gradient))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from jr_onnx.attacks.attack import Attack, Classifier
from jr_onnx.attacks.batch import (
    Goal,
    check_classes_of,
    check_loss,
    climb,
    in_turn,
    radius,
    reseeded,
)
from jr_onnx.attacks.nearest import check_at_least, check_positive
from jr_onnx.attacks.threat import NORMS, ThreatModel
from jr_onnx.errors import ParameterError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """PGD with the model's exact gradient, in any norm.

    An example leaves the batch at its first misclassified iterate.

    Attributes:
        steps: gradient steps of each restart, at least 1.
        step_size: in input units; 2.5 epsilon / steps if None (Madry's robustness library), which
            can cross the ball.
        random_start: start at a random point of the ball instead of at x.
        restarts: starts, each on what the ones before did not break.
        loss: `cross_entropy`, `margin`, `dlr` (3 classes), `cw` or `cw:K`.
        target_classes: one for each example of the data, to be reached instead of any wrong class:
            the loss of that class, `cross_entropy` or `margin`, goes down.

    References:
        Madry et al.: Towards Deep Learning Models Resistant to Adversarial Attacks
        (arXiv:1706.06083).
    """

    name = "pgd"
    steps: int = 40
    step_size: float | None = None
    random_start: bool = True
    restarts: int = 1
    loss: str = "cross_entropy"
    target_classes: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_at_least(1, steps=self.steps, restarts=self.restarts)
        check_loss(self.loss, aimed=self.target_classes is not None)
        if self.step_size is not None:
            check_positive(step_size=self.step_size)
        if self.restarts > 1 and not self.random_start:
            raise ParameterError("restarts without random_start would all be the same run")

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
        """Returns the first iterate of each example at its goal, or its last.

        Raises:
            ParameterError: the loss needs more classes, target classes do not fit, or epsilon is
                inf and step_size None.
        """
        check_classes_of(self.name, self.loss, target, x)
        goal = Goal.of(self.target_classes, target, x, y, indices)
        step_size = self.step_size or 2.5 * radius(self.name, threat) / self.steps

        def move(rows: Array, points: Array, loss: Array, gradient: Array) -> Array:
            step = step_size * NORMS[threat.norm].direction(gradient)
            moved: Array = points + step.astype(points.dtype)
            return moved

        def run(number: int, rows: Array) -> Array:
            start = x[rows]
            if self.random_start:
                start = threat.random_start(start, reseeded(seed, number), indices[rows])
            return climb(
                target,
                x[rows],
                replace(goal, classes=goal.classes[rows]),
                threat,
                move,
                start=start,
                steps=self.steps,
                loss=self.loss,
            )

        return in_turn(target, x, goal, (partial(run, number) for number in range(self.restarts)))
