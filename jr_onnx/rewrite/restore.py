"""hardened -> original, byte for byte."""

from __future__ import annotations

from itertools import groupby

import onnx

from jr_onnx.errors import NotRetrofittedError
from jr_onnx.model import Address, Model
from jr_onnx.rewrite import manifest as manifests
from jr_onnx.rewrite.manifest import Entry

Nodes = onnx.GraphProto | onnx.FunctionProto


def restore(model: Model) -> Model:
    """Undoes a retrofit.

    Args:
        model: a hardened model, as `retrofit` returned it.

    Returns:
        The original: the very bytes that were retrofitted (their SHA-256 is compared).

    Raises:
        NotRetrofittedError: there is no manifest, or the model was changed since.
    """
    proto = model.parse()
    manifest = manifests.read(proto)
    if manifest is None:
        raise NotRetrofittedError(
            f"{model.name}: carries no jr-onnx manifest, so there is nothing to restore. "
            "Was it hardened by `jr-onnx retrofit`, and did a later tool drop its metadata?"
        )
    manifests.remove(proto)
    if not manifests.matches(manifest, proto):
        raise NotRetrofittedError(
            f"{model.name}: was changed after it was retrofitted (its hash is not the manifest's). "
            "Restore the file as jr-onnx wrote it, or go back to the original model"
        )
    # Outer scopes first: an address counts nodes as the original does.
    for address, entries in groupby(manifest.entries, key=lambda entry: entry.scope):
        _put_back(locate(proto, address), list(entries))
    original = Model.of(proto)
    if original.sha256 != manifest.original_sha256:
        raise NotRetrofittedError(
            f"{model.name}: the restored model does not have the original's hash "
            f"(expected {manifest.original_sha256}, got {original.sha256}); nothing was written"
        )
    return original


def jumps_of(model: Model) -> dict[str, float]:
    """Returns the effective jump by site path that the manifest lists, empty without one."""
    manifest = manifests.read(model.proto)
    return {entry.path: entry.effective_jump for entry in manifest.entries} if manifest else {}


def locate(proto: onnx.ModelProto, address: Address) -> Nodes:
    """Returns the graph or function at a scope's address."""
    graph: Nodes
    if address[0] == "graph":
        graph, rest = proto.graph, address[1:]
    else:
        graph, rest = proto.functions[int(address[1])], address[2:]
    while rest:
        node, attribute, number = (int(step) for step in rest[:3])
        holder = graph.node[node].attribute[attribute]
        graph = holder.graphs[number] if holder.graphs else holder.g
        rest = rest[3:]
    return graph


def _put_back(graph: Nodes, entries: list[Entry]) -> None:
    hardened = list(graph.node)
    nodes: list[onnx.NodeProto] = []
    at = 0
    for entry in entries:
        copied = entry.index - len(nodes)
        nodes += hardened[at : at + copied]
        nodes.append(onnx.NodeProto.FromString(entry.node))
        at += copied + entry.count
    nodes += hardened[at:]
    replace_nodes(graph, nodes)


def replace_nodes(graph: Nodes, nodes: list[onnx.NodeProto]) -> None:
    """Makes `nodes` the nodes of the graph, in one pass (insertion one by one is quadratic)."""
    del graph.node[:]
    graph.node.extend(nodes)
