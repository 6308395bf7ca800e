"""What a retrofit writes into the model so that it can be undone and checked.

One entry of `metadata_props`, JSON: hashes of the original and of the hardened model (without this
entry), and for every site where it is, its jump, and the original node.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from jr_onnx.errors import NotRetrofittedError
from jr_onnx.model import Address, Model

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
        scope: address of the list of nodes.
        index: the original node's position in that list, counted in the original model.
        count: how many nodes took its place.
        node: the original node, serialized.
    """

    path: str
    form: str
    jump: float
    effective_jump: float
    scope: Address
    index: int
    count: int
    node: bytes


@dataclass(frozen=True)
class Manifest:
    """The whole record.

    Attributes:
        original_sha256: of the original file, in hex.
        hardened_sha256: of the hardened model without the manifest, in hex.
        entries: the sites, in the order of the model.
    """

    original_sha256: str
    hardened_sha256: str
    entries: tuple[Entry, ...]


def read(proto: onnx.ModelProto) -> Manifest | None:
    """Returns the model's manifest, None where it has none.

    Raises:
        NotRetrofittedError: there is one, but it cannot be read.
    """
    texts = [entry.value for entry in proto.metadata_props if entry.key == KEY]
    if not texts:
        return None
    try:
        record = json.loads(texts[0])
        entries = tuple(
            Entry(**{**site, "scope": tuple(site["scope"]), "node": base64.b64decode(site["node"])})
            for site in record["sites"]
        )
        return Manifest(record["original_sha256"], record["hardened_sha256"], entries)
    except (ValueError, KeyError, TypeError) as error:
        raise NotRetrofittedError(
            f"the manifest in metadata_props[{KEY!r}] is damaged ({error!r}). "
            "Go back to the original model and retrofit it again"
        ) from error


def write(proto: onnx.ModelProto, original: Model, entries: Sequence[Entry]) -> None:
    """Appends the manifest to a hardened model that has none."""
    sites = [{**vars(entry), "node": base64.b64encode(entry.node).decode()} for entry in entries]
    record: dict[str, Any] = {
        "format": "jr-onnx/manifest/1",
        "original_sha256": original.sha256,
        "hardened_sha256": _sha256(proto),
        "sites": sites,
    }
    proto.metadata_props.add(key=KEY, value=json.dumps(record, separators=(",", ":")))


def remove(proto: onnx.ModelProto) -> None:
    """Takes the manifest out of `metadata_props`."""
    for index in reversed(range(len(proto.metadata_props))):
        if proto.metadata_props[index].key == KEY:
            del proto.metadata_props[index]


def matches(manifest: Manifest, proto: onnx.ModelProto) -> bool:
    """Whether a model, its manifest taken out, is the one that the manifest was written for."""
    return _sha256(proto) == manifest.hardened_sha256


def _sha256(proto: onnx.ModelProto) -> str:
    return hashlib.sha256(proto.SerializeToString()).hexdigest()
