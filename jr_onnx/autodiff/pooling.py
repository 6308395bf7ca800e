"""Pooling: a maximum passes its cotangent to the element it came from."""

from __future__ import annotations

from jr_onnx.autodiff.registry import Call, vjp


@vjp("MaxPool", 8, 10, 11, 12, 22)
def max_pool(call: Call) -> str:
    """Scatters g to the `Indices` of the forward node, which count in the flat input."""
    emit = call.emit
    kernel = call.attribute("kernel_shape")
    strides = call.attribute("strides", [1] * len(kernel))
    overlaps = any(step < window for step, window in zip(strides, kernel, strict=True))
    dilated = any(step > 1 for step in call.attribute("dilations", [1]))
    if call.attribute("storage_order", 0):
        raise NotImplementedError("column-major storage_order")
    shared = overlaps or dilated
    if shared and emit.opset < 16:
        raise NotImplementedError("overlapping windows need ScatterElements' sum, of opset 16")
    zeros = emit.op(
        "ConstantOfShape", emit.op("Reshape", emit.op("Size", call.x), emit.integers(1))
    )
    if call.element != 1:
        zeros = emit.op("Cast", zeros, to=call.element)
    scattered = emit.op(
        "ScatterElements" if emit.opset >= 11 else "Scatter",
        zeros,
        emit.flat(call.second_output()),
        emit.flat(call.g),
        axis=0,
        reduction="add" if shared else None,
    )
    return emit.reshape_like(scattered, call.x)
