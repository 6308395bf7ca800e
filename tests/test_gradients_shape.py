"""The rules of operators that move, pick, repeat and interpolate elements, and of linear maps."""

from __future__ import annotations

from typing import Any

import gradient_checks
import numpy as np
import pytest
from gradient_checks import Case, check, model, weight

import jr_onnx as jr
from jr_onnx.session import Session

I64 = np.int64


def case(
    body: str, shape: tuple[int, ...], opset: int = 18, *, fixed: bool = False, **weights: Any
) -> tuple[Case, tuple[int, ...]]:
    """Returns a model that maps `h` of the body to classes, and the shape of x.

    Args:
        body: ONNX text from `x` to `h`, whose first axis is the batch.
        shape: of x; its first axis is symbolic unless `fixed`.
        opset: of the model.
        fixed: whether the model fixes the batch.
        weights: as `model` takes them.
    """
    batch = str(shape[0]) if fixed else "N"
    text = ",".join([batch, *map(str, shape[1:])])
    alone = model(f"{body} z = Flatten(h)", text, opset, **weights)("float")
    session = Session(alone, device="cpu")
    (z,) = session.run({"x": np.zeros(shape, np.float32)})
    whole = f"{body} f = Flatten(h) z = MatMul(f, w_to_classes)"
    return model(whole, text, opset, w_to_classes=weight(z.shape[1], 4), **weights), shape


def ints(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, I64)


