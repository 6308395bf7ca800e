"""What is recognised in a graph, and takes another way back, has the same gradient as its parts."""

from __future__ import annotations

import functools
import math
from collections import Counter
from typing import Any

import gradient_checks
import numpy as np
import pytest
from gradient_checks import check, model, weight
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from test_gradients_shape import ints

import jr_onnx as jr

SHAPE = (2, 3, 4)
NUMBERS = {
    "root": np.array(math.sqrt(2)), "inverse": np.array([math.sqrt(0.5)]), "one": np.array(1.0),
    "two": np.array(2.0), "half": np.array(0.5), "third": np.array(1 / 3), "b": weight(4),
}  # fmt: skip
# name -> body from x to h
GELUS = {
    "torch": "d = Div(x, root) e = Erf(d) a = Add(e, one) m = Mul(x, a) h = Mul(m, half)",
    "dynamo": "v = Mul(x, half) d = Mul(x, inverse) e = Erf(d) a = Add(e, one) h = Mul(v, a)",
    "halved first": "d = Div(x, root) e = Erf(d) a = Add(one, e) m = Mul(half, a) h = Mul(m, x)",
    "divided": "d = Mul(inverse, x) e = Erf(d) a = Add(e, one) m = Mul(a, x) h = Div(m, two)",
    "of a sum": "y = Add(x, b) d = Div(y, root) e = Erf(d) a = Add(e, one) m = Mul(y, a) "
    "h = Mul(m, half)",
}
OTHERS = {
    "another scale": "d = Mul(x, half) e = Erf(d) a = Add(e, one) m = Mul(x, a) h = Mul(m, half)",
    "another factor": "d = Div(x, root) e = Erf(d) a = Add(e, one) m = Mul(x, a) h = Mul(m, third)",
    "of another value": "d = Div(x, root) e = Erf(d) a = Add(e, one) v = Mul(x, x) m = Mul(v, a) "
    "h = Mul(m, half)",
    "more than one": "d = Div(x, root) e = Erf(d) a = Add(e, two) m = Mul(x, a) h = Mul(m, half)",
    "squared": "d = Div(x, root) e = Erf(d) a = Add(e, one) m = Mul(a, a) n = Mul(m, x) "
    "h = Mul(n, half)",
    "divided by it": "d = Div(x, root) e = Erf(d) a = Add(e, two) m = Div(half, a) h = Mul(m, x)",
    "a part in use": "d = Div(x, root) e = Erf(d) a = Add(e, one) m = Mul(x, a) k = Mul(m, half) "
    "h = Add(k, e)",
    "no end": "d = Div(x, root) e = Erf(d) a = Add(e, one) h = Mul(x, a)",
}


def gelu(body: str) -> Any:
    used = {
        name: value for name, value in NUMBERS.items() if f"{name})" in body or f"({name}" in body
    }
    return model(f"{body} f = Flatten(h) z = MatMul(f, w)", "N,3,4", 18, w=weight(12, 4), **used)


class Erf(OpRun):
    """In float64, which the reference evaluator's own is not."""

    def _run(self, x: Any) -> tuple[Any]:
        return (np.vectorize(math.erf)(x),)


