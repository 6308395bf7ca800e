"""Iterative FGSM as the JumpReLU paper runs it (Erichson et al., arXiv:1904.03750).

x_0 = x;  x_{t+1} = clip(x_t + step_size * sign(gradient), bounds),  until misclassified
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jr_onnx.attacks.attack import Attack, Classifier
from jr_onnx.attacks.nearest import check_at_least, check_positive
from jr_onnx.attacks.pgd import PGD
from jr_onnx.attacks.threat import ThreatModel

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class IFGSM(Attack):
    """Fixed steps from x itself; the paper has no ball, so run it with epsilon inf, norm linf.

    The paper clips to the smallest and largest value of the batch, which makes a result depend on
    the batch; here it is the bounds, which the paper's batches of 1,000 images attain.

    Attributes:
        steps: 40 for MNIST, 7 for CIFAR-10 in the paper.
        step_size: in input units. The paper's 0.01 is in normalised units: where the model
            normalises by itself, give 0.01 * std (MNIST 0.01 * 0.3081, CIFAR-10 0.01 * 0.2).

    References:
        Erichson et al.: JumpReLU: A Retrofit Defense Strategy for Adversarial Attacks
        (arXiv:1904.03750); Kurakin et al. (arXiv:1607.02533).
    """

    name = "ifgsm"
    steps: int = 40
    step_size: float = 0.01

    def __post_init__(self) -> None:
        check_at_least(1, steps=self.steps)
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
        """Returns the first misclassified iterate of each example, or its last."""
        steps = PGD(steps=self.steps, step_size=self.step_size, random_start=False)
        return steps.search(target, x, y, threat, seed=seed, indices=indices)
