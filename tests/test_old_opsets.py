"""Models as exporters wrote them from opset 6 to 12, in ONNX text.

IR 3 lists every weight among the inputs, too; Clip has its bounds as attributes up to opset 10, as
inputs from 11; BatchNormalization has `is_test` at opset 6 and `spatial` up to 8. All numbers are
multiples of 1/8, so that every sum is exact: outputs must be equal bit for bit, and some values lie
exactly on the jump.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx.version_converter
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

import jr_onnx as jr
from jr_onnx.errors import NothingToRewriteError
from jr_onnx.model import check

Array = np.ndarray[Any, Any]
JUMP = 0.375
X = np.random.default_rng(0).integers(-16, 17, (64, 3)).astype(np.float32) / 8
WEIGHTS = {
    name: np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)
    for seed, (name, shape) in enumerate({"w": (3, 4), "b": (4,), "v": (4, 5), "u": (4, 5)}.items())
}
WEIGHTS |= {
    "scale": np.array([1, 2, 0.5, 1], np.float32),
    "bias": np.array([0.25, 0, -0.5, 0], np.float32),
    "mean": np.array([0.5, -1, 0, 1], np.float32),
    "variance": np.array([4, 4, 1, 0.25], np.float32),
}
BOUNDS = {"low": np.zeros((), np.float32), "high": np.full((), 4, np.float32)}
BATCH_NORMALIZATION = "BatchNormalization <epsilon = 0.0{}> (a, scale, bias, mean, variance)"


def parse(text: str, opset: int, ir: int, initializers: dict[str, Array]) -> jr.Model:
    """Returns the model; up to IR 3 its initializers are inputs as well."""
    proto = onnx.parser.parse_model(f'<ir_version: {ir}, opset_import: ["": {opset}]> {text}')
    for name, array in initializers.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
        if ir <= 3:
            element = helper.np_dtype_to_tensor_dtype(array.dtype)
            value = helper.make_tensor_value_info(name, element, array.shape)
            proto.graph.input.append(value)
    return jr.Model.of(proto)


def network(opset: int, ir: int, *, spatial: int | None = None) -> jr.Model:
    """Returns Linear, BatchNormalization, Relu, then two Linear with a Clip each: three sites."""
    broadcast = " <axis = 1, broadcast = 1>" if opset < 7 else ""
    attributes = ", is_test = 1" if opset < 7 else ""
    attributes += f", spatial = {spatial}" if spatial is not None else ""
    capped, open_ended = ("Clip <min = 0.0, max = 4.0> (q)", "Clip <min = 0.0> (p)")
    if opset >= 11:
        capped, open_ended = "Clip(q, low, high)", "Clip(p, low)"
    text = f"""g (float[n, 3] x) => (float[n, 5] y) {{
        h = MatMul(x, w)
        a = Add{broadcast} (h, b)
        s = {BATCH_NORMALIZATION.format(attributes)}
        r = Relu(s)
        q = MatMul(r, v)
        c = {capped}
        p = MatMul(r, u)
        d = {open_ended}
        y = Sub(c, d)
    }}"""
    return parse(text, opset, ir, WEIGHTS | (BOUNDS if opset >= 11 else {}))


def expected(jump: float) -> Array:
    """Returns the network's output by numpy; a jump of 0 is the original."""
    w = {name: array.astype(np.float64) for name, array in WEIGHTS.items()}
    a = X @ w["w"] + w["b"]
    s = (a - w["mean"]) / np.sqrt(w["variance"]) * w["scale"] + w["bias"]
    assert (s == JUMP).any(), "some values must lie on the jump"
    r = np.where(s > jump, s, 0)
    q, p = r @ w["v"], r @ w["u"]
    assert (q > 4).any()
    c, d = np.where(q > jump, np.minimum(q, 4), 0), np.where(p > jump, p, 0)
    return np.asarray(c - d, np.float32)


