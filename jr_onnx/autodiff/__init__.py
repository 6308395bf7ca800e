"""Input gradients of ONNX models, as ordinary ONNX graphs.

model(x) -> logits      becomes      gradient(x, labels) -> logits, loss, d sum(loss) / dx
"""

# Importing the families registers their rules.
from jr_onnx.autodiff import (
    activation,
    attention,
    contrib,
    conv,
    elementwise,
    indexing,
    linear,
    normalization,
    pooling,
    quantization,
    reduction,
    resize,
    shape,
)
from jr_onnx.autodiff.backward import InputGradient, input_gradient
from jr_onnx.autodiff.expand import expansion
from jr_onnx.autodiff.losses import LOSSES
from jr_onnx.autodiff.registry import Call, vjp
from jr_onnx.autodiff.surrogates import SURROGATES, Surrogates

__all__ = [
    "LOSSES",
    "SURROGATES",
    "Call",
    "InputGradient",
    "Surrogates",
    "activation",
    "attention",
    "contrib",
    "conv",
    "elementwise",
    "expansion",
    "indexing",
    "input_gradient",
    "linear",
    "normalization",
    "pooling",
    "quantization",
    "reduction",
    "resize",
    "shape",
    "vjp",
]
