"""Loss heads: logits, labels -> loss per example, and its closed-form cotangent of the logits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from jr_onnx.autodiff.emit import Emitter
from jr_onnx.model import Tensor

# (emitter, logits, labels, what is known of the logits) -> (loss, cotangent of the logits)
Loss = Callable[[Emitter, str, str, Tensor], tuple[str, str]]


def cross_entropy(emit: Emitter, logits: str, labels: str, tensor: Tensor) -> tuple[str, str]:
    """Appends loss = -log softmax(z)[y] and its cotangent softmax(z) - onehot(y).

    float16 logits are lifted to float32, where the loss does not overflow.
    """
    element = TensorProto.DOUBLE if tensor.element == TensorProto.DOUBLE else TensorProto.FLOAT
    lifted = element != tensor.element
    z = emit.op("Cast", logits, to=element) if lifted else logits
    hot = one_hot(emit, z, labels, element)
    log_p = emit.op("LogSoftmax", z, axis=1)
    loss = emit.op("Neg", emit.reduce_sum(emit.op("Mul", log_p, hot), [1], keepdims=False))
    seed = emit.op("Sub", emit.op("Exp", log_p), hot)
    return loss, emit.op("Cast", seed, to=tensor.element) if lifted else seed


def one_hot(emit: Emitter, z: str, labels: str, element: int) -> str:
    """Appends the labels as rows of 0 and 1, shaped like the logits `(batch, classes)`."""
    classes = emit.op("Gather", emit.op("Shape", z), emit.integers(1), axis=0)
    values = emit.constant(np.array([0, 1], np.float32))
    hot = emit.op("OneHot", labels, classes, values, axis=1)
    # onnxruntime has no float64 kernel of OneHot.
    return hot if element == TensorProto.FLOAT else emit.op("Cast", hot, to=element)


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy}
