"""Element types and shapes of the values of a model, declared or inferred."""

from __future__ import annotations

import math
from collections.abc import Iterable
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
_Declaration = onnx.ValueInfoProto | onnx.TensorProto


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
    """Looks up a value's type by scope and name, through the enclosing scopes.

    What the model declares is enough for most; only the first value of unknown type or rank makes
    onnx infer the others.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._known = _declared(model.scopes)
        self._read: dict[bytes, Tensor] = {}
        self._inferred = False

    def of(self, scope: Scope, name: str) -> Tensor:
        """Returns what is known of the value `name` as seen from `scope`."""
        tensor = self._lookup(scope, name)
        if (not tensor.element or tensor.shape is None) and not self._inferred:
            self._inferred = True
            self._known = _declared(scopes(_inferred(self._model.proto)))
            tensor = self._lookup(scope, name)
        return tensor

    def _lookup(self, scope: Scope, name: str) -> Tensor:
        address = scope.address
        while address in self._known:
            found = self._known[address].get(name)
            if found is not None:
                return self._tensor(found)
            address = address[:-3]
        return Tensor()

    def _tensor(self, declared: _Declaration) -> Tensor:
        if isinstance(declared, onnx.TensorProto):
            return Tensor(declared.data_type, tuple(declared.dims))
        # Models repeat few types many times.
        key = declared.type.SerializeToString()
        tensor = self._read.get(key)
        if tensor is None:
            tensor = self._read[key] = _tensor(declared)
        return tensor


def dtype_name(element: int) -> str:
    """Returns `float32` for `TensorProto.FLOAT` and so on."""
    return str(helper.tensor_dtype_to_np_dtype(element)) if element else "unknown"


def _declared(found: Iterable[Scope]) -> dict[Address, dict[str, _Declaration]]:
    """Returns the declarations by scope and name, to be read when they are asked for."""
    return {scope.address: _declarations(scope) for scope in found}


def _declarations(scope: Scope) -> dict[str, _Declaration]:
    graph = scope.graph
    if isinstance(graph, onnx.FunctionProto):
        return {info.name: info for info in graph.value_info}
    known: dict[str, _Declaration] = {tensor.name: tensor for tensor in graph.initializer}
    for infos in (graph.value_info, graph.output, graph.input):
        known.update((info.name, info) for info in infos)
    return known


def _tensor(declared: onnx.ValueInfoProto) -> Tensor:
    tensor_type = declared.type.tensor_type
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
        if math.prod(tensor.dims) <= _LARGEST_SHAPE_TENSOR:
            light.graph.initializer.append(tensor)
        else:
            light.graph.initializer.add(
                name=tensor.name, data_type=tensor.data_type, dims=tensor.dims
            )
    return light