# name -> arguments of `case`
CASES: dict[str, tuple[Any, ...]] = {
    "squeeze 9": ("h = Squeeze<axes=[1,3]>(x)", (2, 1, 3, 1), 9, {}),
    "squeeze 11, negative": ("h = Squeeze<axes=[-1]>(x)", (2, 1, 3, 1), 11, {}),
    "squeeze 13": ("h = Squeeze(x, a)", (2, 1, 3, 1), 13, {"a": ints(-1)}),
    "unsqueeze 9": ("h = Unsqueeze<axes=[1,3]>(x)", (2, 3), 9, {}),
    "unsqueeze 13": ("h = Unsqueeze(x, a)", (2, 3), 13, {"a": ints(-1)}),
    "unsqueeze 24": ("h = Unsqueeze(x, a)", (2, 3), 24, {"a": ints(2, -1)}),
    "concat 9": ("a = Neg(x) h = Concat<axis=1>(x, b1, a, x)", (2, 3), 9, {"b1": weight(2, 2)}),
    "concat negative axis": ("a = Mul(x, x) h = Concat<axis=-1>(x, a)", (2, 3, 4), 11, {}),
    "concat one": ("h = Concat<axis=1>(x)", (2, 3), 18, {}),
    "concat unknown sizes": (
        "s = Shape(u) r = Reshape(x, s) q = Mul(r, r) h0 = Concat<axis=1>(q, r, q) "
        "h = Reshape(h0, t)",
        (2, 6), 18, {"u": weight(2, 6), "t": ints(2, 18)},
    ),
    "split 9, one unused": (
        "a, b, c = Split<axis=1, split=[1,3,2]>(x) d = Mul(b, c0) h = Add(a, d)", (2, 6), 9,
        {"c0": weight(1, 3)},
    ),
    "split 11, equal": ("a, b = Split<axis=-1>(x) h = Mul(a, b)", (2, 6), 11, {}),
    "split 13": ("a, b = Split<axis=1>(x, s) c = ReduceSum(b, one) h = Mul(a, c)", (2, 6), 13,
                 {"s": ints(2, 4), "one": ints(1)}),
    "split 18": ("a, b, c = Split<axis=1, num_outputs=3>(x) h = Concat<axis=1>(a, c)", (2, 7), 18,
                 {}),
    "slice 9": ("h = Slice<starts=[1,-3], ends=[9,4], axes=[1,2]>(x)", (2, 4, 6), 9, {}),
    "slice 9, no axes": ("h = Slice<starts=[0,1], ends=[9,-1]>(x)", (2, 4, 6), 9, {}),
    "slice 10": ("h = Slice(x, s, e, a, k)", (2, 5, 7), 10,
                 {"s": ints(1, -1), "e": ints(9, -9), "a": ints(1, 2), "k": ints(2, -2)}),
    "slice 13, reversed": ("h = Slice(x, s, e, a, k)", (2, 5), 13,
                           {"s": ints(-1), "e": ints(-(2**63)), "a": ints(-1), "k": ints(-1)}),
    "slice without axes": ("h = Slice(x, s, e)", (2, 5, 4), 13,
                           {"s": ints(0, 2, 1), "e": ints(2**62, 5, 3)}),
    "slice at run time": (
        "n = Shape(x) z0 = Sub(n, n) one = Gather(z0, i) s = Add(one, b) h0 = Slice(x, s, e, a, k) "
        "h = Reshape(h0, t)", (2, 5, 4), 13,
        {"i": ints(0), "b": ints(1), "e": ints(5), "a": ints(1), "k": ints(2), "t": ints(2, 8)},
    ),
    "pad 9": ("h = Pad<pads=[0,1,0,2], value=1.5>(x)", (2, 3), 9, {}),
    "pad 11": ("h = Pad(x, p, v)", (2, 3, 4), 11, {"p": ints(0, 1, 2, 0, 0, 1), "v": weight()}),
    "pad 13, negative": ("h = Pad(x, p)", (2, 3, 4), 13, {"p": ints(0, 1, -1, 0, -1, 2)}),
    "pad 18, axes": ("h = Pad(x, p, , a)", (2, 3, 4), 18, {"p": ints(1, 2), "a": ints(-1)}),
    "pad 24": ("h = Pad(x, p)", (2, 3, 4), 24, {"p": ints(0, 1, 2, 0, 0, 1)}),
    "pad at run time": (
        "n = Shape(x) z0 = Sub(n, n) q = Concat<axis=0>(z0, z0) o = Add(q, p) h0 = Pad(x, o) "
        "h = Reshape(h0, t)", (2, 3, 4), 13, {"p": ints(0, 1, -1, 0, 2, 0), "t": ints(2, 18)},
    ),
    "reflect 9": ('h = Pad<mode="reflect", pads=[0,0,2,0,0,1]>(x)', (2, 3, 4), 9, {}),
    "reflect 11": ('h = Pad<mode="reflect">(x, p)', (2, 2, 4, 5), 11,
                   {"p": ints(0, 0, 2, 1, 0, 0, 1, 3)}),
    "reflect 18, axes": ('h = Pad<mode="reflect">(x, p, , a)', (2, 4, 5), 18,
                         {"p": ints(2, 1, 1, 3), "a": ints(2, -2)}),
    "edge 9": ('h = Pad<mode="edge", pads=[0,0,2,0,0,1]>(x)', (2, 3, 4), 9, {}),
    "edge 13": ('h = Pad<mode="edge">(x, p)', (2, 3, 4), 13, {"p": ints(0, 1, 3, 0, 0, 1)}),
    "wrap 19": ('h = Pad<mode="wrap">(x, p)', (2, 3, 4), 19, {"p": ints(0, 1, 3, 0, 0, 1)}),
    "reflect at run time": (
        'n = Shape(x) z0 = Sub(n, n) q = Concat<axis=0>(z0, z0) o = Add(q, p) '
        'h0 = Pad<mode="reflect">(x, o) h = Reshape(h0, t)', (2, 3, 4), 18,
        {"p": ints(0, 1, 1, 0, 1, 2), "t": ints(2, 35)},
    ),
    "expand 9": ("h = Expand(x, s)", (2, 1, 3), 9, {"s": ints(4, 1)}),
    "expand 13, more axes": ("e = Expand(x, s) h = Transpose<perm=[1,0,2]>(e)", (2, 3), 13,
                             {"s": ints(4, 1, 3)}),
    "tile 9": ("h = Tile(x, r)", (2, 3, 2), 9, {"r": ints(1, 2, 3)}),
    "tile 13": ("h = Tile(x, r)", (2, 3, 2), 13, {"r": ints(1, 2, 3)}),
    "gather 9, one": ("h = Gather<axis=1>(x, i)", (2, 4, 3), 9, {"i": np.array(-1)}),
    "gather 9, repeated": ("h = Gather<axis=1>(x, i)", (2, 4, 3), 9, {"i": ints(1, 1, 3, 1)}),
    "gather 13, two axes of indices": ("h = Gather<axis=-1>(x, i)", (2, 4, 3), 13,
                                       {"i": np.array([[0, -1], [1, 0]])}),
    "gather 13, in the middle": ("h = Gather<axis=1>(x, i)", (2, 4, 3), 13,
                                 {"i": np.array([[0, -1], [1, 0]])}),
    "gather at run time": ("v, i = TopK(x, k) j = Gather(i, zero) d = Gather<axis=1>(x, j) "
                           "h = Transpose<perm=[0,1]>(d)", (2, 5), 18,
                           {"k": ints(3), "zero": np.array(0)}),
    "gather elements 11, distinct": ("h = GatherElements<axis=1>(x, i)", (2, 4), 11,
                                     {"i": np.array([[3, 0], [1, 2]])}),
    "gather elements 16": ("h = GatherElements<axis=-1>(x, i)", (2, 4), 16,
                           {"i": np.array([[3, 0, -1], [1, 1, 2]])}),
    "gather nd 11": ("h = GatherND(x, i)", (2, 3, 4), 11,
                     {"i": np.array([[[0, 1], [0, 2]], [[1, 0], [1, 1]]])}),
    "gather nd 16, batched": ("h = GatherND<batch_dims=1>(x, i)", (2, 3, 4), 16,
                              {"i": np.array([[[1], [1]], [[0], [-1]]])}),
    "scatter elements 11": ("u = Neg(x) h = ScatterElements<axis=1>(x, i, u)", (2, 3), 11,
                            {"i": np.array([[2, 0, 1], [1, 2, 0]])}),
    "scatter elements 18, add": (
        'u = Mul(x, x) h = ScatterElements<axis=-1, reduction="add">(x, i, u)', (2, 3), 18,
        {"i": np.array([[2, 0, 0], [1, 1, 1]])}),
    "scatter elements, part": ("h = ScatterElements<axis=1>(x, i, u)", (2, 3), 18,
                               {"i": np.array([[2], [0]]), "u": weight(2, 1)}),
    "scatter nd 11": ("u = Slice(x, s, e, a) h = ScatterND(x, i, u)", (2, 3), 11,
                      {"s": ints(1), "e": ints(3), "a": ints(1),
                       "i": np.array([[[0, 0], [0, 1]], [[1, 0], [1, 2]]])}),
    "scatter nd 18, add": (
        'u = Mul(x, x) h = ScatterND<reduction="add">(x, i, u)', (2, 3), 18,
        {"i": np.array([[[0, 0], [0, 0], [0, 1]], [[1, 0], [1, 2], [1, 2]]])}),
    "scatter 9": ("h = Scatter<axis=1>(x, i, u)", (2, 3), 9,
                  {"i": np.array([[2], [0]]), "u": weight(2, 1)}),
    "compress 11": ("h = Compress<axis=1>(x, c)", (2, 4), 11,
                    {"c": np.array([True, False, True, True])}),
    "reverse sequence 10": ("h = ReverseSequence<batch_axis=0, time_axis=1>(x, l)", (2, 4), 10,
                            {"l": ints(3, 4)}),
    "depth to space 9": ("h = DepthToSpace<blocksize=2>(x)", (2, 8, 2, 3), 9, {}),
    "depth to space 11, crd": ('h = DepthToSpace<blocksize=2, mode="CRD">(x)', (2, 8, 2, 3), 11,
                               {}),
    "depth to space 13, dcr": ('h = DepthToSpace<blocksize=2, mode="DCR">(x)', (2, 8, 2, 3), 13,
                               {}),
    "space to depth 9": ("h = SpaceToDepth<blocksize=2>(x)", (2, 2, 4, 6), 9, {}),
    "space to depth 13": ("h = SpaceToDepth<blocksize=2>(x)", (2, 2, 4, 6), 13, {}),
    "cumsum 11": ("h = CumSum(x, a)", (2, 4), 11, {"a": np.array(1)}),
    "cumsum 14, exclusive, reverse": ("h = CumSum<exclusive=1, reverse=1>(x, a)", (2, 4), 14,
                                      {"a": np.array(-1)}),
    "top k 9": ("h, i = TopK<k=2>(x)", (2, 5), 9, {}),
    "top k 10": ("h, i = TopK<axis=1>(x, k)", (2, 5, 3), 10, {"k": ints(2)}),
    "top k 11, smallest": ("h, i = TopK<largest=0>(x, k)", (2, 5), 11, {"k": ints(3)}),
    "top k 24": ("h, i = TopK<axis=1>(x, k)", (2, 5), 24, {"k": ints(2)}),
    "trilu": ("h = Trilu<upper=0>(x)", (2, 3, 4), 14, {}),
    "trilu, k": ("h = Trilu(x, k)", (2, 3, 4), 14, {"k": np.array(1)}),
    "einsum, product": ('h = Einsum<equation="nab,bc->nac">(x, b)', (2, 3, 4), 12,
                        {"b": weight(4, 2)}),
    "einsum, twice x": ('h = Einsum<equation="nab , ncb -> nac">(x, x)', (2, 3, 4), 12, {}),
    "einsum, implicit": ('h = Einsum<equation="bj,jk">(x, b)', (2, 3), 12,
                         {"b": weight(3, 4)}),
    "einsum, one operand": ('h = Einsum<equation="nab->nb">(x)', (2, 3, 4), 12, {}),
    "einsum, ellipsis": ('h = Einsum<equation="...ab,...bc->...ac">(x, b)', (2, 2, 3, 4), 12,
                         {"b": weight(1, 2, 4, 3)}),
    "einsum, ellipsis repeated": ('h = Einsum<equation="n...a,...a->n...">(x, b)', (2, 1, 4), 12,
                                  {"b": weight(3, 4)}),
    "einsum, alone and shared": ('h = Einsum<equation="nab,nc->nac">(y, x)', (2, 4), 12,
                                 {"y": weight(2, 3, 2)}),
    "range 11": (
        "s, d = Split<axis=1>(x) t = Reshape(s, n) v = Reshape(d, n) u = Exp(v) m = Mul(u, c) "
        "e = Add(t, m) r = Range(t, e, u) h = Reshape(r, k)", (1, 2), 11,
        {"n": np.array([], I64), "c": np.array(4.5), "k": ints(1, -1)}),
    "concat 13, negative axis of unknown rank": (
        "o = Shape(x) y = Reshape(x, o) a = Neg(y) b = Mul(y, y) c = Concat<axis=-1>(a, b) "
        "h = Reshape(c, k)", (2, 3), 13, {"k": ints(2, 6)}),
    "matmul, vector right": ("h = MatMul(x, b)", (2, 3, 4), 13, {"b": weight(4)}),
    "matmul, x is the vector": (
        "v = Reshape(x, s) m = MatMul(b, v) h = Reshape(m, t)", (1, 4), 13,
        {"b": weight(2, 3, 4), "s": ints(-1), "t": ints(1, 6)}),
    "matmul, x is the left vector": (
        "v = Reshape(x, s) m = MatMul(v, b) h = Reshape(m, t)", (1, 4), 9,
        {"b": weight(2, 4, 3), "s": ints(-1), "t": ints(1, 6)}),
    "matmul, vector left": ("h = MatMul(b, x)", (2, 4, 3), 13, {"b": weight(4)}),
    "matmul, two vectors": (
        "v = Reshape(x, s) m = MatMul(v, v) h = Reshape(m, t)", (1, 4), 13,
        {"s": ints(-1), "t": ints(1, 1)}),
}  # fmt: skip
FIXED = ("gather nd", "scatter", "concat 9", "reverse", "gather elements", "einsum, alone",
         "concat unknown", "pad at run", "reflect at", "slice at", "slice without",
         "range")  # fmt: skip


