"""Element types and shapes of the values of a model: declared, carried along, or inferred.

declared    by a value_info, an input, an output or an initializer
carried     element types alone: Conv(x, w) has that of x and w, as its schema says
inferred    by onnx, all values at once: slow, so only where nothing else tells what is asked
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import onnx
from onnx import checker, defs, helper, shape_inference

from jr_onnx.model.graphs import ONNX_DOMAINS, Address, Scope, scopes
from jr_onnx.model.model import Model

# Shape inference reads values only of small tensors (shapes, axes, pads); the rest stays out.
_LARGEST_SHAPE_TENSOR = 1024

Dimension = int | str | None
Shape = tuple[Dimension, ...] | None
_Declaration = onnx.ValueInfoProto | onnx.TensorProto
_Declarations = dict[Address, dict[str, _Declaration]]


class Tensor:
    """What is known of a value.

    Attributes:
        element: a `TensorProto.DataType`, 0 if unknown.
    """

    def __init__(self, element: int = 0, shape: Shape | Callable[[], Shape] = None) -> None:
        self.element = element
        self._shape = shape

    @property
    def shape(self) -> Shape:
        """A number, a symbol or None for each axis; None if even the rank is unknown."""
        if callable(self._shape):
            self._shape = self._shape()
        return self._shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy dtype (from ml_dtypes for bfloat16 and the like)."""
        return helper.tensor_dtype_to_np_dtype(self.element)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tensor):
            return NotImplemented
        return (self.element, self.shape) == (other.element, other.shape)

    def __hash__(self) -> int:
        return hash((self.element, self.shape))

    def __repr__(self) -> str:
        return f"Tensor({self.element}, {self.shape})"

    def __reduce__(self) -> tuple[type[Tensor], tuple[int, Shape]]:
        return Tensor, (self.element, self.shape)  # what infers the shape stays in this process


class ValueTypes:
    """Looks up a value's type by scope and name, through the enclosing scopes."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._declared = _declarations(model.scopes)
        self._read: dict[bytes, Tensor] = {}

    def of(self, scope: Scope, name: str) -> Tensor:
        """Returns what is known of the value `name` as seen from `scope`.

        A shape that is not declared is inferred when it is read.
        """
        home = self._model.definitions.home(scope.address, name)
        declared = self._tensor(self._declared[home].get(name))
        if declared.element and declared.shape is not None:
            return declared
        element = declared.element or self._carried[home].get(name)
        if not element:
            return self._of_inference(home, name)
        return Tensor(element, lambda: self._of_inference(home, name).shape)

    def _of_inference(self, home: Address, name: str) -> Tensor:
        return self._tensor(self._inferred.get(home, {}).get(name))

    @cached_property
    def _carried(self) -> dict[Address, dict[str, int]]:
        """The element types that schemas tell, in one pass over the nodes."""
        carried: dict[Address, dict[str, int]] = {}
        for scope in self._model.scopes:
            address, opset = scope.address, scope.opset
            here = carried[address] = {}
            for node in scope.graph.node:
                inputs, outputs = node.input, node.output
                alike = _alike(node.op_type, node.domain, opset, len(inputs), len(outputs))
                for y, sources in alike:
                    for x in sources:
                        name = inputs[x]
                        element = here.get(name) or self._element(carried, address, name)
                        if element:
                            here[outputs[y]] = element
                            break
        return carried

    def _element(
        self, carried: dict[Address, dict[str, int]], address: Address, name: str
    ) -> int | None:
        home = self._model.definitions.home(address, name)
        return self._tensor(self._declared[home].get(name)).element or carried[home].get(name)

    @cached_property
    def _inferred(self) -> _Declarations:
        return _declarations(scopes(_inferred(self._model.proto)))

    def _tensor(self, declared: _Declaration | None) -> Tensor:
        if declared is None:
            return Tensor()
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
    if element and element not in onnx.TensorProto.DataType.values():
        return f"type {element}"
    return str(helper.tensor_dtype_to_np_dtype(element)) if element else "unknown"


def _declarations(found: Iterable[Scope]) -> _Declarations:
    """Returns the declarations by scope and name, to be read when they are asked for."""
    declared: _Declarations = {}
    for scope in found:
        graph, here = scope.graph, declared.setdefault(scope.address, {})
        if isinstance(graph, onnx.GraphProto):
            here.update({tensor.name: tensor for tensor in graph.initializer})
            here.update({info.name: info for info in graph.value_info})
            here.update({info.name: info for info in (*graph.output, *graph.input)})
        else:
            here.update({info.name: info for info in graph.value_info})
    return declared


@lru_cache(maxsize=1024)
def _alike(
    op_type: str, domain: str, opset: int, inputs: int, outputs: int
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Returns, for each output of a node, the inputs that have the same type, by position."""
    if domain not in ONNX_DOMAINS:
        return ()
    try:
        schema = defs.get_schema(op_type, min(opset, defs.onnx_opset_version()), "")
    except defs.SchemaError:
        return ()
    given = _type_variables(schema.inputs, inputs)
    made = _type_variables(schema.outputs, outputs)
    return tuple(
        (y, tuple(x for x, other in enumerate(given) if variable and variable == other))
        for y, variable in enumerate(made)
    )


def _type_variables(formal: Sequence[defs.OpSchema.FormalParameter], count: int) -> list[str]:
    """Returns the type variables of so many inputs or outputs, "" where each has a type of its own.

    All that a variadic parameter takes have one type, if it is homogeneous.
    """
    variables = [each.type_str if each.is_homogeneous else "" for each in formal]
    return (variables + variables[-1:] * count)[:count]


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
    except (shape_inference.InferenceError, checker.ValidationError, RuntimeError, ValueError):
        return light  # an odd model still has the types that it declares


def _without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    # What else there is, doc strings above all, need not even be text.
    light = onnx.ModelProto(ir_version=proto.ir_version)
    light.opset_import.extend(proto.opset_import)
    light.functions.extend(proto.functions)
    graph = proto.graph
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
