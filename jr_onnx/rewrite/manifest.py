"""What a retrofit writes into the model so that it can be undone and checked.

One entry of `metadata_props`, JSON: hashes of the original and of the hardened model (without this
entry), and for every list of nodes that has sites

    scope    its address
    nodes    the original nodes of its sites, as they stood in the file
    sites    for each of them: path, form, jump, effective jump, position, how many took its place
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import onnx

from jr_onnx.errors import NotRetrofittedError
from jr_onnx.model import Address, Model, wire
from jr_onnx.model.graphs import decode_nodes, opset_of
from jr_onnx.model.model import require_model
from jr_onnx.rewrite.forms import FUNCTION_DOMAIN, FUNCTION_NAME, Jump, jump_function
from jr_onnx.rewrite.spill import Spilled

KEY = "jr_onnx/v1/manifest"
_FORMAT = "jr-onnx/manifest/1"
_MOST_NODES = 100  # that a form has


class Entry(NamedTuple):
    """One retrofitted site.

    Attributes:
        path: the site's path.
        form: the node pattern.
        jump: as asked for.
        effective_jump: as the tensor's type holds it.
        scope: address of the list of nodes, in the original model.
        at: the original node's position in that list, counted in the original model.
        span: how many nodes took its place.
        field: the original node as it stood in the file, tag and length included.
    """

    path: str
    form: str
    jump: Jump
    effective_jump: Jump
    scope: Address
    at: int
    span: int
    field: bytes


@dataclass(frozen=True)
class Manifest:
    """The whole record.

    Attributes:
        original_sha256: of the original file, in hex.
        hardened_sha256: of the hardened file without the manifest, in hex.
        entries: the sites, in the order of the model.
        spilled: initializers that were moved to a file beside the model.
        parts: a hash of each part of the hardened model, to tell later what was changed.
    """

    original_sha256: str
    hardened_sha256: str
    entries: tuple[Entry, ...]
    spilled: tuple[Spilled, ...] = ()
    parts: dict[str, str] = field(default_factory=dict)


def read(model: Model) -> Manifest | None:
    """Returns the model's manifest, None where it has none.

    Raises:
        NotRetrofittedError: there is one, but it cannot be read, or there are several.
    """
    require_model(model)
    found = []
    for part in wire.fields(model.content):
        if part.number == wire.MODEL_METADATA:
            entry = onnx.StringStringEntryProto.FromString(model.content[part.value : part.end])
            if entry.key == KEY:
                found.append(entry.value)
    if len(found) > 1:
        raise NotRetrofittedError(
            f"{model.name}: carries {len(found)} jr-onnx manifests. Go back to the original model "
            "and retrofit it again"
        )
    return _decode(found[0]) if found else None


def add(
    content: bytes, original: Model, entries: Sequence[Entry], spilled: Sequence[Spilled] = ()
) -> bytes:
    """Returns the hardened model with its manifest, and the local function if a site calls it."""
    if any(entry.form == "function" for entry in entries):
        imported, function = function_of(original)
        content = wire.insert(
            content,
            [
                (wire.MODEL_OPSET_IMPORT, imported.SerializeToString()),
                (wire.MODEL_FUNCTIONS, function.SerializeToString()),
            ],
        )
    record: dict[str, Any] = {
        "format": _FORMAT,
        "original_sha256": original.sha256,
        "hardened_sha256": hashlib.sha256(content).hexdigest(),
        "parts": _parts(content),
        "scopes": [
            _scope_to_json(scope, list(group))
            for scope, group in groupby(entries, key=lambda entry: entry.scope)
        ],
    }
    if spilled:
        record["spilled"] = [each.to_json() for each in spilled]
    text = json.dumps(record, separators=(",", ":"))
    entry = onnx.StringStringEntryProto(key=KEY, value=text)
    return wire.insert(content, [(wire.MODEL_METADATA, entry.SerializeToString())])


def function_of(original: Model) -> tuple[onnx.OperatorSetIdProto, onnx.FunctionProto]:
    """Returns what the form `function` adds to a model: an import, and the local function."""
    imported = onnx.OperatorSetIdProto(domain=FUNCTION_DOMAIN, version=1)
    return imported, jump_function(opset_of(original.proto.opset_import))


def without(content: bytes) -> bytes:
    """Returns a model without its manifest."""
    return wire.remove(content, _is_manifest)


def without_function(content: bytes) -> bytes:
    """Returns a model without the local function of the form `function`, and its import."""
    return wire.remove(content, _is_function)


def is_edited(manifest: Manifest, content: bytes) -> bool:
    """Whether a hardened model, apart from its manifest, is not as it was written."""
    hashed, view, copied = hashlib.sha256(), memoryview(content), 0
    for part in wire.fields(content):
        if _is_unwanted(content, part, _is_manifest):
            hashed.update(view[copied : part.start])
            copied = part.end
    hashed.update(view[copied:])
    return hashed.hexdigest() != manifest.hardened_sha256


def changed_parts(manifest: Manifest, content: bytes) -> list[str]:
    """Returns which parts of a hardened model, apart from its manifest, were written otherwise."""
    found = _parts(without(content))
    names = sorted(manifest.parts.keys() | found.keys())
    return [name for name in names if manifest.parts.get(name) != found.get(name)]


def removals(content: bytes, manifest: Manifest) -> wire.Edits:
    """Returns the edits that take out the manifest, the local function and its import."""
    function = any(entry.form == "function" for entry in manifest.entries)
    edits: wire.Edits = {}
    seen: Counter[int] = Counter()
    for part in wire.fields(content):
        unwanted = _is_unwanted(content, part, _is_manifest) or (
            function and _is_unwanted(content, part, _is_function)
        )
        if unwanted:
            edits.setdefault(part.number, {})[seen[part.number]] = b""
        seen[part.number] += 1
    return edits


def _parts(content: bytes) -> dict[str, str]:
    """Returns a hash of each field of the model and of its graph, by name."""
    hashes: dict[str, Any] = {}
    view = memoryview(content)
    for prefix, message, top in _messages(content):
        names = {each.number: each.name for each in message.DESCRIPTOR.fields}
        for number, start, end in wire.runs(content, top.value, top.end):
            if message is onnx.ModelProto and number == wire.MODEL_GRAPH:
                continue
            name = f"{prefix}.{names.get(number, number)}"
            hashes.setdefault(name, hashlib.sha256()).update(view[start:end])
    return {name: hashed.hexdigest()[:16] for name, hashed in hashes.items()}


def _messages(content: bytes) -> Iterator[tuple[str, Any, wire.Field]]:
    yield "model", onnx.ModelProto, wire.Field(0, 0, 0, len(content))
    for part in wire.fields(content):
        if part.number == wire.MODEL_GRAPH:
            yield "graph", onnx.GraphProto, part


def _is_unwanted(content: bytes, field: wire.Field, unwanted: Callable[[int, bytes], bool]) -> bool:
    # The graph may have gigabytes, and a look at its payload copies them.
    return field.number != wire.MODEL_GRAPH and unwanted(
        field.number, content[field.value : field.end]
    )


def _is_manifest(number: int, payload: bytes) -> bool:
    if number != wire.MODEL_METADATA:
        return False
    return bool(onnx.StringStringEntryProto.FromString(payload).key == KEY)


def _is_function(number: int, payload: bytes) -> bool:
    if number == wire.MODEL_OPSET_IMPORT:
        return bool(onnx.OperatorSetIdProto.FromString(payload).domain == FUNCTION_DOMAIN)
    if number == wire.MODEL_FUNCTIONS:
        function = onnx.FunctionProto.FromString(payload)
        return bool((function.domain, function.name) == (FUNCTION_DOMAIN, FUNCTION_NAME))
    return False


def _scope_to_json(scope: Address, entries: Sequence[Entry]) -> dict[str, Any]:
    return {
        "scope": scope,
        "nodes": base64.b64encode(b"".join(entry.field for entry in entries)).decode(),
        "sites": [
            (entry.path, entry.form, entry.jump, entry.effective_jump, entry.at, entry.span)
            for entry in entries
        ],
    }


def _decode(text: str) -> Manifest:
    try:
        record = json.loads(text)
        if record["format"] != _FORMAT:
            raise ValueError(f"expected the format {_FORMAT!r}, got {record['format']!r}")
        return Manifest(
            original_sha256=str(record["original_sha256"]),
            hardened_sha256=str(record["hardened_sha256"]),
            entries=tuple(entry for scope in record["scopes"] for entry in _entries(scope)),
            spilled=tuple(map(Spilled.of_json, record.get("spilled", ()))),
            parts={str(name): str(hashed) for name, hashed in record["parts"].items()},
        )
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise NotRetrofittedError(
            f"the manifest in metadata_props[{KEY!r}] is damaged ({error!r}). "
            "Go back to the original model and retrofit it again"
        ) from error


def _entries(record: dict[str, Any]) -> Iterator[Entry]:
    scope = tuple(record["scope"])
    if not _is_address(scope):
        raise ValueError(f"no scope has the address {scope}")
    content = base64.b64decode(record["nodes"], validate=True)
    fields = [content[each.start : each.end] for each in wire.fields(content)]
    if len(decode_nodes(content, scope)) != len(fields):
        raise ValueError(f"not all of {len(fields)} original nodes are nodes")
    for site, original in zip(record["sites"], fields, strict=True):
        path, form, jump, effective, at, span = site
        if type(at) is not int or type(span) is not int or at < 0 or not 1 <= span <= _MOST_NODES:
            raise ValueError(f"no place for {path}")
        yield Entry(
            str(path),
            str(form),
            _jump(jump),
            _jump(effective),
            scope,
            at,
            span,
            original,
        )


def _jump(value: float | list[float]) -> Jump:
    if value == []:
        raise ValueError("a jump for each of no channels")
    return tuple(map(float, value)) if isinstance(value, list) else float(value)


def _is_address(scope: Address) -> bool:
    head = {"graph": 1, "function": 2}.get(str(scope[0]), 0) if scope else 0
    return (
        head > 0 and (len(scope) - head) % 3 == 0 and all(type(step) is int for step in scope[1:])
    )
