"""Convolution: the gradient of Conv for its input is ConvTranspose with the same weights."""

from __future__ import annotations

from jr_onnx.autodiff.registry import Call, vjp


@vjp("Conv", 1, 11, 22)
def conv_x(call: Call) -> str:
    """For the input `(batch, channels, *spatial)`.

    Rows at the far end that no window reaches (where input + pads - extent is not a multiple of
    the stride) come back as output padding.
    """
    weights = call.node.input[1]
    kernel = call.static(call.shape(weights)[2:], "the kernel")
    size = call.static(call.shape(call.x)[2:], "the input size")
    axes = range(len(kernel))
    strides = call.attribute("strides", [1] * len(kernel))
    dilations = call.attribute("dilations", [1] * len(kernel))
    extent = [dilations[i] * (kernel[i] - 1) + 1 for i in axes]
    pads = window_pads(call, size, extent, strides)
    missing = [(size[i] + pads[i] + pads[i + len(kernel)] - extent[i]) % strides[i] for i in axes]
    return call.emit.op(
        "ConvTranspose",
        call.g,
        weights,
        strides=strides,
        dilations=dilations,
        group=call.attribute("group", 1),
        pads=pads,
        output_padding=missing if any(missing) else None,
    )


def window_pads(call: Call, size: list[int], extent: list[int], strides: list[int]) -> list[int]:
    """Returns the pads of a sliding window, `[begin..., end...]`, auto_pad resolved."""
    mode = call.attribute("auto_pad", "NOTSET")
    if mode == "NOTSET":
        return list(call.attribute("pads", [0] * 2 * len(size)))
    if mode == "VALID":
        return [0] * 2 * len(size)
    total = [
        max(0, (-(-length // step) - 1) * step + window - length)
        for length, step, window in zip(size, strides, extent, strict=True)
    ]
    small, large = [pad // 2 for pad in total], [pad - pad // 2 for pad in total]
    return small + large if mode == "SAME_UPPER" else large + small
