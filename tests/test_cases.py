"""The hazards a rewriter meets, one named test for each.

Every case goes through `check`: the hardened model is valid, verified, and restored byte for byte.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import jr_onnx as jr
from jr_onnx.errors import (
    ExternalDataError,
    HiddenActivationError,
    ModelError,
    NothingToRewriteError,
    OutputError,
    ParameterError,
)
from jr_onnx.model import wire
from jr_onnx.rewrite import Retrofit
from jr_onnx.session import Session

Array = np.ndarray[Any, Any]
X = np.array([-np.inf, -2, -0.0, 0, 0.25, 0.5, 0.75, 3, 7, np.inf], np.float32)
F32 = TensorProto.FLOAT


def parse(text: str, *, opset: int = 18, ir: int = 10, more: str = "") -> onnx.ModelProto:
    imports = f'["": {opset}{more}]'
    return onnx.parser.parse_model(f"<ir_version: {ir}, opset_import: {imports}> {text}")


def seal(proto: onnx.ModelProto) -> jr.Model:
    return jr.Model(proto.SerializeToString())


def run(model: jr.Model, **feeds: Any) -> list[Array]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    arrays = {name: np.asarray(value) for name, value in feeds.items()}
    return list(ort.InferenceSession(model.content, options).run(None, arrays))


def check(model: jr.Model, *, jump: float = 0.5, **options: Any) -> Retrofit:
    """Retrofits, and asserts what every retrofit must hold."""
    result = jr.retrofit(model, jump=jump, **options)
    assert jr.restore(result.model).content == model.content
    found = jr.verify(model, result.model)
    assert found.differences == ()
    assert set(found.jumps) == {site.site.path for site in result.sites}
    return result


def paths(result: Retrofit) -> list[str]:
    return [site.site.path for site in result.sites]


def jumped(x: Array, jump: float = 0.5, cap: float = np.inf) -> list[float]:
    return [float(min(v, cap)) if v > jump else 0.0 for v in x]


def one(node: str, *, dtype: str = "float", opset: int = 18, **weights: Any) -> jr.Model:
    """A model of a single node from x to y."""
    proto = parse(f"g ({dtype}[n] x) => ({dtype}[n] y) {{ {node} }}", opset=opset)
    for name, value in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return seal(proto)


RELU = "g (float[n] x) => (float[n] y) { y = Relu(x) }"
ZERO, SIX = np.float32(0), np.float32(6)


def test_01_no_match_leaves_nothing_to_write() -> None:
    with pytest.raises(NothingToRewriteError, match="it has no Relu"):
        jr.retrofit(one("y = Sigmoid(x)"), jump=1)


def test_02_undo_is_byte_identical() -> None:
    check(seal(parse(RELU)))


def test_03_a_second_run_is_a_change_of_jump_and_the_same_jump_a_no_op() -> None:
    first = check(seal(parse(RELU)))
    assert jr.retrofit(first.model, jump=0.5).model.content == first.model.content
    other = jr.retrofit(first.model, jump=0.7)
    assert other.model.content == check(seal(parse(RELU)), jump=0.7).model.content


def test_04_metadata_and_doc_strings_at_every_level_are_kept() -> None:
    proto = parse(RELU)
    for level in (proto, proto.graph, proto.graph.node[0], proto.graph.input[0]):
        level.doc_string = "kept"
        level.metadata_props.add(key="k", value="v")
    hardened = check(seal(proto)).model.proto
    for level in (hardened, hardened.graph, hardened.graph.node[-1], hardened.graph.input[0]):
        assert level.doc_string == "kept"
        assert ("k", "v") in [(entry.key, entry.value) for entry in level.metadata_props]


def test_05_quantization_annotations_and_unused_scales_are_kept() -> None:
    proto = parse(RELU)
    proto.graph.initializer.append(
        numpy_helper.from_array(np.array(0.1, np.float32), "unused_scale")
    )
    note = proto.graph.quantization_annotation.add(tensor_name="y")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="unused_scale")
    hardened = check(seal(proto)).model.proto
    assert hardened.graph.quantization_annotation[0] == note


def test_06_sparse_initializers_and_attributes_are_kept() -> None:
    proto = parse(RELU)
    values = numpy_helper.from_array(np.array([1, 2], np.float32), "sparse")
    indices = numpy_helper.from_array(np.array([0, 3]))
    sparse = helper.make_sparse_tensor(values, indices, [4])
    proto.graph.sparse_initializer.append(sparse)
    inner = helper.make_sparse_tensor(
        numpy_helper.from_array(np.array([1, 2], np.float32)), indices, [4]
    )
    proto.graph.node.append(helper.make_node("Constant", [], ["c"], sparse_value=inner))
    hardened = check(seal(proto)).model.proto
    assert hardened.graph.sparse_initializer[0] == sparse
    assert hardened.graph.node[-1].attribute[0].sparse_tensor == inner


def test_07_training_info_is_kept() -> None:
    proto = parse(RELU)
    proto.training_info.add().algorithm.CopyFrom(proto.graph)
    assert check(seal(proto)).model.proto.training_info == proto.training_info


def test_08_device_configurations_are_kept() -> None:
    proto = parse(RELU, ir=11)
    proto.configuration.add(name="two", num_devices=2)
    proto.graph.node.insert(0, helper.make_node("Identity", ["x"], ["z"]))
    proto.graph.node[0].device_configurations.add(configuration_id="two", pipeline_stage=1)
    hardened = check(seal(proto)).model.proto
    assert hardened.configuration == proto.configuration
    assert hardened.graph.node[0] == proto.graph.node[0]


def _functions(*bodies: str, calls: str) -> jr.Model:
    functions = " ".join(
        f'<domain: "my", opset_import: ["": 18]{extra}> {body}'
        for extra, body in (body.split("|") if "|" in body else ("", body) for body in bodies)
    )
    return seal(
        parse(f"g (float[n] x) => (float[n] y) {{ {calls} }} {functions}", more=', "my": 1')
    )


def test_09_function_overloads_are_told_apart() -> None:
    model = _functions(
        ', overload: "a"|F (u) => (v) { v = Relu(u) }',
        ', overload: "b"|F (u) => (v) { v = Neg(u) }',
        calls="y = my.F:a(x)",
    )
    assert paths(check(model)) == ["my::F:a>v"]


def test_10_one_function_called_with_two_types() -> None:
    model = seal(
        parse(
            """g (float[n] x, float16[n] h) => (float[n] y, float16[n] k) {
                y = my.F(x) k = my.F(h)
            } <domain: "my", opset_import: ["": 18]> F (u) => (v) { v = Relu(u) }""",
            more=', "my": 1',
        )
    )
    y, k = run(check(model).model, x=X, h=X.astype(np.float16))
    assert y.tolist() == k.tolist() == jumped(X)


def test_11_a_function_with_its_own_opset_import() -> None:
    text = """g (float[n] x) => (float[n] y) { y = my.F(x) }
        <domain: "my", opset_import: ["": 14]> F (u) => (v) { v = Relu(u) }"""
    with pytest.raises(NothingToRewriteError, match="CastLike, which adapts to it, needs opset 15"):
        jr.retrofit(seal(parse(text, more=', "my": 1')), jump=1)


def test_12_a_function_that_nobody_calls_is_kept() -> None:
    model = _functions("F (u) => (v) { v = Neg(u) }", calls="y = Relu(x)")
    assert check(model).model.proto.functions == model.proto.functions


def test_13_functions_cannot_see_outer_initializers() -> None:
    model = _functions("F (u) => (v) { v = Relu(u) }", calls="y = my.F(x)")
    hardened = check(model).model
    made = {name for node in hardened.proto.functions[0].node for name in (*node.output, "u")}
    assert all(made.issuperset(node.input) for node in hardened.proto.functions[0].node)
    assert run(hardened, x=X)[0].tolist() == jumped(X)


NESTED = """g (bool c, int64 n, float[4] x) => (float[4] z) {
    w = Neg(x)
    y = If (c) <
        then_branch = t () => (float[4] p) {
            p = Loop (n, c, x) <body = b (int64 i, bool k, float[4] a) => (bool kk, float[4] r) {
                kk = Identity(k)
                m = Add(a, x)
                r = Relu(m)
            }>
        },
        else_branch = e () => (float[4] q) { q = Relu(w) }>
    z = Relu(y)
}"""


def test_14_nested_bodies_with_captured_values() -> None:
    result = check(seal(parse(NESTED)))
    assert paths(result) == ["z", "y.then_branch>p.body>r", "y.else_branch>q"]
    x = np.array([-1, 0.2, 0.3, 2], np.float32)
    two, yes = np.array(2), np.array(True)
    assert run(result.model, c=yes, n=two, x=x)[0].tolist() == pytest.approx([0, 0, 0.9, 6])
    assert run(result.model, c=~yes, n=two, x=x)[0].tolist() == [1, 0, 0, 0]


def test_15_graphs_attributes() -> None:
    proto = parse("g (float[n] x) => (float[n] y) { y = my.Switch(x) }", more=', "my": 1')
    body = onnx.parser.parse_graph("b () => (float[n] r) { s = Neg(x) r = Relu(s) }")
    proto.graph.node[0].attribute.append(helper.make_attribute("cases", [body, body]))
    proto.graph.value_info.append(helper.make_tensor_value_info("s", F32, ["n"]))
    for graph in proto.graph.node[0].attribute[0].graphs:
        graph.value_info.append(helper.make_tensor_value_info("s", F32, ["n"]))
    assert paths(check(seal(proto))) == ["y.cases[0]>r", "y.cases[1]>r"]


def test_16_a_name_that_is_taken_inside_a_subgraph() -> None:
    text = """g (bool c, float[4] x) => (float[4] z) {
        y = Relu(x)
        z = If (c) <
            then_branch = t () => (float[4] "jr_onnx/v1/y/sub:0") { "jr_onnx/v1/y/sub:0" = Neg(y) },
            else_branch = e () => (float[4] q) { q = Neg(y) }>
    }"""
    result = check(seal(parse(text)))
    names = [name for node in result.model.proto.graph.node for name in node.output]
    assert "jr_onnx/v1/y/sub:0" not in names


@pytest.mark.parametrize("name", ["jump", "jump:0", "zero:0", "b/sub:0", "b/clip:0"])
def test_16_a_value_that_has_a_name_of_ours(name: str) -> None:
    text = f"""g (float[n] x) => (float[n] y) <float z = {{0}}, float "jr_onnx/v1/c:0" = {{6}}> {{
        "jr_onnx/v1/{name}" = Neg(x) b = Relu("jr_onnx/v1/{name}")
        y = Clip(b, z, "jr_onnx/v1/c:0") }}"""
    result = check(seal(parse(text)))
    assert run(result.model, x=-X)[0].tolist() == jumped(X, cap=6)


def test_17_ir_3_has_every_initializer_among_the_inputs() -> None:
    proto = parse("g (float[n] x, float w) => (float[n] y) { z = Add(x, w) y = Relu(z) }",
                  opset=9, ir=3)  # fmt: skip
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), "w"))
    result = check(seal(proto))
    assert len(result.model.proto.graph.initializer) == 1
    assert run(result.model, x=X)[0].tolist() == jumped(X)


def test_18_a_bound_that_callers_can_override_is_no_constant() -> None:
    proto = parse("g (float[n] x, float m) => (float[n] y) { y = Clip(x, l, m) }")
    proto.graph.initializer.append(numpy_helper.from_array(np.asarray(ZERO), "l"))
    proto.graph.initializer.append(numpy_helper.from_array(np.asarray(SIX), "m"))
    with pytest.raises(NothingToRewriteError, match="upper bound 'm' is not a constant"):
        jr.retrofit(seal(proto), jump=1)


def test_19_overridable_inputs_are_kept() -> None:
    proto = parse("g (float[n] x, float w) => (float[n] y) { z = Add(x, w) y = Relu(z) }")
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), "w"))
    result = check(seal(proto))
    assert run(result.model, x=X, w=np.float32(-1))[0].tolist() == jumped(X - 1)


@pytest.mark.parametrize(
    ("node", "cap"),
    [("y = Clip(x, z)", None), ("y = Clip(x, z, )", None), ("y = Clip(x, z, s)", 6.0)],
)
def test_20_spellings_of_clip_are_told_apart(node: str, cap: float | None) -> None:
    result = check(one(node.replace(", )", ', "")'), z=ZERO, s=SIX))
    assert result.sites[0].site.cap == cap
    assert run(result.model, x=X)[0].tolist() == jumped(X, cap=cap or np.inf)


@pytest.mark.parametrize("node", ['y = Clip(x, "", s)', "y = Clip(x)", "y = Clip(x, m, s)"])
def test_20_a_clip_without_a_lower_bound_of_zero_is_no_activation(node: str) -> None:
    with pytest.raises(NothingToRewriteError, match="it has no Relu"):
        jr.retrofit(one(node, s=SIX, m=np.float32(-6)), jump=1)


@pytest.mark.parametrize("opset", [7, 8, 9, 10])
@pytest.mark.parametrize(("attributes", "cap"), [("min=0.0, max=6.0", 6.0), ("min=0.0", None)])
def test_21_clip_with_attributes(opset: int, attributes: str, cap: float | None) -> None:
    result = check(one(f"y = Clip<{attributes}>(x)", opset=opset))
    assert result.sites[0].site.cap == cap
    x = X[np.isfinite(X)]
    assert run(result.model, x=x)[0].tolist() == jumped(x, cap=cap or np.inf)


@pytest.mark.parametrize("node", ["y = Max(x, z)", "y = Max(z, x)"])
def test_21_max_in_either_order(node: str) -> None:
    result = check(one(node, z=ZERO))
    assert run(result.model, x=X)[0].tolist() == jumped(X)


@pytest.mark.parametrize(
    ("node", "zero", "reason"),
    [
        ("y = Max(x, z, x)", ZERO, "Max of 3 inputs, expected x and one zero"),
        ("y = Max(x, z)", np.zeros(10, np.float32), "which may broadcast x; expected a scalar"),
        ("y = Max(x, z)", np.zeros((1, 1), np.float32), "its zero has 2 axes"),
    ],
)
def test_22_a_max_that_is_no_relu_is_left_with_its_reason(
    node: str, zero: Array, reason: str
) -> None:
    with pytest.raises(NothingToRewriteError, match=reason):
        jr.retrofit(one(node, z=zero), jump=1)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64"])
def test_23_small_integers_do_not_wrap(dtype: str) -> None:
    result = check(one("y = Relu(x)", dtype=dtype), jump=1)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    x = np.array([low, low + 1, -1, 0, 1, 2, high], dtype)
    if dtype in ("int32", "int64"):  # onnxruntime has no kernels of Relu and Greater for the others
        assert run(result.model, x=x)[0].tolist() == [0, 0, 0, 0, 0, 2, high]
    assert "Sub" not in [node.op_type for node in result.model.proto.graph.node]


@pytest.mark.parametrize("opset", [13, 15])
def test_24_bfloat16_before_opset_16_has_no_where(opset: int) -> None:
    result = check(one("y = Relu(x)", dtype="bfloat16", opset=opset))
    assert result.sites[0].form == "mul-cast"
    onnx.checker.check_model(result.model.proto, full_check=True)


@pytest.mark.parametrize("opset", [7, 8])
def test_25_before_opset_9(opset: int) -> None:
    result = check(one("y = Relu(x)", opset=opset))
    assert run(result.model, x=X)[0].tolist() == jumped(X)


def test_26_special_values() -> None:
    tiny = np.float32(1e-45)
    around = [np.nextafter(np.float32(0.5), np.float32(side)) for side in (0, 1)]
    x = np.array([np.nan, np.inf, -np.inf, -0.0, tiny, -tiny, 0.5, *around], np.float32)
    got = run(check(one("y = Relu(x)")).model, x=x)[0]
    expected = np.array([0, np.inf, 0, 0, 0, 0, 0, 0, around[1]], np.float32)
    assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("jump", [-1, float("nan"), float("inf"), float("-inf")])
def test_27_a_jump_that_is_negative_nan_or_infinite_is_refused(jump: float) -> None:
    with pytest.raises(ParameterError, match="finite number >= 0"):
        jr.retrofit(seal(parse(RELU)), jump=jump)


def test_28_a_relu_of_another_domain_is_untouched() -> None:
    text = "g (float[n] x) => (float[n] y) { z = my.Relu(x) y = Relu(z) }"
    proto = parse(text, more=', "my": 1')
    proto.graph.value_info.append(helper.make_tensor_value_info("z", F32, ["n"]))
    assert paths(check(seal(proto))) == ["y"]


def test_29_duplicate_and_empty_node_names() -> None:
    proto = parse("g (float[n] x) => (float[n] y) { a = Relu(x) b = Relu(a) y = Relu(b) }")
    proto.graph.node[0].name = proto.graph.node[1].name = "same"
    assert paths(check(seal(proto))) == ["a", "b", "y"]


def test_30_duplicate_and_dangling_value_info() -> None:
    proto = parse("g (float[n] x) => (float[n] y) { a = Relu(x) y = Relu(a) }")
    for name in ("a", "a", "nobody"):
        proto.graph.value_info.append(helper.make_tensor_value_info(name, F32, ["n"]))
    assert check(seal(proto)).model.proto.graph.value_info == proto.graph.value_info


def test_31_unsorted_nodes_are_refused_by_the_checker() -> None:
    proto = parse("g (float[n] x) => (float[n] y) { a = Neg(x) y = Relu(a) }")
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend(reversed(nodes))
    with pytest.raises(ModelError, match=r"not output of any previous nodes|topologically sorted"):
        jr.retrofit(seal(proto), jump=1)


def test_32_dead_nodes_and_the_order_of_nodes_are_kept() -> None:
    text = "g (float[n] x) => (float[n] y) { dead = Neg(x) y = Relu(x) late = Abs(x) }"
    ops = [node.op_type for node in check(seal(parse(text))).model.proto.graph.node]
    assert ops == ["Neg", "Constant", "Constant", "Sub", "Greater", "Where", "Abs"]


def test_33_odd_initializers_are_kept_bit_for_bit() -> None:
    proto = parse(RELU)
    kinds = ("FLOAT8E4M3FN", "FLOAT8E5M2", "INT4", "UINT4", "FLOAT4E2M1", "COMPLEX64", "STRING")
    for kind in kinds:
        tensor = proto.graph.initializer.add(name=kind, data_type=TensorProto.DataType.Value(kind))
        tensor.dims.append(2)
        if kind == "STRING":
            tensor.string_data.extend([b"\xff\xfe", b"\x00"])
        else:
            tensor.raw_data = bytes(range({"COMPLEX64": 16}.get(kind, 2 if "8" in kind else 1)))
    assert check(seal(proto)).model.proto.graph.initializer == proto.graph.initializer


def test_34_unknown_fields_are_kept() -> None:
    content = parse(RELU).SerializeToString()
    content += wire.encode(1000, b"from the future") + bytes([0x91, 0x3F]) + bytes(8)
    assert wire.encode(1000, b"from the future") in check(jr.Model(content)).model.content


def test_34_an_unusual_encoding_is_kept() -> None:
    """Another writer may order fields in another way; protobuf itself would not."""
    content = parse(RELU).SerializeToString()
    chunks = [content[field.start : field.end] for field in wire.fields(content)]
    for order in itertools.permutations(chunks):
        check(jr.Model(b"".join(order)))


@pytest.fixture
def external(tmp_path: Path) -> Path:
    """A model whose weights and a Constant are in `w.bin`, behind an offset."""
    folder = tmp_path / "there"
    folder.mkdir()
    weights = np.arange(4, dtype=np.float32)
    (folder / "w.bin").write_bytes(bytes(4096) + weights.tobytes())
    proto = parse("g (float[4] x) => (float[4] y) { a = Add(x, w) b = Relu(a) y = Add(b, c) }")
    tensor = TensorProto(name="w", dims=[4], data_type=F32, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "w.bin"), ("offset", "4096"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    tensor.external_data.add(key="checksum", value="0" * 40)
    proto.graph.initializer.append(tensor)
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(4, np.float32), "c"))
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    return folder / "m.onnx"


def test_35_external_data_offset_and_checksum_are_kept(external: Path) -> None:
    model = jr.load(external)
    hardened = jr.retrofit(model, jump=0.5).model
    assert hardened.proto.graph.initializer == model.proto.graph.initializer
    assert jr.restore(hardened).content == model.content
    assert jr.verify(model, hardened).equivalent


def _outputs(path: Path) -> list[float]:
    session = ort.InferenceSession(os.fspath(path))
    return list(session.run(None, {"x": np.array([-1, -1, 0, 0], np.float32)})[0].tolist())


def test_36_the_data_is_left_in_the_same_folder_and_copied_to_another(
    external: Path, tmp_path: Path
) -> None:
    hardened = jr.retrofit(jr.load(external), jump=0.5).model
    jr.save(hardened, external.with_name("h.onnx"))
    assert sorted(os.listdir(external.parent)) == ["h.onnx", "m.onnx", "w.bin"]
    (tmp_path / "other").mkdir()
    jr.save(hardened, tmp_path / "other" / "h.onnx")
    copied = tmp_path / "other" / "w.bin"
    assert copied.stat().st_nlink == external.with_name("w.bin").stat().st_nlink == 1
    for path in (external.with_name("h.onnx"), tmp_path / "other" / "h.onnx"):
        assert _outputs(path) == [0, 0, 2, 3]
    assert _outputs(external) == [0, 0, 2, 3], "the original still loads"


def test_36_other_data_of_that_name_is_not_overwritten(external: Path, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"w.bin: is there already with other data"):
        jr.save(jr.retrofit(jr.load(external), jump=1).model, tmp_path / "h.onnx")
    assert (tmp_path / "w.bin").read_bytes() == b"precious"
    assert not (tmp_path / "h.onnx").exists()


@pytest.mark.parametrize("location", ["/etc/passwd", "../w.bin", "a/../../w.bin", "C:\\w.bin", ""])
def test_36_data_outside_the_folder_is_refused(
    external: Path, tmp_path: Path, location: str
) -> None:
    proto = jr.load(external).parse()
    proto.graph.initializer[0].external_data[0].value = location
    external.write_bytes(proto.SerializeToString())
    with pytest.raises(ExternalDataError, match="expected a file inside the model's folder"):
        jr.save(jr.load(external), tmp_path / "h.onnx")


def test_36_a_link_out_of_the_folder_is_refused(external: Path, tmp_path: Path) -> None:
    external.with_name("w.bin").rename(tmp_path / "w.bin")
    external.with_name("w.bin").symlink_to(tmp_path / "w.bin")
    (tmp_path / "other").mkdir()
    with pytest.raises(ExternalDataError, match="outside the model's folder"):
        jr.save(jr.load(external), tmp_path / "other" / "h.onnx")


def test_36_missing_data_is_named(external: Path, tmp_path: Path) -> None:
    external.with_name("w.bin").unlink()
    with pytest.raises(ExternalDataError, match=r"data file 'w.bin' is missing"):
        jr.save(jr.load(external), tmp_path / "h.onnx")


def test_37_writing_over_the_input_leaves_its_data_alone(external: Path) -> None:
    before, data = external.read_bytes(), external.with_name("w.bin").read_bytes()
    jr.save(jr.retrofit(jr.load(external), jump=0.5).model, external, force=True)
    assert external.with_name("w.bin").read_bytes() == data
    jr.save(jr.restore(jr.load(external)), external, force=True)
    assert external.read_bytes() == before


def test_37_a_failed_write_leaves_the_old_file(
    external: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = external.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        jr.save(jr.retrofit(jr.load(external), jump=0.5).model, external, force=True)
    assert external.read_bytes() == before
    assert sorted(os.listdir(external.parent)) == ["m.onnx", "w.bin"]


@pytest.fixture
def near_the_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A model that fits as it is, and not with a jump; the limit is lowered to make it small."""
    proto = parse("g (float[4] x) => (float[4] y) { s = ReduceMax(big) z = Sub(s, s) a = Add(x, w) "
                  "b = Add(a, z) y = Relu(b) }")  # fmt: skip
    for name, size in (("unused", 30_000), ("w", 4), ("big", 40_000)):
        array = np.arange(size, dtype=np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    monkeypatch.setattr("jr_onnx.model.model.LARGEST", path.stat().st_size + 100)
    return path


def test_38_near_2_gib_the_largest_weights_go_to_a_file(near_the_limit: Path) -> None:
    model = jr.load(near_the_limit)
    hardened = check(model).model
    assert len(hardened.content) < 130_000
    assert Session(hardened, device="cpu").run({"x": np.zeros(4, np.float32)})[0].tolist() == [
        0, 1, 2, 3
    ]  # fmt: skip
    out = near_the_limit.with_name("h.onnx")
    jr.save(hardened, out)
    (location,) = hardened.attachments
    loaded = jr.load(out)
    assert jr.verify(model, loaded).equivalent
    assert _outputs(out) == [0, 0, 2, 3]
    data = out.with_name(location)
    data.write_bytes(data.read_bytes()[:-4] + b"\0\0\0\0")
    assert [each.what for each in jr.verify(model, loaded).differences] == [
        f"other weights in {location}"
    ]
    data.write_bytes(b"short")
    with pytest.raises(ExternalDataError, match="are cut off"):
        jr.restore(loaded)
    data.unlink()
    with pytest.raises(ExternalDataError, match="Put the file beside the model"):
        jr.restore(loaded)


def test_38_a_model_too_large_for_any_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seal(parse(RELU))
    monkeypatch.setattr("jr_onnx.model.model.LARGEST", len(model.content) + 100)
    with pytest.raises(ModelError, match=r"its initializers hold only 0\. Save its weights"):
        jr.retrofit(model, jump=0.5)


def test_39_a_relu_whose_output_is_an_output_or_captured() -> None:
    text = """g (bool c, float[n] x) => (float[n] y, float[n] z) {
        y = Relu(x)
        z = If (c) <then_branch = t () => (float[n] p) { p = Neg(y) },
                    else_branch = e () => (float[n] q) { q = Abs(y) }>
    }"""
    y, z = run(check(seal(parse(text))).model, c=np.array(True), x=X)
    assert y.tolist() == jumped(X)
    assert (-z).tolist() == jumped(X)


def test_40_infinity_passes_a_clip_that_has_no_upper_bound() -> None:
    model = one("y = Clip(x, z)", z=ZERO)
    assert run(check(model).model, x=X)[0][-1] == np.inf


def test_41_no_weights_are_read(tmp_path: Path) -> None:
    """Three GB of data that is not even there: a sparse file without a block on disk."""
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(3 * 2**30)
    proto = parse("g (float[1] x) => (float[1] y) { y = Relu(x) }")
    tensor = TensorProto(name="w", dims=[3 * 2**28], data_type=F32)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")
    proto.graph.initializer.append(tensor)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    before = _bytes_read()
    model = jr.load(tmp_path / "m.onnx")
    jr.save(jr.retrofit(model, jump=0.5).model, tmp_path / "h.onnx")
    jr.save(jr.restore(jr.load(tmp_path / "h.onnx")), tmp_path / "b.onnx")
    assert _bytes_read() - before < 2**20
    assert (tmp_path / "b.onnx").read_bytes() == model.content


def _bytes_read() -> int:
    counters = Path("/proc/self/io")
    if not counters.exists():
        pytest.skip("needs /proc/self/io to count the bytes read")
    return int(counters.read_text().split("rchar: ")[1].split()[0])


def test_42_a_constant_with_2000_consumers() -> None:
    body = " ".join(f"a{i} = Add(a{i - 1}, c) b{i} = Relu(a{i})" for i in range(1, 2001))
    text = f"g (float[n] a0) => (float[n] y) <float c = {{0.001}}> {{ {body} y = Neg(b2000) }}"
    model = seal(parse(text))
    result = jr.retrofit(model, jump=0.5)
    assert len(result.sites) == 2000
    assert jr.restore(result.model).content == model.content


@pytest.mark.parametrize(
    "text",
    [
        "a = Add(x, t) c = Clip(a, z, s) m = Mul(x, c) y = Div(m, s)",
        "a = Add(t, x) c = Clip(a, z, s) d = Div(c, s) y = Mul(x, d)",
        "a = Add(x, t) c = Clip(a, z, s) y = Mul(c, k)",
        "m = Mul(x, k) a = Add(m, h) c = Clip(a, z, o) y = Mul(c, x)",
    ],
)
def test_43_a_decomposed_hard_swish_or_hard_sigmoid_is_left_alone(text: str) -> None:
    model = one(text, t=np.float32(3), z=ZERO, s=SIX, k=np.float32(1 / 6), h=np.float32(0.5),
                o=np.float32(1))  # fmt: skip
    with pytest.raises(NothingToRewriteError, match="part of a decomposed hard-swish"):
        jr.retrofit(model, jump=0.5)


def test_44_relus_only_in_branches() -> None:
    text = """g (bool c, float[n] x) => (float[n] z) {
        z = If (c) <then_branch = t () => (float[n] p) { p = Relu(x) },
                    else_branch = e () => (float[n] q) { q = Relu(x) }>
    }"""
    assert paths(check(seal(parse(text)))) == ["z.then_branch>p", "z.else_branch>q"]


def test_45_weights_held_in_constants() -> None:
    text = """g (float[n] x) => (float[n] y) {
        z = Constant<value = float {0.0}>() s = Constant<value_float = 6.0>()
        a = Clip(x, z, s)
        k = Constant<value = float[1] {0.0}>() y = Max(k, a)
    }"""
    result = check(seal(parse(text)))
    assert [site.site.op_type for site in result.sites] == ["Clip", "Max"]
    assert run(result.model, x=X)[0].tolist() == jumped(X, cap=6)


def test_46_models_with_other_activations_only() -> None:
    model = one("a = PRelu(x, s) y = HardSwish(a)", s=np.float32(0.2))
    with pytest.raises(NothingToRewriteError) as caught:
        jr.retrofit(model, jump=0.5)
    assert "a (PRelu): its slopes below 0 are not all 0" in str(caught.value)
    assert "y (HardSwish): HardSwish is no ReLU" in str(caught.value)


@pytest.mark.parametrize(
    ("node", "weights"),
    [
        ("y = LeakyRelu<alpha = 0.0>(x)", {}),
        ("y = PRelu(x, s)", {"s": np.zeros(1, np.float32)}),
        ("y = ThresholdedRelu<alpha = 2.0>(x)", {}),
    ],
)
def test_other_spellings_of_relu(node: str, weights: dict[str, Any]) -> None:
    assert run(check(one(node, **weights)).model, x=X)[0].tolist() == jumped(X)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("m = ReduceMean(x) q = Mul(m, m) v = Sub(x, q) y = Max(v, z)", "keeps a variance"),
        ("m = ReduceMean(x) q = Pow(m, t) v = Sub(x, q) y = Clip(v, z)", "keeps a variance"),
        ("b = LessOrEqual(x, t) y = Where(b, z, x)", "a threshold already, spelled LessOrEqual"),
        ("b = Greater(x, z) y = Where(b, x, z)", "a threshold already, spelled Greater"),
        ("b = Greater(x, t) c = Cast<to=1>(b) y = Mul(x, c)", "spelled Greater and Mul"),
        ("b = Less(t, x) c = Cast<to=1>(b) y = Mul(c, x)", "spelled Less and Mul"),
        ("i = Cast<to=7>(x) c = Clip(i, k) y = Gather(x, c)", "used as indices or shapes"),
        ('y, h = RNN<hidden_size=1, activations=["Relu"]>(x, z, z)', "computes a Relu inside"),
    ],
)
def test_what_only_looks_like_an_activation_is_left_with_its_reason(text: str, reason: str) -> None:
    weights: dict[str, Any] = {"z": ZERO, "t": np.float32(2), "k": np.int64(0)}
    _, skipped = jr.find_sites(one(text, **weights))
    assert [reason in entry.reason for entry in skipped] == [True]


