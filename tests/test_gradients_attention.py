"""Attention: the operator in all its forms, and what torch exports instead of it.

The reference evaluator errs in the scores as an output with a softcap (mode 0).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gradient_checks import Case, check, model, weight
from torch import nn
from torch.nn import functional

import jr_onnx as jr
from jr_onnx.autodiff import input_gradient

pytest.importorskip("onnxscript", reason="torch's dynamo exporter needs it")

SHAPE = (3, 5, 8)
W, W_SCORES = weight(40, 4), weight(50, 4)
FOUR_D = "r = Reshape(x, s) q = Transpose<perm=[0,2,1,3]>(r)"
HEADS = "q_num_heads=2, kv_num_heads=2"


def classifier(body: str, opset: int, **weights: Any) -> Case:
    return model(f"{body} f = Flatten(y) z = MatMul(f, w)", "N,5,8", opset=opset, w=W, **weights)


BOOL = np.tril(np.ones((5, 5), bool), 1)
# Name: (body, weights).
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "3-d": (f"y = Attention<{HEADS}>(x, x, x)", {}),
    "causal, softcap, scale": (
        f"y = Attention<{HEADS}, is_causal=1, softcap=1.5, scale=0.3>(x, x, x)", {},
    ),
    "heads that share keys": (
        "k = MatMul(x, a) v = MatMul(x, b) y = Attention<q_num_heads=4, kv_num_heads=2>(x, k, v)",
        {"a": weight(8, 4), "b": weight(8, 4) + 1},
    ),
    "heads that share keys, causal and masked": (
        "k = MatMul(x, a) v = MatMul(x, b) "
        "y = Attention<q_num_heads=4, kv_num_heads=2, is_causal=1>(x, k, v, m)",
        {"a": weight(8, 4), "b": weight(8, 4) + 1, "m": weight(5, 5)},
    ),
    "values of another size, fewer keys": (
        "k = Slice(x, one, four, one) v = MatMul(k, b) "
        "y4 = Attention<q_num_heads=2, kv_num_heads=2>(x, k, v) "
        "y = Concat<axis=2>(y4, y4)",
        {"one": np.array([1]), "four": np.array([4]), "b": weight(8, 4)},
    ),
    "float mask": (f"y = Attention<{HEADS}>(x, x, x, m)", {"m": weight(5, 5)}),
    "float mask made of the input": (
        "t = Transpose<perm=[0,2,1]>(x) p = MatMul(x, t) m = Unsqueeze(p, one) "
        f"y = Attention<{HEADS}>(x, x, x, m)", {"one": np.array([1])},
    ),
    "bool mask": (f"y = Attention<{HEADS}>(x, x, x, m)", {"m": BOOL}),
    "bool mask, broadcast, causal": (
        f"y = Attention<{HEADS}, is_causal=1>(x, x, x, m)", {"m": BOOL[None, None]},
    ),
    "a query that sees nothing": (
        f"y = Attention<{HEADS}>(x, x, x, m)", {"m": np.tril(np.ones((5, 5), bool), -1)},
    ),
    "4-d": (f"{FOUR_D} y = Attention(q, q, q)", {"s": np.array([0, 0, 2, 4])}),
    "4-d, heads that share keys": (
        f"{FOUR_D} k = Slice(q, zero, one, one) y = Attention(q, k, k)",
        {"s": np.array([0, 0, 2, 4]), "zero": np.array([0]), "one": np.array([1])},
    ),
    "a cache": (
        f"{FOUR_D} y, pk, pv = Attention(q, q, q, , q, q)", {"s": np.array([0, 0, 2, 4])},
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float", "double"])
@pytest.mark.parametrize("opset", [23, 24])
@pytest.mark.parametrize("name", BODIES)
def test_attention_agrees_with_finite_differences(name: str, opset: int, dtype: str) -> None:
    body, weights = BODIES[name]
    check(classifier(body, opset, **weights), SHAPE, dtype)


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_scores_may_be_an_output(mode: int) -> None:
    softcap = "softcap=2.0, " if mode else ""
    body = (
        f"y, k, v, s = Attention<{HEADS}, {softcap}qk_matmul_output_mode={mode}>(x, x, x, m) "
        "f = Flatten(y) c = Flatten(s) a = MatMul(f, w) b = MatMul(c, u) z = Add(a, b)"
    )
    check(model(body, "N,5,8", opset=23, w=W, u=W_SCORES, m=weight(5, 5)), SHAPE, "float")


ROTARY = {"c": np.cos(weight(5, 2)), "s": np.sin(weight(5, 2))}
POSITIONS = np.arange(5)[None].repeat(3, 0)


@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotary_embedding_agrees_with_finite_differences(interleaved: int) -> None:
    body = f"y = RotaryEmbedding<interleaved={interleaved}, num_heads=2>(x, c, s, p)"
    check(classifier(body, 23, **ROTARY, p=POSITIONS), SHAPE, "float")


def test_attention_has_no_shape_arithmetic_for_static_sizes() -> None:
    """A CUDA graph allows none of it."""
    body, _ = BODIES["3-d"]
    graph = input_gradient(classifier(body, 23)("float")).model.proto.graph
    forward = [node.op_type for node in graph.node if node.name.startswith("expanded/")]
    assert "Shape" not in forward
    assert forward.count("MatMul") == 2


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> Any:
        y: torch.Tensor = self.attention(x, x, x, need_weights=False)[0]
        return self.head(y.mean(1))


class ScaledDotProduct(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.qkv, self.head, self.options = nn.Linear(8, 24), nn.Linear(8, 4), options

    def forward(self, x: torch.Tensor) -> Any:
        parts = self.qkv(x).reshape(x.shape[0], 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v, **self.options)
        return self.head(y.transpose(1, 2).flatten(2).mean(1))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.layer(x).mean(1))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "nn.MultiheadAttention": SelfAttention,
    "scaled_dot_product_attention": ScaledDotProduct,
    "causal": lambda: ScaledDotProduct(is_causal=True),
    "bool mask": lambda: ScaledDotProduct(attn_mask=torch.tensor(BOOL)),
    "float mask": lambda: ScaledDotProduct(attn_mask=torch.tensor(weight(5, 5).astype(np.float32))),
    "nn.TransformerEncoderLayer": Encoder,
}
EXPORTS = [(14, False), (17, False), (18, True), (23, True)]


@pytest.mark.parametrize(("opset", "dynamo"), EXPORTS)
@pytest.mark.parametrize("name", MODULES)
def test_an_export_has_torchs_gradient(name: str, opset: int, dynamo: bool) -> None:
    torch.manual_seed(0)
    module = MODULES[name]().eval()
    x = torch.randn(3, 5, 8, requires_grad=True)
    y = torch.arange(3) % 4
    (expected,) = torch.autograd.grad(functional.cross_entropy(module(x), y, reduction="sum"), x)
    target = jr.Target(exported(module, opset, dynamo), device="cpu")
    _, got = target.loss_and_gradient(x.detach().numpy(), y.numpy())
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-6)


def exported(module: nn.Module, opset: int, dynamo: bool) -> bytes:
    """Exports with a free batch size."""
    buffer: Any = io.BytesIO()  # which torch takes, and does not declare
    x = torch.randn(2, 5, 8)
    free: dict[str, Any] = {"dynamic_axes": {"x": {0: "N"}}}
    if dynamo:
        free = {"dynamic_shapes": ({0: torch.export.Dim("N", min=1, max=64)},)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (x,), buffer, input_names=["x"], output_names=["z"], opset_version=opset,
            dynamo=dynamo, verbose=False, **free,
        )  # fmt: skip
    return bytes(buffer.getvalue())
