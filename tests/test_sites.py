"""Which activations are found, which are left, and why: what is hard to tell."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import jr_onnx as jr
from jr_onnx import report
from jr_onnx.errors import (
    HiddenActivationError,
    InvalidModelError,
    ModelError,
    NothingToRewriteError,
    ParameterError,
    SessionError,
)
from jr_onnx.model import Constants, wire
from jr_onnx.rewrite.surgeon import find_graph_sites
from jr_onnx.session import Session

MakeModel = Callable[..., jr.Model]
ZERO, SIX = np.float32(0), np.float32(6)


def with_weights(model: jr.Model, **weights: Any) -> jr.Model:
    proto = model.parse()
    for name, value in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return jr.Model.of(proto)


def with_domain(model: jr.Model, domain: str = "my") -> jr.Model:
    proto = model.parse()
    proto.opset_import.add(domain=domain, version=1)
    return jr.Model.of(proto)


@pytest.fixture
def one(text_model: MakeModel) -> MakeModel:
    """Makes a model of nodes from x to y: `one("y = Relu(x)", dtype="double", z=0)`."""

    def make(
        nodes: str, *, dtype: str = "float", to: str | None = None, opset: int = 18, **weights: Any
    ) -> jr.Model:
        text = f"g ({dtype}[n] x) => ({to or dtype}[n] y) {{ {nodes} }}"
        return with_weights(text_model(text, opset=opset), **weights)

    return make


def check(model: jr.Model, jump: float = 0.5, **options: Any) -> jr.rewrite.Retrofit:
    result = jr.retrofit(model, jump=jump, **options)
    assert jr.restore(result.model).content == model.content
    assert jr.verify(model, result.model).differences == ()
    return result


def run(model: jr.Model, **feeds: Any) -> Any:
    return Session(model, device="cpu").run(feeds)[0]


def reasons(model: jr.Model) -> dict[str, str]:
    sites, skipped = jr.find_sites(model)
    return {site.path: "" for site in sites} | {each.path: each.reason for each in skipped}


# --- names ----------------------------------------------------------------------------------------


def test_a_name_of_an_inner_scope_hides_the_constant_of_an_outer_one(text_model: MakeModel) -> None:
    """The loop carries a value called `z` like the zero outside: Max(x, z) is no ReLU there."""
    model = text_model(
        """g (float[4] x, int64 n, bool c) => (float[4] y, float[4] a) <float z = {0}> {
            a = Max(x, z)
            y = Loop(n, c, x) <body = b (int64 i, bool go, float[4] z) => (bool on, float[4] r)
                { on = Identity(go) m = Neg(z) r = Max(m, z) }>
        }"""
    )
    assert list(reasons(model)) == ["a"]
    hardened = jr.retrofit(model, jump=0).model
    feeds = {"x": np.array([-1, 1, -2, 2], np.float32), "n": np.array(1), "c": np.array(True)}
    assert run(hardened, **feeds).tolist() == run(model, **feeds).tolist() == [1, 1, 2, 2]


def test_a_name_of_an_inner_scope_hides_the_type_of_an_outer_one(text_model: MakeModel) -> None:
    model = text_model(
        """g (float16[4] k, float[4] x, int64 n, bool c) => (float[4] y) {
            h = Neg(k)
            y = Loop(n, c, x) <body = b (int64 i, bool go, h) => (bool on, t)
                { on = Identity(go) t = Relu(h) }>
        }"""
    )
    (site,) = jr.find_sites(model)[0]
    assert site.tensor.element == TensorProto.FLOAT


# --- types ----------------------------------------------------------------------------------------


def test_a_local_function_that_is_called_with_integers(text_model: MakeModel) -> None:
    model = with_domain(
        text_model(
            """g (int32[n] x) => (int32[n] y) { y = my.F(x) }
            <domain: "my", opset_import: ["": 18]> F (u) => (v) { v = Relu(u) }"""
        )
    )
    for target in jr.rewrite.TARGETS:
        result = check(model, jump=1, target=target)
        x = np.array([-(2**31), -1, 1, 2], np.int32)
        assert run(result.model, x=x).tolist() == [0, 0, 0, 2], target
    with pytest.raises(
        ParameterError, match="my::F>v: form sub-greater-where is not possible: its"
    ):
        jr.retrofit(model, jump=1, form="sub-greater-where")


AFTER_A_CUSTOM_OPERATOR = """g (float[n] x) => (float[n] y) {
    a = Relu(x) b = com.microsoft.Gelu(a) c = Relu(b) y = Clip(c, z, s) }"""


def test_types_behind_an_operator_without_inference(text_model: MakeModel) -> None:
    """The Clip has the type of its bounds; a Relu of unknown type adapts to it as it runs."""
    model = with_domain(
        with_weights(text_model(AFTER_A_CUSTOM_OPERATOR), z=ZERO, s=SIX), "com.microsoft"
    )
    result = check(model)
    assert [(done.site.path, done.form) for done in result.sites] == [
        ("a", "sub-greater-where"),
        ("c", "greater-where"),
        ("y", "sub-greater-where"),
    ]
    x = np.array([-1, 0.4, 0.6, 2, 9], np.float32)
    gelu = run(jr.model.with_outputs(result.model, ["b"]), x=x).tolist()
    assert gelu == [0, 0, 0, *gelu[3:]]
    assert run(result.model, x=x).tolist() == [0, 0, 0, *run(model, x=x)[3:]]


def test_an_unknown_type_before_opset_15(text_model: MakeModel) -> None:
    text = "g (float[n] x) => (float[n] y) { a = my.Op(x) b = Relu(a) y = Neg(b) c = Relu(x) }"
    assert reasons(with_domain(text_model(text, opset=14))) == {
        "b": "the element type of 'a' is not declared nor inferable; CastLike, which adapts to it, "
        "needs opset 15 (this is 14)",
        "c": "",
    }


def test_a_function_of_an_opset_with_other_operators(text_model: MakeModel) -> None:
    model = with_domain(
        text_model(
            """g (float[n] x) => (float[n] y) { y = my.F(x) }
            <domain: "my", opset_import: ["": 18]> F (u) => (v) { v = Relu(u) }""",
            opset=21,
        )
    )
    expected = "its function imports opset 18, the model 21, and onnx.checker refuses a Constant"
    assert reasons(model)["my::F>v"].startswith(expected)


# --- bounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [2**63 - 1, 2**53 + 1, 7])
def test_the_bound_of_an_integer_clip_is_exact(one: MakeModel, cap: int) -> None:
    model = one("y = Clip(x, z, s)", dtype="int64", z=np.int64(0), s=np.int64(cap))
    result = check(model, jump=1)
    assert result.sites[0].site.cap == cap
    x = np.array([-(2**63), 1, 2, cap - 1, cap, 2**63 - 1])
    assert run(result.model, x=x).tolist() == [0, 0, 2, cap - 1, cap, cap]


@pytest.mark.parametrize(
    ("dtype", "jump"), [("int64", 2.0**63), ("int32", 2**31), ("float16", 65520)]
)
def test_a_jump_that_the_type_cannot_hold(one: MakeModel, dtype: str, jump: float) -> None:
    with pytest.raises(ParameterError, match=rf"y: jump .* is too large for {dtype} tensors"):
        jr.retrofit(one("y = Relu(x)", dtype=dtype), jump=jump)


def test_a_bound_is_kept_that_only_float32_would_take_for_none(one: MakeModel) -> None:
    largest = np.finfo(np.float32).max
    for dtype, cap in (("double", np.float64(1e39)), ("float", largest)):
        result = check(one("y = Clip(x, z, s)", dtype=dtype, z=cap.dtype.type(0), s=cap))
        assert result.sites[0].site.cap == cap
    old = check(one(f"y = Clip<min = 0.0, max = {float(largest)!r}>(x)", opset=10))
    assert old.sites[0].site.cap is None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("bound", "reason"),
    [
        (np.float32(0), "its upper bound is 0, expected a number above its lower one"),
        (np.float32(-1), "its upper bound is -1"),
        (np.float32(np.nan), "its upper bound is nan"),
        (np.zeros(0, np.float32), r"its upper bound has the shape \(0,\), expected one number"),
        (np.ones(2, np.float32), r"its upper bound has the shape \(2,\), expected one number"),
    ],
)
def test_a_clip_whose_bound_makes_no_sense_does_not_stop_the_others(
    one: MakeModel, bound: Any, reason: str
) -> None:
    model = one("a = Relu(x) y = Clip(a, z, s)", z=ZERO, s=bound)
    result = check(model) if bound.size == 1 else None  # the checker refuses the others
    assert result is None or [done.site.path for done in result.sites] == ["a"]
    with pytest.raises(AssertionError, match=reason):
        assert reasons(model)["y"] == ""


@pytest.mark.filterwarnings("error")
def test_bounds_of_16_bits(one: MakeModel) -> None:
    for dtype, kind in (("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)):
        model = one("y = Clip(x, z, s)", dtype=dtype, z=kind(0), s=kind(6))
        assert jr.find_sites(model)[0][0].cap == 6


@pytest.mark.parametrize("alpha", ["-0.5", "nan", "inf"])
def test_a_threshold_that_is_no_jump(one: MakeModel, alpha: str) -> None:
    proto = one("y = ThresholdedRelu<alpha = 1.0>(x)").parse()
    proto.graph.node[0].attribute[0].f = float(alpha)
    assert "only one that is finite and >= 0" in reasons(jr.Model.of(proto))["y"]


def test_slopes_that_are_not_read_are_not_called_variable(one: MakeModel) -> None:
    model = one("y = PRelu(x, s)", s=np.zeros(5000, np.float32))
    known = "its slope 's' has 5,000 values: only small ones in the model file are read"
    assert reasons(model) == {"y": known}
    proto = model.parse()
    slope = proto.graph.initializer[0]
    slope.CopyFrom(TensorProto(name="s", dims=[4], data_type=TensorProto.FLOAT))
    slope.data_location = TensorProto.EXTERNAL
    slope.external_data.add(key="location", value="w.bin")
    assert reasons(jr.Model.of(proto))["y"].startswith("its slope 's' is in an external file")


# --- parts of something else ----------------------------------------------------------------------

# Names of constants: t 3, m -3, s 6, k 1/6, z 0, h 0.5, o 1, q a zero point.
GATES = {
    "Relu and Min": "a = Add(x, t) b = Relu(a) c = Min(b, s) d = Mul(c, x) y = Div(d, s)",
    "Max and Min": "a = Add(x, t) b = Max(a, z) c = Min(s, b) d = Mul(c, x) y = Mul(d, k)",
    "Min and Max": "a = Add(x, t) b = Min(a, s) c = Max(b, z) d = Div(c, s) y = Mul(x, d)",
    "Relu and Clip": "a = Add(x, t) b = Relu(a) c = Clip(b, z, s) y = Mul(c, x)",
    "two Clips": 'a = Add(x, t) b = Clip(a, z) c = Clip(b, "", s) y = Mul(c, x)',
    "Sub": "a = Sub(x, m) b = Clip(a, z, s) y = Mul(b, x)",
    "Identity": "a = Add(x, t) b = Identity(a) c = Clip(b, z, s) d = Identity(c) y = Div(d, s)",
    "Cast": "a = Add(x, t) b = Clip(a, z, s) c = Cast<to=11>(b) d = Cast<to=1>(c) y = Mul(d, x)",
    "quantised": "a = Add(x, t) b = Clip(a, z, s) c = QuantizeLinear(b, o, q) "
    "d = DequantizeLinear(c, o, q) y = Div(d, s)",
    "bias of a Gemm": "r = Reshape(x, r2) a = Gemm(r, w, b3) b = Clip(a, z, s) c = Mul(b, r) "
    "y = Reshape(c, r1)",
    "scaled": "b = Clip(x, z, s) y = Div(b, s)",
    "scaled by a product": "b = Clip(x, z, s) y = Mul(k, b)",
    "scaled later": "b = Clip(x, z, s) c = Mul(x, b) d = Identity(c) y = Mul(d, k)",
    "hard-sigmoid": "a = Mul(x, k) b = Add(a, h) y = Clip(b, z, o)",
    "hard-sigmoid, Max and Min": "a = Mul(x, k) b = Add(h, a) c = Max(b, z) y = Min(c, o)",
}
# What looks alike, and is an activation.
NO_GATES = {
    "another offset": "a = Add(x, o) b = Clip(a, z, s) y = Mul(b, x)",
    "no use": "a = Add(x, t) y = Clip(a, z, s)",
    "another bound": "a = Add(x, t) b = Clip(a, z, o) y = Mul(b, x)",
    "another scale": "b = Clip(x, z, s) y = Div(b, t)",
    "a product": "a = Neg(x) b = Clip(x, z, s) y = Mul(a, b)",  # as in StarNet
    "a bias of a Gemm": "r = Reshape(x, r2) a = Gemm(r, w, b0) b = Clip(a, z, s) c = Mul(b, r) "
    "y = Reshape(c, r1)",
    "divided by it": "b = Clip(x, z, s) y = Div(s, b)",
}
CONSTANTS = {
    "t": np.float32(3), "m": np.float32(-3), "s": SIX, "k": np.float32(1 / 6), "z": ZERO,
    "h": np.float32(0.5), "o": np.float32(1), "q": np.uint8(0), "r1": np.array([-1]),
    "r2": np.array([-1, 2]), "w": np.eye(2, dtype=np.float32),
    "b3": np.array([2.5, 3.2], np.float32), "b0": np.array([-0.3, 0.4], np.float32),
}  # fmt: skip


def _seen_by_surgeon(model: jr.Model) -> list[str]:
    gs = pytest.importorskip("onnx_graphsurgeon")
    return [site.path for site in find_graph_sites(gs.import_onnx(model.parse()))]


@pytest.mark.parametrize("name", [*GATES, *NO_GATES])
def test_a_part_of_a_decomposed_hard_swish_in_any_spelling(one: MakeModel, name: str) -> None:
    text = GATES.get(name) or NO_GATES[name]
    used = {key: value for key, value in CONSTANTS.items() if f"{key})" in text or f"{key}," in text
            or f"({key}" in text}  # fmt: skip
    model = one(text, **used)
    onnx.checker.check_model(model.proto, full_check=True)
    found = reasons(model)
    assert found
    part = [
        "part of a decomposed hard-swish or hard-sigmoid" in reason for reason in found.values()
    ]
    assert all(part) if name in GATES else not any(part)
    assert _seen_by_surgeon(model) == [path for path, reason in found.items() if not reason]


def test_the_parts_of_a_hard_swish_may_be_in_several_scopes(text_model: MakeModel) -> None:
    model = with_weights(
        text_model(
            """g (bool c, float[n] x) => (float[n] w, float[n] v) {
                a = Add(x, t)
                w = If (c) <
                    then_branch = i () => (float[n] p) { b = Clip(a, z, s) d = Div(b, s)
                                                         p = Mul(x, d) },
                    else_branch = j () => (float[n] q) { q = Neg(x) }>
                f = Clip(x, z, s)
                v = If (c) <
                    then_branch = k () => (float[n] r) { r = Div(f, s) },
                    else_branch = l () => (float[n] u) { u = Neg(x) }>
            }"""
        ),
        t=np.float32(3), z=ZERO, s=SIX,
    )  # fmt: skip
    found = reasons(model)
    assert list(found) == ["f", "w.then_branch>b"]
    assert all("decomposed hard-swish" in reason for reason in found.values())
    assert _seen_by_surgeon(model) == []


# Keras has no PRelu in TensorFlow: it writes its halves. a is the slope, n that of no value.
HALVES = {
    "Keras": "p = Relu(x) m = Neg(x) h = Relu(m) s = Mul(a, h) y = Add(p, s)",
    "Sub": "p = Relu(x) m = Neg(x) h = Relu(m) s = Mul(h, a) y = Sub(p, s)",
    "Neg later": "p = Relu(x) m = Neg(x) h = Relu(m) s = Mul(a, h) t = Neg(s) y = Add(t, p)",
    "Max": "p = Max(x, z) m = Neg(x) h = Max(z, m) s = Div(h, a) y = Add(p, s)",
    "Min": "p = Relu(x) h = Min(x, z) s = Mul(a, h) y = Add(p, s)",
    "Abs": "p = Relu(x) b = Abs(x) d = Sub(x, b) s = Mul(a, d) y = Add(p, s)",
    "absolute value": "p = Relu(x) m = Neg(x) h = Relu(m) y = Add(p, h)",
    "converted": "p = Relu(x) c = Cast<to=11>(p) e = Cast<to=1>(c) h = Min(x, z) y = Add(e, h)",
}
NO_HALVES = {
    "slopes of 0": "p = Relu(x) m = Neg(x) h = Relu(m) s = Mul(o, h) y = Add(p, s)",
    "both kept (CReLU)": "p = Relu(x) m = Neg(x) h = Relu(m) y = Concat<axis=0>(p, h)",
    "of another value": "p = Relu(x) m = Exp(x) n = Neg(m) h = Relu(n) y = Add(p, h)",
    "a shortcut": "p = Relu(x) s = Mul(x, a) y = Add(p, s)",
    "a distance": "p = Relu(x) m = Exp(x) b = Abs(m) d = Sub(m, b) y = Add(p, d)",
    "a sum of two others": "p = Relu(x) m = Neg(x) h = Relu(m) c = Exp(p) e = Exp(h) y = Add(c, e)",
}


@pytest.mark.parametrize("name", [*HALVES, *NO_HALVES])
def test_halves_of_a_decomposed_prelu(one: MakeModel, name: str) -> None:
    constants = {"a": np.array([0.25, 0.5], np.float32), "o": np.zeros(2, np.float32), "z": ZERO}
    text = HALVES.get(name) or NO_HALVES[name]
    used = {key: value for key, value in constants.items() if re.search(rf"[ (]{key}[,)]", text)}
    model = one(text, **used)
    onnx.checker.check_model(model.proto, full_check=True)
    found = reasons(model)
    halves = ["half of a decomposed PRelu" in reason for reason in found.values()]
    assert halves
    assert all(halves) if name in HALVES else not any(halves)
    assert _seen_by_surgeon(model) == [path for path, reason in found.items() if not reason]


def test_the_halves_of_a_prelu_may_be_in_two_scopes(text_model: MakeModel) -> None:
    model = with_weights(
        text_model(
            """g (bool c, float[n] x) => (float[n] y) {
                m = Neg(x)
                p = Relu(x)
                y = If (c) <
                    then_branch = i () => (float[n] q) { h = Relu(m) s = Mul(h, a) q = Add(p, s) },
                    else_branch = j () => (float[n] r) { r = Relu(m) }>
            }"""
        ),
        a=np.float32(0.5),
    )
    found = reasons(model)
    halves = {path for path, reason in found.items() if "half of a decomposed" in reason}
    assert halves == {"p", "y.then_branch>h"}
    assert _seen_by_surgeon(model) == ["y.else_branch>r"]


# --- forms ----------------------------------------------------------------------------------------

TYPES = ["float", "double", "float16", "bfloat16", "int32", "int64"]


@pytest.mark.parametrize("jump", [0.5, 0.3, [0.5, 0.3]])
@pytest.mark.parametrize("opset", [7, 9, 10, 12, 13, 15, 16, 18, 21, 22, 23])
@pytest.mark.parametrize("dtype", TYPES)
def test_onnxruntime_has_kernels_for_what_is_chosen_for_it(
    text_model: MakeModel, dtype: str, opset: int, jump: Any
) -> None:
    text = f"g ({dtype}[n, 2] x) => ({dtype}[n, 2] y) {{ y = Relu(x) }}"
    model = text_model(text, opset=opset)
    try:
        Session(model, device="cpu")
    except SessionError:
        pytest.skip("it has none for Relu itself")
    result = jr.retrofit(model, jump=jump, target="onnxruntime")
    x = np.array([[-1, 2]], result.sites[0].site.tensor.dtype)
    assert run(result.model, x=x).tolist() == [[0, 2]]
    one_kernel = dtype in ("float", "float16") and jump != [0.5, 0.3] and opset >= 10
    assert (result.sites[0].form == "thresholded-relu") == one_kernel


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt", "directml"])
def test_runtimes_have_fewer_kernels_than_onnx(one: MakeModel, target: str) -> None:
    site = jr.retrofit(one("y = Relu(x)", dtype="double"), jump=0.5, target=target).sites[0]
    assert site.form == ("mul-cast" if target == "onnxruntime" else "greater-where")
    assert site.reason == f"not thresholded-relu: {target} has no kernel of it for float64"


# --- hidden ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "node",
    [
        'com.microsoft.MoE<activation_type = "relu">(x)',
        "com.microsoft.MoE(x)",
        "com.microsoft.QMoE(x)",
        'com.microsoft.GemmFloat8<activation = "RELU">(x)',
        'com.microsoft.DynamicQuantizeLSTM<activations = ["Sigmoid", "relu", "Tanh"]>(x)',
    ],
)
def test_a_relu_inside_an_operator_of_onnxruntime(one: MakeModel, node: str) -> None:
    model = with_domain(one(f"y = {node} r = Relu(x)"), "com.microsoft")
    with pytest.raises(HiddenActivationError, match=r"an? (Relu|relu|RELU) "):
        jr.retrofit(model, jump=1)


@pytest.mark.parametrize(
    ("node", "hidden"),
    [
        ('com.microsoft.MoE<activation_type = "gelu">(x)', False),
        ("QuantizeLinear(a, s)", True),
        ("QuantizeLinear<output_dtype = 3>(a, s)", False),
        ("QuantizeLinear<output_dtype = 2>(a, s)", True),
        ("QuantizeLinear(x, s)", False),
    ],
)
def test_what_a_default_hides(one: MakeModel, node: str, hidden: bool) -> None:
    text = f"a = MatMul(x, w) y = {node}"
    model = with_domain(one(text, opset=21, w=np.ones(4, np.float32), s=SIX), "com.microsoft")
    assert [entry.hidden for entry in jr.find_sites(model)[1]] == [True] * hidden


# Constants: s a scale, l the zero point that nothing of uint8 is below, m one in the middle.
POOLED = {
    "of a range below 0": ("d = DequantizeLinear(q, s, m) p = MaxPool<kernel_shape=[2]>(d)", True),
    "of a range from 0 on": (
        "d = DequantizeLinear(q, s, l) p = MaxPool<kernel_shape=[2]>(d)",
        False,
    ),
    "of a range that is not told": ("d = DequantizeLinear(q, s) p = GlobalMaxPool(d)", False),
    "of a range that callers tell": ("d = DequantizeLinear(q, s, v) p = GlobalMaxPool(d)", False),
    "requantised": ("p = DequantizeLinear(q, s, m)", True),
    "of a convolution": (
        "c = Conv(x, w) a = AveragePool<kernel_shape=[2]>(c) p = Identity(a)",
        True,
    ),
    "of a Relu that is there": (
        "c = Conv(x, w) r = Relu(c) p = MaxPool<kernel_shape=[2]>(r)",
        False,
    ),
    "of an input": ("p = MaxPool<kernel_shape=[2]>(x)", False),
    "of a probability": ("c = Conv(x, w) r = Sigmoid(c) p = MaxPool<kernel_shape=[2]>(r)", False),
}


@pytest.mark.parametrize("name", POOLED)
def test_a_relu_folded_in_behind_a_pooling(text_model: MakeModel, name: str) -> None:
    """As onnxruntime's quantize_static leaves Conv, MaxPool, Relu."""
    text, hidden = POOLED[name]
    ends = "float[n, 1, k] x, uint8[n, 1, k] q, uint8 v) => (uint8[n, 1, j] y"
    constants: dict[str, Any] = {
        "s": np.float32(1), "l": np.uint8(0), "m": np.uint8(7), "w": np.ones((1, 1, 1), np.float32),
    }  # fmt: skip
    model = with_weights(
        text_model(f"g ({ends}) {{ {text} y = QuantizeLinear(p, s, l) }}"), **constants
    )
    onnx.checker.check_model(model.proto, full_check=True)
    assert [entry.path for entry in jr.find_sites(model)[1] if entry.hidden] == ["y"] * hidden


