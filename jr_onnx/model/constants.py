"""Values that a model fixes: initializers nobody can override, Constant nodes, casts of them."""

from __future__ import annotations

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

    @cached_property
    def _known(self) -> dict[Address, dict[str, TensorProto | onnx.NodeProto]]:
        # Before IR 4 every weight had to be listed as an input, and none was overridable.
        overridable = self._model.proto.ir_version >= 4
        return {scope.address: _fixed(scope, overridable) for scope in self._model.scopes}

    def value(self, scope: Scope, name: str) -> Array | None:
        """Returns the value of `name` as seen from `scope`; None if it may vary or is large."""
        address = scope.address
        while address in self._known:
            found = self._known[address].get(name)
            if isinstance(found, TensorProto):
                return _decoded(found)
            if found is not None:
                return self._of_node(scope, found)
            address = address[:-3]
        return None

    def _of_node(self, scope: Scope, node: onnx.NodeProto) -> Array | None:
        if node.domain not in ONNX_DOMAINS:
            return None
        if node.op_type == "Constant":
            return _of_constant(node)
        inner = self.value(scope, node.input[0])
        if inner is None or node.op_type != "Cast":
            return inner  # of CastLike the type is unknown, the number is not
        to = next((entry.i for entry in node.attribute if entry.name == "to"), 0)
        return inner.astype(helper.tensor_dtype_to_np_dtype(to)) if to else None


def _fixed(scope: Scope, overridable: bool) -> dict[str, TensorProto | onnx.NodeProto]:
    known: dict[str, TensorProto | onnx.NodeProto] = {}
    graph = scope.graph
    if isinstance(graph, onnx.GraphProto):
        open_inputs = {value.name for value in graph.input} if overridable else set()
        known.update((each.name, each) for each in graph.initializer)
        for name in open_inputs & known.keys():
            del known[name]
    for node in graph.node:
        if node.op_type in _FIXED and node.output:
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
        if attribute.name in ("value_float", "value_int", "value_floats", "value_ints"):
            dtype = np.float32 if "float" in attribute.name else np.int64
            return np.asarray(helper.get_attribute_value(attribute), dtype)
    return None


def _decoded(tensor: TensorProto) -> Array | None:
    outside = tensor.data_location == TensorProto.EXTERNAL
    if outside or int(np.prod(tensor.dims)) > _LARGEST:
        return None
    try:
        return numpy_helper.to_array(tensor)
    except (ValueError, TypeError):
        return None
