"""The elementwise rules and activations, against finite differences and torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from gradient_checks import Case, check, model, weight
from onnx.defs import get_all_schemas_with_history, onnx_opset_version
from torch.nn import functional

import jr_onnx as jr
from jr_onnx.autodiff import input_gradient
from jr_onnx.autodiff.registry import find_rule
from jr_onnx.errors import UnsupportedOpError

NEWEST = onnx_opset_version()
W = weight(6, 4)

# Name: (body from x to h, opsets, weights, kernels are float only). x is normal, so positive
# arguments are made of squares; kinks are hit with probability 0.
# Erf, and with it Gelu, is computed in float32 by the reference evaluator: torch checks it below.
# onnxruntime 1.32 runs Swish at opset 24 alone.
POSITIVE = "q = Mul(x, x) p = Add(q, one)"
SMALL = "c = Tanh(x) s = Mul(c, half)"
ONE, HALF = np.array(1.0), np.array(0.5)
BODIES: dict[str, tuple[str, tuple[int, ...], dict[str, Any], bool]] = {
    "pow, constant": (
        f"{POSITIVE} h = Pow(p, e)", (9, 12, 13, NEWEST), {"one": ONE, "e": np.array(-1.5)}, False,
    ),
    "pow, square": ("h = Pow(x, two)", (9, NEWEST), {"two": np.array(2.0)}, False),
    "pow, integers, broadcast": (
        "h = Pow(x, e)", (12, NEWEST), {"e": np.array([[0, 1, 2, 3, 4, 5]])}, False,
    ),
    "pow, varying": (
        f"{POSITIVE} h = Pow(p, x)", (9, NEWEST), {"one": ONE}, False,
    ),
    "pow, both broadcast": (
        f"{POSITIVE} b = ReduceMax<axes=[1]>(p) h = Pow(b, x)", (9,), {"one": ONE}, False,
    ),
    "pow of a constant": ("h = Pow(b, x)", (9, NEWEST), {"b": np.abs(weight(1, 6))}, False),
    "sqrt, exp, log, reciprocal": (
        f"{POSITIVE} r = Sqrt(p) l = Log(r) e = Exp(l) i = Reciprocal(e) h = Add(e, i)",
        (9, 13, NEWEST), {"one": ONE}, False,
    ),
    "sin and cos": ("s = Sin(x) c = Cos(x) h = Div(s, t)", (9, NEWEST), {"t": weight(6)}, False),
    "cos": ("h = Cos(x)", (9, NEWEST), {}, False),
    "tan": (f"{SMALL} h = Tan(s)", (9, NEWEST), {"half": HALF}, True),
    "asin": (f"{SMALL} h = Asin(s)", (9, NEWEST), {"half": HALF}, True),
    "acos": (f"{SMALL} h = Acos(s)", (9, NEWEST), {"half": HALF}, True),
    "atan": ("h = Atan(x)", (9, NEWEST), {}, True),
    "sinh": ("h = Sinh(x)", (9, NEWEST), {}, True),
    "cosh": ("h = Cosh(x)", (9, NEWEST), {}, True),
    "asinh": ("h = Asinh(x)", (9, NEWEST), {}, True),
    "acosh": (f"{POSITIVE} r = Add(p, one) h = Acosh(r)", (9, NEWEST), {"one": ONE}, True),
    "atanh": (f"{SMALL} h = Atanh(s)", (9, NEWEST), {"half": HALF}, True),
    "max with a bound": ("h = Max(x, b)", (9, 12, NEWEST), {"b": np.array(0.1)}, False),
    "max of three, broadcast": (
        "n = Neg(x) m = ReduceMean<axes=[1]>(x) h = Max(x, n, m, b)",
        (9, 12, 13), {"b": weight(6)}, False,
    ),
    "min of three, broadcast": (
        "n = Neg(x) m = ReduceMean<axes=[1]>(x) h = Min(b, x, n, m)",
        (9, 12, 13), {"b": weight(6)}, False,
    ),
    "min of one": ("n = Min(x) h = Max(n)", (9, NEWEST), {}, False),
    "sum": (
        "m = ReduceMean<axes=[1]>(x) h = Sum(m, x, b, x)", (9, 13), {"b": weight(1, 6)}, False,
    ),
    "sum, newest": ("h = Sum(x, b, x)", (NEWEST,), {"b": weight(1, 6)}, False),
    "mean": (
        "m = ReduceMean<axes=[1]>(x) h = Mean(x, m, b, x)", (9, 13), {"b": weight(1, 6)}, True,
    ),
    "mean, newest": ("h = Mean(x, b, x)", (NEWEST,), {"b": weight(1, 6)}, True),
    "cast to integers and back": (
        "i = Cast<to=7>(x) c = CastLike(i, x) h = Add(x, c)", (15, NEWEST), {}, False,
    ),
    "cast like": ("h = CastLike(x, x)", (15, 19, 21, 23, 24, NEWEST), {}, False),
    "dropout": ("d, m = Dropout<ratio=0.5>(x) h = Exp(d)", (9, 10), {}, False),
    "dropout, inputs": (
        "d, m = Dropout(x, r, t) h = Exp(d)", (12, 13, NEWEST),
        {"r": np.float32(0.5), "t": np.array(False)}, False,
    ),
    "sigmoid": ("h = Sigmoid(x)", (9, NEWEST), {}, False),
    "tanh": ("h = Tanh(x)", (9, NEWEST), {}, False),
    "softplus": ("h = Softplus(x)", (9, NEWEST), {}, True),
    "softsign": ("h = Softsign(x)", (9, NEWEST), {}, True),
    "leaky relu": ("h = LeakyRelu<alpha=0.3>(x)", (9, NEWEST), {}, True),
    "leaky relu, defaults": ("h = LeakyRelu(x)", (9, NEWEST), {}, True),
    "leaky relu, falling": ("h = LeakyRelu<alpha=-0.3>(x)", (9, NEWEST), {}, True),
    "prelu": ("h = PRelu(x, s)", (9, NEWEST), {"s": weight(6)}, True),
    "prelu, scalar": ("h = PRelu(x, s)", (9, NEWEST), {"s": weight(1)}, True),
    "prelu, slope": ("n = Sin(x) h = PRelu(n, x)", (9, NEWEST), {}, True),
    "elu": ("h = Elu(x)", (9, NEWEST), {}, True),
    "elu, alpha": ("h = Elu<alpha=0.7>(x)", (9, NEWEST), {}, True),
    "selu": ("h = Selu(x)", (9, NEWEST), {}, True),
    "selu, parameters": ("h = Selu<alpha=0.7, gamma=1.5>(x)", (9, NEWEST), {}, True),
    "celu": ("h = Celu<alpha=0.7>(x)", (12, NEWEST), {}, True),
    "hard sigmoid": ("h = HardSigmoid(x)", (9, NEWEST), {}, True),
    "hard sigmoid, parameters": ("h = HardSigmoid<alpha=0.7, beta=0.4>(x)", (9, NEWEST), {}, True),
    "hard swish": ("t = Mul(x, k) h = HardSwish(t)", (14, NEWEST), {"k": np.array(4.0)}, True),
    "swish": ("h = Swish(x)", (24,), {}, False),
    "swish, alpha": ("h = Swish<alpha=1.7>(x)", (24,), {}, False),
    "mish": ("h = Mish(x)", (18, NEWEST), {}, True),
    "gelu, tanh": ('h = Gelu<approximate="tanh">(x)', (20, NEWEST), {}, True),
    "softmax": ("h = Softmax(x)", (9, 11, 13, NEWEST), {}, False),
    "log-softmax": ("h = LogSoftmax(x)", (9, 11, 13, NEWEST), {}, False),
    "hardmax": ("m = Hardmax(x) h = Add(x, m)", (9, 11, 13, NEWEST), {}, True),
}  # fmt: skip
RUNS = [
    pytest.param(name, opset, dtype, id=f"{name}-{opset}-{dtype}")
    for name, (_, opsets, _, single) in BODIES.items()
    for opset in opsets
    for dtype in (("float",) if single else ("float", "double"))
]


@pytest.mark.parametrize(("name", "opset", "dtype"), RUNS)
def test_a_rule_agrees_with_finite_differences(name: str, opset: int, dtype: str) -> None:
    body, _, weights, _ = BODIES[name]
    check(model(f"{body} z = MatMul(h, w)", "N,6", opset=opset, w=W, **weights), (3, 6), dtype)


def gradient_of(make: Case, x: Any, y: Any, dtype: str = "float") -> Any:
    return jr.Target(make(dtype), device="cpu").loss_and_gradient(x, y)[1]


Forward = Callable[[torch.Tensor], torch.Tensor]
TORCH: dict[str, tuple[str, int, Forward]] = {
    "Sigmoid": ("Sigmoid(x)", 13, torch.sigmoid),
    "Tanh": ("Tanh(x)", 13, torch.tanh),
    "Softplus": ("Softplus(x)", 22, functional.softplus),
    "Softsign": ("Softsign(x)", 22, functional.softsign),
    "Erf, opset 9": ("Erf(x)", 9, torch.erf),
    "Erf": ("Erf(x)", 13, torch.erf),
    "LeakyRelu": ("LeakyRelu<alpha=0.2>(x)", 16, lambda x: functional.leaky_relu(x, 0.2)),
    "Elu": ("Elu<alpha=0.7>(x)", 22, lambda x: functional.elu(x, 0.7)),
    "Selu": ("Selu(x)", 22, functional.selu),
    "Celu": ("Celu<alpha=0.7>(x)", 12, lambda x: functional.celu(x, 0.7)),
    "HardSigmoid": (
        "HardSigmoid<alpha=0.16666667, beta=0.5>(x)", 22, functional.hardsigmoid,
    ),
    "HardSwish": ("HardSwish(x)", 22, functional.hardswish),
    "Swish": ("Swish(x)", 24, functional.silu),
    "Mish": ("Mish(x)", 22, functional.mish),
    "Gelu": ("Gelu(x)", 20, functional.gelu),
    "Gelu, tanh": (
        'Gelu<approximate="tanh">(x)', 20, lambda x: functional.gelu(x, approximate="tanh"),
    ),
    "Softmax, axis": ("Softmax<axis=1>(x)", 13, lambda x: x.softmax(1)),
    "Softmax, last axis": ("Softmax(x)", 13, lambda x: x.softmax(-1)),
    "LogSoftmax, axis": ("LogSoftmax<axis=-2>(x)", 13, lambda x: x.log_softmax(1)),
    # The reference evaluator lacks the flattening of opsets before 13.
    "Softmax, flattened": ("Softmax(x)", 11, lambda x: x.flatten(1).softmax(1).reshape(x.shape)),
    "Softmax, flattened at 2": ("Softmax<axis=2>(x)", 9, lambda x: x.softmax(2)),
    "LogSoftmax, flattened": (
        "LogSoftmax<axis=-2>(x)", 11, lambda x: x.flatten(1).log_softmax(1).reshape(x.shape),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TORCH)
def test_an_activation_agrees_with_torch(name: str) -> None:
    """Far out, too: x goes from -12 to 12."""
    formula, opset, forward = TORCH[name]
    w = weight(12, 4)
    make = model(f"h = {formula} f = Flatten(h) z = MatMul(f, w)", "N,3,4", opset=opset, w=w)
    x = torch.tensor(np.random.default_rng(3).normal(size=(8, 3, 4)) * 4, requires_grad=True)
    y = torch.arange(8) % 4
    z = forward(x).flatten(1) @ torch.tensor(w)
    (expected,) = torch.autograd.grad(functional.cross_entropy(z, y, reduction="sum"), x)
    got = gradient_of(make, x.detach().numpy(), y.numpy())
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_ties_are_shared_among_the_inputs_that_vary() -> None:
    x, y = np.zeros((1, 4)), np.array([0])
    slopes = np.array([-0.75, 0.25, 0.25, 0.25])
    shared = gradient_of(model("n = Neg(x) m = Mul(n, two) h = Max(x, m, b) z = Identity(h)",
                               "N,4", two=np.array(2.0), b=np.array(0.0)), x, y)  # fmt: skip
    np.testing.assert_allclose(shared[0], slopes * (0.5 - 2 * 0.5), atol=1e-6)
    bound = gradient_of(model("z = Min(b, x)", "N,4", b=np.array(0.0)), x, y)
    np.testing.assert_allclose(bound[0], slopes, atol=1e-6)


def test_a_power_of_zero_has_no_nan() -> None:
    x, y = np.zeros((1, 4)), np.array([0])
    fixed = model("p = Pow(x, e) z = Add(p, x)", "N,4", e=np.array([0.0, 1.0, 2.0, 3.0]))
    assert np.isfinite(gradient_of(fixed, x, y)).all()
    varying = model("e = Exp(x) p = Pow(x, e) z = Add(p, x)", "N,4")
    assert np.isfinite(gradient_of(varying, x, y)).all()


def test_a_cast_takes_the_cotangent_back() -> None:
    body = "d = Cast<to=11>(x) e = Exp(d) h = Cast<to=1>(e) z = MatMul(h, w)"
    for opset in (9, 13, 19, 21, 23, 24, NEWEST):
        make = model(body, "N,6", opset=opset, w=W)
        x = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)
        plain = model("h = Exp(x) z = MatMul(h, w)", "N,6", opset=opset, w=W)
        y = np.array([0, 3])
        expected = gradient_of(plain, x, y, "double")
        np.testing.assert_allclose(gradient_of(make, x, y), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("opset", [9, 13, 20])
def test_a_row_masked_as_a_whole_leaves_the_others_their_gradient(opset: int) -> None:
    """The way that torch exports attention: softmax of -inf alone is NaN, and NaN becomes 0."""
    text = "m = Add(x, b) s = Softmax(m) n = IsNaN(s) h = Where(n, o, s) z = MatMul(h, w)"
    mask, x, y = np.zeros((2, 6)), np.random.default_rng(0).normal(size=(2, 6)), np.array([0, 3])
    plain = gradient_of(model(text, "2,6", opset, w=W, b=mask, o=np.array(0.0)), x, y)
    mask[1] = -np.inf
    got = gradient_of(model(text, "2,6", opset, w=W, b=mask, o=np.array(0.0)), x, y)
    np.testing.assert_array_equal(got[0], plain[0])
    assert (got[1] == 0).all()


def test_half_precision_is_supported() -> None:
    body = ("c = Cast<to=10>(x) g = Gelu(c) s = HardSwish(g) e = Elu(s) m = Max(e, c) "
            "p = Pow(m, two) h = Cast<to=1>(p) z = MatMul(h, w)")  # fmt: skip
    two = np.array(2, np.float16)
    x, y = np.random.default_rng(0).normal(size=(2, 6)), np.array([0, 3])
    got = gradient_of(model(body, "N,6", opset=22, w=W, two=two), x, y)
    body = body.replace("Cast<to=10>", "Identity").replace("Cast<to=1>", "Identity")
    expected = gradient_of(model(body, "N,6", opset=22, w=W, two=np.array(2.0)), x, y)
    np.testing.assert_allclose(got, expected, rtol=2e-2, atol=2e-2)


REFUSED = {
    "training mode, in which the output is random": "d = Dropout(x, r, t)",
    "no gradient from FLOAT to FLOAT8E4M3FN": "f = Cast<to=17>(x) d = Cast<to=1>(f)",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_refusal_has_a_reason(reason: str) -> None:
    make = model(f"{REFUSED[reason]} z = MatMul(d, w)", "N,6", opset=19, w=W,
                 r=np.float32(0.5), t=np.array(True))  # fmt: skip
    with pytest.raises(UnsupportedOpError, match=reason):
        input_gradient(make("float"))


# fmt: off
OPERATORS = (
    "Abs", "Acos", "Acosh", "Add", "Asin", "Asinh", "Atan", "Atanh", "Cast", "CastLike", "Celu",
    "Clip", "Cos", "Cosh", "Div", "Dropout", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid",
    "HardSwish", "Hardmax", "Identity", "LeakyRelu", "Log", "LogSoftmax", "Max", "Mean", "Min",
    "Mish", "Mul", "Neg", "PRelu", "Pow", "Reciprocal", "Relu", "Selu", "Sigmoid", "Sin",
    "Sinh", "Softmax", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tan", "Tanh",
    "ThresholdedRelu", "Where", "BatchNormalization",
    "InstanceNormalization", "LRN", "LayerNormalization", "LpNormalization", "RMSNormalization",
)
# fmt: on


@pytest.mark.parametrize("op_type", OPERATORS)
def test_every_version_from_opset_9_on_has_a_rule(op_type: str) -> None:
    """Opsets 7 and 8 are read as 9."""
    versions = [
        schema.since_version
        for schema in get_all_schemas_with_history()
        if schema.name == op_type and schema.domain == ""
    ]
    node = onnx.helper.make_node(op_type, ["x"], ["y"])
    for opset in range(max(9, min(versions)), NEWEST + 1):
        assert find_rule(node, {"": opset}, 0) is not None, opset
