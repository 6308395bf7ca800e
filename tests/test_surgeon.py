"""The adapter for gs.Graph: the engine's sites and outputs, nothing lost, nothing changed."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.backend.test
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper

import jr_onnx as jr
from jr_onnx.errors import (
    AlreadyRetrofittedError,
    HiddenActivationError,
    InvalidModelError,
    JrOnnxError,
    ModelError,
    NothingToRewriteError,
    ParameterError,
    PostconditionError,
    RewriteError,
)
from jr_onnx.rewrite import FORMS, find_sites
from jr_onnx.rewrite.surgeon import (
    DROPPABLE,
    SurgeonRetrofit,
    adapter,
    find_graph_sites,
    import_model,
    retrofit_graph,
)

gs = pytest.importorskip("onnx_graphsurgeon")

MakeModel = Callable[..., jr.Model]
Edit = Callable[[onnx.ModelProto], object]
Array = np.ndarray[Any, Any]
WHEEL = Path(onnx.backend.test.__file__).parent / "data"
JUMP = 0.5


def exported(graph: Any) -> jr.Model:
    return jr.Model.of(gs.export_onnx(graph))


def imported(model: jr.Model) -> Any:
    """Lets gs import what `import_model` refuses, without its words on that."""
    with gs.logger.G_LOGGER.suppress(gs.logger.G_LOGGER.CRITICAL + 1):
        return gs.import_onnx(model.parse())


def run(model: jr.Model, feeds: dict[str, Array]) -> list[Array]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return list(ort.InferenceSession(model.content, options).run(None, feeds))


def probes(dtype: np.dtype[Any], shape: tuple[int, ...], jump: float, seed: int) -> Array:
    """Random values around 0, a third of them special, at the jump or next to it."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(shape) * 3).astype(dtype)
    if dtype.kind != "f":
        special = np.array([0, jump, jump + 1, jump - 1, *limits(dtype)]).astype(dtype)
    else:
        at = dtype.type(jump)
        near = [at, np.nextafter(at, dtype.type(np.inf)), np.nextafter(at, dtype.type(-np.inf))]
        special = np.array([*near, 0.0, -0.0, 6, 7, np.inf, -np.inf, np.nan, -1e-7], dtype)
    where = rng.random(shape) < 1 / 3
    x[where] = rng.choice(special, int(where.sum()))
    return x


def limits(dtype: np.dtype[Any]) -> tuple[int, int]:
    return np.iinfo(dtype).min, np.iinfo(dtype).max


def feeds(model: jr.Model, jump: float = JUMP, seed: int = 0) -> dict[str, Array]:
    made: dict[str, Array] = {}
    graph = model.proto.graph
    weights = {tensor.name for tensor in graph.initializer}
    for value in graph.input:
        tensor = value.type.tensor_type
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        shape = tuple(dim.dim_value or 64 for dim in tensor.shape.dim)
        if value.name not in weights:
            scalar = dtype.kind == "b" or not shape
            made[value.name] = (
                np.array(1, dtype) if scalar else probes(dtype, shape, jump, seed + len(made))
            )
    return made


def assert_same_bits(one: list[Array], other: list[Array]) -> None:
    for left, right in zip(one, other, strict=True):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert left.tobytes() == right.tobytes()


# --- the same sites ------------------------------------------------------------------------------

