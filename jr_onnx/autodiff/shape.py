"""Operators that only move elements: the gradient moves them back."""

from __future__ import annotations

from jr_onnx.autodiff.registry import Call, vjp


@vjp("Reshape", 5, 13, 14, 19, 21, 23, 24, 25)
def reshape(call: Call) -> str:
    """Back to the shape of the input."""
    return call.emit.reshape_like(call.g, call.x)


@vjp("Flatten", 1, 9, 11, 13, 21, 23, 24, 25)
def flatten(call: Call) -> str:
    """Back to the shape of the input."""
    return call.emit.reshape_like(call.g, call.x)


@vjp("Transpose", 1, 13, 21, 23, 24, 25)
def transpose(call: Call) -> str:
    """The inverse permutation."""
    perm = call.attribute("perm") or list(reversed(range(len(call.shape(call.x)))))
    return call.emit.op("Transpose", call.g, perm=[perm.index(axis) for axis in range(len(perm))])
