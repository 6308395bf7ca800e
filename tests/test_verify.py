"""Verification accepts what retrofit makes, and catches every planted difference."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import jr_onnx as jr
from jr_onnx.errors import AlreadyRetrofittedError
from jr_onnx.rewrite.manifest import KEY

Plant = Callable[[onnx.ModelProto], object]


def _node(proto: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    named: onnx.NodeProto = next(
        node
        for node in proto.graph.node
        if node.op_type == op_type and node.name.startswith("jr_onnx/v1/relu_2/")
    )
    return named


def _set_jump(proto: onnx.ModelProto, jump: float) -> None:
    (constant,) = (node for node in proto.graph.node if node.name == "jr_onnx/v1/jump")
    constant.attribute[0].t.CopyFrom(numpy_helper.from_array(np.array(jump, np.float32)))


def _weight(proto: onnx.ModelProto) -> None:
    tensor = proto.graph.initializer[0]
    tensor.raw_data = bytes([tensor.raw_data[0] ^ 1]) + tensor.raw_data[1:]


def _missed_site(proto: onnx.ModelProto) -> None:
    nodes = list(proto.graph.node)
    at = next(i for i, node in enumerate(nodes) if node.name.startswith("jr_onnx/v1/relu_2/"))
    relu = onnx.helper.make_node("Relu", ["linear"], ["relu_2"], name="node_relu_2")
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes[:at], relu, *nodes[at + 3 :]])


def _extra_node(proto: onnx.ModelProto) -> None:
    proto.graph.node.add(op_type="Identity", input=["logits"], output=["more"], name="spy")


def _extra_constant(proto: onnx.ModelProto) -> None:
    nodes = list(proto.graph.node)
    at = next(i for i, node in enumerate(nodes) if node.name == "jr_onnx/v1/zero")
    spy = onnx.helper.make_node("Constant", [], ["spy"], "jr_onnx/v1/spy", value_int=1)
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes[:at], spy, *nodes[at:]])


def _other_constant(proto: onnx.ModelProto) -> None:
    _node(proto, "Sub").input[1] = "jr_onnx/v1/zero:0"


def _other_branch(proto: onnx.ModelProto) -> None:
    where = _node(proto, "Where")
    where.input[1], where.input[2] = where.input[2], where.input[1]


def _no_metadata(proto: onnx.ModelProto) -> None:
    kept = [entry for entry in proto.metadata_props if entry.key == KEY]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)


PLANTED: dict[str, tuple[Plant, str]] = {
    "weight": (_weight, r"graph\.initializer\[conv1\.weight\]"),
    "missed site": (_missed_site, "relu_2: still a plain Relu"),
    "jump one ulp up": (
        lambda proto: _set_jump(proto, float(np.nextafter(np.float32(0.5), np.float32(1)))),
        "relu_2: 1 of 200[0-9]+ values differ from the jump 0.5",
    ),
    "another jump": (lambda proto: _set_jump(proto, 0.75), "relu_2: .* values differ"),
    "another constant": (_other_constant, "relu_2: .* values differ from the jump 0.5"),
    "extra constant": (
        _extra_constant,
        r"node 'jr_onnx/v1/spy' \(Constant\): a constant that no form uses",
    ),
    "branches swapped": (_other_branch, "relu_2: .* values differ"),
    "opset": (lambda proto: setattr(proto.opset_import[0], "version", 19), r"model\.opset_import"),
    "ir version": (lambda proto: setattr(proto, "ir_version", 9), r"model\.ir_version"),
    "metadata": (_no_metadata, r"model\.metadata_props: expected 1 entries, got 0"),
    "doc string": (lambda proto: setattr(proto.graph, "doc_string", "x"), r"graph\.doc_string"),
    "node attribute": (
        lambda proto: setattr(proto.graph.node[3].attribute[0], "i", 2),
        r"node 'node_max_pool2d' \(MaxPool\)",
    ),
    "extra node": (_extra_node, r"node 'spy' \(Identity\): a node that the original does not have"),
    "output name": (lambda proto: setattr(proto.graph.output[0], "name", "z"), r"graph\.output"),
}


@pytest.fixture(scope="module")
def original(lenet: jr.Model) -> jr.Model:
    proto = lenet.parse()
    proto.metadata_props.add(key="owner", value="vision team")
    return jr.Model(proto.SerializeToString())


@pytest.mark.parametrize("jump", [0.0, 0.3, 1.0])
def test_a_retrofit_is_equivalent(original: jr.Model, jump: float) -> None:
    found = jr.verify(original, jr.retrofit(original, jump=jump).model)
    assert found.equivalent
    assert set(found.jumps) == {"relu", "relu_1", "relu_2", "relu_3"}
    assert set(found.jumps.values()) == {float(np.float32(jump))}
    assert found.values_compared > 800_000


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_difference_is_caught(original: jr.Model, planted: str) -> None:
    plant, expected = PLANTED[planted]
    proto = jr.retrofit(original, jump=0.5).model.parse()
    plant(proto)
    found = jr.verify(original, jr.Model(proto.SerializeToString()))
    assert not found.equivalent
    told = "\n".join(f"{entry.where}: {entry.what}" for entry in found.differences)
    assert re.search(expected, told), told


def _size_dependent(proto: onnx.ModelProto) -> None:
    """Makes a mask that is right for the many values of a probe, and always on for few."""
    nodes = list(proto.graph.node)
    at = next(i for i, node in enumerate(nodes) if node.name.startswith("jr_onnx/v1/relu_2/where"))
    where = nodes[at]
    new = onnx.parser.parse_graph(
        f"""g (float[n] linear) => (bool[n] mask) <int64 limit = {{100000}}> {{
            size = Size(linear)
            small = Less(size, size)
            mask = Or({where.input[0].replace("/", "_").replace(":", "_")}, small)
        }}"""
    ).node
    new[2].input[0] = where.input[0]
    for number, node in enumerate(new):
        node.name = f"jr_onnx/v1/spy{number}"
    where.input[0] = "mask"
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes[:at], *new, *nodes[at:]])


def test_nodes_that_only_behave_like_a_form_are_caught(original: jr.Model) -> None:
    proto = jr.retrofit(original, jump=0.5).model.parse()
    _size_dependent(proto)
    found = jr.verify(original, jr.Model(proto.SerializeToString()))
    assert [(each.where, each.what) for each in found.differences] == [
        ("relu_2", "its nodes are not those of the form sub-greater-where")
    ]


def test_constants_need_not_be_shared(original: jr.Model) -> None:
    """A tool may give each site its own again; the sites compute the same."""
    proto = jr.retrofit(original, jump=0.5).model.parse()
    nodes = list(proto.graph.node)
    at = next(i for i, node in enumerate(nodes) if node.name == "jr_onnx/v1/relu_2/sub")
    own = onnx.NodeProto()
    own.CopyFrom(next(node for node in nodes if node.name == "jr_onnx/v1/jump"))
    own.name, own.output[0] = "jr_onnx/v1/own", "jr_onnx/v1/own:0"
    nodes[at].input[1] = own.output[0]
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes[:at], own, *nodes[at:]])
    assert jr.verify(original, jr.Model(proto.SerializeToString())).equivalent


def test_a_field_that_onnx_does_not_know_is_caught(original: jr.Model) -> None:
    hardened = jr.retrofit(original, jump=0.5).model
    found = jr.verify(original, jr.Model(hardened.content + bytes([0xFA, 0x3F, 0x01, 0x41])))
    assert [each.where for each in found.differences] == ["model"]


def test_sites_in_branches_and_functions_are_verified() -> None:
    model = jr.Model(
        onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["": 18, "my": 1]>
            g (bool c, float[4] x) => (float[4] z) {
                y = my.Block(x)
                z = If (c) <then_branch = a () => (float[4] p) { p = Relu(y) },
                            else_branch = b () => (float[4] q) { q = Neg(y) }>
            }
            <domain: "my", opset_import: ["": 18]> Block (x) => (y) { y = Relu(x) }"""
        ).SerializeToString()
    )
    result = jr.retrofit(model, jump=0.5)
    found = jr.verify(model, result.model)
    assert found.differences == ()
    assert found.jumps == {"z.then_branch>p": 0.5, "my::Block>y": 0.5}
    proto = result.model.parse()
    branch = proto.graph.node[1].attribute[0].g
    branch.node[-1].input[1] = "x"
    assert not jr.verify(model, jr.Model(proto.SerializeToString())).equivalent


def test_a_hardened_original_is_refused(original: jr.Model) -> None:
    hardened = jr.retrofit(original, jump=0.5).model
    with pytest.raises(AlreadyRetrofittedError, match="is hardened itself"):
        jr.verify(hardened, hardened)


def test_the_original_itself_is_not_equivalent(original: jr.Model) -> None:
    found = jr.verify(original, original)
    assert [entry.where for entry in found.differences] == ["relu", "relu_1", "relu_2", "relu_3"]


def test_a_lost_manifest_is_told(original: jr.Model) -> None:
    proto = jr.retrofit(original, jump=0.5).model.parse()
    del proto.metadata_props[1]
    found = jr.verify(original, jr.Model(proto.SerializeToString()))
    assert not found.equivalent
    assert "manifest does not list" in found.differences[0].what


def test_json_has_the_differences(original: jr.Model) -> None:
    document = jr.verify(original, original).to_json()
    assert document["equivalent"] is False
    assert document["differences"][0]["where"] == "relu"
