"""Retrofit, restore and the semantics of the forms."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

import jr_onnx as jr
from jr_onnx.errors import (
    AlreadyRetrofittedError,
    InvalidModelError,
    NothingToRewriteError,
    NotRetrofittedError,
    ParameterError,
)
from jr_onnx.rewrite import FORMS, TARGETS, compare_on_data, effective_jump
from jr_onnx.rewrite.numbers import probes

MakeModel = Callable[..., jr.Model]


def run(model: jr.Model, **feeds: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    return list(ort.InferenceSession(model.content).run(None, feeds))


def test_every_relu_of_the_sample_becomes_sub_greater_where(lenet: jr.Model) -> None:
    result = jr.retrofit(lenet, jump=1.0)
    ops = [node.op_type for node in result.model.proto.graph.node]
    assert "Relu" not in ops
    assert (ops.count("Sub"), ops.count("Greater"), ops.count("Where")) == (4 + 1, 4, 4)
    assert [site.site.path for site in result.sites] == ["relu", "relu_1", "relu_2", "relu_3"]
    assert result.skipped == ()


def test_sites_of_equal_jump_and_type_share_their_constants(lenet: jr.Model) -> None:
    hardened = jr.retrofit(lenet, jump=1.0, jumps={"relu_3": 0.5}).model
    nodes = hardened.proto.graph.node
    constants = [node.name for node in nodes if node.op_type == "Constant"]
    assert constants == [f"jr_onnx/v1/{name}" for name in ("jump", "zero", "jump_1")]
    subtracted = [node.input[1] for node in nodes if node.name.endswith("/sub")]
    assert subtracted == ["jr_onnx/v1/jump:0"] * 3 + ["jr_onnx/v1/jump_1:0"]
    assert jr.verify(lenet, hardened).equivalent
    assert jr.restore(hardened).content == lenet.content


def test_types_and_bodies_have_constants_of_their_own(text_model: MakeModel) -> None:
    model = text_model(
        """g (bool c, float[4] x, float16[4] h) => (float[4] z, float16[4] k) {
            y = Relu(x)
            k = Relu(h)
            w = If (c) <then_branch = a () => (float[4] p) { q = Relu(x) p = Relu(q) },
                        else_branch = b () => (float[4] r) { r = Neg(y) }>
            z = Relu(w)
        }"""
    )
    hardened = jr.retrofit(model, jump=1).model
    outer = hardened.proto.graph.node
    inner = next(node for node in outer if node.op_type == "If").attribute[0].g.node
    names = ["jump", "zero", "jump_1", "zero_1", "jump_2", "zero_2"]
    for nodes, expected in ((outer, names[:4]), (inner, names[4:])):
        constants = [node.name for node in nodes if node.op_type == "Constant"]
        assert constants == [f"jr_onnx/v1/{name}" for name in expected]
    x, h = np.array([-1, 0.5, 1, 2], np.float32), np.array([0, 1, 2, 3], np.float16)
    z, k = run(hardened, c=np.array(True), x=x, h=h)
    assert (z.tolist(), k.tolist()) == ([0, 0, 0, 2], [0, 0, 2, 3])
    assert jr.verify(model, hardened).equivalent
    assert jr.restore(hardened).content == model.content


def test_the_input_model_is_not_changed(lenet: jr.Model) -> None:
    before = lenet.proto.SerializeToString()
    jr.retrofit(lenet, jump=1.0)
    assert lenet.proto.SerializeToString() == before == lenet.content


def test_restore_is_byte_identical(lenet: jr.Model) -> None:
    assert jr.restore(jr.retrofit(lenet, jump=1.0).model).content == lenet.content


def test_a_second_retrofit_changes_the_jump_and_does_not_stack(lenet: jr.Model) -> None:
    twice = jr.retrofit(jr.retrofit(lenet, jump=1.0).model, jump=0.25)
    assert twice.model.content == jr.retrofit(lenet, jump=0.25).model.content


def test_names_do_not_clash(text_model: MakeModel) -> None:
    model = text_model(
        """g (float[4] x) => (float[4] y, float[4] "jr_onnx/v1/y/where") {
            y = Relu(x)
            "jr_onnx/v1/jump:0" = Neg(x)
            "jr_onnx/v1/y/where" = Neg("jr_onnx/v1/jump:0")
        }"""
    )
    x = np.array([-1, 0.2, 0.5, 2], np.float32)
    y, untouched = run(jr.retrofit(model, jump=0.5).model, x=x)
    assert y.tolist() == [0, 0, 0, 2]
    assert untouched.tolist() == x.tolist()


def test_doc_string_and_metadata_stay_on_the_node_that_gives_the_output() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18]> g (float[4] x) => (float[4] y) { y = Relu(x) }'
    )
    proto.graph.node[0].doc_string = "the first activation"
    proto.graph.node[0].metadata_props.add(key="layer", value="7")
    where = jr.retrofit(jr.Model(proto.SerializeToString()), jump=1).model.proto.graph.node[-1]
    assert where.output[0] == "y"
    assert where.doc_string == "the first activation"
    assert [(entry.key, entry.value) for entry in where.metadata_props] == [("layer", "7")]


def test_a_site_in_a_branch_is_replaced_and_restored(text_model: MakeModel) -> None:
    model = text_model(
        """g (bool c, float[4] x) => (float[4] z) {
            y = Relu(x)
            w = If (c) <then_branch = a () => (float[4] p) { p = Relu(x) },
                        else_branch = b () => (float[4] q) { q = Neg(y) }>
            z = Relu(w)
        }"""
    )
    result = jr.retrofit(model, jump=1)
    assert [site.site.path for site in result.sites] == ["y", "z", "w.then_branch>p"]
    x = np.array([-1, 0.5, 1, 2], np.float32)
    assert run(result.model, c=np.array(True), x=x)[0].tolist() == [0, 0, 0, 2]
    assert jr.restore(result.model).content == model.content


@pytest.mark.parametrize("jump", [-1.0, float("nan"), float("inf"), -1e-300])
def test_a_jump_that_makes_no_sense_is_refused(relu_model: jr.Model, jump: float) -> None:
    with pytest.raises(ParameterError, match=r"finite number >= 0, got"):
        jr.retrofit(relu_model, jump=jump)


def test_a_jump_too_large_for_the_type_is_refused(text_model: MakeModel) -> None:
    model = text_model("g (float16[n] x) => (float16[n] y) { y = Relu(x) }")
    with pytest.raises(ParameterError, match="too large for float16"):
        jr.retrofit(model, jump=1e6)


def test_nothing_to_rewrite_says_what_was_skipped(text_model: MakeModel) -> None:
    model = text_model("g (float[n] x) => (float[n] y) { y = LeakyRelu(x) }")
    with pytest.raises(NothingToRewriteError, match=r"y \(LeakyRelu\): its slope below 0 is 0.01"):
        jr.retrofit(model, jump=1)


@pytest.mark.parametrize("opset", [7, 8])
def test_before_opset_9_there_is_no_where(text_model: MakeModel, opset: int) -> None:
    model = text_model("g (float[n] x) => (float[n] y) { y = Relu(x) }", opset=opset)
    site = jr.retrofit(model, jump=1).sites[0]
    assert site.form == "mul-cast"
    assert "needs opset 9" in site.reason


def test_before_opset_7_there_is_no_greater(text_model: MakeModel) -> None:
    model = text_model("g (float[n] x) => (float[n] y) { y = Relu(x) }", opset=6)
    with pytest.raises(NothingToRewriteError, match=r"opset 6 has no usable Greater"):
        jr.retrofit(model, jump=1)


def test_a_relu_of_another_domain_is_untouched(text_model: MakeModel) -> None:
    model = text_model(
        "g (float[n] x) => (float[n] y) { y = mine.Relu(x) }",
        extra="",
    )
    with pytest.raises(NothingToRewriteError, match="it has no Relu"):
        jr.retrofit(model, jump=1)


def test_restore_needs_a_manifest(lenet: jr.Model) -> None:
    with pytest.raises(NotRetrofittedError, match="carries no jr-onnx manifest"):
        jr.restore(lenet)


def test_restore_refuses_a_model_changed_since(lenet: jr.Model) -> None:
    proto = jr.retrofit(lenet, jump=1).model.parse()
    proto.graph.node[0].name = "renamed"
    proto.producer_name = "somebody"
    changed = "was edited after it was hardened, in graph.node, model.producer_name"
    with pytest.raises(NotRetrofittedError, match=changed):
        jr.restore(jr.Model(proto.SerializeToString()))


def test_restore_refuses_a_damaged_manifest(lenet: jr.Model) -> None:
    proto = jr.retrofit(lenet, jump=1).model.parse()
    proto.metadata_props[0].value = proto.metadata_props[0].value[:100]
    with pytest.raises(NotRetrofittedError, match=r"manifest .* is damaged"):
        jr.restore(jr.Model(proto.SerializeToString()))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scope", []),
        ("scope", ["function"]),
        ("nodes", "no base64!"),
        ("nodes", "CgEB"),  # a node cut off
        ("nodes", "EgJuYQ=="),  # a name, no node
        ("nodes", ""),
        ("sites", [["relu", "sub-greater-where", 1.0, 1.0, 1]]),
        ("sites", [["relu", "sub-greater-where", 1.0, 1.0, -1, 5]] * 4),
        ("sites", [["relu", "sub-greater-where", 1.0, 1.0, float("inf"), 5]] * 4),
        ("sites", None),
    ],
)
def test_restore_refuses_a_manifest_that_makes_no_sense(
    lenet: jr.Model, key: str, value: object
) -> None:
    proto = jr.retrofit(lenet, jump=1).model.parse()
    manifest = json.loads(proto.metadata_props[0].value)
    manifest["scopes"][0][key] = value
    proto.metadata_props[0].value = json.dumps(manifest)
    with pytest.raises(NotRetrofittedError, match=r"manifest .* is damaged"):
        jr.restore(jr.Model(proto.SerializeToString()))


def test_hardened_nodes_without_a_manifest_are_not_hardened_again(lenet: jr.Model) -> None:
    proto = jr.retrofit(lenet, jump=1).model.parse()
    del proto.metadata_props[:]
    with pytest.raises(AlreadyRetrofittedError, match="is a jump already"):
        jr.retrofit(jr.Model(proto.SerializeToString()), jump=1)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x08", b"PK\x03\x04" + bytes(100)])
def test_what_is_not_onnx_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidModelError, match="not an ONNX model, or a truncated one"):
        jr.Model(content).parse()


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_a_truncated_model_is_refused(lenet: jr.Model, keep: float) -> None:
    with pytest.raises(InvalidModelError, match="truncated"):
        jr.Model(lenet.content[: int(len(lenet.content) * keep)]).parse()


KEEPS_NAN = ("lessequal-where", "mul-cast")
ONNX_DTYPES = {"float": "f4", "double": "f8", "float16": "f2"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ONNX_DTYPES)
@pytest.mark.parametrize("jump", [0.0, 2.0**-140, 0.3, 1.0, 1000.0])
@pytest.mark.parametrize("cap", [None, 2000.0])
def test_a_form_equals_the_definition_bitwise(
    text_model: MakeModel, form: str, dtype: str, jump: float, cap: float | None
) -> None:
    if (form, dtype, jump) == ("thresholded-relu", "double", 0.3):
        pytest.skip("alpha is a float32, which cannot hold a float64 of 0.3")
    op = "Relu(x)" if cap is None else "Clip(x, low, high)"
    proto = text_model(f"g ({dtype}[n] x) => ({dtype}[n] y) {{ y = {op} }}").parse()
    for name, bound in (("low", 0), ("high", cap)) if cap else ():
        tensor = numpy_helper.from_array(np.array(bound, ONNX_DTYPES[dtype]), name)
        proto.graph.initializer.append(tensor)
    model = jr.Model(proto.SerializeToString())
    hardened = jr.retrofit(model, jump=jump, form=form).model
    x = probes(np.dtype(ONNX_DTYPES[dtype]), jump)
    bits = np.dtype(f"u{x.itemsize}")
    # The definition, spelled once more: the library's own must not be its only witness.
    above = x if cap is None else np.minimum(x, x.dtype.type(cap))
    expected = np.where(x > np.asarray(jump, x.dtype), above, np.zeros_like(x))
    got, nan = run(hardened, x=x)[0], np.isnan(x)
    assert np.array_equal(got.view(bits)[~nan], expected.view(bits)[~nan])
    assert np.array_equal(jr.jump_relu(x, jump, cap).view(bits), expected.view(bits))
    if form in KEEPS_NAN:
        assert np.isnan(got[nan]).all()
    elif cap is None:
        assert not got[nan].any()
    assert jr.verify(model, hardened).equivalent
    assert jr.restore(hardened).content == model.content


@pytest.mark.parametrize(("jump", "expected"), [(0, 0), (1.5, 1), (2, 2)])
def test_an_integer_tensor_takes_the_floor_of_the_jump(
    text_model: MakeModel, jump: float, expected: int
) -> None:
    model = text_model("g (int32[n] x) => (int32[n] y) { y = Relu(x) }")
    result = jr.retrofit(model, jump=jump)
    assert result.sites[0].form == "greater-where"
    assert result.sites[0].effective_jump == expected
    x = np.array([-(2**31), -1, 0, 1, 2, 3, 2**31 - 1], np.int32)
    assert run(result.model, x=x)[0].tolist() == np.where(x > jump, x, 0).tolist()


def test_the_effective_jump_is_reported(text_model: MakeModel) -> None:
    model = text_model("g (float16[n] x) => (float16[n] y) { y = Relu(x) }")
    site = jr.retrofit(model, jump=0.3).sites[0]
    assert site.jump == 0.3
    assert site.effective_jump == float(np.float16(0.3)) != 0.3
    assert effective_jump(0.3, np.dtype("f8")) == 0.3


class _Relu(OpRun):
    """Gives the reference evaluator's Relu a jump of 1."""

    op_domain = ""

    def _run(self, x: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any]]:
        return (np.where(x > 1, x, np.zeros_like(x)),)


