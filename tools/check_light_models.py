"""Checks the input gradients of the light models of the onnx package by finite differences.

    python tools/check_light_models.py [NAME ...]

The weights of these models are constants, which makes most gradients 0 and pools tie. So they are
drawn anew, by a seed, in the same shapes: normal with the variance 2 / inputs for convolutions and
matrices, near 1 for scales and variances, near 0 for the rest.

    gradient    the gradient graph in float64, by the reference evaluator (its convolutions and
                pools, which take minutes, by torch)
    slopes      central differences of the cross-entropy of its logits
    error       |gradient . direction - slope| / |gradient|, the largest over the gradient's own
                direction and random normal ones
    float32     |single - gradient| / |gradient|, with the same graph in onnxruntime in float32: a
                unit within rounding of 0 is on in one and off in the other

Prints a table; exits with 1 if an error exceeds the tolerance.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from check_gradients import OneHot, retype
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch.nn import functional

import jr_onnx as jr
from jr_onnx.session import Session

Array = np.ndarray[Any, Any]
FOLDER = Path(onnx.__file__).parent / "backend/test/data/light"
LABEL, RANDOM_DIRECTIONS, STEPS = 3, 2, (1e-6, 1e-7, 1e-8)
TOLERANCE, SINGLE_TOLERANCE = 1e-4, 0.1


class Result(NamedTuple):
    """How the check of one model ended.

    Attributes:
        name: of the model.
        opset: of the model.
        nodes: of the model, without those that make weights.
        error: of the float64 gradient against the slopes.
        single: the distance of the float32 gradient from the float64 one, relative.
    """

    name: str
    opset: int
    nodes: int
    error: float
    single: float


def names() -> list[str]:
    """Returns the light models that are installed."""
    return sorted(path.stem.removeprefix("light_") for path in FOLDER.glob("light_*.onnx"))


def check(name: str) -> Result:
    """Checks one model at one random input."""
    proto = with_random_weights(onnx.load(FOLDER / f"light_{name}.onnx"))
    opset, nodes = proto.opset_import[0].version, len(proto.graph.node)
    weights = {t.name for t in proto.graph.initializer}
    (port,) = (port for port in proto.graph.input if port.name not in weights)
    shape = [dim.dim_value for dim in port.type.tensor_type.shape.dim]
    rng = np.random.default_rng(1)
    x = rng.normal(size=shape).astype(np.float32).astype(np.float64)
    graph = jr.input_gradient(jr.Model(proto.SerializeToString()))
    del proto
    gc.collect()
    single = _on_onnxruntime(graph, x)
    gc.collect()
    run = _in_double(graph)
    gradient = run(x, graph.gradient)
    norm = float(np.linalg.norm(gradient))

    def loss(value: Array) -> float:
        z = run(value, graph.logits).reshape(-1)
        return float(np.log(np.exp(z - z.max()).sum()) + z.max() - z[LABEL])

    errors = [
        abs(float((gradient * direction).sum()) - _slope(loss, x, direction, norm)) / norm
        for direction in _directions(gradient, rng)
    ]
    distance = float(np.linalg.norm(single - gradient) / norm)
    return Result(name, opset, nodes, float(max(errors)), distance)


def _slope(loss: Callable[[Array], float], x: Array, direction: Array, norm: float) -> float:
    """Returns the slope with the first step that no unit changes sides in: both sides agree."""
    here = loss(x)
    for step in STEPS:
        up, down = loss(x + step * direction), loss(x - step * direction)
        if abs(up - 2 * here + down) / step <= TOLERANCE * norm:
            break
    return (up - down) / (2 * step)


def _on_onnxruntime(graph: jr.autodiff.InputGradient, x: Array) -> Array:
    feeds = {graph.x: x.astype(np.float32), graph.compared["labels"]: np.array([LABEL])}
    return Session(graph.model, device="cpu").run(feeds, (graph.gradient,))[0]


def _in_double(graph: jr.autodiff.InputGradient) -> Callable[[Array, str], Array]:
    """Returns the gradient graph in float64, as a function of x and the output wanted."""
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.model.proto)
    weights = {
        tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer
    }  # widened below, one by one
    del proto.graph.initializer[:]
    retype(proto.graph, onnx.TensorProto.DOUBLE)
    for name, value in weights.items():
        proto.graph.input.append(
            helper.make_tensor_value_info(name, onnx.TensorProto.DOUBLE, value.shape)
        )
        if value.dtype == np.float32:
            weights[name] = value.astype(np.float64)
    evaluators: dict[str, ReferenceEvaluator] = {}

    def run(x: Array, output: str) -> Array:
        if output not in evaluators:
            evaluators[output] = ReferenceEvaluator(_upto(proto, output), new_ops=list(FAST))
        feeds = {**weights, graph.x: x, graph.compared["labels"]: np.array([LABEL])}
        with np.errstate(divide="ignore"):  # OneHot's and LogSoftmax's zeros, masked later
            results: Any = evaluators[output].run([output], feeds)
        return np.asarray(results[0])

    return run


def _upto(proto: onnx.ModelProto, output: str) -> onnx.ModelProto:
    """Returns the part of a model that one value needs."""
    needed, kept = {output}, []
    for node in reversed(proto.graph.node):
        if not needed.isdisjoint(node.output):
            needed.update(node.input)
            kept.append(node)
    part = onnx.ModelProto()
    part.CopyFrom(proto)
    del part.graph.node[:], part.graph.output[:]
    part.graph.node.extend(reversed(kept))
    part.graph.output.append(helper.make_tensor_value_info(output, onnx.TensorProto.DOUBLE, None))
    return part


def _directions(gradient: Array, rng: np.random.Generator) -> Iterator[Array]:
    yield gradient / float(np.linalg.norm(gradient))
    for _ in range(RANDOM_DIRECTIONS):
        yield np.asarray(rng.normal(size=gradient.shape))


def with_random_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Replaces the nodes that fill weights with a constant by random initializers."""
    graph, rng = proto.graph, np.random.default_rng(0)
    proto.ir_version = 8  # until 3, every initializer was an input too
    shapes = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    uses = {name: (node, i) for node in graph.node for i, name in enumerate(node.input)}
    kept = []
    for node in graph.node:
        if node.op_type != "ConstantOfShape":
            kept.append(node)
            continue
        shape = tuple(int(size) for size in shapes[node.input[0]])
        name = node.output[0]
        value = _drawn(rng, shape, *_role(name, uses)).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(value, name))
    del graph.node[:]
    graph.node.extend(kept)
    return proto