# Name: ONNX text, how many sites there are, further arguments of `text_model` and a domain.
TEXTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "relu": ("g (float[n] x) => (float[n] y) { y = Relu(x) }", 1, {}),
    "relu of a constant": (
        "g (float[2] x) => (float[2] y) <float[2] w = {1, -1}> { r = Relu(w) y = Add(x, r) }",
        1,
        {},
    ),
    "dead and unnamed": (
        "g (float[n] x) => (float[n] y) { d = Relu(x) y = Neg(x) e = Relu(d) }",
        2,
        {},
    ),
    "clip": (
        """g (float[n] x) => (float[n] a, float[n] b, float[n] c, float[n] d, float[n] e)
        <float zero = {0}, float six = {6}, float one = {1}> {
            a = Clip(x, zero) b = Clip(x, zero, six) c = Clip(x, , six) d = Clip(x, one, six)
            e = Clip(x, zero, )
        }""",
        3,
        {},
    ),
    "clip by attributes": (
        """g (float[n] x) => (float[n] a, float[n] b, float[n] c) {
            a = Clip<min = 0.0, max = 6.0>(x)
            b = Clip<min = 0.0>(x)
            c = Clip<max = 6.0>(x)
        }""",
        2,
        {"opset": 10},
    ),
    "clip with an overridable bound": (
        """g (float[n] x, float six = {6}) => (float[n] y, float[n] z) <float zero = {0}>
        { y = Clip(x, zero, six) z = Relu(x) }""",
        1,
        {},
    ),
    "clip with a bound that is computed": (
        """g (float[n] x, float high) => (float[n] y, float[n] z) <float zero = {0}>
        { y = Clip(x, zero, high) z = Clip(x, zero) }""",
        1,
        {},
    ),
    "bounds from nodes": (
        """g (float[n] x) => (float[n] y, float[n] z) {
            k = Constant<value_int = 0>()
            low = Cast<to = 1>(k)
            same = Identity(low)
            six = Constant<value = float {6.0}>()
            like = CastLike(six, x)
            y = Clip(x, same, six)
            z = Clip(x, low, like)
        }""",
        2,
        {},
    ),
    "max": (
        """g (float[2, 3] x, float[3] v) => (float[2, 3] a, float[2, 3] b, float[2, 3] c,
            float[2, 3] d, float[1, 3] e, float[2, 3] f, float[2, 3] h)
        <float zero = {0}, float[1] flat = {0}, float[1, 1] square = {0}, float[3] row = {0, 0, 0},
         float one = {1}> {
            a = Max(x, zero) b = Max(flat, x) c = Max(x, one) d = Max(x, row) e = Max(v, square)
            f = Max(x, zero, zero) h = Max(x, square)
        }""",
        3,
        {},
    ),
    "max of constants": (
        "g (float x) => (float y) <float o = {0}, float p = {0}> { m = Max(o, p) y = Add(x, m) }",
        0,
        {},
    ),
    "slopes": (
        """g (float[2, 3] x) => (float[2, 3] a, float[2, 3] b, float[2, 3] c, float[2, 3] d,
            float[2, 3] e)
        <float[3] zeros = {0, 0, 0}, float[3] tenth = {0, 0.1, 0}> {
            a = LeakyRelu(x) b = LeakyRelu<alpha = 0.0>(x) c = LeakyRelu<alpha = 0.3>(x)
            d = PRelu(x, zeros) e = PRelu(x, tenth)
        }""",
        2,
        {},
    ),
    "thresholded relu": (
        """g (float[n] x) => (float[n] a, float[n] b)
        { a = ThresholdedRelu(x) b = ThresholdedRelu<alpha = 0.3>(x) }""",
        2,
        {},
    ),
    "hard-swish": (
        """g (float[n] x) => (float[n] y, float[n] w, float[n] u)
        <float three = {3}, float six = {6}, float zero = {0}, float half = {0.5}, float one = {1},
         float two = {2}> {
            a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, six)
            h = Add(half, x) s = Clip(h, zero, one) w = Mul(x, s)
            t = Add(x, two) v = Clip(t, zero, six) u = Mul(x, v)
            b = Add(x, three) d = Clip(b, zero, six) e = Div(d, six) f = Mul(x, e)
        }""",
        1,
        {},
    ),
    "branches": (
        """g (bool c, float[n] x) => (float[n] z) <float zero = {0}> {
            y = Relu(x)
            w = If(c) <
                then_branch = a () => (p) { p = Clip(y, zero) },
                else_branch = b () => (q) {
                    k = Relu(y)
                    q = If(c) <then_branch = d () => (r) { r = Max(k, zero) },
                               else_branch = e () => (s) { s = Neg(x) }>
                }>
            z = Relu(w)
        }""",
        5,
        {},
    ),
    "bounds from outside": (
        """g (bool c, float[n] x) => (float[n] y) {
            zero = Constant<value_float = 0.0>()
            y = If(c) <then_branch = a () => (p) { p = Clip(x, zero) },
                       else_branch = b () => (q) { six = Constant<value_float = 6.0>()
                                                   q = Clip(x, zero, six) }>
        }""",
        2,
        {},
    ),
    "loop": (
        """g (int64 n, bool c, float[4] x) => (float[4] y) {
            y = Loop(n, c, x) <body = b (int64 i, bool go, float[4] s) => (bool on, float[4] t)
                { on = Identity(go) t = Relu(s) }>
        }""",
        1,
        {},
    ),
    "functions": (
        """g (float[n] x) => (float[n] y) { y = mine.Block(x) }
        <domain: "mine", opset_import: ["" : 17]>
        Block (a) => (b) {
            zero = Constant<value_float = 0.0>()
            r = Relu(a)
            c = Clip(r, zero)
            b = LeakyRelu(c)
        }
        <domain: "mine", opset_import: ["" : 14]>
        Uncalled (a) => (b) { b = Relu(a) }""",
        2,
        {"domain": "mine"},
    ),
    "attributes of a function": (
        """g (float[n] x) => (float[n] y) { y = mine.Soft<slope = 0.0>(x) }
        <domain: "mine", opset_import: ["" : 18]>
        Soft <slope> (a) => (b) { c = LeakyRelu<alpha: float = @slope>(a) b = Relu(c) }""",
        1,
        {"domain": "mine"},
    ),
    "another domain": (
        "g (float[n] x) => (float[n] y) { z = mine.Relu(x) y = ai.onnx.Relu(z) }",
        1,
        {"domain": "mine"},
    ),
    "integers": (
        """g (int32[n] x, uint8[n] u) => (int32[n] y, uint8[n] v) <int32 o = {0}, uint8 p = {0}>
        { y = Relu(x) v = Max(u, p) }""",
        1,
        {},
    ),
    "a function of another opset": (
        """g (float[n] x) => (float[n] y) { y = mine.Block(x) }
        <domain: "mine", opset_import: ["" : 15]> Block (a) => (b) { b = Relu(a) }""",
        0,
        {"domain": "mine"},
    ),
    "thresholds that are no jump": (
        "g (float[n] x) => (float[n] y) { y = ThresholdedRelu<alpha = -0.5>(x) }",
        0,
        {},
    ),
    "a bound that is too low": (
        "g (float[n] x) => (float[n] y) <float zero = {0}> { y = Clip(x, zero, zero) }",
        0,
        {},
    ),
    "bounds of integers": (
        """g (int64[n] x) => (int64[n] y) <int64 zero = {0}, int64 high = {9007199254740993}>
        { y = Clip(x, zero, high) }""",
        1,
        {},
    ),
    "names that hide others": (
        """g (float[4] x, int64 n, bool c) => (float[4] y, float[4] a) <float z = {0}> {
            a = Max(x, z)
            y = Loop(n, c, x) <body = b (int64 i, bool go, float[4] z) => (bool on, float[4] r)
                { on = Identity(go) m = Neg(z) r = Max(m, z) }>
        }""",
        1,
        {},
    ),
    "an old opset": ("g (float[n] x) => (float[n] y) { y = Relu(x) }", 0, {"opset": 6}),
    "a type nobody knows": (
        "g (float[n] x) => (float[n] y) { z = unknown.Op(x) w = Relu(z) y = unknown.Op(w) }",
        1,
        {"domain": "unknown"},
    ),
}


def _parsed(text_model: MakeModel, name: str) -> jr.Model:
    text, _, options = TEXTS[name]
    domain = options.get("domain")
    model = text_model(text, **{key: options[key] for key in options.keys() - {"domain"}})
    if domain is None:
        return model
    proto = model.parse()
    proto.opset_import.add(domain=domain, version=1)
    return jr.Model.of(proto)