def test_two_sites_of_one_path_are_told_apart_by_leaving_one() -> None:
    text = """g (bool c, float[n] x) => (float[n] z) {
        "w.then_branch>p" = Relu(x)
        w = If (c) <then_branch = t () => (float[n] p) { p = Relu(x) },
                    else_branch = e () => (float[n] q) { q = Neg(x) }>
        z = Add(w, "w.then_branch>p")
    }"""
    sites, skipped = jr.find_sites(seal(parse(text)))
    assert [site.path for site in sites] == [entry.path for entry in skipped]


def test_a_jump_that_reaches_the_cap_is_refused() -> None:
    with pytest.raises(ParameterError, match="y: jump 6 must be below the upper bound 6"):
        jr.retrofit(one("y = Clip(x, z, s)", z=ZERO, s=SIX), jump=6)


def test_a_jump_for_each_channel() -> None:
    model = seal(parse("g (float[n,3,2] x) => (float[n,3,2] y) { y = Relu(x) }"))
    x = np.linspace(-1, 2, 12, dtype=np.float32).reshape(2, 3, 2)
    jumps = (0.0, 0.5, 1.5)
    for form in ("sub-greater-where", "greater-where", "lessequal-where", "mul-cast", "function"):
        result = jr.retrofit(model, jump=jumps, form=form)
        assert jr.verify(model, result.model).jumps == {"y": jumps}
        expected = np.where(x > np.array(jumps, np.float32).reshape(3, 1), x, 0)
        assert np.array_equal(run(result.model, x=x)[0], expected)
        assert jr.restore(result.model).content == model.content
    with pytest.raises(ParameterError, match="2 jumps for 3 channels"):
        jr.retrofit(model, jump=(1.0, 2.0))
    with pytest.raises(ParameterError, match="ThresholdedRelu takes one number"):
        jr.retrofit(model, jump=jumps, form="thresholded-relu")


