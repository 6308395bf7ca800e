"""Every list of nodes in a model: the main graph, subgraphs at any depth, local functions.

A scope is found again by its address:

    ("graph",)                  the main graph
    ("function", 2)             the third local function
    (*outer, 5, 0, -1)          in `outer`: node 5, attribute 0, its graph
    (*outer, 5, 0, 1)           the same, where the attribute is a list of graphs
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import onnx
from google.protobuf.message import DecodeError

from jr_onnx.model import wire

ONNX_DOMAINS = ("", "ai.onnx")
Address = tuple[str | int, ...]
_GRAPH, _GRAPHS = onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS
# The operators of the standard domain that have graphs; those of other domains may have some too.
WITH_GRAPHS = frozenset(("If", "Loop", "Scan", "SequenceMap"))


@dataclass(frozen=True)
class Scope:
    """One list of nodes.

    Attributes:
        address: how to find it again in the same model.
        label: the readable form, empty for the main graph: `if_out.then_branch`,
            `my.domain::Block`.
        graph: the message that holds the nodes, shared with the model it was found in.
        opset: the version of the standard domain that its nodes use.
    """

    address: Address
    label: str
    graph: onnx.GraphProto | onnx.FunctionProto
    opset: int

    @property
    def is_function(self) -> bool:
        """Whether the nodes belong to a local function (no initializers, no outer values)."""
        return isinstance(self.graph, onnx.FunctionProto)


def scopes(proto: onnx.ModelProto) -> Iterator[Scope]:
    """Yields every scope, an outer one before the ones inside it."""
    opset = opset_of(proto.opset_import)
    yield from _nested(Scope(("graph",), "", proto.graph, opset))
    for index, function in enumerate(proto.functions):
        overload = f":{function.overload}" if function.overload else ""
        label = f"{function.domain}::{function.name}{overload}"
        # Without an import of its own, the model's opset is the best guess.
        own = opset_of(function.opset_import) or opset
        yield from _nested(Scope(("function", index), label, function, own))


class Definitions:
    """Finds the scope that defines a name: an inner one may have a value of an outer one's name."""

    def __init__(self, scopes: Iterable[Scope]) -> None:
        self._scopes = {scope.address: scope for scope in scopes}
        self._inside: dict[Address, frozenset[str]] = {}

    def home(self, address: Address, name: str) -> Address:
        """Returns the nearest scope that defines `name`, going outwards; the outermost if none."""
        # Without an outer scope there is nothing to look up, and most models have none.
        while len(address) > 2:
            known = self._inside.get(address)
            if known is None:
                known = self._inside[address] = _defined(self._scopes[address])
            if name in known:
                break
            address = address[:-3]
        return address


def _defined(scope: Scope) -> frozenset[str]:
    graph = scope.graph
    names = {name for node in graph.node for name in node.output}
    if isinstance(graph, onnx.GraphProto):
        names.update(value.name for value in graph.input)
        names.update(tensor.name for tensor in graph.initializer)
        names.update(tensor.values.name for tensor in graph.sparse_initializer)
    return frozenset(names)


def decode_node(field: bytes) -> onnx.NodeProto:
    """Returns the node in a serialized field, tag and length included.

    Raises:
        ValueError: it is none.
    """
    try:
        node: onnx.NodeProto = onnx.NodeProto.FromString(wire.payload(field))
        return node
    except (DecodeError, IndexError) as error:
        raise ValueError(str(error)) from error


def decode_nodes(fields: bytes, address: Address) -> list[onnx.NodeProto]:
    """Returns the nodes in serialized fields of a scope, all other fields left out.

    Raises:
        ValueError: the fields are none.
    """
    message = onnx.FunctionProto if len(address) == 2 else onnx.GraphProto
    try:
        return list(message.FromString(fields).node)
    except DecodeError as error:
        raise ValueError(str(error)) from error


def node_field(address: Address) -> int:
    """Returns the field number that the nodes of a scope have."""
    return wire.FUNCTION_NODE if len(address) == 2 else wire.GRAPH_NODE


def field_path(address: Address) -> list[tuple[int, int]]:
    """Returns the fields that lead to a scope in the serialized model: numbers and positions."""
    if address[0] == "graph":
        path, rest = [(wire.MODEL_GRAPH, 0)], address[1:]
    else:
        path, rest = [(wire.MODEL_FUNCTIONS, int(address[1]))], address[2:]
    outer = address[: len(address) - len(rest)]
    while rest:
        node, attribute, number = (int(step) for step in rest[:3])
        graph = (wire.ATTRIBUTE_GRAPH, 0) if number < 0 else (wire.ATTRIBUTE_GRAPHS, number)
        path += [(node_field(outer), node), (wire.NODE_ATTRIBUTE, attribute), graph]
        outer, rest = (*outer, *rest[:3]), rest[3:]
    return path


def _nested(scope: Scope) -> Iterator[Scope]:
    yield scope
    for at, node in enumerate(scope.graph.node):
        if node.op_type not in WITH_GRAPHS and node.domain in ONNX_DOMAINS:
            continue
        for which, attribute in enumerate(node.attribute):
            kind = attribute.type
            if kind != _GRAPH and kind != _GRAPHS:
                continue
            several = kind == _GRAPHS
            for number, graph in enumerate(attribute.graphs if several else [attribute.g]):
                step = f"{node.output[0] if node.output else at}.{attribute.name}"
                step += f"[{number}]" if several else ""
                label = f"{scope.label}>{step}" if scope.label else step
                address = (*scope.address, at, which, number if several else -1)
                yield from _nested(Scope(address, label, graph, scope.opset))


def opset_of(imports: object) -> int:
    """Returns the version of the standard domain among `opset_import` entries, 0 if absent."""
    return max(
        (entry.version for entry in imports if entry.domain in ONNX_DOMAINS),  # type: ignore[attr-defined]
        default=0,
    )