@pytest.mark.parametrize("name", TEXTS)
def test_gs_sees_the_sites_that_the_engine_sees(text_model: MakeModel, name: str) -> None:
    model = _parsed(text_model, name)
    graph = imported(model)
    sites = find_graph_sites(graph)
    assert list(sites) == list(find_sites(exported(graph))[0])
    if name != "clip with an overridable bound":  # gs overrides that, see the refusals
        assert len(sites) == TEXTS[name][1]
        assert list(sites) == list(find_sites(model)[0])


def test_gs_sees_the_sites_of_the_sample(lenet: jr.Model) -> None:
    sites = find_graph_sites(import_model(lenet))
    assert [site.path for site in sites] == ["relu", "relu_1", "relu_2", "relu_3"]
    assert sites == find_sites(lenet)[0]


def _agree(model: jr.Model) -> int:
    try:
        sites = find_graph_sites(imported(model))
    except ModelError:
        return -1  # gs cannot export optional types
    assert sites == find_sites(model)[0]
    return len(sites)


def test_gs_sees_the_sites_of_the_models_in_the_onnx_wheel() -> None:
    paths = sorted(WHEEL.rglob("*.onnx"))
    found = [_agree(jr.load(path)) for path in paths]
    assert len(found) > 100
    assert min(found) >= 0
    assert sum(count > 0 for count in found) >= 10