# --- odd files ------------------------------------------------------------------------------------


def _recoded(content: bytes, number: int, change: Callable[[bytes], bytes]) -> bytes:
    """Returns a message with the fields of a number changed, tag included."""
    parts = (content[each.start : each.end] for each in wire.fields(content))
    return b"".join(change(part) if part[0] >> 3 == number else part for part in parts)


def _split_graph(content: bytes) -> bytes:
    def split(part: bytes) -> bytes:
        graph = wire.payload(part)
        nodes = [graph[each.start : each.end] for each in wire.fields(graph) if each.number == 1]
        rest = _recoded(graph, 1, lambda _: b"")
        return wire.encode(7, nodes[0]) + wire.encode(7, b"".join(nodes[1:]) + rest)

    return _recoded(content, 7, split)


def _overlong(content: bytes) -> bytes:
    def longer(part: bytes) -> bytes:
        size = len(wire.payload(part))
        return bytes([part[0], size & 0x7F | 0x80, size >> 7 | 0x80, 0]) + wire.payload(part)

    return _recoded(content, 7, longer)


@pytest.mark.parametrize(
    "change",
    [_split_graph, _overlong, lambda content: b"\x38\x05" + content],
    ids=["a graph in two parts", "an overlong length", "a graph that is a number"],
)
def test_a_file_that_cannot_be_edited_in_place(
    one: MakeModel, change: Callable[[bytes], bytes]
) -> None:
    model = jr.Model(change(one("a = Relu(x) y = Relu(a)").content))
    onnx.checker.check_model(model.proto)
    with pytest.raises(ModelError, match=r"cannot be edited in place\. Load it with onnx\.load"):
        jr.retrofit(model, jump=1)
    saved = jr.Model(model.proto.SerializeToString())
    if change is not _split_graph:
        saved.proto.DiscardUnknownFields()
    check(jr.Model(saved.proto.SerializeToString()))