def _role(name: str, uses: dict[str, tuple[onnx.NodeProto, int]]) -> tuple[str, int]:
    """Returns the operator that a weight ends in, and as which input."""
    node, index = uses[name]
    while node.op_type == "Unsqueeze":
        node, index = uses[node.output[0]]
    return node.op_type, index


def _drawn(rng: np.random.Generator, shape: tuple[int, ...], op_type: str, index: int) -> Array:
    noise = rng.standard_normal(size=shape, dtype=np.float32)
    if op_type in ("Conv", "Gemm") and index == 1:
        return np.asarray(noise * np.float32(np.sqrt(2 / np.prod(shape[1:]))))
    near_one = (op_type, index) in (("BatchNormalization", 1), ("Mul", 1))
    if near_one or (op_type, index) == ("BatchNormalization", 4):
        return np.asarray(1 + np.abs(0.1 * noise))
    return np.asarray(0.1 * noise)


# The reference evaluator's slow operators, in torch


def _tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _four(pads: Sequence[int] | None) -> list[int]:
    """Returns ONNX pads as torch has them."""
    top, left, bottom, right = pads or (0, 0, 0, 0)
    return [left, right, top, bottom]


class BatchNormalization(OpRun):
    """The inference; before opset 14 the reference evaluator's errs."""

    op_domain = ""

    def _run(self, x: Array, s: Array, b: Array, m: Array, v: Array, **o: Any) -> tuple[Array]:
        channels = (-1, *[1] * (x.ndim - 2))
        scale = s / np.sqrt(v + o["epsilon"])
        return ((x - m.reshape(channels)) * scale.reshape(channels) + b.reshape(channels),)