@pytest.fixture(scope="module")
def node_models() -> list[jr.Model]:
    """The models that onnx makes to test backends with."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, on the corner cases that the models compute
        cases = collect_testcases(None)
    return [jr.Model.of(case.model) for case in cases if case.model is not None]


@pytest.mark.slow
def test_gs_sees_the_sites_of_every_model_onnx_makes(node_models: list[jr.Model]) -> None:
    found = [_agree(model) for model in node_models]
    assert len(found) > 1000
    assert sum(count < 0 for count in found) < 20


@pytest.mark.slow
def test_what_is_imported_is_exported_as_a_valid_model(node_models: list[jr.Model]) -> None:
    accepted = 0
    for model in node_models:
        try:
            graph = import_model(model)
        except ModelError:
            continue
        with gs.logger.G_LOGGER.suppress(gs.logger.G_LOGGER.CRITICAL + 1):
            onnx.checker.check_model(exported(graph).content)
        accepted += 1
    assert accepted > 1000


# --- the same outputs ----------------------------------------------------------------------------


def _same_outputs(model: jr.Model, jump: Any, **options: Any) -> SurgeonRetrofit:
    expected = jr.retrofit(model, jump=jump, **options)
    result = retrofit_graph(imported(model), jump=jump, **options)
    assert (result.sites, result.skipped) == (expected.sites, expected.skipped)
    hardened = exported(result.graph)
    onnx.checker.check_model(hardened.content)
    at = jump if isinstance(jump, float) else jump[0]
    for seed in range(3):
        x = feeds(model, at, seed)
        assert_same_bits(run(hardened, x), run(expected.model, x))
    return result


RUNNABLE = (
    "relu",
    "clip",
    "clip by attributes",
    "bounds from nodes",
    "max",
    "slopes",
    "thresholded relu",
    "hard-swish",
    "branches",
    "bounds from outside",
    "loop",
    "functions",
)


@pytest.mark.parametrize("target", ["portable", "tensorrt"])
@pytest.mark.parametrize("name", RUNNABLE)
def test_outputs_are_those_of_the_engine(text_model: MakeModel, name: str, target: str) -> None:
    _same_outputs(_parsed(text_model, name), JUMP, target=target)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float", "double", "float16"])
@pytest.mark.parametrize("capped", [False, True])
def test_outputs_are_those_of_the_engine_in_every_form(
    text_model: MakeModel, form: str, dtype: str, capped: bool
) -> None:
    op = f"low = Cast<to = {_NUMBERS[dtype]}>(o) high = Cast<to = {_NUMBERS[dtype]}>(s) "
    op += "y = Clip(x, low, high)"
    text = f"g ({dtype}[n] x) => ({dtype}[n] y) <float o = {{0}}, float s = {{6}}> "
    model = text_model(text + "{ " + (op if capped else "y = Relu(x)") + " }")
    result = _same_outputs(model, 0.25, form=form)
    assert result.sites[0].form == form


_NUMBERS = {"float": 1, "double": 11, "float16": 10}


def test_outputs_are_those_of_the_engine_for_integers(text_model: MakeModel) -> None:
    model = text_model("g (int32[n] x) => (int32[n] y) { y = Relu(x) }")
    _same_outputs(model, 2.0)


def test_outputs_are_those_of_the_engine_with_a_jump_per_channel(text_model: MakeModel) -> None:
    model = text_model("g (float[n, 3, 5] x) => (float[n, 3, 5] y) { y = Relu(x) }")
    _same_outputs(model, (0.5, 0.25, 2.0))


def test_outputs_are_those_of_the_engine_on_the_sample(lenet: jr.Model, mnist: jr.Dataset) -> None:
    graph = import_model(lenet)
    for form in FORMS:
        result = retrofit_graph(graph, jump=1.0, form=form)
        expected = jr.retrofit(lenet, jump=1.0, form=form)
        x = {"input": mnist.x[:50]}
        assert_same_bits(run(exported(result.graph), x), run(expected.model, x))


def test_selection_and_jumps_by_site_are_those_of_the_engine(lenet: jr.Model) -> None:
    graph = import_model(lenet)
    jumps = {"relu": 0.5, "relu_3": 1.0}
    result = retrofit_graph(graph, jumps=jumps, selection=jr.Selection(last=1))
    expected = jr.retrofit(lenet, jumps=jumps, selection=jr.Selection(last=1))
    assert [done.site.path for done in result.sites] == ["relu_3"]
    assert (result.sites, result.skipped) == (expected.sites, expected.skipped)
    ops = [node.op for node in result.graph.nodes]
    assert ops.count("Relu") == 3


def test_the_nodes_are_those_of_the_engine(lenet: jr.Model) -> None:
    for form in FORMS:
        result = retrofit_graph(import_model(lenet), jump=1.0, form=form)
        engine = jr.retrofit(lenet, jump=1.0, form=form).model.proto
        ours = exported(result.graph).proto
        assert [_plain(node) for node in ours.graph.node] == [
            _plain(node) for node in engine.graph.node
        ]
        assert [each.name for each in ours.functions] == [each.name for each in engine.functions]
        assert {each.domain for each in ours.opset_import} == {
            each.domain for each in engine.opset_import
        }


def _plain(node: onnx.NodeProto) -> tuple[object, ...]:
    attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    for name, value in attributes.items():
        if isinstance(value, TensorProto):
            attributes[name] = numpy_helper.to_array(value).tobytes()
    return (node.domain, node.op_type, node.name, *node.input, "->", *node.output, attributes)


def test_new_names_start_with_the_prefix_and_clash_with_none(text_model: MakeModel) -> None:
    model = text_model(
        """g (float[4] x) => (float[4] y, float[4] "jr_onnx/v1/y/where") {
            y = Relu(x)
            "jr_onnx/v1/y/where" = Neg(x)
        }"""
    )
    graph = import_model(model)
    before = {node.name for node in graph.nodes} | set(graph.tensors())
    result = retrofit_graph(graph, jump=JUMP)
    names = [node.name for node in result.graph.nodes if node.op != "Neg"]
    names += [name for name in result.graph.tensors() if name not in before]
    assert len(names) == len(set(names)) > 5
    assert all(name.startswith("jr_onnx/v1/") for name in names)
    _same_outputs(model, JUMP)


# --- graphs made by hand -------------------------------------------------------------------------


def _by_hand(nodes: list[Any], x: Any, y: Any, **more: Any) -> Any:
    return gs.Graph(nodes=nodes, inputs=[x], outputs=[y], opset=18, ir_version=10, **more)


def _value(name: str, **more: Any) -> Any:
    return gs.Variable(name, **more)


@pytest.fixture
def ends() -> tuple[Any, Any]:
    return (
        _value("x", dtype=np.float32, shape=("n", 4)),
        _value("y", dtype=np.float32, shape=("n", 4)),
    )


def test_a_graph_made_with_gs(ends: tuple[Any, Any]) -> None:
    x, y = ends
    w = gs.Constant("w", np.arange(16, dtype=np.float32).reshape(4, 4))
    h, low, six, c = (_value(name) for name in ("h", "low", "six", "c"))
    nodes = [
        gs.Node("MatMul", inputs=[x, w], outputs=[h]),
        gs.Node("Cast", inputs=[gs.Constant("k", np.array(0))], outputs=[low], attrs={"to": 1}),
        gs.Node(
            "Cast", inputs=[gs.Constant("s", np.array(6))], outputs=[six], attrs={"to": np.float32}
        ),
        gs.Node("Clip", inputs=[h, low, six], outputs=[c]),
        gs.Node("Relu", inputs=[c], outputs=[y]),
    ]
    graph = _by_hand(nodes, x, y)
    sites = find_graph_sites(graph)
    assert list(sites) == list(find_sites(exported(graph))[0])
    assert [(site.path, site.cap) for site in sites] == [("c", 6.0), ("y", None)]
    result = retrofit_graph(graph, jump=JUMP)
    feed = {"x": probes(np.dtype("f4"), (16, 4), JUMP, 0)}
    expected = jr.retrofit(exported(graph), jump=JUMP).model
    assert_same_bits(run(exported(result.graph), feed), run(expected, feed))


def test_constants_in_a_function_made_with_gs(ends: tuple[Any, Any]) -> None:
    x, y = ends
    a, b, c = (_value(name) for name in "abc")
    zero = gs.Constant("zero", np.array(0, np.float32))
    body = [
        gs.Node("Clip", inputs=[a, zero], outputs=[c]),
        gs.Node("Relu", inputs=[c], outputs=[b]),
    ]
    function = gs.Function("Block", "mine", nodes=body, inputs=[a], outputs=[b], opset=18)
    call = gs.Node("Block", domain="mine", inputs=[x], outputs=[y])
    graph = _by_hand([call], x, y, functions=[function])
    sites = find_graph_sites(graph)
    # The export puts a Constant node first, so these are nodes 1 and 2 of the function.
    assert [(site.path, site.index) for site in sites] == [
        ("mine::Block>c", 1),
        ("mine::Block>b", 2),
    ]
    assert list(sites) == list(find_sites(exported(graph))[0])
    result = retrofit_graph(graph, jump=JUMP)
    feed = {"x": probes(np.dtype("f4"), (16, 4), JUMP, 0)}
    expected = jr.retrofit(exported(graph), jump=JUMP).model
    assert_same_bits(run(exported(result.graph), feed), run(expected, feed))
    assert [node.op for node in function.nodes] == ["Clip", "Relu"]


def test_a_bound_that_is_an_input_may_be_overridden(ends: tuple[Any, Any]) -> None:
    x, y = ends
    zero = gs.Constant("zero", np.array(0, np.float32))
    six = gs.Constant("six", np.array(6, np.float32))
    graph = _by_hand([gs.Node("Clip", inputs=[x, zero, six], outputs=[y])], x, y)
    assert len(find_graph_sites(graph)) == 1
    graph.inputs.append(six)
    assert find_graph_sites(graph) == find_sites(exported(graph))[0] == ()
    graph.ir_version = 3  # where every weight is an input, and none may be overridden
    assert len(find_graph_sites(graph)) == len(find_sites(exported(graph))[0]) == 1


def test_large_constants_are_no_bounds_and_stay_out(ends: tuple[Any, Any]) -> None:
    x, y = ends
    x.shape = y.shape = (2, 5000)
    slopes = gs.Constant("slopes", np.zeros(5000, np.float32))
    graph = _by_hand([gs.Node("PRelu", inputs=[x, slopes], outputs=[y])], x, y)
    assert find_graph_sites(graph) == find_sites(exported(graph))[0] == ()


def test_a_graph_that_gs_cannot_export_is_refused(ends: tuple[Any, Any]) -> None:
    graph = _by_hand([gs.Node("Relu", inputs=[ends[0]], outputs=[ends[1]])], *ends)
    graph.nodes[0].attrs["strange"] = object()
    with pytest.raises(ModelError, match=r"cannot export this graph \(\w+Error: .*jr_onnx.retro"):
        retrofit_graph(graph, jump=JUMP)


def test_an_unsorted_graph_is_refused_and_not_sorted(ends: tuple[Any, Any]) -> None:
    h = _value("h")
    nodes = [
        gs.Node("Relu", inputs=[h], outputs=[ends[1]]),
        gs.Node("Relu", inputs=[ends[0]], outputs=[h]),
    ]
    graph = _by_hand(nodes, *ends)
    with pytest.raises(InvalidModelError, match="topologically sorted"):
        retrofit_graph(graph, jump=JUMP)
    assert [node.outputs[0].name for node in graph.nodes] == ["y", "h"]


# --- nothing is changed, nothing is loaded -------------------------------------------------------


def _everything(graph: Any) -> Iterator[object]:
    """Yields identity and content of all there is in a graph, but for the weights' content."""
    yield id(graph.nodes), id(graph.functions), id(graph.import_domains)
    yield graph.name, graph.opset, graph.ir_version, graph.doc_string
    yield [str(entry) for entry in graph.import_domains or ()]
    yield [id(tensor) for tensor in (*graph.inputs, *graph.outputs)]
    for node in graph.nodes:
        yield id(node), node.op, node.name, node.domain, id(node.attrs), list(node.attrs)
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                yield from _everything(value)
            else:
                yield id(value), str(value)
        for tensor in (*node.inputs, *node.outputs):
            yield id(tensor), tensor.name, [id(each) for each in tensor.inputs]
            yield [id(each) for each in tensor.outputs]
            if isinstance(tensor, gs.Constant):
                yield id(tensor._values), tensor.data_location
            else:
                yield tensor.dtype, id(tensor.shape), str(tensor.shape), tensor.type
    for function in graph.functions if not isinstance(graph, gs.Function) else ():
        yield id(function), id(function.functions) == id(graph.functions)
        yield from _everything(function)