def test_text_that_is_not_utf_8(one: MakeModel) -> None:
    model = one("a = Relu(x) y = Relu(a)")
    check(jr.Model(model.content + wire.encode(6, b"\xff")))  # the doc string: nobody reads it
    renamed = jr.Model(model.content.replace(b"\x01a", b"\x01\xff"))
    for call in (jr.find_sites, lambda model: jr.retrofit(model, jump=1)):
        with pytest.raises(InvalidModelError, match="a name or a doc string in it is not UTF-8"):
            call(renamed)


def _odd(**changes: Any) -> onnx.NodeProto:
    node = helper.make_node("Constant", [], ["z"], value_float=0.0)
    for name, value in changes.items():
        setattr(node.attribute[0], name, value)
    return node


ODD = {
    "an Identity of itself": [helper.make_node("Identity", ["z"], ["z"])],
    "a cycle": [helper.make_node("Identity", ["u"], ["z"]), helper.make_node("Cast", ["z"], ["u"])],
    "an Identity of nothing": [helper.make_node("Identity", [], ["z"])],
    "a Cast to a type that is not there": [
        helper.make_node("Cast", ["u"], ["z"], to=999),
        helper.make_node("Constant", [], ["u"], value_float=0.0),
    ],
    "a Constant of a type that is not there": [
        helper.make_node("Constant", [], ["z"], value=TensorProto(data_type=999, dims=[1]))
    ],
    "a Constant of another attribute type": [_odd(type=onnx.AttributeProto.SPARSE_TENSOR)],
}


