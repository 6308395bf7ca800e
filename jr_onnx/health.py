"""Why a gradient is zero: an attack that follows it would report robustness that is not there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jr_onnx.autodiff import Surrogates
from jr_onnx.target import Target

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class GradientHealth:
    """What became of the gradients of some examples.

    Attributes:
        examples: how many there were.
        vanished: those whose gradient is 0 in every element.
        non_finite: those whose loss or gradient has NaN or infinity.
        reasons: why, and what to do; empty where nothing is wrong.
    """

    examples: int
    vanished: int
    non_finite: int
    reasons: tuple[str, ...]


def gradient_health(
    target: Target,
    x: Array,
    y: Array,
    *,
    loss: str = "cross_entropy",
    surrogate: Surrogates = "exact",
    targets: Array | None = None,
) -> GradientHealth:
    """Looks for gradients that vanished, and for the place where they did.

    Example:
        >>> import jr_onnx as jr
        >>> data = jr.load_npz("sample_models/mnist_test.npz")
        >>> hardened = jr.retrofit(jr.load("sample_models/lenet_mnist.onnx"), jump=50.0).model
        >>> health = jr.gradient_health(jr.Target(hardened, device="cpu"), data.x[:20], data.y[:20])
        >>> health.vanished, health.reasons[0][:46]
        (20, 'the jumps are in the way of the gradient of 20')

    Args:
        target: the classifier.
        x: `(batch, ...)`.
        y: int `(batch,)`.
        loss: as `Target.differentiate` takes it.
        surrogate: as `Target.differentiate` takes it.
        targets: as `Target.differentiate` takes it.

    Raises:
        UnsupportedOpError: nodes without a gradient rule.
    """
    found = target.differentiate(x, y, loss=loss, surrogate=surrogate, targets=targets)
    gradient = found.gradient.reshape(len(x), -1)
    finite = np.isfinite(gradient).all(axis=1) & np.isfinite(found.loss)
    vanished = ~gradient.any(axis=1)
    reasons = []
    if not finite.all():
        reasons.append(
            f"the loss or the gradient of {(~finite).sum()} of {len(x)} examples is not finite: "
            "the model overflows, or divides by zero"
        )
    if vanished.any():
        reasons += _why_vanished(target, x[vanished], y[vanished], loss, surrogate)
    return GradientHealth(len(x), int(vanished.sum()), int((~finite).sum()), tuple(reasons))


def _why_vanished(
    target: Target, x: Array, y: Array, loss: str, surrogate: Surrogates
) -> list[str]:
    """Asks for other gradients of the same examples until there are some."""
    graph = target.gradient(loss, surrogate)
    left = np.ones(len(x), bool)
    reasons = []

    def explain(flowing: Array, what: str) -> None:
        count = int((left & flowing).sum())
        if count:
            reasons.append(what.format(count))
        left[flowing] = False

    if "labels" not in graph.compared:
        return ["the gradient is zero there: the outputs are as given, or the model is flat"]
    if loss != "margin":
        explain(
            _flows(target, x, y, surrogate),
            f"the loss {loss} is flat at {{}} examples, at which that of the logits is not: it is "
            "saturated, so attack another loss, say margin or dlr",
        )
    if graph.jumps and left.any():
        explain(
            _flows(target, x, y, "identity"),
            "the jumps are in the way of the gradient of {} examples, which is not zero where they "
            "let everything pass: attack with a surrogate slope, say soft:30% or a wider one",
        )
    if left.any() and are_probabilities(
        target.differentiate(x[left], y[left], loss="margin", surrogate=surrogate).logits
    ):
        explain(
            left.copy(),
            "the logits at {} examples are probabilities so close to 0 and 1 that no gradient is "
            "left, of a softmax that is not recognised as the model's last: export what that is "
            "given",
        )
    explain(
        left.copy(),
        "the model is flat at {} examples: dead or saturated units, or rounding, let no gradient "
        "through, so only attacks without gradients say anything",
    )
    return reasons


def _flows(target: Target, x: Array, y: Array, surrogate: Surrogates) -> Array:
    gradient = target.differentiate(x, y, loss="margin", surrogate=surrogate).gradient
    return np.asarray(gradient.reshape(len(x), -1).any(axis=1))


def are_probabilities(outputs: Array) -> bool:
    """Whether outputs, `(batch, classes)`, look like those of a softmax."""
    sums = outputs.astype(np.float64).sum(axis=1)
    return bool((outputs >= 0).all() and np.abs(sums - 1).max() < 1e-2)
