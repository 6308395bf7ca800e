"""Iterative FGSM with momentum (Dong et al., arXiv:1710.06081).

g_{t+1} = momentum * g_t + gradient / l1(gradient)
x_{t+1} = project(x_t + step_size * direction(g_{t+1}))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jr_onnx.attacks.attack import Attack, Classifier
from jr_onnx.attacks.batch import Goal, check_classes_of, check_loss, climb, radius
from jr_onnx.attacks.nearest import check_at_least, check_positive
from jr_onnx.attacks.threat import NORMS, ThreatModel, per_example

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class MIFGSM(Attack):
    """Steps along a running mean of the gradients, which transfers better to other models.

    Attributes:
        steps: gradient steps, 10 in the paper.
        step_size: in input units; epsilon / steps if None, as in the paper.
        momentum: mu, 1 in the paper.
        loss: `cross_entropy`, `margin`, `dlr` (3 classes), `cw` or `cw:K`.
        target_classes: one for each example of the data, to be reached instead of any wrong class;
            the loss is `cross_entropy` or `margin` then.

    References:
        Dong et al.: Boosting Adversarial Attacks with Momentum (arXiv:1710.06081).
    """

    name = "mifgsm"
    steps: int = 10
    step_size: float | None = None
    momentum: float = 1.0
    loss: str = "cross_entropy"
    target_classes: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_at_least(1, steps=self.steps)
        check_at_least(0, momentum=self.momentum)
        check_loss(self.loss, aimed=self.target_classes is not None)
        if self.step_size is not None:
            check_positive(step_size=self.step_size)

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
        """Returns the first misclassified iterate of each example, or its last.

        Raises:
            ParameterError: the loss needs more classes, target classes do not fit, or epsilon is
                inf and step_size None.
        """
        check_classes_of(self.name, self.loss, target, x)
        step_size = self.step_size or radius(self.name, threat) / self.steps
        running = np.zeros(x.shape)

        def move(rows: Array, points: Array, loss: Array, gradient: Array) -> Array:
            exact = gradient.astype(np.float64)
            size = NORMS["l1"].distance(exact)
            unit = exact / per_example(np.where(size > 0, size, 1), exact)
            running[rows] = self.momentum * running[rows] + unit
            moved: Array = points + step_size * NORMS[threat.norm].direction(running[rows])
            return moved

        goal = Goal.of(self.target_classes, target, x, y, indices)
        return climb(target, x, goal, threat, move, start=x, steps=self.steps, loss=self.loss)
