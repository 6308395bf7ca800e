"""Operators written out before the walk back, and shape arithmetic computed ahead."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from gradient_checks import model, weight
from onnx.reference import ReferenceEvaluator
from torch.nn import functional

import jr_onnx as jr
from jr_onnx.autodiff import expansion, input_gradient
from jr_onnx.autodiff.expand import expand
from jr_onnx.autodiff.fold import fold
from jr_onnx.errors import UnsupportedOpError

W, IMAGE = weight(24, 4), (3, 4, 2, 3)
# Operators that have no rule, but a body in the ONNX standard: (body, formula, opsets, weights).
BODIES: dict[str, tuple[str, str, tuple[int, ...], dict[str, Any]]] = {
    "MeanVarianceNormalization": (
        "h = MeanVarianceNormalization<axes=[1,2]>(x)",
        "m = ReduceMean<axes=[1,2]>(x) c = Sub(x, m) s = Mul(c, c) v = ReduceMean<axes=[1,2]>(s) "
        "d = Sqrt(v) h = Div(c, d)", (9, 13), {},
    ),
    "MeanVarianceNormalization, default axes": (
        "h = MeanVarianceNormalization(x)",
        "m = ReduceMean<axes=[0,2,3]>(x) c = Sub(x, m) s = Mul(c, c) "
        "v = ReduceMean<axes=[0,2,3]>(s) d = Sqrt(v) h = Div(c, d)", (9, 13), {},
    ),
    "CenterCropPad": (
        "h = CenterCropPad<axes=[1,3]>(x, t)",
        "s = Slice(x, one, three, one) h = Pad(s, pads)", (18, 23),
        {"t": np.array([2, 5]), "one": np.array([1]), "three": np.array([3]),
         "pads": np.array([0, 0, 0, 1, 0, 0, 0, 1])},
    ),
    "LayerNormalization, scale made of the input": (
        "e = ReduceMean<keepdims=0>(x, axes) s = Expand(e, like) h = LayerNormalization(x, s)",
        "e = ReduceMean(x, axes) n = LayerNormalization(x, one) h = Mul(n, e)", (18, 23),
        {"axes": np.array([0, 1, 2]), "one": np.ones(3), "like": np.array([3])},
    ),
}  # fmt: skip
RUNS = [(name, opset) for name, (_, _, opsets, _) in BODIES.items() for opset in opsets]
HEAD = "f = Flatten(h) z = MatMul(f, u)"


@pytest.mark.parametrize(("name", "opset"), RUNS)
def test_an_operator_takes_its_body_in_the_standard(name: str, opset: int) -> None:
    body, formula, _, weights = BODIES[name]
    x = np.random.default_rng(0).normal(size=IMAGE)
    u = weight(20 if name == "CenterCropPad" else 24, 4)
    got, expected = (
        jr.Target(
            model(f"{each} {HEAD}", "N,4,2,3", opset=opset, u=u, **weights)("float"), device="cpu"
        ).differentiate(x, np.arange(3))
        for each in (body, formula)
    )
    np.testing.assert_allclose(got.logits, expected.logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.gradient, expected.gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("opset", "scales"), [(18, 2), (21, 4), (23, 4)])
def test_a_group_normalization_may_come_before_other_operators(opset: int, scales: int) -> None:
    """Onnx infers no type for what it gives."""
    s, b = np.abs(weight(scales)), weight(scales)
    body = f"n = GroupNormalization<num_groups=2>(x, s, b) h = Softplus(n) {HEAD}"
    make = model(body, "N,4,2,3", opset=opset, u=W, s=s, b=b)
    x = torch.tensor(np.random.default_rng(3).normal(size=IMAGE), requires_grad=True)
    per_channel = [torch.tensor(each).repeat_interleave(4 // scales) for each in (s, b)]
    z = functional.softplus(functional.group_norm(x, 2, per_channel[0], per_channel[1])).flatten(
        1
    ) @ torch.tensor(W)
    y = torch.arange(3)
    (expected,) = torch.autograd.grad(functional.cross_entropy(z, y, reduction="sum"), x)
    target = jr.Target(make("float"), device="cpu")
    _, got = target.loss_and_gradient(x.detach().numpy(), y.numpy())
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-3, atol=1e-5)


BRANCHES = (
    "h = If(c) <then_branch = t () => (float[N,24] a) "
    "{{ k = Constant<value_float=2.0>() a = Mul(g, k) }}, "
    "else_branch = e () => (float[N,24] b) {{ k = Relu(g) b = Neg(k) }}>"
)


@pytest.mark.parametrize(("condition", "slope"), [(True, 2.0), (False, -1.0)])
def test_a_fixed_condition_takes_its_branch(condition: bool, slope: float) -> None:
    """Sub-graphs may use the same names."""
    body = (
        "g = Flatten(x) two = Constant<value_int=2>() three = Constant<value_int=3>() "
        f"m = {'Less' if condition else 'Greater'}(two, three) "
        f"{BRANCHES.replace('If(c)', 'If(m)').format()} "
        f"{BRANCHES.replace('h = If(c)', 'i = If(m)').replace('(g', '(h').format()} "
        "z = MatMul(i, w)"
    )
    make = model(body, "N,4,2,3", opset=18, w=W)
    x = np.abs(np.random.default_rng(0).normal(size=IMAGE)).astype(np.float32)
    x = x if condition else -x
    got = jr.Target(make("float"), device="cpu").differentiate(x, np.arange(3))
    plain = model(f"g = Flatten(x) k = Constant<value_float={slope}>() h = Mul(g, k) "
                  + ("i = Mul(h, k)" if condition else "r = Relu(g) s = Relu(r) i = Neg(s)")
                  + " z = MatMul(i, w)", "N,4,2,3", opset=18, w=W)  # fmt: skip
    if condition:
        expected = jr.Target(plain("float"), device="cpu").differentiate(x, np.arange(3))
        np.testing.assert_allclose(got.gradient, expected.gradient, rtol=1e-5)
    else:
        assert (got.gradient == 0).all()


REFUSED = {
    "If 'h': .*which one runs, or how often, is known only at run time": (
        "g = Flatten(x) s = ReduceMax<keepdims=0>(g) zero = Constant<value_float=0.0>() "
        f"c = Greater(s, zero) {BRANCHES.format()} z = MatMul(h, w)"
    ),
    "Loop 'h': .*Export the model for a fixed input shape": (
        "g = Flatten(x) n = Constant<value_int=2>() yes = Constant<value = bool {1}>() "
        "h = Loop(n, yes, g) <body = b (int64 i, bool c, float[N,24] a) => "
        "(bool d, float[N,24] e) { d = Identity(c) e = Relu(a) }> z = MatMul(h, w)"
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_control_flow_is_refused(reason: str) -> None:
    with pytest.raises(UnsupportedOpError, match=reason):
        input_gradient(model(REFUSED[reason], "N,4,2,3", opset=18, w=W)("float"))


MIXED = {
    "other::Gate Unique com.microsoft::BiasSplitGelu Mod": (
        "f = Flatten(x) a = other.Gate(f) b = Unique(a) c = com.microsoft.BiasSplitGelu(b, k) "
        "d = Mod<fmod=1>(c, k) z = MatMul(d, w)"
    ),
    "If other::Gate Mod": (
        "g = Flatten(x) s = ReduceMax<keepdims=0>(g) zero = Constant<value_float=0.0>() "
        f"c = Greater(s, zero) {BRANCHES.format()} a = other.Gate(h) d = Mod<fmod=1>(a, k) "
        "z = MatMul(d, w)"
    ),
    "SequenceConstruct ConcatFromSequence": (
        "f = Flatten(x) q = SequenceConstruct(f, f) h = ConcatFromSequence<axis=1>(q) "
        "z = MatMul(h, v)"
    ),
}


@pytest.mark.parametrize("nodes", MIXED)
def test_all_that_is_in_the_way_is_listed_at_once(nodes: str) -> None:
    """Whichever part finds it; in the order of the nodes, and each of them once.

    That MatMul knows no rank is the fault of the operators before it, and not said.
    """
    make = model(MIXED[nodes], "N,4,2,3", opset=18, w=W, v=weight(48, 4), k=weight(24))
    proto = make("float").parse()
    for domain in ("other", "com.microsoft"):
        proto.opset_import.add(domain=domain, version=1)
    with pytest.raises(UnsupportedOpError) as caught:
        input_gradient(jr.Model(proto.SerializeToString()))
    assert [problem.split()[0] for problem in caught.value.problems] == nodes.split()
    assert f"for {len(nodes.split())} node(s)" in str(caught.value)


def test_a_refused_node_beside_the_path_is_in_nobodys_way() -> None:
    loop = REFUSED[next(name for name in REFUSED if name.startswith("Loop"))]
    beside = loop.replace("MatMul(h, w)", "MatMul(g, w)")
    assert input_gradient(model(beside, "N,4,2,3", opset=18, w=W)("float")).x == "x"


def test_what_does_not_vary_with_the_input_stays_as_it_is() -> None:
    body = (f"n = MeanVarianceNormalization(k) c = ConvInteger(q, r) d = Cast<to=1>(c) "
            f"a = Add(x, n) h = Add(a, d) {HEAD}")  # fmt: skip
    ones = np.ones((1, 4, 2, 3), np.uint8), np.ones((4, 4, 1, 1), np.uint8)
    make = model(body, "N,4,2,3", opset=18, u=W, k=weight(1, 4, 2, 3), q=ones[0], r=ones[1])
    before = make("float").parse()
    after, refused = expand(before, "x")
    assert after is before
    assert not refused
    assert before == make("float").proto


def test_an_expansion_is_registered_once() -> None:
    with pytest.raises(ValueError, match="registered already"):
        expansion("Attention", 23)(lambda call: None)


def test_fixed_arithmetic_is_computed() -> None:
    """The chain that torch's exporter writes for `unflatten`."""
    body = (
        "one = Constant<value = int64[1] {1}>() three = Constant<value = int64[1] {3}>() "
        "zero = Constant<value = int64[1] {0}>() m = Mod(one, three) e = Reshape(m, one) "
        "s = Shape(x) l = Slice(s, zero, e) minus = Constant<value = int64[1] {-1}>() "
        "t = Concat<axis=0>(l, minus) r = Reshape(x, t) z = MatMul(r, w)"
    )
    proto = model(body, "N,4,2,3", opset=18, w=W)("float").parse()
    before = ReferenceEvaluator(proto)
    fold(proto)
    onnx.checker.check_model(proto, full_check=True)
    x = np.random.default_rng(0).normal(size=IMAGE).astype(np.float32)
    for got, expected in zip(
        ReferenceEvaluator(proto).run(None, {"x": x}), before.run(None, {"x": x}), strict=True
    ):
        np.testing.assert_array_equal(got, expected)
    left = [node.op_type for node in proto.graph.node if node.op_type != "Constant"]
    assert left == ["Shape", "Slice", "Concat", "Reshape", "MatMul"]
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    (r,) = [info for info in inferred.graph.value_info if info.name == "r"]
    assert len(r.type.tensor_type.shape.dim) == 2


def test_weights_that_may_be_overridden_are_not_fixed() -> None:
    proto = model("s = Add(k, k) h = Mul(x, s) z = MatMul(h, w)", "N,6", w=weight(6, 4),
                  k=np.array([0.5]))("float").parse()  # fmt: skip
    proto.graph.input.append(onnx.helper.make_tensor_value_info("k", 1, [1]))
    fold(proto)
    assert [node.op_type for node in proto.graph.node] == ["Add", "Mul", "MatMul"]
