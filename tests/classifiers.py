"""Classifiers in numpy whose robustness is known in closed form, for attacks to be tried on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from jr_onnx.target import Derivative

Array = np.ndarray[Any, Any]


class NumpyClassifier(ABC):
    """Every loss of `jr_onnx.autodiff.LOSSES`, from logits and a vector-Jacobian product."""

    dtype: np.dtype[Any] = np.dtype(np.float32)

    @abstractmethod
    def logits(self, x: Array) -> Array:
        """Returns `(batch, classes)`."""

    @abstractmethod
    def pull_back(self, x: Array, seed: Array) -> Array:
        """Returns d sum(logits * seed) / dx, like x."""

    def differentiate(
        self, x: Array, y: Array, *, loss: str = "cross_entropy", targets: Array | None = None
    ) -> Derivative:
        z = self.logits(x)
        value, seed = _loss(loss, z.astype(np.float64), y, targets)
        return Derivative(z, value, self.pull_back(x, seed).astype(x.dtype))


class Linear(NumpyClassifier):
    """logits = x @ w + b: the boundary between classes i and j is a hyperplane."""

    def __init__(self, w: Array, b: Array) -> None:
        self.w, self.b = w, b

    def logits(self, x: Array) -> Array:
        return x.reshape(len(x), -1) @ self.w + self.b

    def pull_back(self, x: Array, seed: Array) -> Array:
        return (seed @ self.w.T).reshape(x.shape)

    def distances(self, x: Array, y: Array, dual: float) -> Array:
        """Returns each example's distance to its nearest boundary, without bounds.

        Args:
            x: `(batch, ...)`.
            y: the labels, which the model gives.
            dual: order of the norm dual to the one distances are measured in: 1 for linf, 2 for
                l2, inf for l1.
        """
        z, rows = self.logits(x).astype(np.float64), np.arange(len(x))
        margin = z[rows, y][:, None] - z
        slope = np.linalg.norm(self.w.T[y][:, None, :] - self.w.T[None], ord=dual, axis=2)
        ratio = np.divide(margin, slope, out=np.full_like(margin, np.inf), where=slope > 0)
        nearest: Array = ratio.min(axis=1)
        return nearest


class Folded(Linear):
    """logits = |x - centre| @ w + b: linear in each orthant around the centre."""

    def __init__(self, w: Array, b: Array, centre: float) -> None:
        super().__init__(w, b)
        self.centre = centre

    def logits(self, x: Array) -> Array:
        return super().logits(np.abs(x - self.centre))

    def pull_back(self, x: Array, seed: Array) -> Array:
        return super().pull_back(x, seed) * np.sign(x - self.centre)


def random_linear(seed: int = 0, *, classes: int = 4, shape: tuple[int, ...] = (20,)) -> Linear:
    """Returns a linear model for points around 0.5."""
    w = np.random.default_rng(seed).normal(size=(int(np.prod(shape)), classes)).astype(np.float32)
    return Linear(w, (-0.5 * w.sum(axis=0)).astype(np.float32))


def points(
    model: NumpyClassifier, count: int, shape: tuple[int, ...] = (20,), seed: int = 1
) -> tuple[Array, Array]:
    """Returns points in the middle of [0, 1], and the labels that the model gives them."""
    x = np.random.default_rng(seed).uniform(0.3, 0.7, (count, *shape)).astype(np.float32)
    return x, model.logits(x).argmax(axis=1)


def _loss(name: str, z: Array, y: Array, targets: Array | None) -> tuple[Array, Array]:
    rows, classes = np.arange(len(z)), z.shape[1]
    hot = np.eye(classes)
    others = np.where(hot[y] > 0, -np.inf, z)
    towards_rival = hot[others.argmax(axis=1)] - hot[y]
    falling = np.argsort(-z, axis=1)
    if name == "cross_entropy":
        shifted = z - z.max(axis=1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        return -log_p[rows, y], np.exp(log_p) - hot[y]
    if name == "margin":
        return (z * towards_rival).sum(axis=1), towards_rival
    if name == "cw":
        margin = (z * towards_rival).sum(axis=1)
        return np.minimum(margin, 0), towards_rival * (margin < 0)[:, None]
    if name == "logit_difference":
        assert targets is not None
        direction = hot[targets] - hot[y]
        return (z * direction).sum(axis=1), direction
    if name == "dlr":
        return _ratio(z, towards_rival, hot[falling[:, 0]] - hot[falling[:, 2]])
    if name == "targeted_dlr":
        assert targets is not None
        scale = hot[falling[:, 0]] - (hot[falling[:, 2]] + hot[falling[:, 3]]) / 2
        return _ratio(z, hot[targets] - hot[y], scale)
    raise AssertionError(name)


def _ratio(z: Array, direction: Array, scale: Array) -> tuple[Array, Array]:
    above, below = (z * direction).sum(axis=1), (z * scale).sum(axis=1) + 1e-12
    value = above / below
    return value, (direction - value[:, None] * scale) / below[:, None]
