"""Attention, written out for each head: y = softmax(s q k^T + mask) v.

q, k, v are `(batch, length, heads x size)` or `(batch, heads, length, size)`. Where n heads of q
share one of k and v they are taken as rows of one larger matrix, so that nothing is repeated:

    (batch, n heads, length, size)  as  (batch, heads, n length, size)

softcap c: c tanh(score / c). A masked score falls by 1e38 (3e4 in float16); a query that may see
nothing gets 0. The gradient is that of MatMul, Softmax and Add.
"""

from __future__ import annotations

import math

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from jr_onnx.autodiff.emit import Term
from jr_onnx.autodiff.expand import expansion
from jr_onnx.autodiff.registry import Call

_HEADS_FIRST = [0, 2, 1, 3]  # and back again


@expansion("Attention", 23, 24)
def attention(call: Call) -> list[Term] | None:
    """Leaves to ONNX's function body what is rare: caches, and the scores as an output."""
    if any(call.node.input[4:]) or any(call.node.output[1:]) or _has_short_mask(call):
        return None
    q, k, v = (call.term(name) for name in call.node.input[:3])
    heads, kv_heads = call.attribute("q_num_heads", 0), call.attribute("kv_num_heads", 0)
    scale = call.attribute("scale") or inverse_root(call, call.x, heads or 1)
    flat = heads > 0
    if flat:
        q, k, v = split_heads(q, heads), split_heads(k, kv_heads), split_heads(v, kv_heads)
    else:
        counts = [call.shape(name)[1] for name in call.node.input[:2]]
        if counts[0] != counts[1]:
            heads, kv_heads = call.static(counts, "the number of heads")
    scores = _rows(q * scale, heads, kv_heads).op("MatMul", k.op("Transpose", perm=[0, 1, 3, 2]))
    scores = _rows(scores, kv_heads, heads)
    softcap = call.number("softcap", 0.0)
    if softcap:
        scores = (scores / softcap).op("Tanh") * softcap
    causal = bool(call.attribute("is_causal", 0))
    p = masked_softmax(call, scores, optional(call, 3), causal=causal)
    y = _rows(_rows(p, heads, kv_heads).op("MatMul", v), kv_heads, heads)
    return [merge_heads(y) if flat else y]


def _has_short_mask(call: Call) -> bool:
    """Whether the mask leaves out the last keys, as opset 24 allows."""
    if not any(call.node.input[3:4]):
        return False
    k, mask = (call.tensors[call.node.input[at]].shape or (None, None) for at in (1, 3))
    keys, covered = k[-2], mask[-1]
    known = isinstance(keys, int) and isinstance(covered, int)
    return known and covered not in (1, keys)


def _rows(x: Term, heads: int, regrouped: int) -> Term:
    """From `(batch, heads, n, m)` to `(batch, regrouped, heads n / regrouped, m)`."""
    return x if heads == regrouped else x.reshape(0, regrouped, -1, 0)


def optional(call: Call, index: int) -> Term | None:
    """Returns an input, None where it is left out."""
    given = index < len(call.node.input) and call.node.input[index]
    return call.term(given) if given else None


def inverse_root(call: Call, q: str, heads: int) -> Term | float:
    """Returns 1 / sqrt(size of a head), found out in the graph where it is not known before."""
    shape = call.tensors[q].shape
    if shape is not None and isinstance(shape[-1], int):
        return math.sqrt(heads / shape[-1])
    width = call.emit.op("Gather", call.emit.op("Shape", q), call.emit.integers(-1))
    return (heads / Term(call.emit, width, TensorProto.INT64).to(call.element)).op("Sqrt")


def split_heads(x: Term, heads: int) -> Term:
    """From `(batch, length, heads x size)` to `(batch, heads, length, size)`."""
    return x.reshape(0, 0, heads, -1).op("Transpose", perm=_HEADS_FIRST)


def merge_heads(x: Term) -> Term:
    """From `(batch, heads, length, size)` to `(batch, length, heads x size)`."""
    return x.op("Transpose", perm=_HEADS_FIRST).reshape(0, 0, -1)


def masked_softmax(call: Call, scores: Term, mask: Term | None, *, causal: bool) -> Term:
    """Returns the weights of the keys, the last axis, for each query.

    Args:
        call: the node.
        scores: `(batch, heads, queries, keys)`.
        mask: which pairs may meet (bool), or what to add to the scores; it is broadcast.
        causal: whether a query sees only the keys up to its own position.
    """
    emit, element, seen = call.emit, scores.element, None
    if mask is not None and mask.element != TensorProto.BOOL:
        scores, mask = scores + mask, None
    if causal:
        pairs = emit.op("Shape", scores.name, start=2, end=4)
        one = numpy_helper.from_array(np.ones(1, helper.tensor_dtype_to_np_dtype(element)))
        seen = Term(emit, emit.op("ConstantOfShape", pairs, value=one), element)
        seen = seen.op("Trilu", upper=0)
    if mask is not None:
        seen = mask.to(element) * seen if seen else mask.to(element)
    if seen is not None:
        scores = scores + (seen - 1) * (3e4 if element == TensorProto.FLOAT16 else 1e38)
    precision = call.attribute("softmax_precision", element)
    p = scores.to(precision).op("Softmax", axis=-1).to(element)
    if mask is None or seen is None:
        return p
    return p * Term(emit, emit.op("ReduceMax", seen.name, emit.integers(-1)), element)
