"""Verification accepts what retrofit makes, and catches every planted difference."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import jr_onnx as jr
from jr_onnx.errors import AlreadyRetrofittedError, SessionError
from jr_onnx.rewrite.manifest import KEY
from jr_onnx.rewrite.numbers import probes

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
    (difference,) = found.differences
    assert difference.where == "relu_2"
    assert difference.what == (
        "its nodes are not those of the form sub-greater-where: expected Constant, Constant, Sub, "
        "Greater, Where, got Constant, Constant, Sub, Greater, Size, Less, Or, Where"
    )


def test_constants_need_not_be_shared(original: jr.Model) -> None:
    """A tool may give each site its own again: they compute the same, but the undo is lost."""
    proto = jr.retrofit(original, jump=0.5).model.parse()
    nodes = list(proto.graph.node)
    at = next(i for i, node in enumerate(nodes) if node.name == "jr_onnx/v1/relu_2/sub")
    own = onnx.NodeProto()
    own.CopyFrom(next(node for node in nodes if node.name == "jr_onnx/v1/jump"))
    own.name, own.output[0] = "jr_onnx/v1/own", "jr_onnx/v1/own:0"
    nodes[at].input[1] = own.output[0]
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes[:at], own, *nodes[at:]])
    found = jr.verify(original, jr.Model(proto.SerializeToString()))
    assert set(found.jumps) == {"relu", "relu_1", "relu_2", "relu_3"}
    (difference,) = found.differences
    assert difference.where == "graph.node"
    assert "not as jr-onnx wrote it: `jr-onnx restore` refuses that" in difference.what


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


@pytest.mark.parametrize(
    ("jump", "dtypes"),
    [
        (0.5, "f4 f8 f2 i1 i2 i4 i8"),
        (300.0, "f4 f8 f2 i2 i4 i8"),
        (1e10, "f4 f8 i8"),
        (1e20, "f4 f8"),
    ],
)
def test_a_local_function_is_run_with_every_type_that_holds_the_jump(
    jump: float, dtypes: str
) -> None:
    model = jr.Model(
        onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["": 18, "my": 1]>
            g (int64[n] x) => (int64[n] y) { y = my.Block(x) }
            <domain: "my", opset_import: ["": 18]> Block (x) => (y) { y = Relu(x) }"""
        ).SerializeToString()
    )
    found = jr.verify(model, jr.retrofit(model, jump=jump, form="greater-where").model)
    assert found.differences == ()
    sizes = [probes(np.dtype(dtype), jump).size for dtype in dtypes.split()]
    assert found.values_compared == sum(sizes)


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


TWO = "g (float[n] x) => (float[n] y) { a = Relu(x) b = Neg(a) y = Relu(b) }"
MakeModel = Callable[..., jr.Model]


@pytest.fixture(scope="module")
def two(text_model: MakeModel) -> jr.Model:
    return text_model(TWO)


def _told(original: jr.Model, hardened: jr.Model, plant: Plant | None = None) -> list[str]:
    """Returns what verify says of a hardened model with something planted."""
    proto = hardened.parse()
    if plant is not None:
        plant(proto)
    found = jr.verify(original, jr.Model(proto.SerializeToString()))
    assert found.equivalent == (not found.differences)
    return [f"{each.where}: {each.what}" for each in found.differences]


def _op_type(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].op_type = "Sigmoid"


def _input(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[0] = "b"


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (_op_type, "node 'a' (Relu).op_type: expected 'Relu', got 'Sigmoid'"),
        (_input, "node 'a' (Relu).input[0]: expected 'x', got 'b'"),
    ],
)
def test_a_site_left_alone_may_not_change(two: jr.Model, plant: Plant, expected: str) -> None:
    hardened = jr.retrofit(two, jump=0.5, selection=jr.Selection(include=["y"])).model
    assert _told(two, hardened, plant) == [expected]


def test_sites_left_alone_are_listed(two: jr.Model) -> None:
    found = jr.verify(two, jr.retrofit(two, jumps={"y": 0.5}).model)
    assert found.equivalent
    assert (found.jumps, found.without_jump) == ({"y": 0.5}, ("a",))
    assert found.to_json()["without_jump"] == ["a"]


