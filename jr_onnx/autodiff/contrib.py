"""Operators of onnxruntime's own domain that its optimizer writes, in the standard ones.

    FusedConv, FusedGemm        activation(Conv(x, w, b) + z),   activation(Gemm(a, b, c))
    FusedMatMul                 alpha a' b', each operand transposed as it says
    Gelu, FastGelu, BiasGelu    x P(x) with x, x + bias;   QuickGelu: x s(alpha x)
    SkipLayerNormalization      LayerNormalization(x + skip + bias); Simplified: without the mean
    Attention, MultiHeadAttention

onnxruntime fuses them again where it can. LayerNormalization it writes into the standard domain in
opsets older than 17 too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from onnx import TensorProto, helper

from jr_onnx.autodiff.attention import (
    inverse_root,
    masked_softmax,
    merge_heads,
    optional,
    split_heads,
)
from jr_onnx.autodiff.emit import Term
from jr_onnx.autodiff.expand import expansion
from jr_onnx.autodiff.registry import Call

_contrib = partial(expansion, domain="com.microsoft")
_PREFIX = "activation_"
_LAST = [0, 1, 3, 2]


@_contrib("FusedConv", 1)
def fused_conv(call: Call) -> list[Term]:
    """y = activation(Conv(x, w, b) + z)."""
    attributes = _attributes(call)
    activation = attributes.pop("activation", b"").decode()
    params = map(float, attributes.pop("activation_params", ()))
    x, w, b, z = (optional(call, index) for index in range(4))
    y = _op("Conv", x, w, b, **attributes)
    y = y if z is None else y + z
    if activation == "Clip":
        low, high = params
        return [
            y.op("Clip", low, high) if call.emit.opset > 10 else y.op("Clip", min=low, max=high)
        ]
    named = zip(("alpha", "beta"), params, strict=False)
    return [y.op(activation, **dict(named)) if activation else y]


@_contrib("FusedGemm", 1)
def fused_gemm(call: Call) -> list[Term]:
    """y = activation(Gemm(a, b, c))."""
    attributes = _attributes(call)
    activation = attributes.pop("activation").decode()
    own = {key: attributes.pop(key) for key in list(attributes) if key.startswith(_PREFIX)}
    y = _op("Gemm", *(optional(call, index) for index in range(3)), **attributes)
    return [y.op(activation, **{key.removeprefix(_PREFIX): value for key, value in own.items()})]


@_contrib("FusedMatMul", 1)
@_contrib("TransposeMatMul", 1)
def fused_matmul(call: Call) -> list[Term]:
    """y = alpha a' b'. With transBatch an operand is `(rows, batch, columns)`.

    Einsum says it whatever the rank is, which is often unknown here.
    """
    a, b = (call.term(name) for name in call.node.input)
    equation = f"{_matrix(call, 'A', 'i', 'k')},{_matrix(call, 'B', 'k', 'j')}->...ij"
    y = a.op("Einsum", b, equation=equation)
    return [y * call.number("alpha", 1.0)]


@_contrib("Gelu", 1)
def gelu(call: Call) -> list[Term]:
    """y = x P(x)."""
    return [_gelu(call.term(call.x))]


@_contrib("BiasGelu", 1)
def bias_gelu(call: Call) -> list[Term]:
    """y = (x + bias) P(x + bias)."""
    x, bias = (call.term(name) for name in call.node.input)
    return [_gelu(x + bias)]


@_contrib("FastGelu", 1)
def fast_gelu(call: Call) -> list[Term]:
    """y = (x + bias) P(x + bias), P by the hyperbolic tangent; the bias may be left out."""
    x, bias = call.term(call.x), optional(call, 1)
    return [_fast_gelu(x if bias is None else x + bias)]


@_contrib("QuickGelu", 1)
def quick_gelu(call: Call) -> list[Term]:
    """y = x s(alpha x)."""
    x, alpha = call.term(call.x), call.number("alpha", 1.702)
    return [x * (x if alpha == 1 else x * alpha).op("Sigmoid")]


@expansion("LayerNormalization", *range(9, 17))
def layer_normalization(call: Call) -> list[Term]:
    """In opsets that do not have it."""
    x, scale, bias = (optional(call, index) for index in range(3))
    return [_normalized(call, x, scale, bias)]


@expansion("SimplifiedLayerNormalization")
def simplified_layer_normalization(call: Call) -> list[Term]:
    """y = scale x / sqrt(mean(x^2) + epsilon)."""
    return [_normalized(call, *(optional(call, index) for index in range(2)), centred=False)]


@_contrib("SkipLayerNormalization", 1)
def skip_layer_normalization(call: Call) -> list[Term | None]:
    """y, and as the fourth output the sum that is normalized: x + skip + bias."""
    x, skip, scale, shift, bias = (optional(call, index) for index in range(5))
    total = _sum(x, skip, bias)
    return [_normalized(call, total, scale, shift, epsilon=1e-12), None, None, total]


@_contrib("SkipSimplifiedLayerNormalization", 1)
def skip_simplified_layer_normalization(call: Call) -> list[Term | None]:
    """y, and as the fourth output the sum that is normalized: x + skip + bias."""
    x, skip, scale, bias = (optional(call, index) for index in range(4))
    total = _sum(x, skip, bias)
    return [_normalized(call, total, scale, epsilon=1e-12, centred=False), None, None, total]


@_contrib("MultiHeadAttention", 1)
def multi_head_attention(call: Call) -> list[Term]:
    """q, k and v `(batch, length, heads x size)`, one bias for the three."""
    _require_plain(call, (0, 1, 2, 3, 5))
    q, k, v, bias = (optional(call, index) for index in range(4))
    ranks = {len(call.tensors[name].shape or "3-d") for name in call.node.input[:3]}
    if q is None or k is None or v is None or ranks != {3}:
        raise NotImplementedError("queries, keys and values in one tensor, or split by head")
    if bias is not None:
        width = call.static(call.shape(call.node.input[3]), "the length of the bias")[0]
        values = call.static(call.shape(call.node.input[2])[-1:], "the size of the values")[0]
        sizes = ((width - values) // 2, (width - values) // 2, values)
        q, k, v = map(Term.__add__, (q, k, v), _parts(bias, sizes, axis=0))
    scale = inverse_root(call, call.x, call.attribute("num_heads"))
    return [_attend(call, (q, k, v), scale, optional(call, 5))]


@_contrib("Attention", 1)
def attention(call: Call) -> list[Term]:
    """q, k, v = x w + bias, their weights side by side."""
    _require_plain(call, (0, 1, 2, 5))
    x, w, bias = (optional(call, index) for index in range(3))
    if x is None or w is None:
        raise NotImplementedError("without weights")
    width = call.static(call.shape(call.node.input[1])[1:], "the width of the weights")[0]
    sizes = call.attribute("qkv_hidden_sizes") or [width // 3] * 3
    qkv = [x.op("MatMul", part) for part in _parts(w, sizes, axis=1)]
    if bias is not None:
        qkv = list(map(Term.__add__, qkv, _parts(bias, sizes, axis=0)))
    scale = math.sqrt(call.attribute("num_heads") / sizes[0])
    return [_attend(call, qkv, scale, optional(call, 5))]


def _attend(call: Call, qkv: Sequence[Term], scale: Term | float, mask: Term | None) -> Term:
    q, k, v = (split_heads(term, call.attribute("num_heads")) for term in qkv)
    scores = (q * (call.attribute("scale") or scale)).op("MatMul", k.op("Transpose", perm=_LAST))
    causal = bool(call.attribute("unidirectional", 0))
    return merge_heads(masked_softmax(call, scores, mask, causal=causal).op("MatMul", v))


def _require_plain(call: Call, known: Sequence[int]) -> None:
    """Refuses what only text models have: masks of padding, caches, rotary positions."""
    other = [name for at, name in enumerate(call.node.input) if name and at not in known]
    if other or any(call.node.output[1:]) or call.attribute("do_rotary", 0):
        raise NotImplementedError(f"padding masks, caches or rotary positions {other}")


def _parts(x: Term, sizes: Sequence[int], axis: int) -> list[Term]:
    ends = [sum(sizes[: at + 1]) for at in range(len(sizes))]
    return [
        Term(x.emit, x.emit.slice(x.name, [end - size], [end], [axis]), x.element)
        for size, end in zip(sizes, ends, strict=True)
    ]


def _matrix(call: Call, which: str, row: str, column: str) -> str:
    """Returns Einsum's term for an operand whose matrix, once transposed, has these axes."""
    first, last = (column, row) if call.attribute(f"trans{which}", 0) else (row, column)
    batch = call.attribute(f"transBatch{which}", 0)
    return f"{first}...{last}" if batch else f"...{first}{last}"