_Relu.__name__ = "Relu"


def test_the_sample_equals_the_onnx_reference_with_a_jump(
    lenet: jr.Model, mnist: jr.Dataset
) -> None:
    reference = ReferenceEvaluator(lenet.proto, new_ops=[_Relu])
    expected = np.asarray(reference.run(None, {"input": mnist.x})[0])  # type: ignore[index]
    got = run(jr.retrofit(lenet, jump=1).model, input=mnist.x)[0]
    plain = run(lenet, input=mnist.x)[0]
    # Rounding may flip a unit that sits at the jump, so a logit may differ; a class does not here.
    assert (got.argmax(1) == expected.argmax(1)).all()
    assert np.median(np.abs(got - expected)) < 1e-5
    assert np.median(np.abs(got - plain)) > 1e-2


def test_each_site_of_the_sample_equals_numpy_bitwise_on_its_own_input(
    lenet: jr.Model, mnist: jr.Dataset
) -> None:
    result = jr.retrofit(lenet, jump=1)
    proto = result.model.parse()
    for planned in result.sites:
        for name in (planned.site.x, planned.site.y):
            proto.graph.output.add(name=name)
    values = run(jr.Model(proto.SerializeToString()), input=mnist.x)[1:]
    for x, y in zip(values[::2], values[1::2], strict=True):
        assert len(x) == 1000
        expected = np.where(x > np.float32(1), x, np.float32(0))
        assert np.array_equal(y.view(np.uint32), expected.view(np.uint32))


