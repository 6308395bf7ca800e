"""Loss heads against their definitions in numpy, and central differences of these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import jr_onnx as jr
from jr_onnx.autodiff import LOSSES
from jr_onnx.errors import DataError, ModelError, ParameterError

MakeModel = Callable[..., jr.Model]
Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(3)
Z = RNG.normal(size=(40, 6))
Y = RNG.integers(0, 6, 40)
TARGETS = (Y + RNG.integers(1, 6, 40)) % 6
Y[:10] = Z[:10].argmax(axis=1)  # some right, some wrong
TARGETS[:10] = (Y[:10] + 1) % 6


def _margin(z: Array) -> Any:
    others = z.copy()
    rows = np.arange(len(z))
    others[rows, Y] = -np.inf
    return others.max(axis=1) - z[rows, Y]


def _towards_target(z: Array) -> Any:
    rows = np.arange(len(z))
    return z[rows, TARGETS] - z[rows, Y]


def _falling(z: Array) -> Any:
    return -np.sort(-z, axis=1)


def _cross_entropy(z: Array) -> Any:
    return np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), Y]


DEFINITIONS: dict[str, Callable[[Array], Any]] = {
    "cross_entropy": _cross_entropy,
    "margin": _margin,
    "cw": lambda z: np.minimum(_margin(z), 0),
    "cw:0.7": lambda z: np.minimum(_margin(z), 0.7),
    # 1e-12 as in AutoAttack's reference
    "dlr": lambda z: _margin(z) / (_falling(z)[:, 0] - _falling(z)[:, 2] + 1e-12),
    "targeted_dlr": lambda z: (
        _towards_target(z) / (_falling(z)[:, 0] - _falling(z)[:, 2:4].mean(axis=1) + 1e-12)
    ),
    "logit_difference": _towards_target,
    "drift": lambda z: ((z - 0.1) ** 2).sum(axis=1),
}


def test_every_loss_has_a_definition_here() -> None:
    assert DEFINITIONS.keys() >= LOSSES.keys()


@pytest.mark.parametrize("opset", [7, 9, 10, 11, 12, 13, 18, 24])
@pytest.mark.parametrize("loss", DEFINITIONS)
def test_value_and_gradient(text_model: MakeModel, loss: str, opset: int) -> None:
    model = text_model("g (double[N, 6] x) => (double[N, 6] z) { z = Identity(x) }", opset=opset)
    definition = DEFINITIONS[loss]
    y = np.full_like(Z, 0.1) if loss == "drift" else Y
    found = jr.Target(model, device="cpu").differentiate(Z, y, loss=loss, targets=TARGETS)
    np.testing.assert_allclose(found.loss, definition(Z), rtol=1e-12, atol=1e-12)
    step = 1e-6
    for column in range(6):
        shift = step * np.eye(6)[column]
        slope = (definition(Z + shift) - definition(Z - shift)) / (2 * step)
        np.testing.assert_allclose(found.gradient[:, column], slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["float", "float16"])
@pytest.mark.parametrize("loss", LOSSES)
def test_narrow_types_are_close(text_model: MakeModel, loss: str, kind: str) -> None:
    model = text_model(f"g ({kind}[N, 6] x) => ({kind}[N, 6] z) {{ z = Identity(x) }}")
    y = np.full_like(Z, 0.1) if loss == "drift" else Y
    found = jr.Target(model, device="cpu").differentiate(Z, y, loss=loss, targets=TARGETS)
    assert found.loss.dtype == np.float32
    # The input itself is rounded to 11 bits in float16.
    tolerance = {"float": 1e-4, "float16": 3e-2}[kind]
    np.testing.assert_allclose(found.loss, DEFINITIONS[loss](Z), rtol=tolerance, atol=tolerance)


def test_logits_that_are_all_alike_have_a_finite_dlr(text_model: MakeModel) -> None:
    model = text_model("g (float[N, 4] x) => (float[N, 4] z) { z = Identity(x) }")
    loss, gradient = jr.Target(model, device="cpu").loss_and_gradient(
        np.ones((1, 4)), np.array([2]), loss="dlr"
    )
    assert np.isfinite(loss).all()
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("ending", "name"),
    [
        ("p = Softmax <axis: int = 1> (z)", "softmax"),
        ("p = Softmax (z)", "softmax"),
        ("q = Softmax (z) p = Identity (q)", "softmax"),
        ("p = LogSoftmax <axis: int = -1> (z)", "log_softmax"),
        ("q = Unsqueeze (z, two) r = Softmax <axis: int = 1> (q) p = Flatten (r)", "softmax"),
    ],
)
@pytest.mark.parametrize("loss", ["cross_entropy", "dlr"])
def test_a_softmax_at_the_end_is_seen_through(
    text_model: MakeModel, ending: str, name: str, loss: str
) -> None:
    constants = "two = Constant <value_ints: ints = [2]> ()"
    body = f"{constants} z = Mul (x, x) {ending}"
    model = text_model(f"g (float[N, 6] x) => (float[N, 6] p) {{ {body} }}")
    plain = text_model("g (float[N, 6] x) => (float[N, 6] z) { z = Mul (x, x) }")
    assert jr.input_gradient(model).ending == name
    # Logits so far apart that their softmax is 1 and 0: through it no gradient would come.
    x = 12 * Z
    found = jr.Target(model, device="cpu").differentiate(x, Y, loss=loss)
    expected = jr.Target(plain, device="cpu").differentiate(x, Y, loss=loss)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "ending",
    [
        "p = Softmax <axis: int = 0> (z)",
        "q = Softmax (z) p = Mul (q, q)",
        "a = Constant <value_ints: ints = [-1, 3]> () b = Constant <value_ints: ints = [-1, 6]> ()"
        " q = Reshape (z, a) s = Softmax (q) p = Reshape (s, b)",
    ],
)
def test_what_is_no_softmax_of_the_classes_is_an_operator_like_others(
    text_model: MakeModel, ending: str
) -> None:
    model = text_model(f"g (float[N, 6] x) => (float[N, 6] p) {{ z = Neg (x) {ending} }}")
    assert jr.input_gradient(model).ending == "logits"


def test_logits_with_axes_of_size_one_are_flattened(text_model: MakeModel) -> None:
    model = text_model(
        "g (float[N, 6, 1, 1] x) => (float[N, 6, 1, 1] p) { p = Softmax <axis: int = 1> (x) }",
        opset=12,
    )
    found = jr.Target(model, device="cpu").differentiate(Z[:, :, None, None], Y)
    assert found.logits.shape == (40, 6)
    assert found.gradient.shape == (40, 6, 1, 1)
    np.testing.assert_allclose(found.loss, _cross_entropy(Z), rtol=1e-5)


def test_drift_takes_outputs_of_any_shape(text_model: MakeModel) -> None:
    model = text_model("g (float[N, 3, 2] x) => (float[N, 3, 2] z) { z = Softmax (x) }")
    x = RNG.normal(size=(5, 3, 2)).astype(np.float32)
    target = jr.Target(model, device="cpu")
    reference = np.full_like(x, 0.25)
    z = np.exp(x) / np.exp(x).sum(axis=2, keepdims=True)
    loss, gradient = target.loss_and_gradient(x, reference, loss="drift")
    np.testing.assert_allclose(loss, ((z - reference) ** 2).sum(axis=(1, 2)), rtol=1e-4)
    g = 2 * (z - reference)
    expected = z * (g - (g * z).sum(axis=2, keepdims=True))
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("opset", [11, 18])
def test_drift_of_one_output_is_one_loss_an_example(text_model: MakeModel, opset: int) -> None:
    model = text_model("g (float[N] x) => (float[N] z) { z = Neg (x) }", opset=opset)
    x = np.arange(70, dtype=np.float32)
    target = jr.Target(model, device="cpu")
    loss, gradient = target.loss_and_gradient(x, np.ones_like(x), loss="drift")
    assert np.array_equal(loss, (x + 1) ** 2)
    assert np.array_equal(gradient, 2 * (x + 1))


@pytest.mark.parametrize(("loss", "needed"), [("dlr", 3), ("targeted_dlr", 4), ("margin", 2)])
def test_too_few_classes_are_named(text_model: MakeModel, loss: str, needed: int) -> None:
    classes = needed - 1
    model = text_model(f"g (float[N, {classes}] x) => (float[N, {classes}] z) {{ z = Neg (x) }}")
    with pytest.raises(ParameterError, match=f"needs {needed} classes, the model has {classes}"):
        jr.input_gradient(model, loss=loss)


@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
@pytest.mark.parametrize("shape", ["N, 1", "N"])
def test_a_single_output_is_no_classifier(text_model: MakeModel, shape: str, loss: str) -> None:
    model = text_model(
        f"g (float[N, 1] x) => (float[{shape}] z) <int64[1] s = {{-1}}> {{ z = Reshape (x, s) }}"
        if shape == "N"
        else "g (float[N, 1] x) => (float[N, 1] z) { z = Sigmoid (x) }"
    )
    with pytest.raises(ParameterError, match="a single output is no logits"):
        jr.input_gradient(model, loss=loss)


def test_classes_behind_axes_of_size_one_are_counted(text_model: MakeModel) -> None:
    model = text_model("g (float[N, 1, 6] x) => (float[N, 1, 6] z) { z = Identity (x) }")
    loss, _ = jr.Target(model, device="cpu").loss_and_gradient(Z[:, None], Y, loss="margin")
    np.testing.assert_allclose(loss, _margin(Z), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.array([0, 1, 6]), "label 6 at index 2 is out of range"),
        (np.array([0, -1, 1]), "label -1 at index 1 is out of range"),
        (np.array([0.7, 1, 2]), "one integer label for each"),
        (np.array([1]), "one integer label for each"),
    ],
)
def test_labels_that_do_not_fit_are_refused(text_model: MakeModel, y: Any, message: str) -> None:
    model = text_model("g (float[N, 6] x) => (float[N, 6] z) { z = Neg (x) }")
    with pytest.raises(DataError, match=message):
        jr.Target(model, device="cpu").differentiate(Z[:3], y)


def test_no_examples_are_refused(text_model: MakeModel) -> None:
    target = jr.Target(text_model("g (float[N, 6] x) => (float[N, 6] z) { z = Neg (x) }"))
    with pytest.raises(DataError, match="no examples"):
        target.logits(Z[:0])
    with pytest.raises(DataError, match="no examples"):
        target.differentiate(Z[:0], Y[:0])


@pytest.mark.parametrize("loss", ["", "mse", "cw:", "cw:-1", "cw:inf", "dlr:3", "margin:0"])
def test_an_unknown_loss_is_refused(text_model: MakeModel, loss: str) -> None:
    model = text_model("g (float[N, 6] x) => (float[N, 6] z) { z = Neg (x) }")
    with pytest.raises(ParameterError, match="loss must be one of"):
        jr.input_gradient(model, loss=loss)


def test_missing_targets_are_named(text_model: MakeModel) -> None:
    model = text_model("g (float[N, 6] x) => (float[N, 6] z) { z = Neg (x) }")
    with pytest.raises(ParameterError, match="targets"):
        jr.Target(model, device="cpu").differentiate(Z, Y, loss="targeted_dlr")


def test_one_of_several_inputs_and_outputs_is_asked_for(text_model: MakeModel) -> None:
    model = text_model(
        "g (float[N, 6] a, float[N, 6] b) => (float[N, 6] p, float[N, 6] q)"
        " { p = Mul (a, b) q = Add (a, b) }"
    )
    graph = jr.input_gradient(model, x="b", output="p")
    assert (graph.x, graph.logits) == ("b", "p")
    assert [value.name for value in graph.model.proto.graph.input] == ["a", "b", "labels"]
    with pytest.raises(ModelError, match=r"the name of the input.*\['a', 'b'\]"):
        jr.input_gradient(model)
    with pytest.raises(ModelError, match=r"no output 'r', it has \['p', 'q'\]"):
        jr.input_gradient(model, x="a", output="r")
