"""The rules that plain convolutional and dense networks need."""

from __future__ import annotations

import numpy as np
import pytest
from gradient_checks import Case, check, model, weight

TO_CLASSES = "f = Flatten(h) z = MatMul(f, w)"
CASES: dict[str, tuple[Case, tuple[int, ...]]] = {
    "gemm": (
        model("z = Gemm<alpha=0.5, beta=2.0>(x, w, b)", "N,6", w=weight(6, 4), b=weight(4)),
        (3, 6),
    ),
    "gemm transB": (model("z = Gemm<transB=1>(x, w)", "N,6", w=weight(4, 6)), (3, 6)),
    "gemm transA": (
        model("t = Transpose(x) z = Gemm<transA=1>(t, w)", "N,6", w=weight(6, 4)),
        (3, 6),
    ),
    "gemm second input": (
        model(
            "t = Transpose(x) u = Gemm<transB=1>(w, x) z = Transpose(u)",
            "N,6",
            w=weight(4, 6),
        ),
        (3, 6),
    ),
    "gemm opset 9": (
        model("z = Gemm(x, w, b)", "N,6", opset=9, w=weight(6, 4), b=weight(4)),
        (3, 6),
    ),
    "matmul, batched left": (
        model(
            "h = MatMul(x, v) r = Relu(h) f = Flatten(r) z = MatMul(f, w)",
            "N,3,5",
            v=weight(5, 2),
            w=weight(6, 4),
        ),
        (3, 3, 5),
    ),
    "matmul right": (
        model(
            "h = MatMul(v, x) f = Flatten(h) z = MatMul(f, w)",
            "N,3,5",
            v=weight(2, 3),
            w=weight(10, 4),
        ),
        (3, 3, 5),
    ),
    "add, sub, mul, div with broadcasting": (
        model(
            "a = Add(x, b) s = Sub(b, a) m = Mul(s, x) d = Div(m, e) n = Neg(d) z = MatMul(n, w)",
            "N,6",
            b=weight(1, 6),
            e=weight(6) + 3,
            w=weight(6, 4),
        ),
        (3, 6),
    ),
    "div by x": (
        model(
            "q = Mul(x, x) p = Add(q, one) d = Div(b, p) z = MatMul(d, w)",
            "N,6",
            one=np.array(1.0),
            b=weight(6),
            w=weight(6, 4),
        ),
        (3, 6),
    ),
    "abs and clip": (
        model("a = Abs(x) c = Clip(a, low, high) z = MatMul(c, w)", "N,6", low=np.array(0.3),
               high=np.array(1.2), w=weight(6, 4)),
        (3, 6),
    ),
    "clip opset 10": (
        model("c = Clip<min=-0.5, max=0.7>(x) z = MatMul(c, w)", "N,6", opset=10, w=weight(6, 4)),
        (3, 6),
    ),
    "a broadcast of unknown shapes": (
        model("s = Shape(x) o = Expand(one, s) r = Reshape(one, t) e = Mul(r, o) "
               "m = Mul(x, e) z = MatMul(m, w)", "N,6", one=np.array([1.5]),
               t=np.array([1, 1]), w=weight(6, 4)),
        (3, 6),
    ),
    "an input of unknown rank": (
        model("s = Shape(u) r = Reshape(x, s) m = Mul(r, b) a = Add(b, m) f = Reshape(a, t) "
               "z = MatMul(f, w)", "N,6", u=weight(1, 6), t=np.array([-1, 12]),
               b=weight(2, 6), w=weight(12, 4)),
        (1, 6),
    ),
    "where": (
        model(
            "c = Greater(x, t) n = Neg(x) h = Where(c, x, n) z = MatMul(h, w)",
            "N,6",
            t=np.array(0.2),
            w=weight(6, 4),
        ),
        (3, 6),
    ),
    "conv, stride and uneven pads": (
        model(
            f"h = Conv<strides=[2,3], pads=[1,0,2,1]>(x, k) {TO_CLASSES}",
            "N,2,7,9",
            k=weight(3, 2, 3, 2),
            w=weight(3 * 4 * 3, 4),
        ),
        (2, 2, 7, 9),
    ),
    "conv, rows no window reaches": (
        model(
            f"h = Conv<strides=[3,3]>(x, k) {TO_CLASSES}",
            "N,2,8,9",
            k=weight(3, 2, 3, 3),
            w=weight(3 * 2 * 3, 4),
        ),
        (2, 2, 8, 9),
    ),
    "conv, groups and dilations": (
        model(
            f"h = Conv<group=2, dilations=[2,1]>(x, k) {TO_CLASSES}",
            "N,4,7,5",
            k=weight(4, 2, 3, 3),
            w=weight(4 * 3 * 3, 4),
        ),
        (2, 4, 7, 5),
    ),
    "conv, same upper": (
        model(
            f'h = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, k) {TO_CLASSES}',
            "N,1,6,7",
            k=weight(2, 1, 3, 2),
            w=weight(2 * 3 * 4, 4),
        ),
        (2, 1, 6, 7),
    ),
    "conv 1d": (
        model(
            f"h = Conv<pads=[1,1]>(x, k) {TO_CLASSES}",
            "N,2,7",
            k=weight(3, 2, 3),
            w=weight(21, 4),
        ),
        (2, 2, 7),
    ),
    "max-pool": (
        model(
            f"h = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x) {TO_CLASSES}",
            "N,2,6,5",
            w=weight(12, 4),
        ),
        (2, 2, 6, 5),
    ),
    "max-pool, overlapping with pads and ceil": (
        model(
            "h = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1], ceil_mode=1>(x) "
            + TO_CLASSES,
            "N,2,6,5",
            w=weight(2 * 4 * 3, 4),
        ),
        (2, 2, 6, 5),
    ),
    "max-pool opset 9": (
        model(
            f"h = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x) {TO_CLASSES}",
            "N,2,6,4",
            opset=9,
            w=weight(12, 4),
        ),
        (2, 2, 6, 4),
    ),
    "reshape, transpose, identity": (
        model(
            "t = Transpose<perm=[0,2,1]>(x) r = Reshape(t, s) i = Identity(r) z = MatMul(i, w)",
            "N,2,3",
            s=np.array([-1, 6]),
            w=weight(6, 4),
        ),
        (3, 2, 3),
    ),
    "a value used twice": (
        model("a = Relu(x) b = Neg(x) c = Mul(a, b) d = Add(c, a) z = MatMul(d, w)", "N,6",
               w=weight(6, 4)),
        (3, 6),
    ),
}  # fmt: skip


# onnxruntime's CPU provider has no float64 kernel of Conv, ConvTranspose and the old Clip.
SINGLE_ONLY = ("conv", "clip opset")
DTYPES = [
    (case, dtype)
    for case in CASES
    for dtype in ("float", "double")
    if not (dtype == "double" and case.startswith(SINGLE_ONLY))
]


@pytest.mark.parametrize(("case", "dtype"), DTYPES)
def test_a_rule_agrees_with_finite_differences(case: str, dtype: str) -> None:
    make, shape = CASES[case]
    check(make, shape, dtype)
