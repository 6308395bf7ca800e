"""float16 cotangents that do not vanish: the loss is scaled on the way back (arXiv:1710.03740).

    g / n  --the walk back, in float16-->  d / n  --in float32-->  d

with g the gradient of the loss for the logits, and n its size, each example by itself. float16 ends
at 6e-8, and a confident model starts with p - 1 for the label.
"""

from __future__ import annotations

from collections.abc import Iterable

from onnx import TensorProto

from jr_onnx.autodiff.emit import Term
from jr_onnx.model import Tensor

# The largest numbers on the way back through five networks were 3 times, the largest of a layer at
# the least 7e-6 times those at its start: 64 is far from both ends of float16, 6e-5 and 6.5e4.
_LARGEST = 64


def needs_scaling(tensors: Iterable[Tensor]) -> bool:
    """Whether any value is float16."""
    return any(tensor.element == TensorProto.FLOAT16 for tensor in tensors)


def scaled(g: Term) -> tuple[Term, Term]:
    """Returns g with elements of at most 64, `(batch, -1)`, and what the gradient is to be times.

    Args:
        g: `(batch, ...)`, float32 or float64.
    """
    flat = g.reshape(0, -1)
    size = flat.op("Abs").sum([1])
    size = size + (1 - size.nonzero())
    return flat / size * _LARGEST, size / _LARGEST


def unscaled(gradient: Term, size: Term) -> Term:
    """Returns the gradient at its true size, which float16 could not hold: in float32 then."""
    wide = TensorProto.DOUBLE if gradient.element == TensorProto.DOUBLE else TensorProto.FLOAT
    flat = gradient.reshape(0, -1).to(wide) * size.to(wide)
    return flat.like(flat.emit.reshape_like(flat.name, gradient.name))
