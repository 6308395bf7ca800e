"""The normalizations, against finite differences and torch.

Torch is the only oracle where the reference evaluator errs, as in LRN, BatchNormalization before
opset 14 and the p = 1 of LpNormalization, or computes in float32, as in GroupNormalization 21.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gradient_checks import Case, check, model, weight
from onnx.defs import onnx_opset_version
from torch.nn import functional

import jr_onnx as jr
from jr_onnx.autodiff import input_gradient
from jr_onnx.errors import UnsupportedOpError

NEWEST = onnx_opset_version()
SHAPE = (3, 4, 2, 3)
W = weight(24, 4)


def classifier(formula: str, opset: int, **weights: Any) -> Case:
    body = f"h = {formula} f = Flatten(h) z = Gemm(f, w, zero)"
    return model(body, "N,4,2,3", opset=opset, w=W, zero=np.array([0.0]), **weights)


def per_channel(*names: str, size: int = 4) -> dict[str, Any]:
    """Weights of one axis, each its own; positive, as variances must be."""
    return {name: np.abs(weight(size)) + 0.3 * index for index, name in enumerate(names)}


STATISTICS = per_channel("s", "b", "m", "v")
# Name: (formula, opsets, weights, kernels are float only).
FORMULAS: dict[str, tuple[str, tuple[int, ...], dict[str, Any], bool]] = {
    "batch": ("BatchNormalization(x, s, b, m, v)", (14, 15, NEWEST), STATISTICS, False),
    "batch, epsilon": (
        "BatchNormalization<epsilon=0.5>(x, s, b, m, v)", (14, NEWEST), STATISTICS, False,
    ),
    "instance": (
        "InstanceNormalization<epsilon=0.1>(x, s, b)", (9, NEWEST), per_channel("s", "b"), True,
    ),
    "group, scaled by group": (
        "GroupNormalization<num_groups=2, epsilon=0.1>(x, s, b)", (18,),
        per_channel("s", "b", size=2), True,
    ),
    "layer": (
        "LayerNormalization<epsilon=0.1>(x, s, b)", (17, 18, NEWEST),
        per_channel("s", "b", size=3), False,
    ),
    "layer, axis": (
        "LayerNormalization<axis=2, epsilon=0.1>(x, s)", (17, 18, NEWEST),
        {"s": weight(2, 3)}, False,
    ),
    "layer, negative axis": (
        "LayerNormalization<axis=-3, epsilon=0.1>(x, s)", (17, NEWEST),
        {"s": weight(4, 2, 3)}, False,
    ),
    "rms": (
        "RMSNormalization<epsilon=0.1>(x, s)", (23, NEWEST), per_channel("s", size=3), False,
    ),
    "rms, axis": (
        "RMSNormalization<axis=2, epsilon=0.1>(x, s)", (23, NEWEST), {"s": weight(2, 3)}, False,
    ),
    "lp": ("LpNormalization(x)", (9, 12, NEWEST), {}, False),
    "lp, axis": ("LpNormalization<axis=1, p=2>(x)", (9, 12, NEWEST), {}, False),
}  # fmt: skip
RUNS = [
    pytest.param(name, opset, dtype, id=f"{name}-{opset}-{dtype}")
    for name, (_, opsets, _, single) in FORMULAS.items()
    for opset in opsets
    for dtype in (("float",) if single else ("float", "double"))
]


@pytest.mark.parametrize(("name", "opset", "dtype"), RUNS)
def test_a_rule_agrees_with_finite_differences(name: str, opset: int, dtype: str) -> None:
    formula, _, weights, _ = FORMULAS[name]
    check(classifier(formula, opset, **weights), SHAPE, dtype)


Forward = Callable[..., torch.Tensor]
TORCH: dict[str, tuple[str, tuple[int, ...], dict[str, Any], Forward]] = {
    "batch": (
        "BatchNormalization(x, s, b, m, v)", (9, NEWEST), STATISTICS,
        lambda x, s, b, m, v: functional.batch_norm(x, m, v, s, b),
    ),
    "instance": (
        "InstanceNormalization(x, s, b)", (9, NEWEST), per_channel("s", "b"),
        lambda x, s, b: functional.instance_norm(x, weight=s, bias=b),
    ),
    "group": (
        "GroupNormalization<num_groups=2>(x, s, b)", (21, NEWEST), per_channel("s", "b"),
        lambda x, s, b: functional.group_norm(x, 2, s, b),
    ),
    "layer": (
        "LayerNormalization(x, s, b)", (17, NEWEST), per_channel("s", "b", size=3),
        lambda x, s, b: functional.layer_norm(x, [3], s, b),
    ),
    "rms": (
        "RMSNormalization(x, s)", (23, NEWEST), per_channel("s", size=3),
        lambda x, s: functional.rms_norm(x, [3], s, 1e-5),
    ),
    "response": (
        "LRN<size=3, alpha=0.9, beta=0.6, bias=1.5>(x)", (9, NEWEST), {},
        lambda x: functional.local_response_norm(x, 3, 0.9, 0.6, 1.5),
    ),
    "response, wider than the channels": (
        "LRN<size=9>(x)", (9, NEWEST), {}, lambda x: functional.local_response_norm(x, 9),
    ),
    "lp, 1": (
        "LpNormalization<p=1, axis=1>(x)", (9, NEWEST), {},
        lambda x: functional.normalize(x, 1.0, 1),
    ),
    "lp, 2": ("LpNormalization(x)", (9, NEWEST), {}, lambda x: functional.normalize(x, 2.0, -1)),
}  # fmt: skip


@pytest.mark.parametrize("name", TORCH)
def test_a_normalization_agrees_with_torch(name: str) -> None:
    formula, opsets, weights, forward = TORCH[name]
    x = torch.tensor(np.random.default_rng(3).normal(size=SHAPE), requires_grad=True)
    y = torch.arange(len(x)) % 4
    z = forward(x, *map(torch.tensor, weights.values())).flatten(1) @ torch.tensor(W)
    (expected,) = torch.autograd.grad(functional.cross_entropy(z, y, reduction="sum"), x)
    for opset in opsets:
        target = jr.Target(classifier(formula, opset, **weights)("float"), device="cpu")
        _, got = target.loss_and_gradient(x.detach().numpy(), y.numpy())
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-3, atol=2e-5)


def test_a_vanished_norm_has_a_gradient_of_zero() -> None:
    x = np.zeros(SHAPE, np.float32)
    target = jr.Target(classifier("LpNormalization(x)", 22)("float"), device="cpu")
    _, got = target.loss_and_gradient(x, np.arange(3))
    assert (got == 0).all()


def test_half_precision_is_normalized_in_single_precision() -> None:
    """Squares of 300 overflow float16."""
    body = ("c = Cast<to=10>(x) n = LayerNormalization(c, s) r = RMSNormalization(n, s) "
            "b = BatchNormalization(r, s, s, t, v) h = Cast<to=1>(b) z = MatMul(h, w)")  # fmt: skip
    s, v = np.ones(6, np.float16), np.full(6, 0.5, np.float32)
    make = model(body, "N,6", opset=23, w=weight(6, 4), s=s, t=0 * v, v=v)
    plain = model(body.replace("to=10", "to=1"), "N,6", opset=23, w=weight(6, 4),
                  s=s.astype(np.float32), t=0 * v, v=v)  # fmt: skip
    x, y = 300 * np.random.default_rng(0).normal(size=(2, 6)), np.array([0, 3])
    _, got = jr.Target(make("float"), device="cpu").loss_and_gradient(x, y)
    _, expected = jr.Target(plain("float"), device="cpu").loss_and_gradient(x, y)
    np.testing.assert_allclose(got, expected, rtol=2e-2, atol=1e-2 * np.abs(expected).max())


REFUSED = {
    "training mode, in which examples": "h, a, c = BatchNormalization<training_mode=1>(x,s,b,m,v)",
    "LRN of even size 4": "h = LRN<size=4>(x)",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_refusal_has_a_reason(reason: str) -> None:
    body = f"{REFUSED[reason]} f = Flatten(h) z = Gemm(f, w, zero)"
    make = model(body, "N,4,2,3", opset=15, w=W, zero=np.array([0.0]), **STATISTICS)
    with pytest.raises(UnsupportedOpError, match=reason):
        input_gradient(make("float"))
