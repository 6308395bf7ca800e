"""Random graphs with nested bodies and functions: what must hold for all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import jr_onnx as jr
from jr_onnx.rewrite import FORMS
from jr_onnx.rewrite.forms import why_not

UNARY = ("Relu", "Neg", "Abs", "Relu", "my.Block", "my.Plain", "Relu")
KINDS = ("unary", "unary", "add", "clip", "integers")
NESTED = ("if", "loop", "scan")
SAMPLE = np.array([[-2, -0.5, 0], [0.3, 0.7, 2]], np.float32)
SHAPE, CHANNELS = "float[2, 3]", 3
IR_VERSION = 8


@st.composite
def bodies(draw: st.DrawFn, depth: int, prefix: str, visible: tuple[str, ...]) -> tuple[str, str]:
    """Draws statements that see `visible`; returns them and the name of their last value."""
    lines: list[str] = []
    values = list(visible)
    for number in range(draw(st.integers(1, 4))):
        name = f"{prefix}{number}"
        x, other = draw(st.sampled_from(values)), draw(st.sampled_from(values))
        kind = draw(st.sampled_from((*KINDS, *NESTED) if depth else KINDS))
        if kind == "unary":
            lines.append(f"{name} = {draw(st.sampled_from(UNARY))}({x})")
        elif kind == "add":
            lines.append(f"{name} = Add({x}, {other})")
        elif kind == "clip":
            lines.append(f"{name} = Clip({x}, zero, six)")
        elif kind == "integers":
            block = draw(st.sampled_from(("my.Block", "Relu")))
            lines.append(f"{name}i = Cast<to = 6>({x}) {name}j = {block}({name}i)")
            lines.append(f"{name} = Cast<to = 1>({name}j)")
        elif kind == "if":
            branches = (
                f"{branch}_branch = {name}_{branch}_g () => "
                f"{draw(inner(depth, f'{name}_{branch}_', tuple(values)))}"
                for branch in ("then", "else")
            )
            lines.append(f"{name} = If (c) <{', '.join(branches)}>")
        else:
            state = f"{name}_s"
            body = draw(inner(depth, f"{name}_", (*values, state), kind=kind))
            if kind == "loop":
                inputs = f"int64 {name}_i, bool {name}_k, {SHAPE} {state}"
                lines.append(
                    f"{name} = Loop (two, yes, {x}) <body = {name}_g ({inputs}) => {body}>"
                )
            else:
                inputs = f"{SHAPE} {state}, float[3] {name}_e"
                lines.append(f"{name}, {name}_all = Scan <num_scan_inputs = 1,")
                lines.append(f"body = {name}_g ({inputs}) => {body}> ({x}, {other})")
        values.append(name)
    return " ".join(lines), values[-1]


@st.composite
def inner(
    draw: st.DrawFn, depth: int, prefix: str, visible: tuple[str, ...], kind: str = "if"
) -> str:
    """Draws the outputs and the statements of a body."""
    text, last = draw(bodies(depth - 1, f"{prefix}v", visible))
    y = f"{prefix}out"
    text += f" {y} = Relu({last})"
    if kind == "loop":
        return f"(bool {prefix}kk, {SHAPE} {y}) {{ {prefix}kk = Identity({prefix}k) {text} }}"
    if kind == "scan":
        return f"({SHAPE} {y}, float[3] {prefix}r) {{ {text} {prefix}r = Relu({prefix}e) }}"
    return f"({SHAPE} {y}) {{ {text} }}"


@st.composite
def models(draw: st.DrawFn) -> jr.Model:
    text, last = draw(bodies(2, "v", ("x",)))
    proto = onnx.parser.parse_model(
        f"""<ir_version: {IR_VERSION}, opset_import: ["": 18, "my": 1]>
        g ({SHAPE} x, bool c) => ({SHAPE} y)
        <float zero = {{0}}, float six = {{6}}, int64 two = {{2}}, bool yes = {{1}}>
        {{ {text} y = Relu({last}) }}
        <domain: "my", opset_import: ["": 18]> Block (u) => (v) {{ w = Relu(u) v = Neg(w) }}
        <domain: "my", opset_import: ["": 18]> Plain (u) => (v) {{ v = Neg(u) }}"""
    )
    return jr.Model(proto.SerializeToString())


def _run(model: jr.Model) -> list[bytes]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.content, options)
    feeds = [{"x": SAMPLE, "c": np.array(c)} for c in (True, False)]
    return [(session.run(None, feed)[0] + np.float32(0)).tobytes() for feed in feeds]


@st.composite
def options_for(draw: st.DrawFn, model: jr.Model) -> dict[str, Any]:
    """Draws a form, a jump for each site that can have it in this form, and which to take."""
    sites, _ = jr.find_sites(model)
    form = draw(st.sampled_from((*FORMS, None)))
    numbers = st.sampled_from((0.0, 0.25, 0.5, 1.0, 1.5))
    jumps = {}
    for site in sites:
        jump: Any = draw(numbers)
        if site.tensor.shape == (2, CHANNELS) and draw(st.booleans()):
            jump = tuple(draw(st.lists(numbers, min_size=CHANNELS, max_size=CHANNELS)))
        if form is None or why_not(form, site, jump, IR_VERSION) is None:
            jumps[site.path] = jump
    assume(jumps)
    included = draw(st.lists(st.sampled_from(sorted(jumps)), unique=True))
    return {"form": form, "jumps": jumps, "selection": jr.Selection(include=included)}


SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@SETTINGS
@given(data=st.data(), model=models())
def test_retrofit_keeps_everything_else_and_restore_is_the_identity(
    data: st.DataObject, model: jr.Model
) -> None:
    sites, _ = jr.find_sites(model)
    assert len({site.path for site in sites}) == len(sites)
    options = data.draw(options_for(model))
    result = jr.retrofit(model, **options)
    assert jr.restore(result.model).content == model.content
    found = jr.verify(model, result.model)
    assert found.differences == ()
    asked = set(options["selection"].include) or options["jumps"].keys()
    assert found.jumps.keys() == asked
    other = jr.retrofit(model, **{**options, "form": None, "target": "openvino"}).model
    assert _run(result.model) == _run(other)


@SETTINGS
@given(model=models())
def test_jump_zero_keeps_the_function(model: jr.Model) -> None:
    assert _run(jr.retrofit(model, jump=0.0).model) == _run(model)
