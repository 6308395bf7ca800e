"""A vanished gradient, and where it vanished."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import jr_onnx as jr

MakeModel = Callable[..., jr.Model]
X = np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32)
Y = X.argmax(axis=1)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("k = Mul (x, big) z = Identity (k)", "saturated, so attack another loss, say margin"),
        ("k = Mul (x, big) p = Softmax (k) z = Mul (p, p)", "probabilities"),
        (
            "k = Mul (x, big) p = Softmax <axis = 1> (k) z = Softmax <axis = 1> (p)",
            "probabilities",
        ),
        ("k = Mul (x, big) z = ThresholdedRelu <alpha: float = 1e6> (k)", "surrogate slope"),
        ("k = Round (x) a = Mul (x, none) z = Add (k, a)", "the model is flat at 8 examples"),
    ],
)
def test_the_reason_is_found(text_model: MakeModel, body: str, reason: str) -> None:
    constants = "<float big = {20000}, float none = {0}>"
    model = text_model(f"g (float[N, 4] x) => (float[N, 4] z) {constants} {{ {body} }}")
    health = jr.gradient_health(jr.Target(model, device="cpu"), X, Y)
    assert (health.examples, health.vanished, health.non_finite) == (8, 8, 0)
    assert len(health.reasons) == 1
    assert reason in health.reasons[0]


def test_a_gradient_that_is_not_finite(text_model: MakeModel) -> None:
    model = text_model("g (float[N, 4] x) => (float[N, 4] z) { z = Sqrt (x) }")
    health = jr.gradient_health(jr.Target(model, device="cpu"), X, Y)
    assert health.non_finite == (X < 0).any(axis=1).sum()
    assert "is not finite" in health.reasons[0]


def test_a_healthy_model(lenet: jr.Model, mnist: jr.Dataset) -> None:
    wrong = (mnist.y[:50] + 1) % 10
    health = jr.gradient_health(jr.Target(lenet, device="cpu"), mnist.x[:50], wrong)
    assert (health.vanished, health.non_finite, health.reasons) == (0, 0, ())


def test_a_saturated_cross_entropy_is_told(lenet: jr.Model, mnist: jr.Dataset) -> None:
    """Most digits are classified with a probability that float32 rounds to 1."""
    target = jr.Target(lenet, device="cpu")
    health = jr.gradient_health(target, mnist.x[:200], mnist.y[:200])
    assert health.vanished == sum(
        not row.any() for row in target.differentiate(mnist.x[:200], mnist.y[:200]).gradient
    )
    if health.vanished:
        assert "saturated" in health.reasons[0]
