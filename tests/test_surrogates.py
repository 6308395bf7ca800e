"""Slopes of the jumps on the way back, in every spelling of a jump."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from gradient_checks import model

import jr_onnx as jr
from jr_onnx.errors import ParameterError
from jr_onnx.rewrite.forms import FORMS

MakeModel = Callable[..., jr.Model]
Array = np.ndarray[Any, Any]
JUMP = 0.75
X = np.random.default_rng(5).normal(0, 1.5, (64, 4))
Y = np.arange(64) % 4


def _soft(x: Array, width: float) -> Any:
    s = 1 / (1 + np.exp(-(x - JUMP) / width))
    return s + x * s * (1 - s) / width


SLOPES: dict[str, Callable[[Array], Any]] = {
    "exact": lambda x: (x > JUMP).astype(float),
    "relu": lambda x: (x > 0).astype(float),
    "identity": np.ones_like,
    "soft:0.5": lambda x: _soft(x, 0.5),
    "soft:0.1": lambda x: _soft(x, 0.1),
    "soft:20%": lambda x: _soft(x, 0.2 * JUMP),
}


def _softmax(z: Array) -> Any:
    exp = np.exp(z - z.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)


def _check(model: jr.Model, surrogate: str, cap: float = np.inf, x: Array = X) -> None:
    """One jump, nothing else: the gradient is the loss's times the slope."""
    found = jr.Target(model, device="cpu").differentiate(x, Y, surrogate=surrogate)
    x = x.astype(found.logits.dtype).astype(float)
    z = np.where(x > JUMP, np.minimum(x, cap), 0)
    assert np.array_equal(found.logits, z)
    expected = (_softmax(z) - np.eye(4)[Y]) * SLOPES[surrogate](x) * (x <= cap)
    tolerance = {"float16": 4e-3, "float32": 1e-5, "float64": 1e-12}[found.logits.dtype.name]
    np.testing.assert_allclose(found.gradient, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["float", "double", "float16"])
