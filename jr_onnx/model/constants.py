"""Values that a model fixes: initializers nobody can override, Constant nodes, casts of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from jr_onnx.model.graphs import ONNX_DOMAINS, Address, Scope
from jr_onnx.model.model import Model

Array = np.ndarray[Any, Any]
# Bounds, slopes and shapes are small; weights are never decoded.
_LARGEST = 4096
_FIXED = ("Constant", "Identity", "Cast", "CastLike")


class Constants:
    """Looks up a constant by scope and name, through the enclosing scopes."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._values: dict[tuple[Address, str], Array | None] = {}

    @cached_property
    def _known(self) -> dict[Address, dict[str, TensorProto | onnx.NodeProto]]:
        # Before IR 4 every weight had to be listed as an input, and none was overridable.
        overridable = self._model.proto.ir_version >= 4
        return {scope.address: _fixed(scope, overridable) for scope in self._model.scopes}

    def value(self, scope: Scope, name: str) -> Array | None:
        """Returns the value of `name` as seen from `scope`; None if it may vary or is large."""
        return self.at(scope.address, name)

    def at(self, address: Address, name: str) -> Array | None:
        """Returns the value of `name` as seen from the scope of an address, as `value` does."""
        key = address, name
        if key not in self._values:
            self._values[key] = self._read(address, name)
        return self._values[key]

    def _read(self, address: Address, name: str) -> Array | None:
        source, casts = self._source(address, name)
        value = _of_constant(source) if isinstance(source, onnx.NodeProto) else _decoded(source)
        for element in reversed(casts):
            value = _cast(value, element)
        if value is not None:
            value.flags.writeable = False  # one array for all who ask
        return value

    def unread(self, scope: Scope, name: str) -> str | None:
        """Says why a constant is not read; None for what is read, or is no constant."""
        source, _ = self._source(scope.address, name)
        if isinstance(source, onnx.NodeProto):
            attribute = attribute_of(source, "value")
            source = attribute.t if attribute is not None else None
        if source is None or not _is_unread(source):
            return None
        outside = source.data_location == TensorProto.EXTERNAL
        return "is in an external file" if outside else f"has {math.prod(source.dims):,} values"

    def _source(
        self, address: Address, name: str
    ) -> tuple[TensorProto | onnx.NodeProto | None, list[int]]:
        """Returns the initializer or Constant node that a value is, and what it is cast to."""
        casts = list[int]()
        passed: set[tuple[Address, str]] = set()  # an invalid model may have a cycle
        while (address, name) not in passed:
            passed.add((address, name))
            address = self._model.definitions.home(address, name)
            found = self._known[address].get(name)
            if not isinstance(found, onnx.NodeProto) or found.op_type == "Constant":
                return found, casts
            if not found.input:
                break
            if found.op_type == "Cast":
                casts.append(next((entry.i for entry in found.attribute if entry.name == "to"), 0))
            name = found.input[0]  # of CastLike the type is unknown, the number is not
        return None, []


def _fixed(scope: Scope, overridable: bool) -> dict[str, TensorProto | onnx.NodeProto]:
    known: dict[str, TensorProto | onnx.NodeProto] = {}
    graph = scope.graph
    if isinstance(graph, onnx.GraphProto):
        open_inputs = {value.name for value in graph.input} if overridable else set()
        known.update((each.name, each) for each in graph.initializer)
        for name in open_inputs & known.keys():
            del known[name]
    for node in graph.node:
        if node.op_type in _FIXED and node.domain in ONNX_DOMAINS and node.output:
            known[node.output[0]] = node
    return known


def attribute_of(node: onnx.NodeProto, name: str) -> onnx.AttributeProto | None:
    """Returns a node's attribute, None where it is absent."""
    return next((entry for entry in node.attribute if entry.name == name), None)


def _of_constant(node: onnx.NodeProto) -> Array | None:
    for attribute in node.attribute:
        if attribute.ref_attr_name:  # in a function: whatever the caller says
            return None
        if attribute.name == "value":
            return _decoded(attribute.t)
        read = _NUMBERS.get(attribute.name)
        if read is not None:
            return read(attribute)
    return None


_NUMBERS: dict[str, Callable[[onnx.AttributeProto], Array]] = {
    "value_float": lambda attribute: np.asarray(attribute.f, np.float32),
    "value_int": lambda attribute: np.asarray(attribute.i, np.int64),
    "value_floats": lambda attribute: np.asarray(attribute.floats, np.float32),
    "value_ints": lambda attribute: np.asarray(attribute.ints, np.int64),
}


def _decoded(tensor: TensorProto | None) -> Array | None:
    if tensor is None or _is_unread(tensor):
        return None
    try:
        return numpy_helper.to_array(tensor)
    except Exception:  # KeyError, TypeError, ValueError, ...: the checker will say what is wrong
        return None


def _cast(value: Array | None, element: int) -> Array | None:
    if value is None or not element or element not in TensorProto.DataType.values():
        return None
    with np.errstate(invalid="ignore", over="ignore"):  # NaN as an integer is whatever it is
        return value.astype(helper.tensor_dtype_to_np_dtype(element))


def _is_unread(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL or math.prod(tensor.dims) > _LARGEST