@pytest.mark.parametrize("name", ["max", "branches", "functions"])
def test_the_callers_graph_is_not_changed(text_model: MakeModel, name: str) -> None:
    graph = import_model(_parsed(text_model, name))
    before, content = list(_everything(graph)), exported(graph).content
    find_graph_sites(graph)
    for form in ("function", None):
        made = retrofit_graph(graph, jump=JUMP, form=form if name == "max" else None)
        gs.export_onnx(made.graph)
    assert list(_everything(graph)) == before
    assert exported(graph).content == content


def test_a_hardened_graph_shares_nothing_but_weights(text_model: MakeModel) -> None:
    graph = import_model(_parsed(text_model, "branches"))
    hardened = retrofit_graph(graph, jump=JUMP).graph
    theirs = {id(node) for each in (graph, *graph.subgraphs(True)) for node in each.nodes}
    ours = {id(node) for each in (hardened, *hardened.subgraphs(True)) for node in each.nodes}
    assert not theirs & ours
    assert not {map(id, graph.tensors().values())} & {map(id, hardened.tensors().values())}
    content = exported(graph).content
    hardened.import_domains[0].version = 19
    hardened.inputs[1].shape.append(1)
    for each in (hardened, *hardened.subgraphs(True)):
        each.nodes.clear()
        each.outputs.clear()
    assert exported(graph).content == content


def test_what_gs_knows_of_a_graph_is_kept(ends: tuple[Any, Any]) -> None:
    graph = _by_hand([gs.Node("Relu", inputs=[ends[0]], outputs=[ends[1]])], *ends)
    graph.producer_name, graph.producer_version, graph.doc_string = "me", "7", "mine"
    graph.name, graph.name_idx = "net", 5
    copy = retrofit_graph(graph, jump=JUMP).graph
    for name in ("producer_name", "producer_version", "doc_string", "name", "name_idx", "opset"):
        assert getattr(copy, name) == getattr(graph, name)
    assert copy.outputs[0].inputs[0].op == "Where"
    assert copy.inputs[0].shape == ["n", 4]


def test_what_gs_knows_of_nodes_and_constants_is_kept(ends: tuple[Any, Any]) -> None:
    h = _value("h", dtype=np.float32, shape=[2, 3], type="sequence_type")
    k = gs.Constant("k", np.ones(4, np.float32), data_location=0, export_dtype=np.float32)
    axes = [0, 1]
    nodes = [
        gs.Node("Add", "add", {"axes": axes}, [ends[0], k], [h], domain="mine"),
        gs.Node("Relu", inputs=[ends[0]], outputs=[ends[1]]),
    ]
    result = retrofit_graph(_by_hand(nodes, *ends), jump=JUMP)
    node = result.graph.nodes[0]
    assert (node.name, node.domain, node.attrs) == ("add", "mine", {"axes": [0, 1]})
    assert node.attrs["axes"] is not axes
    copy = node.inputs[1]
    assert copy is not k
    assert (copy.data_location, copy._export_dtype) == (0, np.float32)
    assert (node.outputs[0].type, node.outputs[0].shape) == ("sequence_type", [2, 3])


def test_a_renamed_constant_is_not_touched(text_model: MakeModel) -> None:
    graph = import_model(_parsed(text_model, "clip"))
    six = graph.tensors()["six"]
    six.name = "renamed"
    retrofit_graph(graph, jump=JUMP)
    assert six._values.tensor.name == "six"


@pytest.fixture
def heavy(text_model: MakeModel) -> jr.Model:
    """A model with a weight in an initializer, and one in a Constant node."""
    proto = text_model(
        """g (float[n, 100] x) => (float[n, 100] z) {
            c = Constant<value = float {1.0}>()
            a = MatMul(x, c) y = Relu(a) b = MatMul(y, w) z = Relu(b)
        }"""
    ).parse()
    weight = numpy_helper.from_array(np.ones((100, 100), np.float32), "w")
    proto.graph.initializer.append(weight)
    proto.graph.node[0].attribute[0].t.CopyFrom(weight)
    return jr.Model.of(proto)


