"""Element types and shapes of the values of a model, declared or inferred."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, shape_inference

from jr_onnx.model.graphs import Address, Scope, scopes
from jr_onnx.model.model import Model

# Shape inference reads values only of small tensors (shapes, axes, pads); the rest stays out.
_LARGEST_SHAPE_TENSOR = 1024

Dimension = int | str | None


@dataclass(frozen=True)
class Tensor:
    """What is known of a value.

    Attributes:
        element: a `TensorProto.DataType`, 0 if unknown.
        shape: a number, a symbol or None for each axis; None if even the rank is unknown.
    """

    element: int = 0
    shape: tuple[Dimension, ...] | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy dtype (from ml_dtypes for bfloat16 and the like)."""
        return helper.tensor_dtype_to_np_dtype(self.element)


class ValueTypes:
    """Looks up a value's type by scope and name, through the enclosing scopes."""

    def __init__(self, model: Model) -> None:
        self._known: dict[Address, dict[str, Tensor]] = {}
        for scope in scopes(_inferred(model.proto)):
            self._known[scope.address] = _declared(scope)

    def of(self, scope: Scope, name: str) -> Tensor:
        """Returns what is known of the value `name` as seen from `scope`."""
        address = scope.address
        while address in self._known:
            if name in self._known[address]:
                return self._known[address][name]
            address = address[:-3]
        return Tensor()


def dtype_name(element: int) -> str:
    """Returns `float32` for `TensorProto.FLOAT` and so on."""
    return str(helper.tensor_dtype_to_np_dtype(element)) if element else "unknown"


def _declared(scope: Scope) -> dict[str, Tensor]:
    graph = scope.graph
    if isinstance(graph, onnx.FunctionProto):
        return {info.name: _tensor(info) for info in graph.value_info}
    known = {
        tensor.name: Tensor(tensor.data_type, tuple(tensor.dims)) for tensor in graph.initializer
    }
    for info in (*graph.value_info, *graph.output, *graph.input):
        known[info.name] = _tensor(info)
    return known


def _tensor(info: onnx.ValueInfoProto) -> Tensor:
    tensor_type = info.type.tensor_type
    if not tensor_type.HasField("shape"):
        return Tensor(tensor_type.elem_type)
    dims: list[Dimension] = [
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
        for dim in tensor_type.shape.dim
    ]
    return Tensor(tensor_type.elem_type, tuple(dims))


def _inferred(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Returns a copy without large weights, its values annotated as far as onnx can infer."""
    light = _without_weights(proto)
    try:
        return shape_inference.infer_shapes(light, data_prop=True)
    except (shape_inference.InferenceError, RuntimeError, ValueError):
        return light  # an odd model still has the types that it declares


def _without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    light = onnx.ModelProto()
    for field, value in proto.ListFields():
        if field.name == "graph":
            continue
        if hasattr(value, "extend"):
            getattr(light, field.name).extend(value)
        elif field.message_type:
            getattr(light, field.name).CopyFrom(value)
        else:
            setattr(light, field.name, value)
    graph = proto.graph
    light.graph.name = graph.name
    for name in ("node", "input", "output", "value_info", "sparse_initializer"):
        getattr(light.graph, name).extend(getattr(graph, name))
    for tensor in graph.initializer:
        if np.prod(tensor.dims) <= _LARGEST_SHAPE_TENSOR:
            light.graph.initializer.append(tensor)
        else:
            light.graph.initializer.add(
                name=tensor.name, data_type=tensor.data_type, dims=tensor.dims
            )
    return light
