"""What onnx-graphsurgeon (gs) would lose of a model: its export compared field by field."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

Array = np.ndarray[Any, Any]

# What a model computes the same without. Whoever says so to `import_model` may lose it.
DROPPABLE = frozenset(
    (
        "configuration",
        "denotation",
        "device_configurations",
        "doc_string",
        "initializer",
        "metadata_props",
        "model_domain",
        "model_version",
        "quantization_annotation",
        "training_info",
        "unknown fields",
        "value_info",
    )
)


@dataclass(frozen=True)
class Loss:
    """Something of the model that gs does not hold.

    Attributes:
        field: its name in onnx.proto; `model_domain`, as a node's `domain` is no annotation.
        where: whose it is.
    """

    field: str
    where: str


# Fields whose entries are told apart by a name; all others go by position.
_NAMED = {
    "attribute": "name",
    "attribute_proto": "name",
    "initializer": "name",
    "input": "name",
    "value_info": "name",
    "opset_import": "domain",
}


def losses_of(before: Any, after: Any, where: str) -> Iterator[Loss]:
    """Compares a message with what gs exports in its place; what is more there is no loss."""
    for each in before.DESCRIPTOR.fields:
        if _is_weight(before, each.name):
            continue
        mine, yours = getattr(before, each.name), getattr(after, each.name)
        if not each.message_type:
            if repr(mine) != repr(yours):  # repr, as NaN is equal to NaN here
                of_model = each.name == "domain" and isinstance(before, onnx.ModelProto)
                yield Loss("model_domain" if of_model else each.name, where)
        elif not hasattr(mine, "extend"):
            if before.HasField(each.name) and not after.HasField(each.name):
                # An empty shape is that of a scalar, an empty type says nothing.
                if mine.ByteSize() or each.name == "shape":
                    yield Loss(each.name, where)
            elif before.HasField(each.name):
                yield from losses_of(mine, yours, _named(mine, where))
        elif each.name in _NAMED:
            yield from _lost_by_name(before, after, each.name, where)
        elif len(mine) > len(yours):
            yield Loss(each.name, where)
        else:
            for one, other in zip(mine, yours, strict=False):
                yield from losses_of(one, other, _named(one, where))


def _lost_by_name(before: Any, after: Any, name: str, where: str) -> Iterator[Loss]:
    key = _NAMED[name]
    there = {getattr(entry, key): entry for entry in getattr(after, name)}
    gone = []
    for entry in getattr(before, name):
        found = there.get(getattr(entry, key))
        if found is None:
            gone.append(entry)
        elif name == "value_info":
            for loss in losses_of(entry, found, ""):
                yield Loss(name, f"{entry.name!r}, its {loss.field}")
        else:
            yield from losses_of(entry, found, _named(entry, where))
    if gone and isinstance(before, onnx.GraphProto):
        yield from _gone_from_graph(before, after, name, gone)
    else:
        yield from (Loss(name, f"{getattr(entry, key)!r} of {where}") for entry in gone)


def _gone_from_graph(
    before: onnx.GraphProto, after: onnx.GraphProto, name: str, gone: Sequence[Any]
) -> Iterator[Loss]:
    """Says what is gone from a graph, unless what gs exports is as good."""
    weights = {tensor.name for tensor in before.initializer}
    told = {value.name for value in (*before.input, *before.output)} | weights
    in_branches = {tensor.name for graph in _inside(after) for tensor in graph.initializer}
    used = {each for node in before.node for each in (*node.input, *node.output)}
    for entry in gone:
        if name == "input" and entry.name in weights:
            yield Loss(name, f"{entry.name!r}, which is an initializer too")
        elif name == "initializer" and entry.name not in in_branches:
            yield Loss(name, f"{entry.name!r}, which no node uses")
        elif name == "value_info" and entry.name in used - told and entry.type.ByteSize():
            yield Loss(name, repr(entry.name))


def _inside(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g
                yield from _inside(attribute.g)


def _is_weight(message: Any, name: str) -> bool:
    """Says whether a field is what gs hands over unread: the inside of a tensor."""
    return isinstance(message, TensorProto) and name not in ("data_type", "dims")


def _named(message: Any, where: str) -> str:
    if isinstance(message, onnx.NodeProto):
        return f"node {message.name or ', '.join(message.output)!r} ({message.op_type})"
    if isinstance(message, onnx.FunctionProto):
        return f"function '{message.domain}::{message.name}'"
    if isinstance(message, onnx.GraphProto):
        return f"graph {message.name!r}"
    if isinstance(message, (TensorProto, onnx.ValueInfoProto)) and message.name:
        return f"tensor {message.name!r}"
    return where


def spelled_losses(lost: Sequence[Loss]) -> str:
    """Returns one line: each kind of loss, and whose it is."""
    kinds: dict[str, dict[str, None]] = {}
    for loss in lost:
        kinds.setdefault(loss.field, {})[loss.where] = None
    parts = []
    for name, places in kinds.items():
        first = ", ".join(list(places)[:3])
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        parts.append(f"{name} ({first}{more})")
    hint = "jr_onnx.retrofit keeps everything"
    if kinds.keys() <= DROPPABLE:
        hint += f"; if it may go, pass drop={sorted(kinds)}"
    return f"{'; '.join(parts)}. {hint}"