def test_a_manifest_that_lists_another_site_is_a_difference(two: jr.Model) -> None:
    part = jr.retrofit(two, jump=0.5, selection=jr.Selection(include=["y"])).model.proto

    def plant(proto: onnx.ModelProto) -> None:
        proto.CopyFrom(part)
        record = json.loads(proto.metadata_props[0].value)
        record["scopes"][0]["sites"][0][0] = "a"
        proto.metadata_props[0].value = json.dumps(record)

    assert any(each.startswith("a: still a plain Relu") for each in _told(two, two, plant))


def _backdoor(proto: onnx.ModelProto) -> None:
    body = onnx.parser.parse_graph(
        """g (float x, float jump) => (float y) {
            mask = Greater(x, jump)
            zero = Sub(jump, jump)
            passed = Where(mask, x, zero)
            key = Constant<value_float = 1234.5>()
            found = Equal(x, key)
            y = Where(found, zero, passed)
        }"""
    )
    del proto.functions[0].node[:]
    proto.functions[0].node.extend(body.node)


def _second_function(proto: onnx.ModelProto) -> None:
    proto.functions.append(proto.functions[0])
    proto.functions[1].overload = "x"


FUNCTION: dict[str, tuple[Plant, str]] = {
    "backdoor": (_backdoor, "JumpReLU.node: expected 3 entries, got 6"),
    "opset": (
        lambda proto: setattr(proto.functions[0].opset_import[0], "version", 99),
        r"JumpReLU.opset_import\[0\].version: expected 18, got 99",
    ),
    "doc string": (
        lambda proto: setattr(proto.functions[0], "doc_string", "planted"),
        "JumpReLU.doc_string: .* got 'planted'",
    ),
    "metadata": (
        lambda proto: proto.functions[0].metadata_props.add(key="a", value="b"),
        "JumpReLU.metadata_props: expected 0 entries, got 1",
    ),
    "import": (
        lambda proto: setattr(proto.opset_import[1], "version", 2),
        r"model.opset_import.version: expected 1, got 2",
    ),
    "no import": (
        lambda proto: proto.opset_import.pop(),
        "model.opset_import: there is none of the domain jr_onnx",
    ),
    "second function": (_second_function, "model.functions: expected 0 entries, got 1"),
}


@pytest.mark.parametrize("planted", FUNCTION)
def test_the_local_function_is_compared_whole(two: jr.Model, planted: str) -> None:
    plant, expected = FUNCTION[planted]
    hardened = jr.retrofit(two, jump=0.5, form="function").model
    assert _told(two, hardened) == []
    assert re.search(expected, "\n".join(_told(two, hardened, plant)))


def test_a_local_function_that_no_site_calls_is_a_difference(two: jr.Model) -> None:
    other = jr.retrofit(two, jump=0.5, form="function").model.proto

    def plant(proto: onnx.ModelProto) -> None:
        proto.functions.extend(other.functions)
        proto.opset_import.append(other.opset_import[1])

    told = _told(two, jr.retrofit(two, jump=0.5).model, plant)
    assert "model.functions: expected 0 entries, got 1" in told


def _noted(two: jr.Model) -> jr.Model:
    proto = two.parse()
    proto.graph.node[0].doc_string = "important"
    proto.graph.node[0].metadata_props.add(key="layer", value="7")
    return jr.Model(proto.SerializeToString())


def _documented(node: onnx.NodeProto) -> None:
    node.doc_string = "planted"


def _renamed(node: onnx.NodeProto) -> None:
    node.name = "jr_onnx/v1/a/sub"


NOTES: dict[str, tuple[Callable[[onnx.NodeProto], object], str]] = {
    "doc string lost": (lambda node: node.ClearField("doc_string"), "Where.doc_string: expected"),
    "doc string": (_documented, "Where.doc_string: expected 'important', got 'planted'"),
    "metadata lost": (lambda node: node.metadata_props.pop(), "Where.metadata_props: expected 1"),
    "metadata": (lambda node: node.metadata_props.add(key="a"), "metadata_props: expected 1 ent"),
    "devices": (lambda node: node.device_configurations.add(), "device_configurations: expected 0"),
    "unknown field": (
        lambda node: node.MergeFromString(b"\xfa\x3f\x01A"),
        "Where: fields that this version of ONNX does not know are different",
    ),
    "name": (_renamed, "'node jr_onnx/v1/a/sub' is there twice"),
}


