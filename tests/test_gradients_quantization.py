"""Quantized models: straight-through gradients, against torch's fake quantization."""

from __future__ import annotations

import io
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from gradient_checks import model, weight
from onnxruntime import quantization
from torch import nn
from torch.nn import functional

import jr_onnx as jr
from jr_onnx.autodiff import input_gradient
from jr_onnx.errors import UnsupportedOpError

W = weight(6, 4).astype(np.float32)
PAIR = "q = QuantizeLinear(x, s, o) h = DequantizeLinear(q, s, o) z = MatMul(h, w)"
SCALE = np.float32(0.05)


def gradient(body: str, x: np.ndarray[Any, Any], opset: int, **weights: Any) -> Any:
    make = model(body, "N,6", opset=opset, **weights)
    return jr.Target(make("float"), device="cpu").loss_and_gradient(x, np.arange(len(x)) % 4)[1]


def torchs(x: np.ndarray[Any, Any], h: torch.Tensor, leaf: torch.Tensor) -> Any:
    y = torch.arange(len(x)) % 4
    loss = functional.cross_entropy(h @ torch.tensor(W), y, reduction="sum")
    return torch.autograd.grad(loss, leaf)[0].numpy()


@pytest.mark.parametrize("opset", [10, 13, 19, 21, 23, 24, 25])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_a_pair_has_the_gradient_of_fake_quantization(opset: int, dtype: type) -> None:
    """Values beyond the range get none, and some lie on its bounds."""
    zero, range_ = dtype(7), np.iinfo(dtype)
    x = 6 * np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    x[0] = (np.array([range_.min, range_.max] * 3) - 7) * SCALE
    leaf = torch.tensor(x, requires_grad=True)
    low, high = int(range_.min), int(range_.max)
    h = torch.fake_quantize_per_tensor_affine(leaf, float(SCALE), 7, low, high)
    got = gradient(PAIR, x, opset, s=SCALE, o=zero, w=W)
    np.testing.assert_allclose(got, torchs(x, h, leaf), rtol=1e-5, atol=1e-6)
    assert 0 < (got == 0).sum() < got.size
    assert (got[0] != 0).all()


@pytest.mark.parametrize("opset", [13, 21, 25])
def test_an_axis_may_have_its_own_scales(opset: int) -> None:
    scales = np.linspace(0.01, 0.06, 6).astype(np.float32)
    zeros = np.arange(6).astype(np.int8)
    x = 3 * np.random.default_rng(1).normal(size=(5, 6)).astype(np.float32)
    leaf = torch.tensor(x, requires_grad=True)
    h = torch.fake_quantize_per_channel_affine(
        leaf, torch.tensor(scales), torch.tensor(zeros).int(), 1, -128, 127
    )
    body = PAIR.replace("Linear", "Linear<axis=-1>")
    got = gradient(body, x, opset, s=scales, o=zeros, w=W)
    np.testing.assert_allclose(got, torchs(x, h, leaf), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("to", "low", "high"), [("3", -128, 127), ("5", -32768, 32767)])
def test_the_type_may_be_an_attribute(to: str, low: int, high: int) -> None:
    body = (f"q = QuantizeLinear<output_dtype={to}>(x, s) "
            "h = DequantizeLinear(q, s) z = MatMul(h, w)")  # fmt: skip
    x = 1.5 * high * SCALE * np.random.default_rng(2).normal(size=(5, 6)).astype(np.float32)
    leaf = torch.tensor(x, requires_grad=True)
    h = torch.fake_quantize_per_tensor_affine(leaf, float(SCALE), 0, low, high)
    got = gradient(body, x, 21, s=SCALE, w=W / high)
    expected = torchs(x, h / high, leaf)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(x)


class Batches(quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, x: np.ndarray[Any, Any]) -> None:
        self.left = [{"x": part} for part in np.split(x, 4)]

    def get_next(self) -> Any:
        return self.left.pop() if self.left else None


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_quantized_network_has_the_gradient_of_the_float_one(per_channel: bool) -> None:
    torch.manual_seed(3)
    net, x = Net().eval(), torch.rand(32, 3, 12, 12)
    buffer: Any = io.BytesIO()  # which torch takes, and does not declare
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (x,), buffer, opset_version=17, dynamo=False, input_names=["x"],
                          output_names=["z"], dynamic_axes={"x": {0: "N"}})  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        source, quantized = Path(folder, "float.onnx"), Path(folder, "qdq.onnx")
        source.write_bytes(buffer.getvalue())
        quantization.quantize_static(
            source, quantized, Batches(x.numpy()), per_channel=per_channel,
            quant_format=quantization.QuantFormat.QDQ,
        )  # fmt: skip
        content = quantized.read_bytes()
    y = np.arange(32) % 5
    plain = jr.Target(buffer.getvalue(), device="cpu").differentiate(x.numpy(), y)
    got = jr.Target(content, device="cpu").differentiate(x.numpy(), y)
    ops = {node.op_type for node in onnx.load_from_string(content).graph.node}
    assert "DequantizeLinear" in ops
    a, b = (each.gradient.reshape(32, -1) for each in (plain, got))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert np.median(cosine) > 0.98
    assert cosine.min() > 0.8


