"""What depends on what: the values of a graph that vary with its input."""

from __future__ import annotations

import onnx

from jr_onnx.autodiff.registry import is_zero_gradient


def depends_on(graph: onnx.GraphProto, x: str) -> set[str]:
    """Returns the values that vary with x, of whatever type: only named operators cut a path."""
    active = {x}
    for node in graph.node:
        used = {*node.input, *captured(node)}
        if not is_zero_gradient(node) and not active.isdisjoint(used):
            active.update(name for name in node.output if name)
    return active


def captured(node: onnx.NodeProto) -> list[str]:
    """Returns the names that the bodies of If, Loop and Scan use, their own values included."""
    names: list[str] = []
    for attribute in node.attribute:
        for body in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            names += used_in(body)
    return names


def used_in(body: onnx.GraphProto) -> list[str]:
    """Returns the names that a body uses, its own values included."""
    names = [output.name for output in body.output]
    for node in body.node:
        names += [*node.input, *captured(node)]
    return names


def spelled(node: onnx.NodeProto) -> str:
    """Returns how messages call a node."""
    domain = f"{node.domain}::" if node.domain else ""
    return f"{domain}{node.op_type} {node.name or node.output[0]!r}"