def _gelu(x: Term) -> Term:
    if x.emit.opset >= 20:
        return x.op("Gelu")
    return x * ((x / math.sqrt(2)).op("Erf") + 1) * 0.5


def _fast_gelu(x: Term) -> Term:
    if x.emit.opset >= 20:
        return x.op("Gelu", approximate="tanh")
    c = math.sqrt(2 / math.pi)
    return x * ((x * (c + 0.044715 * c * (x * x))).op("Tanh") + 1) * 0.5


def _normalized(
    call: Call,
    x: Term | None,
    scale: Term | None,
    bias: Term | None = None,
    *,
    epsilon: float = 1e-5,
    centred: bool = True,
) -> Term:
    """Returns scale (x - mean) / deviation + bias; without the mean if not centred."""
    if x is None or scale is None:
        raise NotImplementedError("without x or scale")
    epsilon, axis = call.number("epsilon", epsilon), call.attribute("axis", -1)
    op_type, since = ("LayerNormalization", 17) if centred else ("RMSNormalization", 23)
    if call.emit.opset >= since:
        more = [scale] if bias is None else [scale, bias]
        return x.op(op_type, *more, axis=axis, epsilon=epsilon)
    element = TensorProto.FLOAT if x.element == TensorProto.FLOAT16 else x.element
    axes = list(range(axis, 0 if axis < 0 else len(call.shape(call.x))))
    x = x.to(element)
    if centred:
        x = x - x.mean(axes)
    unit = (x / ((x * x).mean(axes) + epsilon).op("Sqrt")).to(scale.element)
    return unit * scale if bias is None else unit * scale + bias


def _sum(*terms: Term | None) -> Term:
    first, second, *rest = (term for term in terms if term is not None)
    return first + second + rest[0] if rest else first + second


def _op(op_type: str, x: Term | None, *others: Term | None, **attributes: Any) -> Term:
    """Appends an operator; inputs left out are at the end."""
    if x is None:
        raise NotImplementedError(f"a {op_type} without its first input")
    return x.op(op_type, *(other for other in others if other is not None), **attributes)


def _attributes(call: Call) -> dict[str, Any]:
    return {entry.name: helper.get_attribute_value(entry) for entry in call.node.attribute}