@pytest.mark.parametrize("surrogate", SLOPES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form(text_model: MakeModel, form: str, surrogate: str, kind: str) -> None:
    original = text_model(f"g ({kind}[N, 4] x) => ({kind}[N, 4] z) {{ z = Relu (x) }}")
    _check(jr.retrofit(original, jump=JUMP, form=form).model, surrogate)


@pytest.mark.parametrize("kind", ["float", "double"])
@pytest.mark.parametrize("opset", [7, 8, 9, 10, 11, 12, 13, 16, 22, 24])
@pytest.mark.parametrize("surrogate", SLOPES)
def test_every_opset(text_model: MakeModel, opset: int, surrogate: str, kind: str) -> None:
    graph = f"g ({kind}[N, 4] x) => ({kind}[N, 4] z) {{ z = Relu (x) }}"
    _check(jr.retrofit(text_model(graph, opset=opset), jump=JUMP).model, surrogate)


@pytest.mark.parametrize("surrogate", SLOPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cap", [2.0, 6.0])
def test_a_cap_stays(text_model: MakeModel, form: str, surrogate: str, cap: float) -> None:
    body = (
        f"low = Constant <value_float: float = 0.0> () top = Constant <value_float: float = {cap}>"
    )
    original = text_model(
        f"g (float[N, 4] x) => (float[N, 4] z) {{ {body} () z = Clip (x, low, top) }}"
    )
    model = jr.retrofit(original, jump=JUMP, form=form).model
    assert set(jr.input_gradient(model).jumps) == {"z"}
    _check(model, surrogate, cap=cap, x=4 * X)


@pytest.mark.parametrize("surrogate", SLOPES)
def test_an_absolute_value_above_the_jump_is_the_value(
    text_model: MakeModel, surrogate: str
) -> None:
    constants = "<float t = {0.75}, float o = {0}>"
    body = "a = Abs (x) m = Greater (x, t) z = Where (m, a, o)"
    _check(text_model(f"g (float[N, 4] x) => (float[N, 4] z) {constants} {{ {body} }}"), surrogate)


@pytest.mark.parametrize("shape", [(3, 1, 4), (1, 1, 1)])
def test_a_threshold_that_repeats_x_makes_no_jump(shape: tuple[int, ...]) -> None:
    repeated = model(
        "m = Greater (x, t) w = Where (m, x, o) s = ReduceSum <keepdims: int = 0> (w, a)"
        " z = Add (x, s)",
        "2,4",
        t=np.full(shape, 0.5),
        o=np.zeros(()),
        a=np.zeros(1, np.int64),
    )("float")
    assert jr.input_gradient(repeated).jumps == ()


@pytest.mark.parametrize(
    "body",
    [
        "m = Greater (x, t) c = Cast <to: int = 1> (m) z = Mul (c, x)",
        "m = Greater (x, t) r = Relu (x) z = Where (m, r, o)",
        "d = Sub (x, t) m = Greater (d, o) z = Where (m, x, o)",
        "m = LessOrEqual (x, t) z = Where (m, o, x)",
        "z = ThresholdedRelu <alpha: float = 0.75> (x)",
    ],
)
@pytest.mark.parametrize("surrogate", SLOPES)
def test_a_jump_written_by_hand(text_model: MakeModel, body: str, surrogate: str) -> None:
    constants = "<float t = {0.75}, float o = {0}>"
    _check(text_model(f"g (float[N, 4] x) => (float[N, 4] z) {constants} {{ {body} }}"), surrogate)


@pytest.mark.parametrize("surrogate", SLOPES)
def test_a_jump_per_channel(text_model: MakeModel, surrogate: str) -> None:
    original = text_model("g (float[N, 4] x) => (float[N, 4] z) { z = Relu (x) }")
    _check(jr.retrofit(original, jump=[JUMP] * 4).model, surrogate)


@pytest.mark.parametrize(
    "body",
    [
        "m = Greater (x, t) z = Where (m, y, o)",  # another value passes
        "m = Greater (x, t) z = Where (m, x, t)",  # not zero below
        "m = Greater (x, y) z = Where (m, x, o)",  # the threshold varies with x
        "m = Less (x, t) z = Where (m, x, o)",
        "z = ThresholdedRelu <alpha: float = -1.0> (y)",
    ],
)
def test_what_is_no_jump(text_model: MakeModel, body: str) -> None:
    constants = "<float t = {0.75}, float o = {0}>"
    text = f"g (float[N, 4] x) => (float[N, 4] z) {constants} {{ y = Neg (x) {body} }}"
    try:
        assert jr.input_gradient(text_model(text)).jumps == ()
    except jr.errors.UnsupportedOpError:
        assert "alpha: float = -1.0" in body


def test_slopes_by_site(lenet: jr.Model) -> None:
    hardened = jr.retrofit(lenet, jump=1.0).model
    x, y = np.random.default_rng(0).random((8, 1, 28, 28)), np.arange(8)
    target = jr.Target(hardened, device="cpu")
    exact = target.differentiate(x, y)
    relu = target.differentiate(x, y, surrogate="relu")
    mixed = target.differentiate(x, y, surrogate={"relu_*": "relu", "relu_2": "exact"})
    assert np.array_equal(exact.logits, relu.logits)
    assert not np.allclose(mixed.gradient, exact.gradient)
    assert not np.allclose(mixed.gradient, relu.gradient)
    every = dict.fromkeys(("relu", "relu_1", "relu_2", "relu_3"), "relu")
    same = target.differentiate(x, y, surrogate=every)
    assert np.array_equal(same.gradient, relu.gradient)


def test_sites_inside_functions_have_the_paths_of_inspect() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18, "my": 1]>'
        "g (float[N, 4] x) => (float[N, 4] z) { a = my.Block (x) b = Relu (a) z = my.Block (b) }"
        '<domain: "my", opset_import: ["": 18]> Block (x) => (y) { h = Relu (x) y = Neg (h) }'
    )
    original = jr.Model(proto.SerializeToString())
    paths = {site.path for site in jr.find_sites(original)[0]}
    for form in ("greater-where", "lessequal-where"):
        graph = jr.input_gradient(jr.retrofit(original, jump=1, form=form).model)
        assert set(graph.jumps) == paths == {"b", "my::Block>h"}
        assert len(graph.jumps) == 3  # the function is called twice


@pytest.mark.parametrize(
    "surrogate",
    ["", "bpda", "soft", "soft:", "soft:0", "soft:-1", "soft:nan", "relu:1", "soft:%", "soft:0%"],
)
def test_an_unknown_surrogate_is_refused(relu_model: jr.Model, surrogate: str) -> None:
    with pytest.raises(ParameterError, match="surrogate must be one of exact, relu, identity"):
        jr.input_gradient(relu_model, surrogate=surrogate)


def test_a_pattern_that_names_no_jump_is_refused(lenet: jr.Model) -> None:
    hardened = jr.retrofit(lenet, jump=1.0).model
    with pytest.raises(ParameterError, match="'conv' names no jump of the model, which has relu,"):
        jr.input_gradient(hardened, surrogate={"conv": "relu"})


@pytest.mark.parametrize("kind", ["float", "double", "float16"])
@pytest.mark.parametrize("surrogate", ["soft:1e-50", "soft:1e-9", "soft:1e-300", "soft:1e-50%"])
def test_a_width_below_what_the_type_tells_is_that_of_the_type(
    text_model: MakeModel, kind: str, surrogate: str
) -> None:
    original = text_model(f"g ({kind}[N, 4] x) => ({kind}[N, 4] z) {{ z = Relu (x) }}")
    x = X.copy()
    x[:, 0] = JUMP
    model = jr.retrofit(original, jump=JUMP).model
    found = jr.Target(model, device="cpu").differentiate(x, Y, surrogate=surrogate)
    assert np.isfinite(found.gradient).all()
    away = np.abs(x - JUMP) > 0.05
    expected = (_softmax(found.logits.astype(float)) - np.eye(4)[Y]) * (x > JUMP)
    np.testing.assert_allclose(found.gradient[away], expected[away], rtol=5e-3, atol=5e-3)