@pytest.mark.parametrize("name", ODD)
def test_odd_constants_raise_nothing(one: MakeModel, name: str) -> None:
    proto = one("y = Max(x, z)").parse()
    for node in ODD[name]:
        proto.graph.node.insert(0, node)
    jr.find_sites(jr.Model.of(proto))


def test_odd_types_and_functions_raise_nothing(text_model: MakeModel) -> None:
    text = "g (float[n] x) => (float[n] y) { a = my.F(x) y = Relu(a) }"
    proto = with_domain(text_model(text)).parse()
    proto.graph.value_info.add(name="a").type.tensor_type.elem_type = 999
    assert reasons(jr.Model.of(proto)) == {"y": "there is no jump for type 999 tensors"}
    del proto.graph.value_info[:]
    function = onnx.parser.parse_function(
        '<domain: "my", opset_import: ["": 18]> F (u) => (v) { v = Neg(u) }'
    )
    proto.functions.extend([function, function])
    jr.find_sites(jr.Model.of(proto))


def test_a_long_chain_of_identities(one: MakeModel) -> None:
    chain = " ".join(f"z{number + 1} = Identity(z{number})" for number in range(1500))
    check(one(f"{chain} y = Max(x, z1500)", z0=ZERO))


def test_constants_are_read_once_and_not_to_be_written_to(one: MakeModel) -> None:
    model = one("y = Max(x, z)", z=ZERO)
    constants = Constants(model)
    value = constants.value(model.scopes[0], "z")
    assert value is constants.value(model.scopes[0], "z")
    assert value is not None
    assert not value.flags.writeable