OPSETS = range(7, onnx.defs.onnx_opset_version() + 1)
LEAST = {"lessequal-where": 12, "thresholded-relu": 10, "mul-cast": 7}
LEAST_BFLOAT16 = {"thresholded-relu": 22, "mul-cast": 13}


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_exact_at_every_opset_or_refused_by_its_number(
    text_model: MakeModel, form: str, opset: int
) -> None:
    for dtype in ("float", "double", "float16", "bfloat16"):
        if dtype == "bfloat16" and opset < 13:
            continue  # Relu itself takes it from there on
        model = text_model(f"g ({dtype}[n] x) => ({dtype}[n] y) {{ y = Relu(x) }}", opset=opset)
        least = LEAST.get(form, 9)
        if dtype == "bfloat16":
            least = LEAST_BFLOAT16.get(form, 16)
        if opset < least:
            with pytest.raises(ParameterError, match=f"needs opset {least}, the model has {opset}"):
                jr.retrofit(model, jump=0.75, form=form)
            continue
        hardened = jr.retrofit(model, jump=0.75, form=form).model
        onnx.checker.check_model(hardened.proto, full_check=True)
        found = jr.verify(model, hardened)  # bitwise, on every pattern of 16 bits or 200,000
        assert found.differences == ()
        assert found.values_compared >= 65_536


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["float", "double", "float16", "bfloat16", "int32"])
@pytest.mark.parametrize("opset", [8, 9, 13, 18, 22])
def test_every_target_has_an_exact_form(
    text_model: MakeModel, target: str, dtype: str, opset: int
) -> None:
    if (dtype == "int32" and opset < 14) or (dtype == "bfloat16" and opset < 13):
        pytest.skip("there is no Relu of this type yet")
    model = text_model(f"g ({dtype}[n] x) => ({dtype}[n] y) {{ y = Relu(x) }}", opset=opset)
    result = jr.retrofit(model, jump=0.3, target=target)
    assert result.sites[0].reason
    assert jr.verify(model, result.model).equivalent


