"""onnxruntime's own operators: written by its optimizer, or here by hand.

A model with one has the logits and the gradient of the model in standard operators.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from gradient_checks import weight
from onnx import numpy_helper
from torch import nn
from torch.nn import functional

import jr_onnx as jr
from jr_onnx.autodiff import input_gradient
from jr_onnx.errors import UnsupportedOpError

Array = np.ndarray[Any, Any]
LEVELS = ("BASIC", "EXTENDED", "ALL")


def text_model(body: str, shape: str, opset: int, weights: dict[str, Array]) -> bytes:
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}, "com.microsoft": 1]> '
        f"g (float[{shape}] x) => (float[N, C] z) {{ {body} }}"
    )
    for name, value in weights.items():
        array = value.astype(np.float32) if value.dtype == np.float64 else value
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return bytes(proto.SerializeToString())


HEAD = "f = Flatten(y) z = MatMul(f, w)"
IMAGE, TOKENS = ("N,2,5,5", (3, 2, 5, 5)), ("N,5,8", (3, 5, 8))
CONV = {"k": weight(3, 2, 3, 3), "b": weight(3), "w": weight(75, 4)}
NORM = {"s": weight(8), "b": weight(8) + 1, "c": weight(8) - 1, "w": weight(40, 4)}
FUSED_CONV = "com.microsoft.FusedConv<pads=[1,1,1,1], activation="
PLAIN_CONV = "c = Conv<pads=[1,1,1,1]>(x, k, b)"
MATRICES = {"w": weight(40, 4), "v": weight(8, 8)}
QKV = {"q": weight(8, 8), "k": weight(8, 8) + 0.3, "v": weight(8, 8) - 0.3, "b": weight(24)}
QKV_ATTENTION = {
    **{"p": np.hstack([QKV["q"], QKV["k"], QKV["v"]]), "b": QKV["b"], "w": weight(40, 4)},
    **{"bq": QKV["b"][:8], "bk": QKV["b"][8:16], "bv": QKV["b"][16:]},
    **{name: QKV[name] for name in "qkv"},
}
PROJECTED = ("qm = MatMul(x, q) qq = Add(qm, bq) km = MatMul(x, k) kk = Add(km, bk) "
             "vm = MatMul(x, v) vv = Add(vm, bv)")  # fmt: skip
# Name: (fused, plain, their opset, input, weights); y goes to the classes.
Pair = tuple[str, str, int, tuple[str, tuple[int, ...]], dict[str, Array]]
PAIRS: dict[str, Pair] = {
    **{
        f"FusedConv, {name}": (
            f'y = {FUSED_CONV}"{name}"{params}>(x, k, b)', f"{PLAIN_CONV} y = {plain}(c)",
            11, IMAGE, CONV,
        )
        for name, params, plain in (
            ("Relu", "", "Relu"), ("Sigmoid", "", "Sigmoid"), ("Tanh", "", "Tanh"),
            ("LeakyRelu", ", activation_params=[0.2]", "LeakyRelu<alpha=0.2>"),
            ("HardSigmoid", ", activation_params=[0.3, 0.4]", "HardSigmoid<alpha=0.3, beta=0.4>"),
        )
    },
    "FusedConv, Clip": (
        f'y = {FUSED_CONV}"Clip", activation_params=[-0.5, 2.0]>(x, k)',
        "c = Conv<pads=[1,1,1,1]>(x, k) y = Clip<min=-0.5, max=2.0>(c)", 10, IMAGE, CONV,
    ),
    "FusedConv, residual": (
        "l = Conv<pads=[1,1,1,1]>(x, k) "
        f'y = {FUSED_CONV}"Relu">(x, k, b, l)',
        f"l = Conv<pads=[1,1,1,1]>(x, k) {PLAIN_CONV} a = Add(c, l) y = Relu(a)",
        11, IMAGE, CONV,
    ),
    "FusedGemm": (
        'a = Flatten(x) y = com.microsoft.FusedGemm<transB=1, alpha=0.5, '
        'activation="LeakyRelu", activation_alpha=0.3>(a, v, c)',
        "a = Flatten(x) g = Gemm<transB=1, alpha=0.5>(a, v, c) y = LeakyRelu<alpha=0.3>(g)",
        13, TOKENS, {"v": weight(6, 40), "c": weight(6), "w": weight(6, 4)},
    ),
    "FusedMatMul": (
        "p = com.microsoft.FusedMatMul<transB=1, alpha=0.3>(x, x) "
        "y = com.microsoft.FusedMatMul<transA=1, alpha=2.0>(p, x)",
        "t = Transpose<perm=[0,2,1]>(x) p3 = MatMul(x, t) h = Constant<value_float=0.3>() "
        "p = Mul(p3, h) q = Transpose<perm=[0,2,1]>(p) m = MatMul(q, x) y = Add(m, m)",
        14, TOKENS, MATRICES,
    ),
    "FusedMatMul, batches": (
        "r = Transpose<perm=[1,0,2]>(x) "
        "y = com.microsoft.FusedMatMul<transBatchA=1, transBatchB=1, transB=1>(r, r)",
        "t = Transpose<perm=[0,2,1]>(x) y = MatMul(x, t)", 14, TOKENS, {"w": weight(25, 4)},
    ),
    "Gelu": (
        "y = com.microsoft.Gelu(x)", "y = Gelu(x)", 20, TOKENS, MATRICES,
    ),
    "Gelu before opset 20": (
        "y = com.microsoft.Gelu(x)",
        "r = Sqrt(two) d = Div(x, r) e = Erf(d) p = Add(e, one) m = Mul(x, p) y = Div(m, two)",
        13, TOKENS, {**MATRICES, "one": np.array(1.0), "two": np.array(2.0)},
    ),
    "BiasGelu": (
        "y = com.microsoft.BiasGelu(x, b)", "a = Add(x, b) y = Gelu(a)", 20, TOKENS, NORM,
    ),
    "FastGelu": (
        "y = com.microsoft.FastGelu(x, b)", 'a = Add(x, b) y = Gelu<approximate="tanh">(a)',
        20, TOKENS, NORM,
    ),
    "FastGelu before opset 20": (
        "y = com.microsoft.FastGelu(x)",
        "c3 = Mul(x, x) c4 = Mul(c3, x) c5 = Mul(c4, k) c6 = Add(x, c5) c7 = Mul(c6, c) "
        "t = Tanh(c7) p = Add(t, one) m = Mul(x, p) y = Mul(m, half)",
        13, TOKENS, {**MATRICES, "one": np.array(1.0), "half": np.array(0.5),
                     "k": np.array(0.044715), "c": np.array(np.sqrt(2 / np.pi))},
    ),
    "QuickGelu": (
        "y = com.microsoft.QuickGelu<alpha=1.2>(x)",
        "a = Mul(x, l) s = Sigmoid(a) y = Mul(x, s)", 14, TOKENS,
        {**MATRICES, "l": np.array(1.2)},
    ),
    **{
        f"SkipLayerNormalization, opset {opset}": (
            "y1, m, d, a = com.microsoft.SkipLayerNormalization<epsilon=0.01>(x, c4, s, b, c) "
            "y = Add(y1, a)",
            "u = Add(x, c4) a = Add(u, c) y1 = LayerNormalization<epsilon=0.01>(a, s, b) "
            "y = Add(y1, a)",
            opset, TOKENS, {**NORM, "c4": weight(1, 5, 8)},
        )
        for opset in (13, 17)
    },
    **{
        f"SkipSimplifiedLayerNormalization, opset {opset}": (
            "y = com.microsoft.SkipSimplifiedLayerNormalization<epsilon=0.01>(x, x, s)",
            "a = Add(x, x) y = SimplifiedLayerNormalization<epsilon=0.01>(a, s)",
            opset, TOKENS, NORM,
        )
        for opset in (17, 23)
    },
    "SimplifiedLayerNormalization": (
        "y = SimplifiedLayerNormalization<epsilon=0.01>(x, s)",
        "q = Mul(x, x) m = ReduceMean<axes=[-1]>(q) a = Add(m, e) d = Sqrt(a) n = Div(x, d) "
        "y = Mul(n, s)", 17, TOKENS, {**NORM, "e": np.array(0.01)},
    ),
    "Attention": (
        "y = com.microsoft.Attention<num_heads=2>(x, p, b)",
        f"{PROJECTED} y = Attention<q_num_heads=2, kv_num_heads=2>(qq, kk, vv)",
        23, TOKENS, QKV_ATTENTION,
    ),
    "Attention, causal": (
        "y = com.microsoft.Attention<num_heads=2, unidirectional=1, scale=0.2>(x, p, b)",
        f"{PROJECTED} "
        "y = Attention<q_num_heads=2, kv_num_heads=2, is_causal=1, scale=0.2>(qq, kk, vv)",
        23, TOKENS, QKV_ATTENTION,
    ),
    "MultiHeadAttention": (
        "qm = MatMul(x, q) km = MatMul(x, k) vm = MatMul(x, v) "
        "y = com.microsoft.MultiHeadAttention<num_heads=2>(qm, km, vm, b)",
        f"{PROJECTED} y = Attention<q_num_heads=2, kv_num_heads=2>(qq, kk, vv)",
        23, TOKENS, QKV_ATTENTION,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_a_fused_operator_is_its_formula(name: str) -> None:
    fused, plain, opset, (declared, shape), weights = PAIRS[name]
    x, y = np.random.default_rng(0).normal(size=shape).astype(np.float32), np.arange(3)
    targets = [
        jr.Target(text_model(f"{body} {HEAD}", declared, opset, weights), device="cpu")
        for body in (fused, plain)
    ]
    logits = targets[0].logits(x)  # of onnxruntime's own kernel
    got, expected = (target.differentiate(x, y) for target in targets)
    np.testing.assert_allclose(got.logits, logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(expected.logits, logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got.gradient, expected.gradient, rtol=1e-3, atol=1e-4)
    assert np.abs(got.gradient).max() > 0.01


class Convolutional(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), activation)
        self.second = nn.Sequential(nn.Conv2d(5, 5, 3, padding=1), nn.BatchNorm2d(5))
        self.activation, self.head = activation, nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> Any:
        h = self.first(x)
        return self.head(self.activation(self.second(h) + h).mean((2, 3)))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.dense = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: torch.Tensor) -> Any:
        x = self.embed(x)
        h = self.norms[0](x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        x = x + self.dense(self.norms[1](x))
        return self.head(x.mean(1))


NETWORKS: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    **{
        f"convolutions, {type(each).__name__}": (Convolutional(each), (3, 3, 8, 8), fused)
        for each, fused in (
            (nn.ReLU(), "FusedConv"), (nn.ReLU6(), "FusedConv"), (nn.Sigmoid(), "FusedConv"),
            (nn.Tanh(), "FusedConv"), (nn.LeakyReLU(0.2), "FusedConv"),
            (nn.Hardsigmoid(), "FusedConv"), (nn.SiLU(), "QuickGelu"), (nn.GELU(), "Gelu"),
        )
    },
    "transformer": (Transformer(), (3, 5, 8), "BiasGelu"),
}  # fmt: skip


@pytest.mark.parametrize("opset", [14, 17])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_optimized_model_has_the_gradient_of_the_model(
    name: str, opset: int, tmp_path: Path
) -> None:
    """Except where it is laid out for one processor, in a domain of its own."""
    module, shape, fused = NETWORKS[name]
    content = exported(module.eval(), shape, opset)
    x, y = torch.randn(shape, requires_grad=True), torch.arange(3)
    (expected,) = torch.autograd.grad(functional.cross_entropy(module(x), y, reduction="sum"), x)
    seen = set()
    for level in ("DISABLE_ALL", *(f"ENABLE_{level}" for level in LEVELS)):
        optimized = optimize(content, level, tmp_path / f"{level}.onnx")
        ops = {(node.domain, node.op_type) for node in optimized.graph.node}
        seen |= {op_type for domain, op_type in ops if domain == "com.microsoft"}
        target = jr.Target(optimized.SerializeToString(), device="cpu")
        if any(domain == "com.microsoft.nchwc" for domain, _ in ops):
            with pytest.raises(UnsupportedOpError, match="before onnxruntime optimized"):
                target.loss_and_gradient(x.detach().numpy(), y.numpy())
            continue
        _, got = target.loss_and_gradient(x.detach().numpy(), y.numpy())
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-3, atol=2e-6)
    assert fused in seen


def exported(module: nn.Module, shape: tuple[int, ...], opset: int) -> bytes:
    buffer: Any = io.BytesIO()  # which torch takes, and does not declare
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (torch.randn(shape),), buffer, opset_version=opset, dynamo=False,
                          input_names=["x"], dynamic_axes={"x": {0: "N"}})  # fmt: skip
    return bytes(buffer.getvalue())


def optimize(content: bytes, level: str, path: Path) -> onnx.ModelProto:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_{level}")
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return onnx.load(path)


REFUSED = {
    "padding masks, caches or rotary positions": (
        "y = com.microsoft.Attention<num_heads=2>(x, p, b, m)"
    ),
    "com.microsoft::Inverse 'i': onnxruntime's own operator. Take the model as it was before": (
        "t = Transpose<perm=[0,2,1]>(x) g = MatMul(t, x) i = com.microsoft.Inverse(g) "
        "y = MatMul(x, i)"
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_refusal_has_a_reason(reason: str) -> None:
    content = text_model(
        f"{REFUSED[reason]} {HEAD}", "N,5,8", 17, {**QKV_ATTENTION, "m": np.ones((3, 5), np.int32)}
    )
    with pytest.raises(UnsupportedOpError, match=reason):
        input_gradient(jr.Model(content))