def test_weights_are_neither_loaded_nor_copied(
    heavy: jr.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: object) -> None:
        raise AssertionError("a weight was loaded")

    monkeypatch.setattr(gs.ir.tensor.LazyValues, "load", load)
    graph = import_model(heavy)
    assert len(adapter._outline(gs, graph).content) < 2000
    hardened = retrofit_graph(graph, jump=JUMP).graph
    assert len(exported(hardened).content) > 80_000
    assert hardened.tensors()["w"]._values is graph.tensors()["w"]._values
    mine, theirs = (each.nodes[0].attrs["value"] for each in (hardened, graph))
    assert mine._values is theirs._values
    feed = {"x": probes(np.dtype("f4"), (3, 100), JUMP, 0)}
    expected = jr.retrofit(heavy, jump=JUMP).model
    assert_same_bits(run(exported(hardened), feed), run(expected, feed))


def test_external_data_is_not_read(heavy: jr.Model, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(heavy.parse(), path, save_as_external_data=True, location="w", size_threshold=1000)
    feed = {"x": probes(np.dtype("f4"), (3, 100), JUMP, 0)}
    away = tmp_path / "w"
    data = away.read_bytes()
    away.unlink()
    graph = import_model(jr.load(path))
    hardened = exported(retrofit_graph(graph, jump=JUMP).graph)
    assert hardened.proto.graph.initializer[0].data_location == TensorProto.EXTERNAL
    away.write_bytes(data)
    (tmp_path / "hard.onnx").write_bytes(hardened.content)
    got = ort.InferenceSession(tmp_path / "hard.onnx").run(None, feed)
    assert_same_bits(list(got), run(jr.retrofit(heavy, jump=JUMP).model, feed))


def test_nothing_is_printed(
    text_model: MakeModel, capfd: pytest.CaptureFixture[str], ends: tuple[Any, Any]
) -> None:
    proto = text_model("g (bfloat16[n] x) => (bfloat16[n] y) { y = Relu(x) }").parse()
    proto.graph.node[0].name = proto.graph.node.add(op_type="Neg", input=["y"], output=["z"]).name
    graph = import_model(jr.Model.of(proto))
    find_graph_sites(graph)
    retrofit_graph(graph, jump=JUMP)
    with pytest.raises(ModelError):
        retrofit_graph(_by_hand([gs.Node("If", attrs={"a": object()})], *ends), jump=JUMP)
    assert capfd.readouterr() == ("", "")
    assert gs.logger.G_LOGGER.severity == gs.logger.G_LOGGER.INFO


# --- what gs would lose --------------------------------------------------------------------------


def _node(proto: onnx.ModelProto) -> Any:
    return proto.graph.node[0]


def _sparse(proto: onnx.ModelProto) -> None:
    values = helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("", TensorProto.INT64, [1], [2])
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))


def _sparse_attribute(proto: onnx.ModelProto) -> None:
    _sparse(proto)
    sparse = proto.graph.sparse_initializer.pop()
    proto.graph.node.append(helper.make_node("Constant", [], ["c"], "c", sparse_value=sparse))


def _initializer(proto: onnx.ModelProto, name: str) -> None:
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(4, np.float32), name))


def _initializer_as_input(proto: onnx.ModelProto) -> None:
    _initializer(proto, "w")
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4]))
    proto.graph.node.append(helper.make_node("Neg", ["w"], ["z"]))


def _initializer_as_output(proto: onnx.ModelProto) -> None:
    _initializer(proto, "w")
    proto.graph.output.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4]))


def _graphs(proto: onnx.ModelProto) -> None:
    graph = helper.make_graph([], "inner", [], [])
    attribute = AttributeProto(name="bodies", type=AttributeProto.GRAPHS, graphs=[graph])
    _node(proto).attribute.append(attribute)


def _type(proto: onnx.ModelProto) -> None:
    kind = AttributeProto(name="kind", type=AttributeProto.TYPE_PROTO)
    kind.tp.tensor_type.elem_type = 1
    _node(proto).attribute.append(kind)


def _sequence(proto: onnx.ModelProto) -> Any:
    info = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, [4])
    proto.graph.input.append(info)
    return info


def _value_info(proto: onnx.ModelProto, name: str) -> Any:
    proto.graph.node.add(op_type="Neg", input=["x"], output=[name])
    proto.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]))
    return proto.graph.value_info[-1]


def _device(proto: onnx.ModelProto) -> None:
    proto.configuration.add(name="gpus", num_devices=2)


def _node_device(proto: onnx.ModelProto) -> None:
    _node(proto).device_configurations.add(configuration_id="gpus")


def _function(proto: onnx.ModelProto) -> Any:
    node = helper.make_node("Relu", ["a"], ["b"], "r")
    opsets = [helper.make_opsetid("", 18)]
    proto.functions.append(helper.make_function("d", "F", ["a"], ["b"], [node], opsets))
    return proto.functions[0]


def _set(get: Callable[[onnx.ModelProto], Any], name: str, value: object) -> Edit:
    return lambda proto: setattr(get(proto), name, value)


def _meta(get: Callable[[onnx.ModelProto], Any]) -> Edit:
    return lambda proto: get(proto).metadata_props.add(key="k", value="v")


def _model(proto: onnx.ModelProto) -> onnx.ModelProto:
    return proto


def _graph(proto: onnx.ModelProto) -> onnx.GraphProto:
    return proto.graph