HIDDEN = {
    "FusedConv": 'y = ms.FusedConv<activation = "Relu">(x, w)',
    "FusedGemm": 'y = ms.FusedGemm<activation = "Relu">(x, w)',
    "QLinearConv": "y = QLinearConv(x, s, p, w, s, p, s, p)",
    "QuantizeLinear": "a = MatMul(x, w) y = QuantizeLinear(a, s, p)",
}


@pytest.mark.parametrize("op_type", HIDDEN)
def test_an_activation_hidden_in_another_operator_is_refused(op_type: str) -> None:
    imports = "['': 18, 'ms': 1]".replace("'", '"')
    text = f"g (float[n] x) => (float[n] r) {{ {HIDDEN[op_type]} r = Relu(x) }}"
    proto = onnx.parser.parse_model(f"<ir_version: 8, opset_import: {imports}> {text}")
    for entry in (*proto.graph.node, *proto.opset_import):
        entry.domain = entry.domain.replace("ms", "com.microsoft")
    for name, value in (("w", np.float32(1)), ("s", np.float32(1)), ("p", np.uint8(0))):
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    model = seal(proto)
    with pytest.raises(HiddenActivationError, match="retrofit the model before it is") as caught:
        jr.retrofit(model, jump=0.5)
    assert f"y ({op_type})" in str(caught.value)
    result = jr.retrofit(model, jump=0.5, partial=True)
    assert paths(result) == ["r"]
    assert [entry.hidden for entry in result.skipped] == [True]


def test_force_keeps_the_changes_that_others_made() -> None:
    hardened = check(seal(parse(RELU))).model.parse()
    hardened.producer_name = "somebody else"
    changed = seal(hardened)
    with pytest.raises(jr.errors.NotRetrofittedError, match="was edited after it was hardened"):
        jr.retrofit(changed, jump=0.7)
    result = jr.retrofit(changed, jump=0.7, force=True)
    assert result.original.proto.producer_name == "somebody else"
    assert result.sites[0].jump == 0.7
    plain = jr.restore(changed, force=True).proto
    assert [node.op_type for node in plain.graph.node] == ["Relu"]
