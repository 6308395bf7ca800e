"""Input gradients against torch autograd and finite differences."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

import jr_onnx as jr
from jr_onnx.autodiff import vjp
from jr_onnx.errors import ModelError, ParameterError, UnsupportedOpError, UnsupportedOpsetError

MakeModel = Callable[..., jr.Model]
REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def torch_lenet(monkeypatch: pytest.MonkeyPatch, lenet: jr.Model) -> Any:
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    return importlib.import_module("train_samples").load_weights(lenet.path)


def _torch_gradient(module: Any, x: Any, y: Any) -> tuple[Any, Any]:
    import torch

    inputs = torch.tensor(x, requires_grad=True)
    losses = torch.nn.functional.cross_entropy(module(inputs), torch.tensor(y), reduction="none")
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert inputs.grad is not None
    return losses.detach().numpy(), inputs.grad.numpy()


def test_the_sample_agrees_with_torch_autograd(
    torch_lenet: Any, lenet: jr.Model, mnist: jr.Dataset
) -> None:
    # Labels one off: correct ones give losses and gradients that are zero up to rounding.
    x, y = mnist.x[:256], (mnist.y[:256] + 1) % 10
    loss, gradient = jr.Target(lenet, device="cpu").loss_and_gradient(x, y)
    expected_loss, expected = _torch_gradient(torch_lenet, x, y)
    assert np.linalg.norm(loss - expected_loss) <= 1e-5 * np.linalg.norm(expected_loss)
    error = np.linalg.norm((gradient - expected).reshape(256, -1), axis=1)
    assert (error <= 1e-5 * np.linalg.norm(expected.reshape(256, -1), axis=1)).all()


def test_the_hardened_sample_agrees_with_torch_autograd(
    torch_lenet: Any, lenet: jr.Model, mnist: jr.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def jump_relu(z: Any) -> Any:
        return torch.where(z > 0.5, z, torch.zeros_like(z))

    monkeypatch.setattr(torch, "relu", jump_relu)
    monkeypatch.setattr(torch.nn.functional, "relu", jump_relu)
    monkeypatch.setattr(torch.nn.ReLU, "forward", lambda self, z: jump_relu(z))
    x, y = mnist.x[:256], (mnist.y[:256] + 1) % 10
    hardened = jr.retrofit(lenet, jump=0.5).model
    _, gradient = jr.Target(hardened, device="cpu").loss_and_gradient(x, y)
    _, expected = _torch_gradient(torch_lenet, x, y)
    error = np.linalg.norm((gradient - expected).reshape(256, -1), axis=1)
    close = error <= 1e-5 * np.linalg.norm(expected.reshape(256, -1), axis=1)
    # A unit within rounding of the jump is on in one engine and off in the other: a whole term.
    assert close.mean() >= 0.99


def _weight(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(sum(shape)).normal(size=shape)


Case = Callable[[str], jr.Model]


def _model(body: str, shape: str, opset: int = 18, **weights: Any) -> Case:
    """Returns a function that makes the model in float or double, weights as initializers."""

    def make(dtype: str) -> jr.Model:
        proto = onnx.parser.parse_model(
            f'<ir_version: 8, opset_import: ["": {opset}]> '
            f"g ({dtype}[{shape}] x) => ({dtype}[N, C] z) {{ {body} }}"
        )
        for name, value in weights.items():
            array = np.asarray(value)
            if array.dtype == np.float64 and dtype == "float":
                array = array.astype(np.float32)
            proto.graph.initializer.append(numpy_helper.from_array(array, name))
        return jr.Model(proto.SerializeToString())

    return make


TO_CLASSES = "f = Flatten(h) z = MatMul(f, w)"
CASES: dict[str, tuple[Case, tuple[int, ...]]] = {
    "gemm": (
        _model("z = Gemm<alpha=0.5, beta=2.0>(x, w, b)", "N,6", w=_weight(6, 4), b=_weight(4)),
        (3, 6),
    ),
    "gemm transB": (_model("z = Gemm<transB=1>(x, w)", "N,6", w=_weight(4, 6)), (3, 6)),
    "gemm transA": (
        _model("t = Transpose(x) z = Gemm<transA=1>(t, w)", "N,6", w=_weight(6, 4)),
        (3, 6),
    ),
    "gemm second input": (
        _model(
            "t = Transpose(x) u = Gemm<transB=1>(w, x) z = Transpose(u)",
            "N,6",
            w=_weight(4, 6),
        ),
        (3, 6),
    ),
    "gemm opset 9": (
        _model("z = Gemm(x, w, b)", "N,6", opset=9, w=_weight(6, 4), b=_weight(4)),
        (3, 6),
    ),
    "matmul, batched left": (
        _model(
            "h = MatMul(x, v) r = Relu(h) f = Flatten(r) z = MatMul(f, w)",
            "N,3,5",
            v=_weight(5, 2),
            w=_weight(6, 4),
        ),
        (3, 3, 5),
    ),
    "matmul right": (
        _model(
            "h = MatMul(v, x) f = Flatten(h) z = MatMul(f, w)",
            "N,3,5",
            v=_weight(2, 3),
            w=_weight(10, 4),
        ),
        (3, 3, 5),
    ),
    "add, sub, mul, div with broadcasting": (
        _model(
            "a = Add(x, b) s = Sub(b, a) m = Mul(s, x) d = Div(m, e) n = Neg(d) z = MatMul(n, w)",
            "N,6",
            b=_weight(1, 6),
            e=_weight(6) + 3,
            w=_weight(6, 4),
        ),
        (3, 6),
    ),
    "div by x": (
        _model(
            "q = Mul(x, x) p = Add(q, one) d = Div(b, p) z = MatMul(d, w)",
            "N,6",
            one=np.array(1.0),
            b=_weight(6),
            w=_weight(6, 4),
        ),
        (3, 6),
    ),
    "abs and clip": (
        _model("a = Abs(x) c = Clip(a, low, high) z = MatMul(c, w)", "N,6", low=np.array(0.3),
               high=np.array(1.2), w=_weight(6, 4)),
        (3, 6),
    ),
    "clip opset 10": (
        _model("c = Clip<min=-0.5, max=0.7>(x) z = MatMul(c, w)", "N,6", opset=10, w=_weight(6, 4)),
        (3, 6),
    ),
    "where": (
        _model(
            "c = Greater(x, t) n = Neg(x) h = Where(c, x, n) z = MatMul(h, w)",
            "N,6",
            t=np.array(0.2),
            w=_weight(6, 4),
        ),
        (3, 6),
    ),
    "conv, stride and uneven pads": (
        _model(
            f"h = Conv<strides=[2,3], pads=[1,0,2,1]>(x, k) {TO_CLASSES}",
            "N,2,7,9",
            k=_weight(3, 2, 3, 2),
            w=_weight(3 * 4 * 3, 4),
        ),
        (2, 2, 7, 9),
    ),
    "conv, rows no window reaches": (
        _model(
            f"h = Conv<strides=[3,3]>(x, k) {TO_CLASSES}",
            "N,2,8,9",
            k=_weight(3, 2, 3, 3),
            w=_weight(3 * 2 * 3, 4),
        ),
        (2, 2, 8, 9),
    ),
    "conv, groups and dilations": (
        _model(
            f"h = Conv<group=2, dilations=[2,1]>(x, k) {TO_CLASSES}",
            "N,4,7,5",
            k=_weight(4, 2, 3, 3),
            w=_weight(4 * 3 * 3, 4),
        ),
        (2, 4, 7, 5),
    ),
    "conv, same upper": (
        _model(
            f'h = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, k) {TO_CLASSES}',
            "N,1,6,7",
            k=_weight(2, 1, 3, 2),
            w=_weight(2 * 3 * 4, 4),
        ),
        (2, 1, 6, 7),
    ),
    "conv 1d": (
        _model(
            f"h = Conv<pads=[1,1]>(x, k) {TO_CLASSES}",
            "N,2,7",
            k=_weight(3, 2, 3),
            w=_weight(21, 4),
        ),
        (2, 2, 7),
    ),
    "max-pool": (
        _model(
            f"h = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x) {TO_CLASSES}",
            "N,2,6,5",
            w=_weight(12, 4),
        ),
        (2, 2, 6, 5),
    ),
    "max-pool, overlapping with pads and ceil": (
        _model(
            "h = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1], ceil_mode=1>(x) "
            + TO_CLASSES,
            "N,2,6,5",
            w=_weight(2 * 4 * 3, 4),
        ),
        (2, 2, 6, 5),
    ),
    "max-pool opset 9": (
        _model(
            f"h = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x) {TO_CLASSES}",
            "N,2,6,4",
            opset=9,
            w=_weight(12, 4),
        ),
        (2, 2, 6, 4),
    ),
    "reshape, transpose, identity": (
        _model(
            "t = Transpose<perm=[0,2,1]>(x) r = Reshape(t, s) i = Identity(r) z = MatMul(i, w)",
            "N,2,3",
            s=np.array([-1, 6]),
            w=_weight(6, 4),
        ),
        (3, 2, 3),
    ),
    "a value used twice": (
        _model("a = Relu(x) b = Neg(x) c = Mul(a, b) d = Add(c, a) z = MatMul(d, w)", "N,6",
               w=_weight(6, 4)),
        (3, 6),
    ),
}  # fmt: skip


# onnxruntime's CPU provider has no float64 kernel of Conv, ConvTranspose and the old Clip.
DTYPES = [
    (case, dtype)
    for case in CASES
    for dtype in ("float", "double")
    if not (dtype == "double" and case.startswith(("conv", "clip opset")))
]


def _reference_loss(reference: ReferenceEvaluator, x: Any, y: Any) -> Any:
    z = np.asarray(reference.run(None, {"x": x})[0])  # type: ignore[index]
    z = z - z.max(axis=1, keepdims=True)
    return np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(y)), y]


@pytest.mark.parametrize(("case", "dtype"), DTYPES)
def test_a_rule_agrees_with_finite_differences(case: str, dtype: str) -> None:
    make, shape = CASES[case]
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=shape).astype(np.float32).astype(np.float64), np.arange(shape[0]) % 4
    _, gradient = jr.Target(make(dtype), device="cpu").loss_and_gradient(x, y)
    assert gradient.dtype == {"float": np.float32, "double": np.float64}[dtype]
    assert gradient.shape == x.shape
    # The slope of the loss by the ONNX reference evaluator, in float64.
    reference, step = ReferenceEvaluator(make("double").proto), 1e-6
    tolerance = {"float": 1e-4, "double": 1e-6}[dtype]
    for _ in range(5):
        direction = rng.normal(size=shape)
        up = _reference_loss(reference, x + step * direction, y)
        down = _reference_loss(reference, x - step * direction, y)
        slope = (gradient * direction).reshape(shape[0], -1).sum(axis=1)
        # Central differences: truncation is about step^2, cancellation about 1e-16 / step.
        np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=tolerance, atol=tolerance)


def test_the_loss_is_the_cross_entropy(text_model: MakeModel) -> None:
    model = text_model("g (float[N, 3] x) => (float[N, 3] z) { z = Identity(x) }")
    z = np.array([[1, 2, 3], [100, 0, 0], [0, 0, 1000]], np.float32)
    found = jr.Target(model, device="cpu").differentiate(z, np.array([0, 1, 2]))
    exact = [np.log(np.exp(1.0) + np.exp(2.0) + np.exp(3.0)) - 1, 100, 0]
    np.testing.assert_allclose(found.loss, exact, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.gradient.sum(axis=1), 0, atol=1e-6)
    assert np.array_equal(found.logits, z)


def test_float16_losses_do_not_overflow(text_model: MakeModel) -> None:
    model = text_model("g (float16[N, 3] x) => (float16[N, 3] z) { z = Identity(x) }")
    z = np.array([[60000, 0, 0]], np.float16)
    found = jr.Target(model, device="cpu").differentiate(z, np.array([1]))
    assert found.loss.tolist() == [float(np.float16(60000))]
    assert found.loss.dtype == np.float32
    assert found.gradient.tolist() == [[1, -1, 0]]


def test_a_batch_may_be_cut_in_any_way(lenet: jr.Model, mnist: jr.Dataset) -> None:
    x, y = mnist.x[:10], mnist.y[:10]
    whole = jr.Target(lenet, device="cpu").differentiate(x, y)
    parts = jr.Target(lenet, device="cpu", batch_size=3).differentiate(x, y)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_fixed_batch_is_filled_up(text_model: MakeModel) -> None:
    model = text_model("g (float[2, 3] x) => (float[2, 3] z) { z = Neg(x) }")
    x = np.arange(15, dtype=np.float32).reshape(5, 3)
    target = jr.Target(model, device="cpu")
    assert np.array_equal(target.logits(x), -x)
    assert target.differentiate(x, np.zeros(5, int)).gradient.shape == (5, 3)


def test_every_node_without_a_rule_is_listed(text_model: MakeModel) -> None:
    model = text_model(
        """g (float[N, 3] x) => (float[N, 3] z) {
            a = Erf(x) b = Add(a, x) c = Softplus(b) z = Softmax(c)
        }"""
    )
    with pytest.raises(UnsupportedOpError) as caught:
        jr.input_gradient(model)
    assert [problem.split()[0] for problem in caught.value.problems] == [
        "Softmax",
        "Softplus",
        "Erf",
    ]
    assert "no rule at opset 18" in str(caught.value)
    assert "jr_onnx.autodiff.vjp" in str(caught.value)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("a, b = Split<num_outputs=2, axis=1>(x) r = Relu(b) z = Add(r, a)", "Split"),
        ("a, b = Split<num_outputs=2, axis=1>(x) z = Relu(b)", "outputs ['b']"),
        ("q = QuantizeLinear(x, s, p) d = DequantizeLinear(q, s, p) z = Add(d, x)", "Quantize"),
        ("c = Cast<to=16>(x) d = Cast<to=1>(c) z = Add(d, x)", "Cast"),
        ("a = my.Sign(x) z = Add(a, x)", "my::Sign"),
        (
            "w = If (c) <then_branch = t () => (float[N, 4] p) { p = Neg(x) },"
            " else_branch = e () => (float[N, 4] q) { q = Neg(x) }> z = Add(w, x)",
            "its body uses values that depend on the input",
        ),
    ],
)
def test_a_path_without_a_rule_is_never_silently_zero(body: str, problem: str) -> None:
    with pytest.raises(UnsupportedOpError, match=re.escape(problem)):
        jr.input_gradient(_with_constants(body))


def _with_constants(body: str) -> jr.Model:
    return jr.Model(
        onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["": 18, "my": 1]> g (float[N, 4] x) => (float[N, C] z) '
            f"<float s = {{0.1}}, uint8 p = {{0}}, bool c = {{1}}> {{ {body} }}"
        ).SerializeToString()
    )


def test_a_rule_of_ones_own_domain_is_found_by_its_version() -> None:
    vjp("Twice", 1, domain="my")(lambda call: call.emit.op("Add", call.g, call.g))
    assert jr.input_gradient(_with_constants("z = my.Twice(x)")).gradient


def test_an_opset_that_is_too_old_is_named(text_model: MakeModel) -> None:
    model = text_model("g (float[N, 3] x) => (float[N, 3] z) { z = Relu(x) }", opset=8)
    with pytest.raises(UnsupportedOpsetError, match="need opset 9 or newer, the model has 8"):
        jr.input_gradient(model)


def test_an_unknown_loss_is_refused(relu_model: jr.Model) -> None:
    with pytest.raises(ParameterError, match="loss must be one of cross_entropy"):
        jr.input_gradient(relu_model, loss="mse")


def test_two_inputs_are_refused(text_model: MakeModel) -> None:
    model = text_model("g (float[N,3] a, float[N,3] b) => (float[N,3] z) { z = Add(a, b) }")
    with pytest.raises(ModelError, match=r"inputs \['a', 'b'\]"):
        jr.input_gradient(model)


def test_an_output_that_does_not_depend_on_the_input_is_told() -> None:
    model = _model("a = Neg(x) z = Identity(w)", "N,4", w=_weight(3, 4))("float")
    with pytest.raises(ModelError, match="does not depend on the input"):
        jr.input_gradient(model)


def test_registering_a_rule_twice_raises() -> None:
    with pytest.raises(ValueError, match="registered already"):
        vjp("Relu", 14)(lambda call: call.g)


def test_the_gradient_graph_is_valid_onnx(lenet: jr.Model) -> None:
    graph = jr.input_gradient(jr.retrofit(lenet, jump=1).model)
    onnx.checker.check_model(graph.model.proto, full_check=True)
    outputs = [value.name for value in graph.model.proto.graph.output]
    assert outputs == ["logits", graph.loss, graph.gradient]