I8 = np.arange(-6, 18).reshape(4, 6).astype(np.int8)
# On int8 between the pair: (operators, the same on floats); x is (N, 2, 4, 6), h the result.
BETWEEN: dict[str, tuple[str, str]] = {
    "MaxPool": ("r = MaxPool<kernel_shape=[2,2], strides=[2,2]>(q)", ""),
    "MaxPool, overlapping": (
        "r = MaxPool<kernel_shape=[3,3], strides=[1,1], pads=[1,1,1,1]>(q)", "",
    ),
    "Relu": ("r = Relu(q)", ""),
    "Relu and MaxPool": ("a = Relu(q) r = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a)", ""),
    "Clip": ("r = Clip(q, low, high)", "r = Clip(q, flow, fhigh)"),
    "Max": ("r = Max(q, c)", "r = Max(q, fc)"),
    "Min with itself reversed": (
        "a = Slice(q, end, begin, last, back) r = Min(q, a)", "",
    ),
    "Resize": ('r = Resize<mode="nearest">(q, , twice)', ""),
    "Where": ("r = Where(cond, q, c)", "r = Where(cond, q, fc)"),
    "TopK": ("r, i = TopK<axis=3>(q, three)", ""),
    "GatherElements": ("r = GatherElements<axis=3>(q, picks)", ""),
    "Split with a part unused": ("r, unused = Split<axis=3, num_outputs=2>(q)", ""),
    "Concat": ("r = Concat<axis=1>(q, q)", ""),
    "Pad": ("r = Pad(q, pads, low)", "r = Pad(q, pads, flow)"),
    "Gather": ("r = Gather<axis=3>(q, three)", ""),
    "Transpose and Reshape": ("a = Transpose<perm=[0,2,3,1]>(q) r = Reshape(a, sizes)", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", BETWEEN)
def test_operators_on_integers_have_the_gradient_they_have_on_floats(name: str) -> None:
    """The pair straight through: what is picked among integers is picked among their floats."""
    on_integers, on_floats = BETWEEN[name]
    on_floats = on_floats or on_integers
    numbers = np.random.default_rng(5).permutation(3 * 48).reshape(3, 2, 4, 6) - 70
    x = (numbers / 32).astype(np.float32)
    weights: dict[str, Any] = {
        "s": np.float32(1 / 32), "o": np.int8(3), "fo": np.float32(3), "c": I8,
        "fc": I8.astype(np.float32), "low": np.int8(-40), "flow": np.float32(-40),
        "high": np.int8(30), "fhigh": np.float32(30), "cond": I8 % 3 == 0,
        "three": np.array([3]), "twice": np.array([1, 1, 2, 2], np.float32),
        "picks": np.tile(np.array([5, 0, 0]), (3, 2, 4, 1)),
        "pads": np.array([0, 0, 0, 1, 0, 0, 1, 2]), "begin": np.array([-100]),
        "end": np.array([-1]), "last": np.array([3]), "back": np.array([-1]),
        "sizes": np.array([0, 2, 6, 4]), "o0": np.array([0]), "o4": np.array([4]),
        "o1": np.array([1]),
    }  # fmt: skip
    head = (
        "m = ReduceMean<keepdims=0>(d, last) f = Flatten(m) g = Mul(f, f) z = Slice(g, o0, o4, o1)"
    )
    bodies = (
        f"q = QuantizeLinear(x, s, o) {on_integers} d = DequantizeLinear(r, s, o) {head}",
        f"e = Div(x, s) q = Add(e, fo) {on_floats} b = Sub(r, fo) d = Mul(b, s) {head}",
    )
    got, expected = (
        jr.Target(model(body, "N,2,4,6", opset=18, **weights)("float"), device="cpu")
        .differentiate(x, np.arange(3)) for body in bodies
    )  # fmt: skip
    np.testing.assert_allclose(got.logits, expected.logits, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got.gradient, expected.gradient, rtol=1e-4, atol=1e-7)
    assert np.any(expected.gradient)


REFUSED = {
    "a scale for each block": (
        "q = QuantizeLinear<axis=1, block_size=3>(x, b) "
        "h = DequantizeLinear<axis=1, block_size=3>(q, b) z = MatMul(h, w)"
    ),
    "DynamicQuantizeLinear 'q': it computes in integers": (
        "q, s1, o1 = DynamicQuantizeLinear(x) h = DequantizeLinear(q, s1, o1) z = MatMul(h, w)"
    ),
    "MatMulInteger 'i': it computes in integers": (
        "q = QuantizeLinear(x, s, o) i = MatMulInteger(q, v) h = Cast<to=1>(i) z = MatMul(h, w)"
    ),
    "quantization to FLOAT8E4M3FN: only integer types": (
        "q = QuantizeLinear<output_dtype=17>(x, s) h = DequantizeLinear(q, s) z = MatMul(h, w)"
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_refusal_has_a_reason(reason: str) -> None:
    make = model(REFUSED[reason], "2,6", opset=21, s=SCALE, o=np.int8(0), w=W,
                 b=np.full((2, 2), SCALE), v=np.ones((6, 6), np.int8))  # fmt: skip
    with pytest.raises(UnsupportedOpError, match=reason):
        input_gradient(make("float"))
