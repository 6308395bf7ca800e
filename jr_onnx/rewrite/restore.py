"""hardened -> original, byte for byte."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate, groupby

from jr_onnx.errors import InvalidModelError, NotRetrofittedError
from jr_onnx.model import Address, Model, check, wire
from jr_onnx.model.graphs import decode_node, field_path, node_field
from jr_onnx.model.model import readable
from jr_onnx.rewrite import manifest as manifests
from jr_onnx.rewrite.forms import NAME_PREFIX, Jump
from jr_onnx.rewrite.manifest import Entry, Manifest
from jr_onnx.rewrite.spill import bring_back


def restore(model: Model, *, force: bool = False) -> Model:
    """Undoes a retrofit.

    Args:
        model: a hardened model, as `retrofit` returned it.
        force: go on if the model was changed since. The original nodes take the places of the
            jumps, and all other changes stay: what comes back is valid, and not the original.

    Returns:
        The original: the very bytes that were retrofitted (their SHA-256 is compared).

    Raises:
        NotRetrofittedError: there is no manifest; or the model was changed since, and `force` is
            not given or the changes moved or broke the jumps.
        ExternalDataError: weights that `retrofit` moved to a file are missing.
        InvalidModelError: it is no ONNX model, or a damaged one.
    """
    with readable(model):
        return _restored(model, force)


def _restored(model: Model, force: bool) -> Model:
    manifest = manifests.read(model)
    if manifest is None:
        raise NotRetrofittedError(
            f"{model.name}: carries no jr-onnx manifest, so there is nothing to restore. "
            "Was it hardened by `jr-onnx retrofit`, and did a later tool drop its metadata?"
        )
    edited = manifests.is_edited(manifest, model.content)
    if edited and not force:
        raise NotRetrofittedError(
            f"{_told(model, manifest)}. Go back to the file as jr-onnx wrote it or to the original "
            "model, or keep the edits with force=True (--accept-edits on the command line). "
            "`jr-onnx verify ORIGINAL HARDENED` lists them"
        )
    try:
        if edited:
            _require_jumps(model, manifest)
        original = Model(_undone(model, manifest), folder=model.folder)
        if edited:
            check(original)
    except (KeyError, ValueError, InvalidModelError) as error:
        where = _told(model, manifest) if edited else f"{model.name}: its manifest is damaged"
        raise NotRetrofittedError(
            f"{where}, and what it was before cannot be put back ({error}). "
            "Go back to the original model"
        ) from error
    if original.sha256 != manifest.original_sha256 and not edited:
        raise NotRetrofittedError(
            f"{model.name}: the restored model does not have the original's hash "
            f"(expected {manifest.original_sha256}, got {original.sha256})"
        )
    return original


def jumps_of(model: Model) -> dict[str, Jump]:
    """Returns the effective jump by site path that the manifest lists, empty without one."""
    with readable(model):
        manifest = manifests.read(model)
    return {entry.path: entry.effective_jump for entry in manifest.entries} if manifest else {}


def edits_at(edits: wire.Edits, scope: Address) -> dict[int, wire.Edit | bytes | wire.Edits]:
    """Returns the branch of a tree of edits that belongs to the nodes of a scope."""
    for number, index in field_path(scope):
        inner = edits.setdefault(number, {}).setdefault(index, {})
        if not isinstance(inner, dict):
            raise ValueError(f"field {number} is replaced and edited inside")
        edits = inner
    return edits.setdefault(node_field(scope), {})


def _told(model: Model, manifest: Manifest) -> str:
    parts = manifests.changed_parts(manifest, model.content) or ["the order of its fields"]
    return f"{model.name} was edited after it was hardened, in {', '.join(parts)}"


def _undone(model: Model, manifest: Manifest) -> bytes:
    edits = manifests.removals(model.content, manifest)
    for scope, places in _places(manifest):
        here = edits_at(edits, scope)
        for first, entry in places:
            here[first] = entry.field
            here.update(dict.fromkeys(range(first + 1, first + entry.span), b""))
    bring_back(edits, manifest.spilled, model)
    return wire.splice(model.content, edits)


def _require_jumps(model: Model, manifest: Manifest) -> None:
    """Compares the nodes at the places of the manifest with what stands there in a jump.

    Raises:
        ValueError: other nodes are there.
    """
    nodes = {scope.address: scope.graph.node for scope in model.scopes}
    for scope, places in _places(manifest):
        for first, entry in places:
            group = nodes.get(scope, ())[first : first + entry.span]
            for node in group:
                if not node.name.startswith(f"{NAME_PREFIX}/"):
                    raise ValueError(
                        f"at {entry.path}, node {node.name!r} ({node.op_type}) stands where a node "
                        "of the jump was"
                    )
            if len(group) < entry.span or decode_node(entry.field).output[0] not in (
                group[-1].output
            ):
                raise ValueError(f"the nodes of the jump of {entry.path} are not in their place")


def _places(manifest: Manifest) -> Iterator[tuple[Address, list[tuple[int, Entry]]]]:
    """Yields each list of nodes in the hardened model, and where in it the jumps begin."""
    grouped = groupby(manifest.entries, key=lambda entry: entry.scope)
    by_scope = {scope: list(entries) for scope, entries in grouped}
    for scope, entries in by_scope.items():
        spans = accumulate((entry.span - 1 for entry in entries), initial=0)
        places = [(entry.at + grown, entry) for entry, grown in zip(entries, spans, strict=False)]
        yield _as_hardened(scope, by_scope), places


def _as_hardened(scope: Address, by_scope: dict[Address, list[Entry]]) -> Address:
    """Returns a scope's address as the hardened model counts nodes."""
    at = 1 if scope[0] == "graph" else 2
    address = list(scope)
    while at < len(scope):
        entries = by_scope.get(scope[:at], [])
        before = bisect_left([entry.at for entry in entries], int(scope[at]))
        grown = list(accumulate((entry.span - 1 for entry in entries[:before]), initial=0))[-1]
        address[at] = int(scope[at]) + grown
        at += 3
    return tuple(address)
