"""Types that are carried along are those that onnx infers."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import onnx
import pytest
from onnx import defs

import jr_onnx as jr
from jr_onnx.model import ValueTypes
from jr_onnx.model import types as module
from jr_onnx.model.graphs import WITH_GRAPHS

MakeModel = Callable[..., jr.Model]
_GRAPHS = (defs.OpSchema.AttrType.GRAPH, defs.OpSchema.AttrType.GRAPHS)


def test_the_operators_with_graphs_are_those_of_the_schemas() -> None:
    found = {
        schema.name
        for schema in defs.get_all_schemas_with_history()
        if schema.domain == "" and any(each.type in _GRAPHS for each in schema.attributes.values())
    }
    assert found == WITH_GRAPHS


def _refuse(proto: onnx.ModelProto) -> onnx.ModelProto:
    raise AssertionError("inferred")


TEXT = """g (float16[n, 4] x, bool c) => (float16[n, 4] z)
    <float16[4, 4] w = {{{zeros}}}, int64[2] sizes = {{2, 2}}> {{
        a = MatMul(x, w)
        b = Relu(a)
        d, e = Split<axis = 1>(b, sizes)
        f = Concat<axis = 1>(d, e)
        g = If (c) <then_branch = t () => (float16[n, 4] p) {{ h = Relu(f) p = Relu(h) }},
                    else_branch = u () => (float16[n, 4] q) {{ q = Neg(f) }}>
        z = Neg(g)
    }}""".format(zeros=", ".join("0" * 16))


def test_element_types_are_carried_without_inference(
    text_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = text_model(TEXT)
    monkeypatch.setattr(module, "_inferred", _refuse)
    types = ValueTypes(model)
    found = {
        name: types.of(scope, name).element
        for scope in model.scopes
        for node in scope.graph.node
        for name in node.output
        if node.op_type != "If"  # whose schema leaves the types to its branches
    }
    assert found == dict.fromkeys("abdefzhpq", onnx.TensorProto.FLOAT16)


def test_retrofit_infers_only_what_it_needs(
    text_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = text_model(TEXT)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_inferred", _refuse)
        jr.retrofit(model, jump=0.5)
    shapes = [done.site.tensor.shape for done in jr.retrofit(model, jump=0.5).sites]
    assert shapes == [("n", 4)] * 3


@pytest.mark.parametrize(
    ("node", "element"),
    [
        ("y = Cast<to = 11>(x)", onnx.TensorProto.DOUBLE),
        ("y = Shape(x)", onnx.TensorProto.INT64),
        ("y = Greater(x, x)", onnx.TensorProto.BOOL),
        ("y = mine.Relu(x)", 0),
    ],
)
def test_an_operator_with_another_output_type_carries_nothing(
    text_model: MakeModel, node: str, element: int
) -> None:
    model = text_model(f"g (float[n] x) => (float[n] z) {{ {node} z = Neg(x) }}")
    assert ValueTypes(model).of(model.scopes[0], "y").element == element


def test_tensors_are_equal_by_what_is_known() -> None:
    one, other = jr.model.Tensor(1, lambda: (2, "n")), jr.model.Tensor(1, (2, "n"))
    assert one == other
    assert hash(one) == hash(other)
    assert repr(one) == "Tensor(1, (2, 'n'))"
    assert one != jr.model.Tensor(1)
    assert one != 1
    lazy = jr.model.Tensor(1, lambda: (2, "n"))
    assert pickle.loads(pickle.dumps(lazy)) == lazy
