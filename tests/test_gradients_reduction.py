"""The reductions' rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gradient_checks import Case, check, model, weight
from test_gradients_plain import TO_CLASSES

import jr_onnx as jr

AXES = {"last": [2], "negative": [-1], "two": [1, 3]}
SIZES = {"last": 15, "negative": 12, "two": 4}
NAMES = ("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
# The opsets around each change of spelling; onnxruntime's newest.
OPSETS = (9, 11, 13, 18, 20, 24)


def reduction(name: str, opset: int, axes: str, keepdims: int) -> Case:
    as_input = opset >= (13 if name == "Sum" else 18)
    node = f"Reduce{name}<keepdims={keepdims}{'' if as_input else f', axes={AXES[axes]}'}>"
    arguments = "p, axes" if as_input else "p"
    # LogSum needs what is positive; an offset by element keeps maxima apart.
    before = "s = Mul(x, x) p = Add(s, b)" if name == "LogSum" else "p = Add(x, b)"
    given: dict[str, Any] = {"axes": np.array(AXES[axes])} if as_input else {}
    return model(
        f"{before} h = {node}({arguments}) {TO_CLASSES}",
        "N,3,4,5",
        opset=opset,
        b=np.abs(weight(3, 4, 5)) + 0.5,
        w=weight(SIZES[axes], 4),
        **given,
    )


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", NAMES)
def test_reductions(name: str, opset: int) -> None:
    axes = "last" if opset < 11 else "negative"
    for which, keepdims in ((axes, 1), (axes, 0), ("two", 0), ("two", 1)):
        for dtype in ("float", "double"):
            check(reduction(name, opset, which, keepdims), (2, 3, 4, 5), dtype)


@pytest.mark.parametrize("opset", [9, 13, 18, 24])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keepdims", [0, 1])
def test_all_axes(name: str, opset: int, keepdims: int) -> None:
    body = f"q = Mul(x, x) r = Reduce{name}<keepdims={keepdims}>(q) m = Mul(x, r) z = MatMul(m, w)"
    # Two elements, or the product is large.
    check(model(body, "N,2", opset=opset, w=weight(2, 4)), (1, 2), "float")


@pytest.mark.parametrize("name", NAMES)
def test_no_axes_reduce_nothing(name: str) -> None:
    body = f"q = Mul(x, x) h = Reduce{name}<noop_with_empty_axes=1>(q) z = MatMul(h, w)"
    check(model(body, "N,6", opset=18, w=weight(6, 4)), (3, 6), "float")


@pytest.mark.parametrize("opset", [10, 18])
def test_a_product_with_zeros(opset: int) -> None:
    """One zero leaves its own slope; two leave none."""
    m = np.array([[1.0, 2, 0, 3], [1, 0, 0, 2], [1, 2, 3, 4]])
    axes = ("", ", a") if opset >= 18 else (", axes=[2]", "")
    body = f"p = Mul(x, m) h = ReduceProd<keepdims=0{axes[0]}>(p{axes[1]}) z = MatMul(h, w)"
    given: dict[str, Any] = {"a": np.array([2])} if opset >= 18 else {}
    for dtype in ("float", "double"):
        check(model(body, "N,3,4", opset=opset, m=m, w=weight(3, 4), **given), (2, 3, 4), dtype)


def test_axes_known_at_run_time_only() -> None:
    body = (
        "r = Size(x) zero = Sub(r, r) a = Add(one, zero) p = ReduceSumSquare<keepdims=0>(x, a) "
        "q = Reshape(p, s) z = MatMul(q, w)"
    )
    given: dict[str, Any] = {"one": np.array([1]), "s": np.array([-1, 4])}
    check(model(body, "N,3,4", w=weight(4, 4), **given), (2, 3, 4), "double")


def test_equal_maxima_share() -> None:
    make = model("h = ReduceMax<axes=[1]>(x) z = MatMul(h, w)", "N,4", opset=13, w=weight(1, 4))
    x, y = np.array([[1.0, 3, 3, 0]]), np.array([0])
    _, gradient = jr.Target(make("float"), device="cpu").loss_and_gradient(x, y)
    assert gradient[0, 1] == gradient[0, 2] != 0
    assert gradient[0, 0] == gradient[0, 3] == 0
