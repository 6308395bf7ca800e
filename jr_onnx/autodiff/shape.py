"""Operators that only move elements: the gradient moves them back.

Reshape, Flatten, Squeeze, Unsqueeze: reshape to x      Transpose: the inverse permutation
Concat: the input's part of g      Split: the parts' cotangents concatenated
Expand: g summed to x              Tile: g summed over the repeats
DepthToSpace: SpaceToDepth, and the other way round
"""

from __future__ import annotations

import numpy as np

from jr_onnx.autodiff.registry import Call, vjp


@vjp("Squeeze", 1, 11, 13, 21, 23, 24, 25)
@vjp("Unsqueeze", 1, 11, 13, 21, 23, 24, 25)
@vjp("Reshape", 5, 13, 14, 19, 21, 23, 24, 25)
def reshape(call: Call) -> str:
    """Back to the shape of the input."""
    return call.emit.reshape_like(call.g, call.x)


@vjp("Flatten", 9, 11, 13, 21, 23, 24, 25)
def flatten(call: Call) -> str:
    """Back to the shape of the input."""
    return call.emit.reshape_like(call.g, call.x)


@vjp("Transpose", 1, 13, 21, 23, 24, 25)
def transpose(call: Call) -> str:
    """The inverse permutation."""
    perm = call.attribute("perm") or list(reversed(range(len(call.shape(call.x)))))
    return call.emit.op("Transpose", call.g, perm=[perm.index(axis) for axis in range(len(perm))])


@vjp("Concat", 4, 11, 13, wrt=None)
def concat(call: Call) -> str:
    """The part of g at the place of the input asked for."""
    emit, axis, inputs = call.emit, call.attribute("axis"), call.node.input
    if len(inputs) == 1:
        return call.g
    sizes = [call.tensors[name].shape for name in inputs[: call.wrt + 1]]
    lengths = [shape[axis] if shape else None for shape in sizes]
    ends = [0]
    for length in lengths:
        if not isinstance(length, int):
            return _part_at_run_time(call)
        ends.append(ends[-1] + length)
    return emit.slice(call.g, ends[-2:-1], ends[-1:], [axis])


def _part_at_run_time(call: Call) -> str:
    emit, axis = call.emit, call.attribute("axis")
    # Gather takes negative indices from opset 11 on.
    where = axis if axis >= 0 or emit.opset >= 11 else axis + len(call.shape(call.y))
    begin = emit.integers(0)
    for name in call.node.input[: call.wrt]:
        begin = emit.op("Add", begin, emit.sizes(name, [where]))
    return emit.part(call.g, begin, emit.sizes(call.x, [where]), [where])


@vjp("Split", 2, 11, 13, 18, all_outputs=True)
def split(call: Call) -> str:
    """The cotangents of all parts, zeros for parts that are not used."""
    emit, parts = call.emit, []
    element = call.tensors[call.x].element
    for index, g in enumerate(call.cotangents):
        if not call.node.output[index]:
            call.node.output[index] = emit.name("part")
        part = call.node.output[index]
        parts.append(g or emit.zeros(emit.op("Shape", part), element))
    return emit.op("Concat", *parts, axis=call.attribute("axis", 0))


@vjp("Expand", 8, 13)
def expand(call: Call) -> str:
    """The sum over the axes along which x was repeated."""
    return call.unbroadcast(call.g)


@vjp("Tile", 6, 13)
def tile(call: Call) -> str:
    """g seen as `(repeats, size, repeats, size, ...)`, summed over the repeats."""
    emit, rank = call.emit, len(call.shape(call.x))
    column = emit.integers(-1, 1)
    pairs = emit.op(
        "Concat",
        emit.op("Reshape", call.node.input[1], column),
        emit.op("Reshape", emit.op("Shape", call.x), column),
        axis=1,
    )
    repeated = emit.op("Reshape", call.g, emit.flat(pairs))
    return emit.reduce_sum(repeated, range(0, 2 * rank, 2), keepdims=False)


@vjp("DepthToSpace", 1, 11, 13, 28)
def depth_to_space(call: Call) -> str:
    """SpaceToDepth, which writes a block's elements before the channels (DCR)."""
    block = call.attribute("blocksize")
    depth = call.emit.op("SpaceToDepth", call.g, blocksize=block)
    return _channels_first(call, depth, block) if _is_crd(call) else depth


@vjp("SpaceToDepth", 1, 13, 28)
def space_to_depth(call: Call) -> str:
    """DepthToSpace."""
    block, g = call.attribute("blocksize"), call.g
    return call.emit.op("DepthToSpace", _blocks_first(call, g, block) if _is_crd(call) else g,
                        blocksize=block)  # fmt: skip


def _is_crd(call: Call) -> bool:
    return bool(call.attribute("mode", "DCR") == "CRD")


def _channels_first(call: Call, depth: str, block: int) -> str:
    """Reorders the channels `(block^2, channels)` to `(channels, block^2)`."""
    channels = call.static(call.shape(call.x)[1:2], "the number of channels")[0]
    order = np.arange(channels).reshape(block * block, -1).T.reshape(-1)
    return call.emit.op("Gather", depth, call.emit.constant(order.astype(np.int64)), axis=1)


def _blocks_first(call: Call, depth: str, block: int) -> str:
    """Reorders the channels `(channels, block^2)` to `(block^2, channels)`."""
    channels = call.static(call.shape(call.y)[1:2], "the number of channels")[0]
    order = np.arange(channels).reshape(-1, block * block).T.reshape(-1)
    return call.emit.op("Gather", depth, call.emit.constant(order.astype(np.int64)), axis=1)
