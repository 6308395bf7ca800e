"""Files that bit rot, a broken download or another tool damaged: no bug, never equivalent."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import onnx
import onnx.parser
import pytest

import jr_onnx as jr
from jr_onnx.errors import InvalidModelError, JrOnnxError
from jr_onnx.model import wire
from jr_onnx.rewrite import edits_of, jumps_of

READERS: dict[str, Callable[[jr.Model], Any]] = {
    "find_sites": jr.find_sites,
    "retrofit": lambda model: jr.retrofit(model, jump=1.0),
    "restore": jr.restore,
    "restore, forced": lambda model: jr.restore(model, force=True),
    "edits_of": edits_of,
    "jumps_of": jumps_of,
    "input_gradient": jr.input_gradient,
}


# Sites in the main graph, one of them with a cap, in a branch and in a function.
TEXT = """<ir_version: 9, opset_import: ["": 18, "my": 1]>
    g (float[n, 2] x, bool c) => (float[n, 2] y)
        <float[2, 2] w = {1, 2, 3, 4}, float z = {0}, float s = {6}> {
        a = MatMul(x, w) b = Relu(a) d = Clip(b, z, s) e = my.F(d)
        y = If (c) <then_branch = t () => (float[n, 2] p) { p = Relu(e) },
                    else_branch = u () => (float[n, 2] q) { k = Neg(e) q = Max(k, z) }>
    }
    <domain: "my", opset_import: ["": 18]> F (i) => (o) { j = Relu(i) o = Identity(j) }"""


@pytest.fixture(scope="module")
def original() -> jr.Model:
    return jr.Model.of(onnx.parser.parse_model(TEXT))


@pytest.fixture(scope="module")
def hardened(original: jr.Model) -> jr.Model:
    return jr.retrofit(original, jump=0.5).model


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Returns the bytes with a bit flipped, or with a few of them lost or added."""
    at, kind = rng.randrange(len(content)), rng.random()
    if kind < 0.6:
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    if kind < 0.8:
        return content[:at] + content[at + rng.randrange(1, 6) :]
    return content[:at] + rng.randbytes(rng.randrange(1, 5)) + content[at:]


@pytest.mark.parametrize("seed", range(4))
def test_no_damage_passes_for_the_original_with_a_jump(
    original: jr.Model, hardened: jr.Model, seed: int
) -> None:
    rng = random.Random(seed)
    for _ in range(12):
        content = damaged(hardened.content, rng)
        if content == hardened.content:
            continue
        with contextlib.suppress(InvalidModelError):
            assert not jr.verify(original, jr.Model(content)).equivalent


@pytest.mark.parametrize("reader", READERS)
def test_damage_is_a_named_error_or_none(hardened: jr.Model, reader: str) -> None:
    rng = random.Random(0)
    for _ in range(60):
        with contextlib.suppress(JrOnnxError):
            READERS[reader](jr.Model(damaged(hardened.content, rng)))


@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_is_cut_off(hardened: jr.Model, reader: str) -> None:
    with pytest.raises(InvalidModelError, match="model: not an ONNX model, or a truncated one"):
        READERS[reader](jr.Model(hardened.content[:-9]))


def test_a_name_that_is_not_utf_8(original: jr.Model, hardened: jr.Model) -> None:
    content = hardened.content.replace(b"jr_onnx/v1/b/where", b"jr_onnx/v1/b/wh\xffre")
    with pytest.raises(InvalidModelError, match="model: a name or a doc string in it is not UTF-8"):
        jr.verify(original, jr.Model(content))


def test_metadata_that_is_cut_off(hardened: jr.Model) -> None:
    content = hardened.content + bytes([14 << 3 | 2, 2, 0x0A, 0x05])
    with pytest.raises(InvalidModelError, match="not an ONNX model, or a truncated one"):
        jr.restore(jr.Model(content))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x0a\x05ab", "field 1 at byte 0 is cut off"),
        (b"\x0a", "cut off at byte 1"),
        (b"\x08\xff", "cut off"),
        (b"\x0e\x00", "wire type 6 at byte 0"),
        (b"\x0b\x08", "cut off"),
    ],
)
def test_bytes_that_are_no_message(content: bytes, said: str) -> None:
    with pytest.raises(wire.LayoutError, match=said):
        list(wire.fields(content))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("Clip(b, z, s)", "Gemm(b)", r"onnx\.checker refuses it"),
        ("If (c)", "If ()", r"onnx\.checker refuses it"),
        ("y = If", "y, y2 = If", "does not fit the body that it calls"),
        ("e = my.F(d)", "e = my.F(d, d)", "does not fit the body that it calls"),
        ("Clip(b, z, s)", "Constant ()", "Constant 'd' has no value"),
    ],
)
def test_a_gradient_of_what_is_no_model(old: str, new: str, said: str) -> None:
    text = TEXT.replace("2] x, bool c", "2] x").replace("<float", "<bool c = {1}, float")
    jr.input_gradient(jr.Model.of(onnx.parser.parse_model(text)))
    broken = jr.Model.of(onnx.parser.parse_model(text.replace(old, new)))
    with pytest.raises(InvalidModelError, match=said):
        jr.input_gradient(broken)


def test_a_mistake_of_ours_is_not_laid_to_a_sound_model(
    hardened: jr.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr("jr_onnx.rewrite.manifest.read", fail)
    with pytest.raises(TypeError, match="a bug"):
        jr.restore(hardened)
    monkeypatch.setattr("jr_onnx.autodiff.backward.prepare", fail)
    with pytest.raises(TypeError, match="a bug"):
        jr.input_gradient(hardened)
