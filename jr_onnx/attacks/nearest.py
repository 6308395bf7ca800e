"""What the attacks share that look for the smallest perturbation.

    margin(z, y)         max over j != y of z[j], less z[y]: positive where misclassified
    nearest_boundary     the rival t for which  (z[y] - z[t]) / dual norm(gradient of it)  is least
    Nearest              the nearest misclassified point of each example so far
    Nearest.bisect       ... moved towards the example, as far as it stays misclassified

The ratio is the distance to the boundary between y and t, were the logits linear in x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from jr_onnx.attacks.attack import Classifier
from jr_onnx.attacks.threat import NORMS, Norm, ThreatModel
from jr_onnx.errors import ParameterError

Array = np.ndarray[Any, Any]

# |<g, v>| <= dual norm(g) * norm(v)
DUAL: dict[str, Norm] = {"linf": NORMS["l1"], "l2": NORMS["l2"], "l1": NORMS["linf"]}
# Logits differ by a few units in the last place between batches and between gradient and forward
# graph: a point nearer to the boundary than this may be classified correctly when counted.
_ROUNDING = 16


def check_at_least(least: float, **options: float) -> None:
    """Compares options with the least value that makes sense.

    Raises:
        ParameterError: one is smaller, or no number.
    """
    for name, value in options.items():
        if not least <= value < np.inf:
            raise ParameterError(f"{name} must be at least {least:g}, got {value}")


def check_positive(**options: float) -> None:
    """Compares options with 0.

    Raises:
        ParameterError: one is not larger, or no finite number.
    """
    for name, value in options.items():
        if not 0 < value < np.inf:
            raise ParameterError(f"{name} must be > 0, got {value}")


def ranked_rivals(z: Array, y: Array, count: int | None = None) -> Array:
    """Returns the best classes other than the label, int `(batch, at most count)`, best first.

    Raises:
        ParameterError: there is no other class.
    """
    if z.shape[1] < 2:
        raise ParameterError(f"the attack needs a rival class, got logits of shape {z.shape}")
    falling: Array = np.argsort(-_without(z, y), axis=1, kind="stable")
    return falling[:, : min(count or len(z[0]), z.shape[1] - 1)]


def margin(z: Array, y: Array) -> Array:
    """Returns the best other logit less the label's, float64 `(batch,)`."""
    best: Array = _without(z, y).max(axis=1) - z[np.arange(len(z)), y].astype(np.float64)
    return best


def rounding(z: Array) -> Array:
    """Returns the margin that may be an accident of rounding, float64 `(batch,)`."""
    unit = np.finfo(z.dtype).eps
    accident: Array = _ROUNDING * unit * np.abs(z).max(axis=1).astype(np.float64)
    return accident


def misclassified(z: Array, y: Array) -> Array:
    """Whether another class wins by more than rounding, bool `(batch,)`; NaN does not win."""
    wins: Array = margin(z, y) > rounding(z)
    return wins


def reached(z: Array, classes: Array) -> Array:
    """Whether a class wins by more than rounding, bool `(batch,)`; NaN does not win."""
    wins: Array = margin(z, classes) < -rounding(z)
    return wins


def chosen_targets(given: Sequence[int], y: Array, indices: Array, classes: int) -> Array:
    """Returns the class that each example is to become, int `(batch,)`.

    Args:
        given: one class for each example of the data.
        y: int `(batch,)`, the labels.
        indices: int `(batch,)`, which examples of the data these are.
        classes: how many the model has.

    Raises:
        ParameterError: they do not fit.
    """
    whole = np.asarray(given)
    if whole.ndim != 1 or whole.dtype.kind not in "iu" or indices.max() >= len(whole):
        raise ParameterError(
            f"target_classes must be one class for each example, got {whole.dtype} of shape "
            f"{whole.shape} for example {indices.max()}"
        )
    chosen: Array = whole[indices]
    if chosen.min() < 0 or chosen.max() >= classes or (chosen == y).any():
        raise ParameterError(
            f"target_classes must be classes below {classes} other than the label, got "
            f"{chosen.tolist()} for labels {y.tolist()}"
        )
    return chosen


class Boundary(NamedTuple):
    """The boundary that is nearest to each point, were the logits linear.

    Attributes:
        rival: int `(batch,)`, the class behind it.
        loss: float64 `(batch,)`, the rival's logit less the label's.
        gradient: float64, like x, of the loss.
        ratio: float64 `(batch,)`, distance to it, >= 0; inf where no rival has a gradient.
        rounding: float64 `(batch,)`, of the loss: less is not beyond the boundary.
    """

    rival: Array
    loss: Array
    gradient: Array
    ratio: Array
    rounding: Array


