"""hardened -> original, byte for byte."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from itertools import accumulate, groupby

from jr_onnx.errors import NotRetrofittedError
from jr_onnx.model import Address, Model, wire
from jr_onnx.model.graphs import field_path, node_field
from jr_onnx.rewrite import manifest as manifests
from jr_onnx.rewrite.forms import Jump
from jr_onnx.rewrite.manifest import Entry, Manifest
from jr_onnx.rewrite.spill import bring_back


def restore(model: Model, *, force: bool = False) -> Model:
    """Undoes a retrofit.

    Args:
        model: a hardened model, as `retrofit` returned it.
        force: go on if the model was changed since: the sites are put back, the other changes stay.

    Returns:
        The original: the very bytes that were retrofitted (their SHA-256 is compared).

    Raises:
        NotRetrofittedError: there is no manifest, or the model was changed since.
    """
    manifest = manifests.read(model)
    if manifest is None:
        raise NotRetrofittedError(
            f"{model.name}: carries no jr-onnx manifest, so there is nothing to restore. "
            "Was it hardened by `jr-onnx retrofit`, and did a later tool drop its metadata?"
        )
    content = manifests.without(model.content)
    changed = hashlib.sha256(content).hexdigest() != manifest.hardened_sha256
    if changed and not force:
        parts = ", ".join(manifests.changed_parts(manifest, content)) or "the order of its fields"
        raise NotRetrofittedError(
            f"{model.name}: was changed after it was retrofitted, in {parts}. Go back to the file "
            "as jr-onnx wrote it or to the original model, or pass --force to put the sites back "
            "and keep the other changes (`jr-onnx verify ORIGINAL HARDENED` lists them)"
        )
    try:
        inside = bring_back(_undone(content, manifest), manifest.spilled, model)
        original = Model(inside, folder=model.folder)
    except (KeyError, ValueError) as error:
        raise NotRetrofittedError(
            f"{model.name}: its sites are no longer where the manifest says ({error}). "
            "Go back to the original model"
        ) from error
    if original.sha256 != manifest.original_sha256 and not changed:
        raise NotRetrofittedError(
            f"{model.name}: the restored model does not have the original's hash "
            f"(expected {manifest.original_sha256}, got {original.sha256})"
        )
    return original


def jumps_of(model: Model) -> dict[str, Jump]:
    """Returns the effective jump by site path that the manifest lists, empty without one."""
    manifest = manifests.read(model)
    return {entry.path: entry.effective_jump for entry in manifest.entries} if manifest else {}


def edits_at(edits: wire.Edits, path: list[wire.Key]) -> wire.Edits:
    """Returns the branch of a tree of edits that belongs to a scope."""
    for step in path:
        inner = edits.setdefault(step, {})
        assert isinstance(inner, dict), "no field is replaced and edited inside"
        edits = inner
    return edits


def _undone(content: bytes, manifest: Manifest) -> bytes:
    if any(entry.form == "function" for entry in manifest.entries):
        content = manifests.without_function(content)
    grouped = groupby(manifest.entries, key=lambda entry: entry.scope)
    by_scope = {scope: list(entries) for scope, entries in grouped}
    edits: wire.Edits = {}
    for scope, entries in by_scope.items():
        here = edits_at(edits, field_path(_as_hardened(scope, by_scope)))
        number, grown = node_field(scope), 0
        for entry in entries:
            first = entry.index + grown
            here[number, first] = entry.field
            for more in range(1, entry.count):
                here[number, first + more] = b""
            grown += entry.count - 1
    return wire.splice(content, edits)


def _as_hardened(scope: Address, by_scope: dict[Address, list[Entry]]) -> Address:
    """Returns a scope's address as the hardened model counts nodes."""
    at = 1 if scope[0] == "graph" else 2
    address = list(scope)
    while at < len(scope):
        entries = by_scope.get(scope[:at], [])
        before = bisect_left([entry.index for entry in entries], int(scope[at]))
        grown = list(accumulate((entry.count - 1 for entry in entries[:before]), initial=0))[-1]
        address[at] = int(scope[at]) + grown
        at += 3
    return tuple(address)