# --- what is asked for ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call", [jr.find_sites, jr.verify, jr.restore, jr.retrofit, jr.save, jr.model.check]
)
@pytest.mark.parametrize("model", ["net.onnx", onnx.ModelProto(), None])
def test_something_else_than_a_model(call: Callable[..., Any], model: object) -> None:
    arguments = (model, model) if call in (jr.verify, jr.save) else (model,)
    options = {"jump": 1} if call is jr.retrofit else {}
    with pytest.raises(ParameterError, match=r"expected a Model, got .*: jr_onnx.load reads one"):
        call(*arguments, **options)


@pytest.mark.parametrize(
    "jump", [np.array(0.5), np.float16(0.5), [0.5], np.array([0.5]), (np.float32(0.5),), range(1)]
)
def test_jumps_in_every_spelling(text_model: MakeModel, jump: Any) -> None:
    model = text_model("g (float[n, 1] x) => (float[n, 1] y) { y = Relu(x) }")
    asked = jr.retrofit(model, jump=jump).sites[0].jump
    expected = np.asarray(jump, np.float64)
    assert asked == (tuple(expected) if expected.ndim else float(expected))
    assert {type(each) for each in (asked if isinstance(asked, tuple) else [asked])} == {float}
    assert np.array_equal(jr.jump_relu(np.ones((2, 1), np.float32), jump), np.ones((2, 1)))


