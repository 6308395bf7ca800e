"""Verification trusts no word of the manifest: every one is compared with the models."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

import jr_onnx as jr
from jr_onnx.model import wire

MakeModel = Callable[..., jr.Model]


@pytest.fixture(scope="module")
def two(text_model: MakeModel) -> jr.Model:
    return text_model("g (float[n] x) => (float[n] y) { a = Relu(x) b = Neg(a) y = Relu(b) }")


def _told(original: jr.Model, hardened: jr.Model) -> list[str]:
    found = jr.verify(original, hardened)
    assert found.equivalent == (not found.differences)
    return [f"{each.where}: {each.what}" for each in found.differences]


def _tampered(hardened: jr.Model, change: Callable[[dict[str, Any]], object]) -> jr.Model:
    proto = hardened.parse()
    record = json.loads(proto.metadata_props[0].value)
    change(record)
    proto.metadata_props[0].value = json.dumps(record)
    return jr.Model(proto.SerializeToString())


def _site(record: dict[str, Any], place: int, value: object) -> None:
    record["scopes"][0]["sites"][0][place] = value


TAMPERED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "original's hash": (
        lambda record: record.update(original_sha256="0" * 64),
        "model: .* does not have the original's hash",
    ),
    "hardened model's hash": (lambda record: record.update(hardened_sha256="0" * 64), "model: "),
    "hashes of parts": (
        lambda record: record["parts"].update({"graph.node": "0"}),
        "graph.node: is not as jr-onnx wrote it",
    ),
    "format": (
        lambda record: record.update(format="x"),
        "expected the format 'jr-onnx/manifest/1'",
    ),
    "form": (lambda record: _site(record, 1, "x"), "a: the manifest names the form 'x', there is"),
    "jump": (
        lambda record: _site(record, 2, 0.7),
        r"a: the manifest says that the jump 0.7 is 0.5",
    ),
    "negative jump": (lambda record: _site(record, 2, -1.0), "a: the manifest has a jump that it"),
    "no jumps": (lambda record: _site(record, 2, []), "is damaged"),
    "place": (lambda record: _site(record, 4, 1), "model: "),
    "endless span": (lambda record: _site(record, 5, 10**400), "is damaged"),
}


@pytest.mark.parametrize("changed", TAMPERED)
def test_the_manifest_is_compared(two: jr.Model, changed: str) -> None:
    change, expected = TAMPERED[changed]
    told = _told(two, _tampered(jr.retrofit(two, jump=0.5).model, change))
    assert re.search(expected, "\n".join(told)), told


def test_an_undo_to_another_model_is_a_difference(two: jr.Model) -> None:
    """The manifest is consistent in itself, and restores a Sigmoid without a word."""
    other = two.parse()
    other.graph.node[0].op_type = "Sigmoid"
    wrong = jr.Model(other.SerializeToString())

    def change(record: dict[str, Any]) -> None:
        nodes = (wire.encode(1, node.SerializeToString()) for node in other.graph.node[::2])
        record["scopes"][0]["nodes"] = base64.b64encode(b"".join(nodes)).decode()
        record["original_sha256"] = wrong.sha256

    hardened = _tampered(jr.retrofit(two, jump=0.5).model, change)
    assert jr.restore(hardened).content == wrong.content
    assert _told(two, hardened) == ["model: its undo gives other bytes than the original's"]


def test_a_second_manifest_is_a_difference(two: jr.Model) -> None:
    proto = jr.retrofit(two, jump=0.5).model.parse()
    proto.metadata_props.append(proto.metadata_props[0])
    (told,) = _told(two, jr.Model(proto.SerializeToString()))
    assert "carries 2 jr-onnx manifests" in told
