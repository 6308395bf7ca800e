"""Relus inside fused, recurrent and quantised operators, where there is no node to replace.

FusedConv<activation = "Relu">, MoE<activation_type = "relu">, RNN<activations = ["Relu"]>
QuantizeLinear(Conv(x)) to a range that starts at zero, as it does when a Relu was folded in
QuantizeLinear(MaxPool(DequantizeLinear(x))) to one, from a range that reaches below zero
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from jr_onnx.model import Scope, attribute_of
from jr_onnx.rewrite.surroundings import Surroundings, Value

_RECURRENT = ("RNN", "GRU", "LSTM")
# The operators of the standard domain to look at; of other domains it is all.
HIDING = frozenset(("QLinearConv", "QLinearMatMul", "QuantizeLinear", *_RECURRENT))
# com.microsoft's mixtures of experts compute a Relu unless they are told otherwise.
_RELU_BY_DEFAULT = ("MoE", "QMoE")
_FUSED = (b"relu", b"clip")
# Position of the output's zero point among the inputs.
_ZERO_POINT = {"QLinearConv": 7, "QLinearMatMul": 7, "QLinearAdd": 7, "QGemm": 8}
_LINEAR = frozenset(("Conv", "Gemm", "MatMul", "Add", "BatchNormalization", "ConvTranspose"))
# What makes nothing negative that was not.
_KEEPING = frozenset((
    "MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool", "Identity", "Reshape",
    "Flatten", "Squeeze", "Unsqueeze", "Transpose",
))  # fmt: skip
_FARTHEST = 16  # nodes
_SIGNED = (TensorProto.INT4, TensorProto.INT8, TensorProto.INT16)


def hidden_relu(scope: Scope, node: onnx.NodeProto, around: Surroundings) -> str | None:
    """Says why a Relu may be inside a fused or quantised node, None where none can be."""
    fused = _fused(node)
    if fused is not None:
        return (
            f"{node.op_type} has a {fused} fused into it, which is no node of its own: retrofit "
            "the model before it is optimised"
        )
    inner = attribute_of(node, "activations")
    if inner is not None and any(name.lower() == b"relu" for name in inner.strings):
        return f"{node.op_type} computes a Relu inside, which is no node of its own"
    zero_point = _zero_point(scope, node, around)
    if zero_point is None:
        return None
    return (
        f"{node.op_type} quantises to a range that starts at zero (zero point {zero_point}), as it "
        "does when a Relu was folded into it: retrofit the model before it is quantised"
    )


def _fused(node: onnx.NodeProto) -> str | None:
    if node.op_type in _RECURRENT:
        return None
    for name in ("activation", "activation_type"):
        attribute = attribute_of(node, name)
        if attribute is not None:
            known = attribute.s.lower() in _FUSED
            return attribute.s.decode() if known else None
    return "Relu" if node.op_type in _RELU_BY_DEFAULT else None


def _zero_point(scope: Scope, node: onnx.NodeProto, around: Surroundings) -> int | None:
    """Returns the output's zero point where nothing below zero can be quantised, else None."""
    at = _ZERO_POINT.get(node.op_type)
    if node.op_type == "QuantizeLinear":
        at = 2 if _may_be_negative(Value(scope, node.input[0]), around) else None
    if at is None:
        return None
    if at >= len(node.input) or not node.input[at]:
        output = attribute_of(node, "output_dtype")
        signed = output is not None and output.i in _SIGNED
        return None if node.op_type != "QuantizeLinear" or signed else 0  # the default is uint8's 0
    value = _integers(scope, node.input[at], around)
    if value is None or _has_below(value):
        return None
    return int(np.iinfo(value.dtype).min)


def _integers(scope: Scope, name: str, around: Surroundings) -> np.ndarray[Any, Any] | None:
    value = around.constants.value(scope, name)
    return value if value is not None and value.size and value.dtype.kind in "iu" else None


def _has_below(zero_point: np.ndarray[Any, Any]) -> bool:
    """Whether there are integers below a zero point, and so numbers below 0."""
    return bool((zero_point != np.iinfo(zero_point.dtype).min).any())


def _may_be_negative(value: Value, around: Surroundings) -> bool:
    """Whether a linear operator made a value, or a range that reaches below zero; pooled or not."""
    for _ in range(_FARTHEST):
        made = around.maker(value)
        if made is None or made.node.op_type in _LINEAR:
            return made is not None
        scope, node = made
        if node.op_type == "DequantizeLinear":
            known = _integers(scope, node.input[2], around) if len(node.input) > 2 else None
            return known is not None and _has_below(known)
        if node.op_type not in _KEEPING or not node.input:
            break
        value = Value(scope, node.input[0])
    return False