@pytest.mark.parametrize(
    "jump",
    ["a", b"a", True, np.True_, (), [True], [[0.5]], 1j, {"y": 1}, np.ones((1, 1)), object()],
)
def test_a_jump_that_is_no_number(one: MakeModel, jump: Any) -> None:
    with pytest.raises(ParameterError, match=r"^jump must be a number or a list of numbers"):
        jr.retrofit(one("y = Relu(x)"), jump=jump)
    with pytest.raises(ParameterError, match=r"^the jump of 'y' must be a number or a list of"):
        jr.retrofit(one("y = Relu(x)"), jumps={"y": jump})


@pytest.mark.parametrize("jump", [10**400, -1, np.nan, [np.inf]])
def test_a_jump_that_is_no_jump(one: MakeModel, jump: Any) -> None:
    with pytest.raises(ParameterError, match=r"^the jump of 'y' must be a finite number >= 0"):
        jr.retrofit(one("y = Relu(x)"), jumps={"y": jump})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jumps": [("y", 1)]}, r"jumps must have a jump for each site path, got \[\('y', 1\)\]"),
        ({"jumps": {1: 1}}, "jumps must have a jump for each site path"),
        ({"jumps": {}}, "no jump is given"),
        ({"jump": 1, "selection": "y"}, "selection must be a Selection, got 'y'"),
        ({"jump": 1, "form": ["function"]}, "form must be one of .*, got \\['function'\\]"),
        ({"jump": 1, "target": None}, "target must be one of .*, got None"),
    ],
)
def test_options_that_make_no_sense(one: MakeModel, options: Any, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        jr.retrofit(one("y = Relu(x)"), **options)


def test_channels_must_be_counted(text_model: MakeModel) -> None:
    for axis, known in (("c", "c"), ("?", "unknown")):
        model = text_model(
            f"g (float[n, {axis}, 2] x) => (float[n, {axis}, 2] y) {{ y = Relu(x) }}"
        )
        with pytest.raises(ParameterError, match=f"a fixed number of channels, it is {known}"):
            jr.retrofit(model, jump=(1, 2, 3))


def test_every_site_that_refuses_is_named_and_can_be_left_out(one: MakeModel) -> None:
    caps = " ".join(f"c{number} = Clip(x, z, s)" for number in range(7))
    model = one(f"{caps} y = Relu(x)", z=ZERO, s=np.float32(1))
    expected = (
        r"c0: jump 2 must be below the upper bound 1 of this Clip; c1: .*; c4: .*; and at 2 more "
        r"sites\. To leave such a site as it is: --exclude c0, in Python Selection\(exclude="
    )
    with pytest.raises(ParameterError, match=expected):
        jr.retrofit(model, jump=2)
    assert len(jr.retrofit(model, jump=2, selection=jr.Selection(exclude=["c?"])).sites) == 1


@pytest.mark.parametrize(
    ("ir_version", "message"),
    [(7, "local functions need IR 8, the model has 7"), (9, "it needs opset 9, the model has 8")],
)
def test_why_the_form_function_is_not_possible(
    text_model: MakeModel, ir_version: int, message: str
) -> None:
    text = "g (float[n] x) => (float[n] y) { y = Relu(x) }"
    model = text_model(text, opset=8, ir_version=ir_version)
    with pytest.raises(ParameterError, match=f"y: form function is not possible: {message}"):
        jr.retrofit(model, jump=1, form="function")


def test_the_form_function_and_small_integers(one: MakeModel) -> None:
    old, new = (
        one("y = Clip(x, z, s)", dtype="int8", opset=opset, z=np.int8(0), s=np.int8(6))
        for opset in (13, 14)
    )
    with pytest.raises(ParameterError, match="it needs opset 14, the model has 13"):
        jr.retrofit(old, jump=1, form="function")
    hardened = check(new, form="function")
    onnx.checker.check_model(hardened.model.proto, full_check=True)


def test_the_form_function_needs_its_domain_for_itself(one: MakeModel) -> None:
    model = with_domain(one("y = Relu(x)"), "jr_onnx")
    with pytest.raises(ParameterError, match="the model has a domain 'jr_onnx' of its own"):
        jr.retrofit(model, jump=1, form="function")
    check(model)


def test_the_summary_says_what_is_left_and_why(one: MakeModel) -> None:
    dead = " ".join(f"d{number} = Clip(x, z, z)" for number in range(5))
    others = "s = Selu(x) h = HardSwish(x) e = Elu(x) l = LeakyRelu(x)"
    model = one(f"{dead} {others} a = Relu(x) y = Relu(a)", z=ZERO)
    result = jr.retrofit(model, jump=1, selection=jr.Selection(exclude=["a"]))
    assert report.retrofit_summary(result).splitlines() == [
        "1 of 11 activations replaced, jump 1 (sub-greater-where)",
        "  left as it is: d0, d1, d2 and 2 more: its upper bound is 0, expected a number above its "
        "lower one",
        "  left as it is: s: Selu is no ReLU",
        "  left as it is: h: HardSwish is no ReLU",
        "  left as it is: e: Elu is no ReLU",
        "  and 2 other reasons, see `jr-onnx inspect`",
    ]


def test_the_summary_says_which_form_was_taken_and_why(text_model: MakeModel) -> None:
    text = """g (float[n] x, double[n] u) => (float[n] y, double[n] v) {
        y = Relu(x) v = Relu(u) }"""
    model = text_model(text)
    assert report.retrofit_summary(
        jr.retrofit(model, jump=1, target="onnxruntime")
    ).splitlines() == [
        "2 of 2 activations replaced, jump 1 (thresholded-relu, mul-cast)",
        "  thresholded-relu: one kernel instead of three, and Where is single-threaded on the CPU",
        "  mul-cast: not thresholded-relu: onnxruntime has no kernel of it for float64",
    ]
    for form in (None, "greater-where"):
        assert "\n" not in report.retrofit_summary(jr.retrofit(model, jump=1, form=form))


def test_nothing_left_says_why(one: MakeModel) -> None:
    model = one("y = Clip(x, z, z)", z=ZERO)
    with pytest.raises(NothingToRewriteError, match=r"y \(Clip\): its upper bound is 0"):
        jr.retrofit(model, jump=1)