def nearest_boundary(target: Classifier, x: Array, y: Array, rivals: Array, norm: str) -> Boundary:
    """Linearises logit differences at x and compares |loss| / dual norm(gradient).

    Args:
        target: the classifier.
        x: `(batch, ...)`; the batch may be empty.
        y: int `(batch,)`.
        rivals: int `(batch, n)`, the classes to compare.
        norm: in which the distance is measured.
    """
    rival, loss = rivals[:, 0].copy(), np.zeros(len(x))
    gradient, ratio, doubt = np.zeros(x.shape), np.full(len(x), np.inf), np.zeros(len(x))
    for classes in rivals.T if len(x) else ():
        found = target.differentiate(x, y, loss="logit_difference", targets=classes)
        doubt = rounding(found.logits)
        slope = DUAL[norm].distance(found.gradient.astype(np.float64))
        value = found.loss.astype(np.float64)
        # A gradient of 0 (dead units, equal classes) has no boundary; 0 / 0 would be NaN, which
        # the code of the JumpReLU paper then counts as a success.
        sloped = np.logical_and(slope > 0, np.isfinite(slope))
        distance = np.divide(np.abs(value), slope, out=np.full(len(x), np.inf), where=sloped)
        nearer = distance < ratio
        rival[nearer], loss[nearer] = classes[nearer], value[nearer]
        gradient[nearer], ratio[nearer] = found.gradient[nearer], distance[nearer]
    return Boundary(rival, loss, gradient, ratio, doubt)


class Nearest:
    """The nearest misclassified point of each example so far.

    Attributes:
        x_adv: like x: that point; the last one offered where none was misclassified.
        size: float64 `(batch,)`, what makes a point near; inf where none was misclassified.
    """

    def __init__(self, x: Array, threat: ThreatModel) -> None:
        self.x_adv, self.size = x.copy(), np.full(len(x), np.inf)
        self._x, self._threat = x, threat
        self._bounds_alone = replace(threat, epsilon=np.inf)
        self._inside = np.zeros(len(x), bool)

    @property
    def found(self) -> Array:
        """Examples with a misclassified point, bool `(batch,)`."""
        finite: Array = np.isfinite(self.size)
        return finite

    @property
    def open(self) -> Array:
        """Indices of the examples for which `is_open`."""
        return np.flatnonzero(~self._inside)

    def is_open(self, rows: Array) -> Array:
        """Whether more work on the examples `rows` can count, bool `(n,)`.

        Without a ball any nearer point does; with one, a misclassified point inside it is all.
        """
        still: Array = ~self._inside[rows]
        return still

    def bounded(self, points: Array, rows: Array) -> Array:
        """Returns points for the examples `rows` inside the bounds, in x's dtype."""
        projected: Array = self._bounds_alone.project(points, self._x[rows])
        return projected

    def offer(
        self, rows: Array, points: Array, misclassified: Array, size: Array | None = None
    ) -> None:
        """Keeps points that are misclassified and nearer.

        Args:
            rows: int `(n,)`, their examples.
            points: `(n, ...)`, as `bounded` returns them.
            misclassified: bool `(n,)`.
            size: `(n,)`; the distance in the threat model's norm if None.
        """
        distance = self._threat.distance(points, self._x[rows])
        size = np.where(misclassified, distance if size is None else size, np.inf)
        better = np.logical_or(size < self.size[rows], ~self.found[rows])
        self.x_adv[rows[better]], self.size[rows[better]] = points[better], size[better]
        if np.isfinite(self._threat.epsilon):
            self._inside[rows] |= np.logical_and(misclassified, distance <= self._threat.epsilon)

    def bisect(self, target: Classifier, y: Array, steps: int) -> None:
        """Halves the interval between example and point `steps` times."""
        rows = np.flatnonzero(self.found)
        away = self.x_adv[rows].astype(np.float64) - self._x[rows]
        low, high = np.zeros((2, len(rows), *[1] * (away.ndim - 1)))
        high += 1
        for _ in range(steps if len(rows) else 0):
            middle = (low + high) / 2
            points = self.bounded(self._x[rows] + middle * away, rows)
            wrong = misclassified(target.logits(points), y[rows])
            self.offer(rows, points, wrong)
            wrong = wrong.reshape(low.shape)
            low, high = np.where(wrong, low, middle), np.where(wrong, middle, high)


def _without(z: Array, y: Array) -> Array:
    others: Array = z.astype(np.float64)
    others[np.arange(len(z)), y] = -np.inf
    return others
