"""Undoing a retrofit of a model that somebody edited since."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import pytest

import jr_onnx as jr
from jr_onnx.errors import NotRetrofittedError

MakeModel = Callable[..., jr.Model]
TWO = "g (float[n] x) => (float[n] y) { a = Relu(x) b = Neg(a) y = Relu(b) }"
Edit = Callable[[onnx.ModelProto], object]


def _in_front(proto: onnx.ModelProto) -> None:
    proto.graph.node.insert(0, onnx.helper.make_node("Identity", ["x"], ["unused"], name="spy"))


def _between(proto: onnx.ModelProto) -> None:
    proto.graph.node.insert(3, onnx.helper.make_node("Identity", ["x"], ["unused"], name="spy"))


def _cut(proto: onnx.ModelProto) -> None:
    del proto.graph.node[4:]


def _another_input(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].name = "renamed"
    for node in proto.graph.node:
        node.input[:] = ["renamed" if name == "x" else name for name in node.input]


def _swapped(proto: onnx.ModelProto) -> None:
    proto.graph.node[4].output[0], proto.graph.node[3].output[0] = "jr_onnx/v1/a/greater:0", "a"


MOVED: dict[str, tuple[Edit, str]] = {
    "a node in front": (
        _in_front,
        r"at a, node 'spy' \(Identity\) stands where a node of the jump",
    ),
    "a node between": (_between, r"at a, node 'spy' \(Identity\) stands where a node of the jump"),
    "nodes gone": (_cut, "the nodes of the jump of a are not in their place"),
    "another last node": (_swapped, "the nodes of the jump of a are not in their place"),
    "another input": (_another_input, "onnx.checker refuses it"),
}


@pytest.mark.parametrize("moved", MOVED)
def test_a_forced_undo_refuses_edits_that_moved_or_broke_the_jumps(
    text_model: MakeModel, moved: str
) -> None:
    edit, told = MOVED[moved]
    proto = jr.retrofit(text_model(TWO), jump=0.5).model.parse()
    edit(proto)
    model = jr.Model(proto.SerializeToString())
    with pytest.raises(NotRetrofittedError, match=r"force=True \(--accept-edits on the command"):
        jr.restore(model)
    with pytest.raises(NotRetrofittedError, match=told) as caught:
        jr.restore(model, force=True)
    assert "was edited after it was hardened, in graph." in str(caught.value)
    assert "what it was before cannot be put back" in str(caught.value)


def test_a_forced_undo_keeps_edits_beside_the_jumps(text_model: MakeModel) -> None:
    proto = jr.retrofit(text_model(TWO), jump=0.5).model.parse()
    proto.graph.node.append(onnx.helper.make_node("Abs", ["y"], ["z"]))
    restored = jr.restore(jr.Model(proto.SerializeToString()), force=True).proto
    assert [node.op_type for node in restored.graph.node] == ["Relu", "Neg", "Relu", "Abs"]