# What is edited into a model with one Relu, and what is said of it.
LOSSES: dict[str, tuple[Edit, str]] = {
    "model metadata": (_meta(_model), r"metadata_props \(the model\)"),
    "graph metadata": (_meta(_graph), r"metadata_props \(graph 'g'\)"),
    "node metadata": (_meta(_node), r"metadata_props \(node 'act' \(Relu\)\)"),
    "value metadata": (_meta(lambda p: p.graph.input[0]), r"metadata_props \(tensor 'x'\)"),
    "function metadata": (_meta(_function), r"metadata_props \(function 'd::F'\)"),
    "model doc": (_set(_model, "doc_string", "d"), r"doc_string \(the model\)"),
    "node doc": (_set(_node, "doc_string", "d"), r"doc_string \(node 'act' \(Relu\)\)"),
    "input doc": (_set(lambda p: p.graph.input[0], "doc_string", "d"), r"doc_string \(tensor 'x'"),
    "attribute doc": (
        lambda proto: proto.graph.node.add(
            op_type="LeakyRelu", name="leaky", input=["x"], output=["z"]
        ).attribute.add(name="alpha", type=AttributeProto.FLOAT, f=1, doc_string="d"),
        r"doc_string \(node 'leaky' \(LeakyRelu\)\)",
    ),
    "model version": (_set(_model, "model_version", 3), r"model_version \(the model\)"),
    "model domain": (_set(_model, "domain", "org.me"), r"model_domain \(the model\)"),
    "denotation": (
        _set(lambda p: p.graph.input[0].type, "denotation", "IMAGE"),
        r"denotation \(tensor 'x'\)",
    ),
    "quantization": (
        lambda proto: proto.graph.quantization_annotation.add(tensor_name="x"),
        r"quantization_annotation \(graph 'g'\)",
    ),
    "training": (
        lambda proto: proto.training_info.add().algorithm.node.add(op_type="Neg"),
        r"training_info \(the model\)",
    ),
    "overload of a function": (
        lambda proto: setattr(_function(proto), "overload", "o"),
        r"overload \(function 'd::F'\)",
    ),
    "overload of a call": (_set(_node, "overload", "o"), r"overload \(node 'act' \(Relu\)\)"),
    "types in a function": (
        lambda proto: _function(proto).value_info.add(name="a"),
        r"value_info \('a' of function 'd::F'\)",
    ),
    "doc of a value": (
        lambda proto: _value_info(proto, "h").__setattr__("doc_string", "d"),
        r"value_info \('h', its doc_string\)",
    ),
    "shape of a value in a sequence": (
        lambda proto: _value_info(proto, "h").type.CopyFrom(_sequence(proto).type),
        r"shape \(tensor 's'\); value_info \('h', its shape\)",
    ),
    "devices": (_device, r"configuration \(the model\)"),
    "devices of a node": (_node_device, r"device_configurations \(node 'act' \(Relu\)\)"),
    "sparse initializer": (_sparse, r"sparse_initializer \(graph 'g'\)"),
    "sparse attribute": (_sparse_attribute, r"attribute \('sparse_value' of node 'c' \(Constant"),
    "graphs": (_graphs, r"attribute \('bodies' of node 'act' \(Relu\)\)"),
    "a type": (_type, r"attribute \('kind' of node 'act' \(Relu\)\)"),
    "a shape in a sequence": (_sequence, r"shape \(tensor 's'\)"),
    "unused initializer": (lambda p: _initializer(p, "w"), r"initializer \('w', which no node us"),
    "initializer and input": (_initializer_as_input, r"input \('w', which is an initializer too"),
    "unknown field": (
        lambda proto: proto.graph.MergeFromString(b"\xfa\x3f\x02hi"),
        r"unknown fields \(5 bytes that onnx \S+ does not know\)",
    ),
}


@pytest.mark.parametrize("case", LOSSES)
def test_what_gs_would_lose_is_refused(text_model: MakeModel, case: str) -> None:
    edit, message = LOSSES[case]
    proto = text_model("g (float[4] x) => (float[4] y) { y = Relu(x) }", ir_version=11).parse()
    _node(proto).name = "act"
    import_model(jr.Model.of(proto))
    edit(proto)
    model = jr.Model.of(proto)
    with pytest.raises(ModelError, match=f"^g: onnx-graphsurgeon would lose {message}") as caught:
        import_model(model)
    said = str(caught.value)
    assert "jr_onnx.retrofit keeps everything" in said
    kinds = {
        part.split(" (")[0] for part in said.split(" would lose ")[1].split(". ")[0].split("; ")
    }
    assert (f"pass drop={sorted(kinds)}" in said) == (kinds <= DROPPABLE)
    if kinds <= DROPPABLE:
        assert import_model(model, drop=kinds).nodes[0].op == "Relu"


def test_an_attribute_that_is_not_a_number_is_kept(text_model: MakeModel) -> None:
    proto = text_model("g (float[4] x) => (float[4] y) { y = Elu(x) }").parse()
    _node(proto).attribute.append(helper.make_attribute("alpha", float("nan")))
    assert np.isnan(import_model(jr.Model.of(proto)).nodes[0].attrs["alpha"])


def test_what_says_nothing_may_go(text_model: MakeModel) -> None:
    proto = text_model(
        """g (bool c, float[4] x) => (float[4] y) {
            y = If(c) <then_branch = a () => (p) { p = Neg(x) }, else_branch = b () => (q)
                { q = Relu(x) }>
        }"""
    ).parse()
    _node(proto).attribute[0].g.output[0].type.SetInParent()  # an empty type
    for name in ("x", "y", "unheard of"):
        proto.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]))
    import_model(jr.Model.of(proto))


def test_an_initializer_that_is_an_output_is_kept(text_model: MakeModel) -> None:
    proto = text_model("g (float[4] x) => (float[4] y) { y = Relu(x) }").parse()
    _initializer_as_output(proto)
    kept = exported(import_model(jr.Model.of(proto))).proto.graph
    assert [tensor.name for tensor in kept.initializer] == ["w"]
    assert [value.name for value in kept.output] == ["y", "w"]


def test_all_that_would_be_lost_is_listed(text_model: MakeModel) -> None:
    proto = text_model("g (float[4] x) => (float[4] y) { y = Relu(x) }").parse()
    for number in range(5):
        node = proto.graph.node.add(op_type="Neg", name=f"n{number}", input=["x"])
        node.output.append(f"z{number}")
        node.doc_string = "made by hand"
    proto.model_version = 3
    with pytest.raises(ModelError) as caught:
        import_model(jr.Model.of(proto))
    said = "doc_string (node 'n0' (Neg), node 'n1' (Neg), node 'n2' (Neg) and 2 more)"
    assert said in str(caught.value)
    assert "model_version (the model)" in str(caught.value)
    assert "pass drop=['doc_string', 'model_version']" in str(caught.value)
    with pytest.raises(ModelError, match=r"lose model_version \(the model\)\. "):
        import_model(jr.Model.of(proto), drop=["doc_string"])


