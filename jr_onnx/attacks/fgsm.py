"""The fast gradient sign method (Goodfellow et al., arXiv:1412.6572), in any norm.

x_adv = project(x + epsilon * direction(gradient))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jr_onnx.attacks.attack import Attack, Classifier
from jr_onnx.attacks.batch import Goal, check_classes_of, check_loss, radius
from jr_onnx.attacks.threat import NORMS, ThreatModel

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class FGSM(Attack):
    """One step to the boundary of the ball: a lower bar than any iterative attack.

    Attributes:
        loss: `cross_entropy`, `margin`, `dlr` (3 classes), `cw` or `cw:K`.
        target_classes: one for each example of the data, to be reached instead of any wrong class;
            the loss is `cross_entropy` or `margin` then.

    References:
        Goodfellow et al.: Explaining and Harnessing Adversarial Examples (arXiv:1412.6572).
    """

    name = "fgsm"
    loss: str = "cross_entropy"
    target_classes: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_loss(self.loss, aimed=self.target_classes is not None)

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
        """Returns the point of the step.

        Raises:
            ParameterError: the loss needs more classes, target classes do not fit, or epsilon is
                inf.
        """
        check_classes_of(self.name, self.loss, target, x)
        goal = Goal.of(self.target_classes, target, x, y, indices)
        found = target.differentiate(x, goal.classes, loss=self.loss)
        uphill = goal.sign * found.gradient.astype(np.float64)
        step = radius(self.name, threat) * NORMS[threat.norm].direction(uphill)
        return threat.project(x + step, x)
