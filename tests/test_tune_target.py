"""The model with its jumps as inputs, against the model that a retrofit writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import jr_onnx as jr
from jr_onnx.attacks import PGD
from jr_onnx.errors import ParameterError
from jr_onnx.session import Session
from jr_onnx.tune import JumpTarget
from jr_onnx.tune.inputs import tunable

Array = np.ndarray[Any, Any]
FIVE = [0.0, 0.4, 1.0, 1.5, 2.5]


@pytest.fixture(scope="module")
def opened(lenet: jr.Model) -> JumpTarget:
    return JumpTarget(lenet, jr.find_sites(lenet)[0], device="cpu")


def _everywhere(target: JumpTarget, jump: float) -> dict[str, float]:
    return {site.path: jump for site in target.sites}


@pytest.mark.parametrize("jump", FIVE)
def test_one_session_agrees_with_the_retrofit_at_each_jump(
    opened: JumpTarget, lenet: jr.Model, mnist: jr.Dataset, jump: float
) -> None:
    """Clean accuracy, robust accuracy under the same attack, and gradients, surrogates too."""
    alone = jr.Target(jr.retrofit(lenet, jump=jump).model, device="cpu")
    shared = opened.at(_everywhere(opened, jump))
    one, other = (target.logits(mnist.x) for target in (shared, alone))
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    assert (one.argmax(1) == mnist.y).mean() == (other.argmax(1) == mnist.y).mean()
    x, y = mnist.x[:60], mnist.y[:60]
    threat = jr.ThreatModel(epsilon=0.1)
    robust = [PGD(steps=5).run(target, x, y, threat, seed=3).robust for target in (shared, alone)]
    # A unit at its jump may fall either way where the two graphs round differently.
    assert (robust[0] != robust[1]).sum() <= 1
    for surrogate in ("exact", "relu", "soft:30%"):
        slopes = [
            target.differentiate(x[:16], y[:16], surrogate=surrogate).gradient
            for target in (shared, alone)
        ]
        np.testing.assert_allclose(slopes[0], slopes[1], rtol=1e-4, atol=1e-6)


def test_the_model_as_it_is_has_the_jumps_that_it_has(
    opened: JumpTarget, lenet: jr.Model, mnist: jr.Dataset
) -> None:
    plain = jr.Target(lenet, device="cpu").logits(mnist.x[:100])
    for target in (opened.original, opened.at({})):
        np.testing.assert_allclose(target.logits(mnist.x[:100]), plain, rtol=1e-5, atol=1e-5)


def test_fifty_jumps_need_no_other_session(
    lenet: jr.Model, mnist: jr.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Session] = []
    init = Session.__init__

    def counted(self: Session, *arguments: Any, **options: Any) -> None:
        made.append(self)
        init(self, *arguments, **options)

    monkeypatch.setattr(Session, "__init__", counted)
    target = JumpTarget(lenet, jr.find_sites(lenet)[0], device="cpu")
    for jump in np.linspace(0, 3, 50):
        target.at(_everywhere(target, float(jump))).logits(mnist.x[:2])
    assert len(made) == 1
    x, y = mnist.x[:2], mnist.y[:2]
    for jump in np.linspace(0, 3, 50):
        target.at(_everywhere(target, float(jump))).differentiate(x, y, surrogate="soft:10%")
    assert len(made) == 2


SITES = {
    "Relu": "y = Relu(x)",
    "Clip6": "zero = Constant<value_float = 0.0>() six = Constant<value_float = 6.0>() "
    "y = Clip(x, zero, six)",
    "ThresholdedRelu": "y = ThresholdedRelu<alpha = 0.5>(x)",
    "LeakyRelu": "y = LeakyRelu<alpha = 0.0>(x)",
}


@pytest.mark.parametrize("op", SITES)
@pytest.mark.parametrize("dtype", ["float", "double", "float16"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_each_site_computes_the_jump(
    text_model: Callable[..., jr.Model], op: str, dtype: str, per_channel: bool
) -> None:
    if op == "Clip6" and dtype != "float":
        pytest.skip("its bounds are float32")
    model = text_model(
        f"one ({dtype}[n, 3, 50] x) => ({dtype}[n, 3, 50] y) {{ {SITES[op]} }}", opset=18
    )
    (site,) = jr.find_sites(model)[0]
    target = JumpTarget(model, [site], per_channel=per_channel, device="cpu")
    x = (4 * np.random.default_rng(0).standard_normal((20, 3, 50))).astype(site.tensor.dtype)
    jump: Any = (0.1, 0.7, 2.3) if per_channel else 1.3
    x[:3, :, 0] = np.asarray(jump, x.dtype)  # at the jump itself nothing passes
    got = target.at({"y": jump}).logits(x)
    np.testing.assert_array_equal(got, jr.jump_relu(x, jump, site.cap))
    np.testing.assert_array_equal(target.original.logits(x), jr.jump_relu(x, site.jump, site.cap))


def test_a_jump_that_a_site_cannot_have_is_named(
    text_model: Callable[..., jr.Model], opened: JumpTarget
) -> None:
    with pytest.raises(ParameterError, match="finite number >= 0"):
        opened.at({"relu": -1.0})
    with pytest.raises(ParameterError, match="2 jumps for 10 channels"):
        opened.at({"relu": (1.0, 2.0)})


def test_what_cannot_be_tuned_is_named(text_model: Callable[..., jr.Model]) -> None:
    model = text_model(
        """mixed (float[n, 4] x, int32[n, 4] k, bool c) => (float[n, 4] y, int32[n, 4] z) {
            z = Relu(k)
            y = If(c) <
                then_branch = yes () => (float[n, 4] a) { a = Relu(x) },
                else_branch = no () => (float[n, 4] b) { b = Identity(x) }
            >
        }"""
    )
    kept, left = tunable(jr.find_sites(model)[0])
    assert kept == ()
    reasons = {entry.path: entry.reason for entry in left}
    assert "in a branch or a function" in reasons["y.then_branch>a"]
    assert "its type is int32" in reasons["z"]