@pytest.mark.parametrize("body", [*GELUS.values(), *OTHERS.values()], ids=[*GELUS, *OTHERS])
def test_a_product_with_erf_agrees_with_finite_differences(
    body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = functools.partial(ReferenceEvaluator, new_ops=[Erf])
    monkeypatch.setattr(gradient_checks, "ReferenceEvaluator", exact)
    check(gelu(body), SHAPE, "float")


@pytest.mark.parametrize("body", GELUS.values(), ids=GELUS)
def test_the_parts_of_a_gelu_are_left_to_onnxruntime(body: str) -> None:
    """It fuses them only if nothing else reads them."""
    source = gelu(body)("float")
    made = {name for node in source.proto.graph.node for name in node.output} - {"z", "f"}
    readers = Counter(
        name for node in jr.input_gradient(source).model.proto.graph.node for name in node.input
    )
    given = {"x", "y", "h"}  # what goes in and comes out
    assert all(readers[name] == 1 for name in made - given)


TAKEN_APART = {
    "all": ("q = Gather<axis=1>(x, i0) k = Gather<axis=1>(x, i2) v = Gather<axis=-2>(x, i1) "
            "m = Mul(q, k) h = Add(m, v)", True),
    "from the end": ("q = Gather<axis=1>(x, i0) k = Gather<axis=1>(x, last) "
                     "v = Gather<axis=1>(x, i1) m = Mul(q, k) h = Sub(m, v)", True),
    "one unused": ("q = Gather<axis=1>(x, i0) k = Gather<axis=1>(x, i2) v = Gather<axis=1>(x, i1) "
                   "h = Mul(q, k)", True),
    "one twice": ("q = Gather<axis=1>(x, i0) k = Gather<axis=1>(x, i0) v = Gather<axis=1>(x, i1) "
                  "m = Mul(q, k) h = Add(m, v)", False),
    "one missing": ("q = Gather<axis=1>(x, i0) k = Gather<axis=1>(x, i2) h = Mul(q, k)", False),
    "another reader": ("q = Gather<axis=1>(x, i0) k = Gather<axis=1>(x, i2) "
                       "v = Gather<axis=1>(x, i1) m = Mul(q, k) n = Add(m, v) "
                       "r = ReduceSum(x, one) h = Add(n, r)", False),
    "a row": ("q = Gather<axis=1>(x, r0) k = Gather<axis=1>(x, r1) v = Gather<axis=1>(x, i2) "
              "m = Mul(q, k) s = Squeeze(m, one) h = Add(s, v)", False),
    "two axes": ("q = Gather<axis=1>(x, i0) k = Gather<axis=2>(x, i1) v = Gather<axis=1>(x, i2) "
                 "m = Mul(q, v) r = Gather<axis=1>(k, i2) u = Unsqueeze(r, one) h = Mul(m, u)",
                 False),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN_APART)
@pytest.mark.parametrize("opset", [11, 13, 18])
def test_an_axis_taken_apart_agrees_with_finite_differences(name: str, opset: int) -> None:
    body, splits = TAKEN_APART[name]
    given: dict[str, Any] = {
        "i0": np.array(0), "i1": np.array(1), "i2": np.array(2), "last": np.array(-1),
        "r0": ints(0), "r1": ints(1), "one": ints(1),
    }  # fmt: skip
    if opset < 13:
        body = body.replace("ReduceSum(x, one)", "ReduceSum<axes=[1], keepdims=0>(x)")
        body = body.replace("Squeeze(m, one)", "Squeeze<axes=[1]>(m)")
        body = body.replace("Unsqueeze(r, one)", "Unsqueeze<axes=[1]>(r)")
    else:
        body = body.replace("ReduceSum(x", "ReduceSum<keepdims=0>(x")
    used = {key: value for key, value in given.items() if f", {key})" in body}
    make = model(f"{body} z = MatMul(h, w)", "N,3,4", opset, w=weight(4, 5), **used)
    graph = jr.input_gradient(make("float")).model.proto.graph
    assert ("Split" in {node.op_type for node in graph.node}) == (splits and opset >= 13)
    check(make, SHAPE, "float")


REST: dict[str, dict[str, Any]] = {
    "Where(n, zero, p)": {"zero": np.float32(0)},
    "Slice(p, i0, i2, i1)": {"i0": ints(0), "i1": ints(1), "i2": ints(2)},
}


@pytest.mark.parametrize("rest", REST)
def test_rows_that_are_masked_as_a_whole_have_no_gradient(rest: str) -> None:
    """A softmax of nothing but -infinity is NaN: replaced, or cut away."""
    mask = np.zeros((3, 4), np.float32)
    mask[2] = -np.inf
    source = model(
        f"s = MatMul(x, k) m = Add(s, mask) p = Softmax<axis=-1>(m) n = IsNaN(p) y = {rest} "
        "r = ReduceMax<axes=[1], keepdims=0>(y) z = MatMul(r, w)",
        "N,3,4", 17, k=weight(4, 4), w=weight(4, 5), mask=mask, **REST[rest],
    )("float")  # fmt: skip
    x = np.random.default_rng(0).normal(size=SHAPE)
    _, gradient = jr.Target(source, device="cpu").loss_and_gradient(x, np.array([1, 2]))
    assert np.isfinite(gradient).all()
    assert not gradient[:, 2].any()
    assert gradient[:, :2].any()