def test_only_what_changes_no_output_may_be_dropped(relu_model: jr.Model) -> None:
    with pytest.raises(ParameterError, match=r"drop takes configuration, .*; got attribute, node"):
        import_model(relu_model, drop=["node", "attribute", "doc_string"])


def test_a_model_that_gs_cannot_import_is_refused(text_model: MakeModel) -> None:
    proto = text_model("g (float[4] x) => (float[4] y) { y = Relu(x) }").parse()
    _node(proto).attribute.append(helper.make_attribute("name", b"\xff\xfe"))
    with pytest.raises(ModelError, match=r"cannot import this graph \(UnicodeDecodeError: .*0xff"):
        import_model(jr.Model.of(proto))


def test_a_model_that_gs_cannot_export_is_refused(text_model: MakeModel) -> None:
    proto = text_model("g (float[4] x) => (float[4] y) { y = Relu(x) }").parse()
    value = proto.graph.input.add(name="o")
    value.type.optional_type.elem_type.tensor_type.elem_type = 1
    with pytest.raises(ModelError, match=r"cannot export this graph \(UnboundLocalError"):
        import_model(jr.Model.of(proto))


def test_the_imported_model_is_not_changed(lenet: jr.Model) -> None:
    before = lenet.proto.SerializeToString()
    graph = import_model(lenet)
    graph.tensors()["fc1.weight"].name = "renamed"
    gs.export_onnx(graph)
    graph.import_domains.append(helper.make_opsetid("mine", 1))
    assert lenet.proto.SerializeToString() == before


def test_initializers_used_in_branches_may_move_there(text_model: MakeModel) -> None:
    model = text_model(
        """g (bool c, float[4] x) => (float[4] z) <float[4] w = {1, 2, 3, 4}> {
            z = If(c) <then_branch = a () => (p) { p = Mul(x, w) },
                       else_branch = b () => (q) { q = Relu(x) }>
        }"""
    )
    assert not exported(import_model(model)).proto.graph.initializer
    _same_outputs(model, JUMP)


# --- the engine's refusals -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, ParameterError),
        ({"jump": -1}, ParameterError),
        ({"jump": float("nan")}, ParameterError),
        ({"jump": 7}, ParameterError),
        ({"jump": 1, "form": "none"}, ParameterError),
        ({"jump": 1, "form": "mul-cast", "target": "nowhere"}, ParameterError),
        ({"jumps": {"nowhere": 1}}, ParameterError),
        ({"jump": [1, 2, 3]}, ParameterError),
        ({"jump": 1, "selection": jr.Selection(include=["no*"])}, ParameterError),
        ({"jump": 1, "selection": jr.Selection(exclude=["*"])}, NothingToRewriteError),
    ],
)
def test_the_engines_refusals_in_its_words(
    text_model: MakeModel, options: dict[str, Any], error: type[JrOnnxError]
) -> None:
    model = _parsed(text_model, "clip")
    with pytest.raises(error) as expected:
        jr.retrofit(model, **options)
    with pytest.raises(error) as got:
        retrofit_graph(import_model(model), **options)
    assert str(got.value) == str(expected.value)


def test_something_else_than_a_graph(relu_model: jr.Model) -> None:
    with pytest.raises(ParameterError, match=r"expected a Model, got str: jr_onnx\.load"):
        import_model("net.onnx")  # type: ignore[arg-type]
    for call in (find_graph_sites, lambda graph: retrofit_graph(graph, jump=1)):
        with pytest.raises(ParameterError, match=r"expected a gs\.Graph, got Model: import_model"):
            call(relu_model)


def test_a_second_retrofit_is_refused(relu_model: jr.Model) -> None:
    once = retrofit_graph(import_model(relu_model), jump=JUMP).graph
    with pytest.raises(AlreadyRetrofittedError, match="is a jump already"):
        retrofit_graph(once, jump=1)
    hardened = jr.retrofit(relu_model, jump=JUMP).model
    with pytest.raises(ModelError, match=r"lose metadata_props \(the model\)"):
        import_model(hardened)


def test_hidden_activations_are_refused(text_model: MakeModel) -> None:
    model = text_model(
        """g (float[1, 1, 4] x, float[1, 1, 1] w) => (float[1, 1, 4] z) {
            y = com.microsoft.FusedConv<activation = "Relu">(x, w)
            z = Relu(x)
        }"""
    )
    graph = import_model(model)
    with pytest.raises(HiddenActivationError, match="FusedConv has a Relu fused into it"):
        retrofit_graph(graph, jump=JUMP)
    result = retrofit_graph(graph, jump=JUMP, partial=True)
    assert [entry.path for entry in result.skipped] == ["y"]


def test_a_site_that_gs_does_not_see_is_our_bug(
    relu_model: jr.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "find", lambda *_: iter(()))
    with pytest.raises(PostconditionError, match=r"y would be replaced, but .* no such"):
        retrofit_graph(import_model(relu_model), jump=JUMP)


def test_a_graph_that_is_not_what_the_engine_made_is_our_bug(
    relu_model: jr.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "_hardened", lambda _, graph, __: graph)
    with pytest.raises(PostconditionError, match="does not export to what was asked of it"):
        retrofit_graph(import_model(relu_model), jump=JUMP)


def test_without_the_package_the_message_says_what_to_install(
    relu_model: jr.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = import_model(relu_model)
    monkeypatch.setitem(sys.modules, "onnx_graphsurgeon", None)
    calls: tuple[Callable[[], object], ...] = (
        lambda: import_model(relu_model),
        lambda: find_graph_sites(graph),
        lambda: retrofit_graph(graph, jump=1),
    )
    for call in calls:
        with pytest.raises(RewriteError, match=r"pip install 'jr-onnx\[surgeon\]'"):
            call()