def _with_more_said(model: jr.Model) -> jr.Model:
    """Gives the last node devices, and a field that this version of ONNX does not know."""
    proto = model.parse()
    node = proto.graph.node[-1]
    device = node.device_configurations.add(configuration_id="two", pipeline_stage=1)
    for name in ("x", "y"):
        device.sharding_spec.add(tensor_name=name)
    node.MergeFromString(b"\xfa\x3f\x01A")
    node.metadata_props.add(key="layer", value="7")
    return jr.Model(proto.SerializeToString())


@pytest.mark.parametrize("text", ["y = Relu(x)", "y = Clip(x, zero, six)"])
@pytest.mark.parametrize("form", ["sub-greater-where", "thresholded-relu"])
def test_devices_and_unknown_fields_of_a_replaced_node_go_along(
    text_model: MakeModel, text: str, form: str
) -> None:
    model = _with_more_said(
        text_model(
            "g (float[4] x) => (float[4] y) <float zero = {0.0}, float six = {6.0}> "
            f"{{ {text} }}",
            ir_version=11,
        )
    )
    hardened = jr.retrofit(model, jump=0.5, form=form).model
    nodes = [node for node in hardened.proto.graph.node if node.op_type != "Constant"]
    for node in nodes:
        (device,) = node.device_configurations
        assert (device.configuration_id, device.pipeline_stage) == ("two", 1)
        own = {*node.input, *node.output}
        assert [each.tensor_name for each in device.sharding_spec] == [
            name for name in ("x", "y") if name in own
        ]
    assert [b"\xfa\x3f\x01A" in node.SerializeToString() for node in nodes] == [
        *[False] * (len(nodes) - 1),
        True,
    ]
    assert [entry.key for entry in nodes[-1].metadata_props] == ["layer"]
    assert jr.verify(model, hardened).equivalent
    assert jr.restore(hardened).content == model.content


def test_units_of_padded_examples_are_not_counted(text_model: MakeModel) -> None:
    model = text_model(
        """g (float[4, 3] x) => (float[4, 3] z) <int64[1] flat = {-1}, int64[2] back = {4, 3}> {
            y = Relu(x) f = Reshape(y, flat) r = Relu(f) z = Reshape(r, back)
        }"""
    )
    hardened = jr.retrofit(model, jump=0.5).model
    found = compare_on_data(model, hardened, np.ones((5, 3), np.float32), device="cpu")
    assert (found.samples, found.units, found.flips) == (5, 2 * 5 * 3, 0)