def run(model: jr.Model, **feeds: Array) -> Array:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # onnxruntime warns of every opset it does not test
    session = ort.InferenceSession(model.content, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


def hardened(model: jr.Model, **options: Any) -> jr.Retrofit:
    """Retrofits, and checks all that must hold whatever the model."""
    check(model)
    result = jr.retrofit(model, jump=JUMP, **options)
    check(result.model)
    assert jr.verify(model, result.model).differences == ()
    assert jr.restore(result.model).content == model.content
    assert result.model.proto.ir_version == model.proto.ir_version
    assert result.model.proto.opset_import == model.proto.opset_import
    assert result.model.proto.graph.input == model.proto.graph.input
    return result


NEWEST_IR = {7: 3, 8: 3, 9: 4, 10: 5, 11: 6, 12: 7}
# IR 3 lists weights as inputs, from IR 4 on they are constants only if they are not.
OPSETS_AND_IRS = [(opset, ir) for opset, newest in NEWEST_IR.items() for ir in {3, newest}]


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
@pytest.mark.parametrize(("opset", "ir"), OPSETS_AND_IRS)
def test_a_network_of_the_time(opset: int, ir: int, target: str) -> None:
    model = network(opset, ir)
    result = hardened(model, target=target)
    assert [site.site.path for site in result.sites] == ["r", "c", "d"]
    assert [site.site.op_type for site in result.sites] == ["Relu", "Clip", "Clip"]
    assert [site.site.cap for site in result.sites] == [None, 4, None]
    assert np.array_equal(run(model, x=X), expected(0))
    assert np.array_equal(run(result.model, x=X), expected(JUMP))
    assert not np.array_equal(expected(JUMP), expected(0))


@pytest.mark.parametrize(("opset", "target", "form"), [
    (7, "portable", "mul-cast"), (8, "onnxruntime", "mul-cast"),
    (9, "portable", "sub-greater-where"), (9, "onnxruntime", "mul-cast"),
    (10, "onnxruntime", "thresholded-relu"), (12, "portable", "sub-greater-where"),
])  # fmt: skip
def test_the_form_is_one_that_the_opset_has(opset: int, target: str, form: str) -> None:
    result = hardened(network(opset, 3), target=target)
    assert {site.form for site in result.sites} == {form}


@pytest.mark.parametrize("spatial", [0, 1])
@pytest.mark.parametrize("opset", [7, 8])
def test_batch_normalization_that_is_spatial_or_not(opset: int, spatial: int) -> None:
    model = network(opset, 3, spatial=spatial)
    assert np.array_equal(run(model, x=X), expected(0))
    assert np.array_equal(run(hardened(model).model, x=X), expected(JUMP))


def test_opset_6_is_refused_with_the_way_out() -> None:
    model = network(6, 3)
    check(model)
    sites, skipped = jr.find_sites(model)
    assert sites == ()
    assert [entry.path for entry in skipped] == ["r", "c", "d"]
    reason = "opset 6 has no usable Greater, opset 7 is needed: export the model again, or run"
    with pytest.raises(NothingToRewriteError, match=rf"r \(Relu\): {reason} onnx.version_conv"):
        jr.retrofit(model, jump=JUMP)


@pytest.mark.parametrize("opset", [7, 8, 9, 11, 12])
def test_the_way_out_of_opset_6_is_one(opset: int) -> None:
    old = network(6, 3).parse()
    for value in (old.graph.input[0], old.graph.output[0]):  # it knows no symbols
        value.type.tensor_type.shape.dim[0].dim_value = len(X)
    model = jr.Model.of(onnx.version_converter.convert_version(old, opset))
    result = hardened(model)
    assert [site.site.path for site in result.sites] == ["r", "c", "d"]
    assert np.array_equal(run(model, x=X), expected(0))
    assert np.array_equal(run(result.model, x=X), expected(JUMP))


ACTIVATIONS = {
    "Relu(x)": range(7, 13),
    "LeakyRelu <alpha = 0.0> (x)": range(7, 13),
    "PRelu(x, slopes)": range(7, 13),
    "Max(x, zero)": range(8, 13),
    "Max(zero, x)": range(8, 13),
    "Clip <min = 0.0> (x)": range(7, 11),
    "Clip <min = 0.0, max = 3.4028234663852886e+38> (x)": range(7, 11),
    "Clip <max = 1.5, min = 0.0> (x)": range(7, 11),
    "Clip(x, zero)": (11, 12),
    'Clip(x, zero, "")': (11, 12),
    "Clip(x, zero, cap)": (11, 12),
    "ThresholdedRelu <alpha = 0.25> (x)": (10, 11, 12),
}


ELEMENTS = {"float": np.float32, "double": np.float64}


@pytest.mark.parametrize(
    ("activation", "opset", "element"),
    [
        (activation, opset, element)
        for activation, opsets in ACTIVATIONS.items()
        for opset in opsets
        for element in ELEMENTS
        # onnxruntime has no Clip for double before opset 12, with or without a jump.
        if element == "float" or opset == 12 or not ("cap" in activation or "1.5" in activation)
    ],
)
def test_each_activation(activation: str, opset: int, element: str) -> None:
    known = {"slopes": np.zeros(3), "zero": np.zeros(()), "cap": np.array(1.5)}
    dtype = ELEMENTS[element]
    used = {name: array.astype(dtype) for name, array in known.items() if name in activation}
    text = f"g ({element}[n, 3] x) => ({element}[n, 3] y) {{ y = {activation} }}"
    model = parse(text, opset, 3, used)
    result = hardened(model)
    x = X.astype(dtype)
    assert (x == JUMP).any()
    capped = np.minimum(x, 1.5 if "cap" in activation or "1.5" in activation else np.inf)
    assert np.array_equal(run(result.model, x=x), np.where(x > JUMP, capped, 0))
    if element == "float":  # of double, onnxruntime has few of these kernels
        was = 0.25 if "Thresholded" in activation else 0
        assert np.array_equal(run(model, x=x), np.where(x > was, capped, 0))


@pytest.mark.parametrize("opset", [7, 8, 9, 11, 12])
@pytest.mark.parametrize("taken", [True, False])
def test_an_activation_in_a_branch(opset: int, taken: bool) -> None:
    text = """g (bool c, float[n, 3] x) => (float[n, 3] y) {
        y = If (c) <then_branch = one () => (float[n, 3] t) { t = Relu(x) },
                    else_branch = two () => (float[n, 3] e) { m = Neg(x) e = Relu(m) }>
    }"""
    model = parse(text, opset, 3, {})
    result = hardened(model)
    assert [site.site.path for site in result.sites] == ["y.then_branch>t", "y.else_branch>e"]
    x = X if taken else -X
    c = np.array(taken)
    assert np.array_equal(run(model, c=c, x=X), np.where(x > 0, x, 0))
    assert np.array_equal(run(result.model, c=c, x=X), np.where(x > JUMP, x, 0))


REFUSED = {
    # Max does not broadcast before opset 8, so a zero of its own shape may not, either.
    "Max(x, zeros)": (7, 3, r"its zero has shape \(3,\), which may broadcast x"),
    # From IR 4 on, an initializer among the inputs is a default that the caller may change.
    "Clip(x, zero)": (11, 4, "its lower bound 'zero' is not a constant of the model"),
    "PRelu(x, zeros)": (9, 4, "its slope 'zeros' is not a constant of the model"),
    "Clip <min = -1.0, max = 1.0> (x)": (10, 3, "it has no Relu"),
    "Clip <max = 6.0> (x)": (10, 3, "it has no Relu"),
    "LeakyRelu(x)": (7, 3, r"its slope below 0 is 0\.01"),
}


@pytest.mark.parametrize("activation", REFUSED)
def test_what_is_refused(activation: str) -> None:
    opset, ir, reason = REFUSED[activation]
    known = {"zeros": np.zeros(3, np.float32), "zero": np.zeros((), np.float32)}
    text = f"g (float[3] x) => (float[3] y) {{ y = {activation} }}"
    used = {name: array for name, array in known.items() if f" {name})" in activation}
    proto = parse(text, opset, 3, used).parse()
    proto.ir_version = ir
    with pytest.raises(NothingToRewriteError, match=reason):
        jr.retrofit(jr.Model.of(proto), jump=JUMP)


@pytest.mark.parametrize("opset", [7, 8, 9])
def test_hard_swish_of_the_time_is_left_alone(opset: int) -> None:
    text = """g (float[n, 3] x) => (float[n, 3] y) {
        a = Add(x, three)
        c = Clip <min = 0.0, max = 6.0> (a)
        m = Mul(x, c)
        d = Div(m, six)
        y = Relu(d)
    }"""
    constants = {"three": np.array(3, np.float32), "six": np.array(6, np.float32)}
    result = hardened(parse(text, opset, 3, constants))
    assert [site.site.path for site in result.sites] == ["y"]
    assert [entry.path for entry in result.skipped] == ["c"]
    assert "decomposed hard-swish" in result.skipped[0].reason