class Conv(OpRun):
    """Conv of pictures."""

    op_domain = ""

    def _run(self, x: Array, w: Array, b: Array | None = None, **o: Any) -> tuple[Array]:
        if o["auto_pad"] not in (None, "NOTSET"):
            raise NotImplementedError(o["auto_pad"])
        padded = functional.pad(_tensor(x), _four(o["pads"]))
        bias = None if b is None else _tensor(b)
        y = functional.conv2d(
            padded, _tensor(w), bias, o["strides"] or 1, 0, o["dilations"] or 1,
            o["group"] or 1,
        )  # fmt: skip
        return (y.numpy(),)


class ConvTranspose(OpRun):
    """ConvTranspose of pictures."""

    op_domain = ""

    def _run(self, x: Array, w: Array, b: Array | None = None, **o: Any) -> tuple[Array]:
        more = o["output_padding"] or [0, 0]
        y = functional.conv_transpose2d(
            _tensor(x), _tensor(w), None, o["strides"] or 1, 0, 0,
            o["group"] or 1, o["dilations"] or 1,
        )  # fmt: skip
        begin_h, begin_w, end_h, end_w = o["pads"] or [0, 0, 0, 0]
        cut = [-begin_w, more[1] - end_w, -begin_h, more[0] - end_h]
        return (functional.pad(y, cut).numpy(),)


class MaxPool(OpRun):
    """MaxPool of pictures, with indices that count in the flat input."""

    op_domain = ""

    def _run(self, x: Array, **o: Any) -> tuple[Array, ...]:
        if o.get("ceil_mode") or o["auto_pad"] not in (None, "NOTSET"):
            raise NotImplementedError(str(o))
        top, left, _, _ = o["pads"] or [0, 0, 0, 0]
        padded = functional.pad(_tensor(x), _four(o["pads"]), value=-torch.inf)
        y, places = functional.max_pool2d(
            padded, o["kernel_shape"], o["strides"] or 1, return_indices=True
        )
        rows, columns = np.divmod(places.numpy(), padded.shape[3])
        height, width = x.shape[2:]
        planes = np.arange(x.shape[0] * x.shape[1]).reshape(*x.shape[:2], 1, 1)
        indices = (planes * height + rows - top) * width + columns - left
        return (y.numpy(), indices)[: len(self.output)]


class AveragePool(OpRun):
    """AveragePool of pictures."""

    op_domain = ""

    def _run(self, x: Array, **o: Any) -> tuple[Array]:
        if o.get("ceil_mode") or o["auto_pad"] not in (None, "NOTSET"):
            raise NotImplementedError(str(o))
        kernel, strides, pads = o["kernel_shape"], o["strides"] or 1, _four(o["pads"])

        def mean(values: torch.Tensor) -> torch.Tensor:
            return functional.avg_pool2d(functional.pad(values, pads), kernel, strides)

        value = _tensor(x)
        y = mean(value)
        return ((y if o["count_include_pad"] else y / mean(torch.ones_like(value))).numpy(),)


class LRN(OpRun):
    """LRN; the reference evaluator's errs."""

    op_domain = ""

    def _run(self, x: Array, **o: Any) -> tuple[Array]:
        y = functional.local_response_norm(_tensor(x), o["size"], o["alpha"], o["beta"], o["bias"])
        return (y.numpy(),)


class Scatter(OpRun):
    """Scatter along the only axis."""

    op_domain = ""

    def _run(self, x: Array, indices: Array, updates: Array, **o: Any) -> tuple[Array]:
        if x.ndim != 1:
            raise NotImplementedError(str(x.shape))
        y = x.copy()
        if o.get("reduction") == "add":
            np.add.at(y, indices, updates)
        else:
            y[indices] = updates
        return (y,)


class ScatterElements(Scatter):
    """Its newer name."""


FAST = (
    AveragePool,
    BatchNormalization,
    Conv,
    ConvTranspose,
    LRN,
    MaxPool,
    OneHot,
    Scatter,
    ScatterElements,
)


def main() -> int:
    """Prints the table; 1 if a gradient is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("names", nargs="*", default=names(), help="all without any")
    chosen = parser.parse_args().names
    print("| model | opset | nodes | error | float32 |")
    print("|---|---:|---:|---:|---:|")
    bad = 0
    for name in chosen:
        r = check(name)
        bad += not (r.error <= TOLERANCE and r.single <= SINGLE_TOLERANCE)
        print(f"| {r.name} | {r.opset} | {r.nodes} | {r.error:.1e} | {r.single:.1e} |", flush=True)
        gc.collect()
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
