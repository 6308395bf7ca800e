"""Minimise  size(x' - x) + c * hinge(x'),  and search for the smallest c that misclassifies.

    m     = max over j != k of z[j], less z[k];   k the label, or the target
    hinge = max(0, confidence - m)                untargeted: m grows
          = max(0, confidence + m)                targeted:   m falls
    c     ten times larger until something is found, then the middle of what failed and what did not

Carlini and Wagner (arXiv:1608.04644); what their attack and EAD share.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jr_onnx.attacks.attack import Attack, Classifier
from jr_onnx.attacks.nearest import (
    Nearest,
    check_at_least,
    check_positive,
    chosen_targets,
    margin,
    rounding,
)
from jr_onnx.attacks.threat import ThreatModel, per_example
from jr_onnx.errors import ParameterError

Array = np.ndarray[Any, Any]
# Of the objective, in a tenth of the steps, or the search for this c ends (the authors' code).
_LEAST_PROGRESS = 1e-4
# c, in the authors' code.
_LARGEST = 1e10


class Hinge(NamedTuple):
    """The second term for some examples.

    Attributes:
        target: the classifier.
        classes: int `(batch,)`, k.
        sign: 1 untargeted, -1 targeted.
        confidence: by which the margin is to be reached.
    """

    target: Classifier
    classes: Array
    sign: int
    confidence: float

    def of(self, rows: Array) -> Hinge:
        """Returns the term for the examples `rows`."""
        return self._replace(classes=self.classes[rows])

    def differentiate(self, points: Array) -> tuple[Array, Array, Array]:
        """Returns the hinge and its gradient, float64, and whether the goal is reached."""
        found = self.target.differentiate(points, self.classes, loss="margin")
        hinge = self.confidence - self.sign * found.loss.astype(np.float64)
        slope = np.where(hinge > 0, -self.sign, 0)
        gradient = found.gradient.astype(np.float64)
        reached = self.reached(found.logits)
        return np.maximum(hinge, 0), per_example(slope, gradient) * gradient, reached

    def reached(self, z: Array) -> Array:
        """Whether the margin is larger than the confidence, and than rounding, bool `(batch,)`."""
        wins: Array = self.sign * margin(z, self.classes) > np.maximum(self.confidence, rounding(z))
        return wins


class Plateau:
    """Which examples have stopped to make progress, each judged alone."""

    def __init__(self, count: int, steps: int, wanted: bool) -> None:
        self._lowest, self._before = np.full((2, 2, count), np.inf)
        self._every = math.ceil(steps / 10) if wanted else steps + 1

    def stalled(self, step: int, rows: Array, objective: Array, size: Array) -> Array:
        """Looks at the examples `rows` every tenth of the steps.

        Args:
            step: from 0.
            rows: int `(n,)`.
            objective: `(n,)`, at this step.
            size: `(n,)`, of the nearest point so far; inf where there is none.

        Returns:
            bool `(n,)`: neither fell. EAD's steps go on making l1 smaller where its objective,
            which is without l1, does not fall any more.
        """
        self._lowest[:, rows] = lowest = np.minimum(self._lowest[:, rows], (objective, size))
        if step % self._every:
            return np.zeros(len(rows), bool)
        stalled: Array = ~(lowest < (1 - _LEAST_PROGRESS) * self._before[:, rows]).any(axis=0)
        self._before[:, rows] = lowest
        return stalled


@dataclass(frozen=True, kw_only=True)
class Penalty(Attack):
    """The search for c; a subclass minimises for given c.

    Attributes:
        steps: of the minimisation, for each c.
        binary_search_steps: values of c tried; 9 in the authors' code.
        initial_const: the first.
        learning_rate: of the minimisation.
        confidence: margin of the logits to be reached, at least 0.
        abort_early: leave a c at which, in a tenth of the steps, neither the objective nor the
            nearest point's size falls by 1e-4 of itself.
        target_classes: one for each example of the data, to be reached instead of any wrong class.
    """

    steps: int = 1000
    binary_search_steps: int = 9
    initial_const: float = 1e-3
    learning_rate: float = 0.01
    confidence: float = 0.0
    abort_early: bool = True
    target_classes: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_at_least(1, steps=self.steps, binary_search_steps=self.binary_search_steps)
        check_at_least(0, confidence=self.confidence)
        check_positive(initial_const=self.initial_const, learning_rate=self.learning_rate)

    @abstractmethod
    def minimise(
        self,
        hinge: Hinge,
        nearest: Nearest,
        x: Array,
        const: Array,
        rows: Array,
        bounds: tuple[float, float],
    ) -> Array:
        """Minimises from x, offers what it finds to `nearest`, and returns where it found, bool.

        Args:
            hinge: the second term for these examples.
            nearest: of all examples.
            x: `(n, ...)`.
            const: float64 `(n,)`, c.
            rows: int `(n,)`, what `nearest` knows these examples by.
            bounds: of an input element.
        """

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
        """Returns the nearest point that reached the goal, or the last.

        Raises:
            ParameterError: target classes that do not fit, or there is one class only.
        """
        classes = target.logits(x[:1]).shape[1]
        if classes < 2:
            raise ParameterError(f"{self.name} needs a rival class, the model has {classes}")
        chosen = y
        if self.target_classes is not None:
            chosen = chosen_targets(self.target_classes, y, indices, classes)
        hinge = Hinge(target, chosen, 1 if self.target_classes is None else -1, self.confidence)
        nearest, const = Nearest(x, threat), np.full(len(x), self.initial_const)
        low, high = np.zeros(len(x)), np.full(len(x), np.inf)
        for _ in range(self.binary_search_steps):
            rows = nearest.open
            if not len(rows):
                break
            found = self.minimise(
                hinge.of(rows), nearest, x[rows], const[rows], rows, threat.bounds
            )
            high[rows] = np.where(found, const[rows], high[rows])
            low[rows] = np.where(found, low[rows], const[rows])
            const = np.where(np.isinf(high), np.minimum(const * 10, _LARGEST), (low + high) / 2)
        return nearest.x_adv
