"""Random graphs with nested bodies and functions: what must hold for all of them."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
from hypothesis import given, settings
from hypothesis import strategies as st

import jr_onnx as jr
from jr_onnx.errors import NothingToRewriteError
from jr_onnx.rewrite import FORMS

UNARY = ("Relu", "Neg", "Abs", "Relu", "my.Block", "my.Plain", "Relu")
SAMPLE = np.array([-2, -0.5, 0, 0.3, 0.7, 2], np.float32)


@st.composite
def bodies(draw: st.DrawFn, depth: int, prefix: str, visible: tuple[str, ...]) -> tuple[str, str]:
    """Draws statements that see `visible`; returns them and the name of their last value."""
    lines: list[str] = []
    values = list(visible)
    for number in range(draw(st.integers(1, 4))):
        name = f"{prefix}{number}"
        x, other = draw(st.sampled_from(values)), draw(st.sampled_from(values))
        kind = draw(st.sampled_from(("unary", "unary", "add", "clip", "if" if depth else "unary")))
        if kind == "unary":
            lines.append(f"{name} = {draw(st.sampled_from(UNARY))}({x})")
        elif kind == "add":
            lines.append(f"{name} = Add({x}, {other})")
        elif kind == "clip":
            lines.append(f"{name} = Clip({x}, zero, six)")
        else:
            branches = []
            for branch in ("then", "else"):
                inner = f"{name}_{branch}_"
                text, last = draw(bodies(depth - 1, inner, tuple(values)))
                output = f"{inner}out"
                branches.append(
                    f"{branch}_branch = {inner}g () => (float[6] {output}) "
                    f"{{ {text} {output} = Relu({last}) }}"
                )
            lines.append(f"{name} = If (c) <{', '.join(branches)}>")
        values.append(name)
    return " ".join(lines), values[-1]


@st.composite
def models(draw: st.DrawFn) -> jr.Model:
    text, last = draw(bodies(2, "v", ("x",)))
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 18, "my": 1]>
        g (float[6] x, bool c) => (float[6] y) <float zero = {{0}}, float six = {{6}}>
        {{ {text} y = Abs({last}) }}
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


@settings(max_examples=60, deadline=None)
@given(model=models(), form=st.sampled_from(sorted(FORMS.keys() - {"function", "mul-cast"})))
def test_retrofit_keeps_everything_else_and_restore_is_the_identity(
    model: jr.Model, form: str
) -> None:
    sites, _ = jr.find_sites(model)
    assert len({site.path for site in sites}) == len(sites)
    typed = all(site.tensor.element for site in sites)
    chosen = form if typed or form != "thresholded-relu" else "greater-where"
    result = jr.retrofit(model, jump=0.5, form=chosen)
    assert jr.restore(result.model).content == model.content
    found = jr.verify(model, result.model)
    assert found.differences == ()
    assert found.jumps.keys() == {site.path for site in sites}


@settings(max_examples=60, deadline=None)
@given(model=models())
def test_jump_zero_keeps_the_function(model: jr.Model) -> None:
    try:
        hardened = jr.retrofit(model, jump=0.0).model
    except NothingToRewriteError:
        return
    assert _run(hardened) == _run(model)