# The reference evaluator lacks Scatter, pads of both signs, and GatherElements' negative axes:
# there the loss comes from onnxruntime in float64.
BY_ONNXRUNTIME = ("scatter 9", "pad 13", "pad at run", "gather elements 16")


class Runtime:
    """Looks like a `ReferenceEvaluator`."""

    def __init__(self, proto: Any) -> None:
        self._session = Session(jr.Model(proto.SerializeToString()), device="cpu")

    def run(self, outputs: None, feeds: dict[str, Any]) -> list[Any]:
        return self._session.run(feeds, outputs)


@pytest.mark.parametrize("dtype", ["float", "double"])
@pytest.mark.parametrize("name", CASES)
def test_a_rule_agrees_with_finite_differences(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name.startswith(BY_ONNXRUNTIME):
        monkeypatch.setattr(gradient_checks, "ReferenceEvaluator", Runtime)
    body, shape, opset, weights = CASES[name]
    make, _ = case(body, shape, opset, fixed=name.startswith(FIXED), **weights)
    check(make, shape, dtype)


def test_the_values_of_one_hot_vary() -> None:
    """In float32 only: onnxruntime has no float64 kernel."""
    for opset in (9, 11, 28):
        make, shape = case(
            "v = Reshape(x, n) o = OneHot<axis=0>(i, d, v) h = Reshape(o, k)", (1, 2), opset,
            fixed=True, n=ints(-1), i=ints(2, 0, 1, 5), d=ints(3), k=ints(1, 12),
        )  # fmt: skip
        check_with_onnxruntime(make, shape)


def check_with_onnxruntime(make: Case, shape: tuple[int, ...]) -> None:
    """The logits are linear in x, so that float32 differences of any size are exact enough."""
    rng = np.random.default_rng(1)
    x, d = rng.normal(size=shape).astype(np.float32), rng.normal(size=shape).astype(np.float32)
    target = jr.Target(make("float"), device="cpu")
    _, gradient = target.loss_and_gradient(x, np.array([2]))

    def loss(t: float) -> float:
        z = target.logits(x + np.float32(t) * d).astype(np.float64)[0]
        return float(np.log(np.exp(z).sum()) - z[2])

    slope = (loss(-0.02) - 8 * loss(-0.01) + 8 * loss(0.01) - loss(0.02)) / 0.12
    np.testing.assert_allclose((gradient * d).sum(), slope, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "body",
    ["h = Gather<axis=1>(x, j)", "h = GatherElements<axis=1>(x, i)",
     "h = GatherND<batch_dims=1>(x, k)"],
)  # fmt: skip
def test_copies_are_added_in_float16(body: str) -> None:
    """For which onnxruntime's ScatterElements has no sum."""
    text = f"o = Shape(x) y = Reshape(x, o) {body.replace('(x', '(y')} z = MatMul(h, w)"
    indices = {"i": np.array([[1, 1, 0]]), "j": ints(1, 1, 0), "k": np.array([[[1], [1], [0]]])}
    x, y = np.array([[0.5, -1.5]]), np.array([1])
    make = model(text, "1,2", 18, w=weight(3, 4).astype(np.float16).astype(float), **indices)
    _, expected = jr.Target(make("double"), device="cpu").loss_and_gradient(x, y)
    half = model(text, "1,2", 18, w=weight(3, 4).astype(np.float16), **indices)
    _, got = jr.Target(half("float16"), device="cpu").loss_and_gradient(x, y)
    np.testing.assert_allclose(got, expected, rtol=2e-3)
