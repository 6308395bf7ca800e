"""Finding the activations a jump can go into.

    Relu(x) -> y        a site
    anything else       not a site, or skipped with its reason

A site's path is the name of its output, which ONNX keeps unique in a scope, behind the label of
the scope: `relu_1`, `if_out.then_branch>relu_1`. The rewrite keeps output names, so a path means
the same site before and after.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto

from jr_onnx.model import Address, Model, Scope, Tensor, ValueTypes, dtype_name, scopes
from jr_onnx.model.model import ONNX_DOMAINS

FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
INTEGERS = (TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64)

# Activations that cut at or near zero, so that a reader of the report expects a word on them.
_RELATIVES = frozenset(("Clip", "LeakyRelu", "PRelu", "ThresholdedRelu", "Elu", "Selu", "Celu"))


@dataclass(frozen=True)
class Site:
    """One activation to replace.

    Attributes:
        path: its readable, stable name.
        op_type: the operator it is now.
        node: the node's name, often empty.
        x: the name of its input.
        y: the name of its output.
        tensor: element type and shape of x.
        scope: address of the list of nodes it is in.
        index: its position there.
        opset: the opset of that scope.
    """

    path: str
    op_type: str
    node: str
    x: str
    y: str
    tensor: Tensor
    scope: Address
    index: int
    opset: int

    def to_json(self) -> dict[str, Any]:
        """Returns the site as `inspect --json` lists it."""
        return {
            "path": self.path,
            "op_type": self.op_type,
            "node": self.node,
            "dtype": dtype_name(self.tensor.element),
            "shape": None if self.tensor.shape is None else list(self.tensor.shape),
        }


@dataclass(frozen=True)
class Skipped:
    """An activation that is left as it is, and why."""

    path: str
    op_type: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Returns the entry as `inspect --json` lists it."""
        return {"path": self.path, "op_type": self.op_type, "reason": self.reason}


def find_sites(model: Model) -> tuple[tuple[Site, ...], tuple[Skipped, ...]]:
    """Lists every activation of the model, those to replace and those to leave."""
    sites: list[Site] = []
    skipped: list[Skipped] = []
    types = ValueTypes(model)
    for scope in scopes(model.proto):
        for index, node in enumerate(scope.graph.node):
            if node.domain not in ONNX_DOMAINS:
                continue
            if node.op_type == "Relu":
                site = _site(scope, index, node, types)
                reason = _reason_to_skip(site, scope)
                if reason is None:
                    sites.append(site)
                else:
                    skipped.append(Skipped(site.path, "Relu", reason))
            elif node.op_type in _RELATIVES:
                reason = f"only Relu is replaced, this is {node.op_type}"
                skipped.append(Skipped(_path(scope, node), node.op_type, reason))
    return tuple(sites), tuple(skipped)


def _path(scope: Scope, node: onnx.NodeProto) -> str:
    return f"{scope.label}>{node.output[0]}" if scope.label else node.output[0]


def _site(scope: Scope, index: int, node: onnx.NodeProto, types: ValueTypes) -> Site:
    return Site(
        path=_path(scope, node),
        op_type=node.op_type,
        node=node.name,
        x=node.input[0],
        y=node.output[0],
        tensor=types.of(scope, node.input[0]),
        scope=scope.address,
        index=index,
        opset=scope.opset,
    )


def _reason_to_skip(site: Site, scope: Scope) -> str | None:
    if scope.is_function:
        return "it is in a local function, which may be called with several types"
    if not site.tensor.element:
        return f"the element type of its input {site.x!r} is not declared and cannot be inferred"
    if site.tensor.element not in (*FLOATS, *INTEGERS):
        return f"no jump for element type {dtype_name(site.tensor.element)}"
    if site.opset < 9:
        return (
            f"Where needs opset 9, the model has {site.opset}: export again at opset 13 or newer, "
            "or run onnx.version_converter"
        )
    return None
