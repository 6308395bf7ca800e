"""What a retrofit writes into the model so that it can be undone and checked.

One entry of `metadata_props`, JSON: hashes of the original and of the hardened model (without this
entry), and for every site where it is, its jump, and the bytes of the original node.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx

from jr_onnx.errors import NotRetrofittedError
from jr_onnx.model import Address, Model, wire
from jr_onnx.model.graphs import decode_node
from jr_onnx.rewrite.forms import FUNCTION_DOMAIN, FUNCTION_NAME, Jump, jump_function
from jr_onnx.rewrite.spill import Spilled

KEY = "jr_onnx/v1/manifest"
NAME_PREFIX = "jr_onnx/v1"


@dataclass(frozen=True)
class Entry:
    """One retrofitted site.

    Attributes:
        path: the site's path.
        form: the node pattern.
        jump: as asked for.
        effective_jump: as the tensor's type holds it.
        scope: address of the list of nodes, in the original model.
        index: the original node's position in that list, counted in the original model.
        count: how many nodes took its place.
        field: the original node as it stood in the file, tag and length included.
    """

    path: str
    form: str
    jump: Jump
    effective_jump: Jump
    scope: Address
    index: int
    count: int
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
        NotRetrofittedError: there is one, but it cannot be read.
    """
    for part in wire.fields(model.content):
        if part.number == wire.MODEL_METADATA:
            payload = model.content[part.value : part.end]
            if _is_manifest(part.number, payload):
                return _decode(onnx.StringStringEntryProto.FromString(payload).value)
    return None


def add(
    content: bytes, original: Model, entries: Sequence[Entry], spilled: Sequence[Spilled] = ()
) -> bytes:
    """Returns the hardened model with its manifest, and the local function if a site calls it."""
    if any(entry.form == "function" for entry in entries):
        imported = onnx.OperatorSetIdProto(domain=FUNCTION_DOMAIN, version=1)
        function = jump_function(
            max(
                entry.version
                for entry in original.proto.opset_import
                if entry.domain in ("", "ai.onnx")
            )
        )
        content = wire.insert(
            content,
            [
                (wire.MODEL_OPSET_IMPORT, imported.SerializeToString()),
                (wire.MODEL_FUNCTIONS, function.SerializeToString()),
            ],
        )
    record: dict[str, Any] = {
        "format": "jr-onnx/manifest/1",
        "original_sha256": original.sha256,
        "hardened_sha256": hashlib.sha256(content).hexdigest(),
        "parts": _parts(content),
        "sites": [
            {**vars(entry), "field": base64.b64encode(entry.field).decode()} for entry in entries
        ],
    }
    if spilled:
        record["spilled"] = [each.to_json() for each in spilled]
    text = json.dumps(record, separators=(",", ":"))
    entry = onnx.StringStringEntryProto(key=KEY, value=text)
    return wire.insert(content, [(wire.MODEL_METADATA, entry.SerializeToString())])


def changed_parts(manifest: Manifest, content: bytes) -> list[str]:
    """Returns which parts of a model, its manifest taken out, are not as they were written."""
    found = _parts(content)
    names = sorted(manifest.parts.keys() | found.keys())
    return [name for name in names if manifest.parts.get(name) != found.get(name)]


def without(content: bytes) -> bytes:
    """Returns a model without its manifest."""
    return wire.remove(content, _is_manifest)


def without_function(content: bytes) -> bytes:
    """Returns a model without the local function of the form `function`, and its import."""
    return wire.remove(content, _is_function)


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


def _decode(text: str) -> Manifest:
    try:
        record = json.loads(text)
        entries = tuple(map(_entry, record["sites"]))
        spilled = tuple(map(Spilled.of_json, record.get("spilled", ())))
        return Manifest(
            original_sha256=str(record["original_sha256"]),
            hardened_sha256=str(record["hardened_sha256"]),
            entries=entries,
            spilled=spilled,
            parts={str(name): str(hashed) for name, hashed in record["parts"].items()},
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise NotRetrofittedError(
            f"the manifest in metadata_props[{KEY!r}] is damaged ({error!r}). "
            "Go back to the original model and retrofit it again"
        ) from error


def _entry(site: dict[str, Any]) -> Entry:
    entry = Entry(
        path=str(site["path"]),
        form=str(site["form"]),
        jump=_jump(site["jump"]),
        effective_jump=_jump(site["effective_jump"]),
        scope=tuple(step if isinstance(step, str) else int(step) for step in site["scope"]),
        index=int(site["index"]),
        count=int(site["count"]),
        field=base64.b64decode(site["field"], validate=True),
    )
    decode_node(entry.field)
    if entry.index < 0 or entry.count < 1 or not _is_address(entry.scope):
        raise ValueError(f"no place for {entry.path}")
    return entry


def _jump(value: float | list[float]) -> Jump:
    return tuple(map(float, value)) if isinstance(value, list) else float(value)


def _is_address(scope: Address) -> bool:
    head = {"graph": 1, "function": 2}.get(str(scope[0]), 0) if scope else 0
    return (
        head > 0 and (len(scope) - head) % 3 == 0 and all(type(step) is int for step in scope[1:])
    )