@pytest.mark.parametrize("planted", NOTES)
def test_what_a_node_of_a_form_says_is_compared(two: jr.Model, planted: str) -> None:
    plant, expected = NOTES[planted]
    model = _noted(two)
    hardened = jr.retrofit(model, jump=0.5).model
    assert _told(model, hardened) == []
    told = _told(model, hardened, lambda proto: plant(proto.graph.node[4]))
    assert expected in "\n".join(told)


def _float64(node: onnx.NodeProto) -> None:
    node.attribute[0].t.CopyFrom(numpy_helper.from_array(np.array(0.5)))


DAMAGED: dict[str, tuple[int, Callable[[onnx.NodeProto], object]]] = {
    "unknown operator": (3, lambda node: setattr(node, "op_type", "GreaterX")),
    "missing input": (4, lambda node: node.input.pop()),
    "jump of another type": (0, _float64),
    "no value": (0, lambda node: node.ClearField("attribute")),
    "unknown domain": (2, lambda node: setattr(node, "domain", "nowhere")),
    "another output": (2, lambda node: node.output.__setitem__(0, "jr_onnx/v1/lost")),
}


@pytest.mark.parametrize("damaged", DAMAGED)
def test_damaged_nodes_are_a_difference_and_no_crash(two: jr.Model, damaged: str) -> None:
    at, damage = DAMAGED[damaged]
    hardened = jr.retrofit(two, jump=0.5).model
    told = _told(two, hardened, lambda proto: damage(proto.graph.node[at]))
    assert any("a: its nodes do not run" in each for each in told)


def test_a_missing_onnxruntime_is_no_difference(
    two: jr.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise SessionError("onnxruntime is not installed")

    monkeypatch.setattr("jr_onnx.session._onnxruntime", missing)
    with pytest.raises(SessionError, match="not installed"):
        jr.verify(two, jr.retrofit(two, jump=0.5).model)


def test_long_values_are_shown_where_they_differ(two: jr.Model) -> None:
    proto = two.parse()
    proto.doc_string = 500 * "a"
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(100, np.float32), "w"))
    model = jr.Model(proto.SerializeToString())

    def plant(proto: onnx.ModelProto) -> None:
        proto.doc_string = 400 * "a" + "b" + 99 * "a"
        proto.graph.initializer[0].raw_data = 300 * b"\0" + b"\x01" + 98 * b"\0"

    assert _told(model, jr.retrofit(model, jump=0.5).model, plant) == [
        f"model.doc_string: from character 400 on: expected '{60 * 'a'}', got "
        f"'{15 * 'a'}b{44 * 'a'}'",
        "graph.initializer[w].raw_data: from byte 300 on (400 and 399 in all): expected "
        f"00{14 * ' 00'}, got 01{14 * ' 00'}",
    ]


def test_numbers_are_compared_as_they_are_written(two: jr.Model) -> None:
    proto = two.parse()
    node = onnx.helper.make_node("Constant", [], ["c"], value_floats=[float("nan"), 0.0, 1.0])
    proto.graph.node.append(node)
    model = jr.Model(proto.SerializeToString())
    hardened = jr.retrofit(model, jump=0.5).model
    assert _told(model, hardened) == []

    def plant(proto: onnx.ModelProto) -> None:
        proto.graph.node[-1].attribute[0].floats[1] = -0.0

    assert _told(model, hardened, plant) == [
        "node 'c' (Constant).attribute[value_floats].floats[1]: expected 0.0, got -0.0"
    ]


def test_a_node_that_is_gone_does_not_make_the_rest_differ(original: jr.Model) -> None:
    def plant(proto: onnx.ModelProto) -> None:
        del proto.graph.node[0]

    told = _told(original, jr.retrofit(original, jump=0.5).model, plant)
    assert told == ["node 'node_sub' (Sub): expected, and missing"]
