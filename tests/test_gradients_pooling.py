"""The rules of what slides over space: pooling, convolution, interpolation."""

from __future__ import annotations

import re
from typing import Any

import gradient_checks
import numpy as np
import pytest
from gradient_checks import check, model, weight
from test_gradients_shape import case, ints

import jr_onnx as jr
from jr_onnx.errors import UnsupportedOpError
from jr_onnx.session import Session

IMAGE = (2, 2, 6, 7)
# name -> arguments of `case`; attributes in place of {}.
CASES: dict[str, tuple[Any, ...]] = {
    "global average 9": ("h = GlobalAveragePool(x)", IMAGE, 9, {}),
    "global average 24, 3d": ("h = GlobalAveragePool(x)", (2, 2, 3, 4, 2), 24, {}),
    "global max 9": ("h = GlobalMaxPool(x)", IMAGE, 9, {}),
    "global max 22": ("h = GlobalMaxPool(x)", IMAGE, 22, {}),
    "average 9": ("h = AveragePool<kernel_shape=[2,3], strides=[2,2]>(x)", IMAGE, 9, {}),
    "average 9, pads": (
        "h = AveragePool<kernel_shape=[3,3], strides=[2,1], pads=[1,1,0,1]>(x)", IMAGE, 9, {}),
    "average 9, pads counted": (
        "h = AveragePool<kernel_shape=[3,3], pads=[1,1,0,1], count_include_pad=1>(x)", IMAGE, 9,
        {}),
    "average 11, ceil": (
        "h = AveragePool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1>(x)", IMAGE, 11, {}),
    "average 11, ceil and pads": (
        "h = AveragePool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1, pads=[1,1,1,1]>(x)",
        IMAGE, 11, {}),
    "average 22, ceil, pads counted": (
        "h = AveragePool<kernel_shape=[3,3], strides=[2,3], ceil_mode=1, pads=[1,1,1,1], "
        "count_include_pad=1>(x)", IMAGE, 22, {}),
    "average 19, dilated": (
        "h = AveragePool<kernel_shape=[2,3], dilations=[3,2], pads=[1,1,1,1]>(x)", IMAGE, 19, {}),
    "average 11, same upper": (
        'h = AveragePool<kernel_shape=[3,2], strides=[2,2], auto_pad="SAME_UPPER">(x)', IMAGE, 11,
        {}),
    "average 11, same lower": (
        'h = AveragePool<kernel_shape=[3,2], strides=[2,2], auto_pad="SAME_LOWER">(x)', IMAGE, 11,
        {}),
    "average 22, ceil, the last in the padding": (
        "h = AveragePool<kernel_shape=[1,2], strides=[2,1], ceil_mode=1>(x)", (2, 2, 4, 5), 22, {}),
    "average 1d": ("h = AveragePool<kernel_shape=[3], strides=[2]>(x)", (2, 2, 8), 13, {}),
    "average 3d": ("h = AveragePool<kernel_shape=[2,2,2], strides=[2,1,2]>(x)", (2, 1, 4, 3, 5),
                   13, {}),
    "lp 9, p = 1": ("h = LpPool<kernel_shape=[2,3], p=1>(x)", IMAGE, 9, {}),
    "lp 11": ("h = LpPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(x)", IMAGE, 11, {}),
    "lp 18, p = 3": ("h = LpPool<kernel_shape=[3,2], strides=[2,2], p=3>(x)", IMAGE, 18, {}),
    "lp 22, dilated": ("h = LpPool<kernel_shape=[2,2], dilations=[2,1]>(x)", IMAGE, 22, {}),
    "max 9, overlapping": (
        "h = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(x)", IMAGE, 9, {}),
    "max 10, ceil": (
        "h = MaxPool<kernel_shape=[3,2], strides=[2,1], ceil_mode=1>(x)", IMAGE, 10, {}),
    "max 12, dilated": ("h = MaxPool<kernel_shape=[2,2], dilations=[2,3]>(x)", IMAGE, 12, {}),
    "max 12, few windows": ("h = MaxPool<kernel_shape=[5,5]>(x)", IMAGE, 12, {}),
    "max 22, dilated": ("h = MaxPool<kernel_shape=[2,2], dilations=[2,3]>(x)", IMAGE, 22, {}),
    "max 11, columns first": (
        "h = MaxPool<kernel_shape=[3,3], strides=[2,2], storage_order=1>(x)", IMAGE, 11, {}),
    "max 1d": ("h = MaxPool<kernel_shape=[3], strides=[2]>(x)", (2, 2, 8), 13, {}),
    "max 3d": ("h = MaxPool<kernel_shape=[2,2,3], strides=[1,2,1]>(x)", (2, 1, 4, 3, 5), 13, {}),
    "conv 3d": (
        "h = Conv<strides=[2,1,2], pads=[1,0,1,0,1,1]>(x, k, b)", (2, 2, 4, 3, 5), 13,
        {"k": weight(3, 2, 3, 2, 2), "b": weight(3)}),
    "conv, input as bias": (
        "s = GlobalMaxPool(x) r = Reshape(s, t) h = Conv(x, k, r)", (1, 2, 4, 3), 13,
        {"k": weight(2, 2, 3, 2), "t": ints(2)}),
    "transposed 9": ("h = ConvTranspose(x, k)", (2, 3, 4, 3), 9, {"k": weight(3, 2, 3, 2)}),
    "transposed, strides, pads, groups": (
        "h = ConvTranspose<strides=[2,3], pads=[1,0,0,1], output_padding=[1,2], group=2, "
        "dilations=[1,2]>(x, k)", (2, 4, 4, 3), 13, {"k": weight(4, 1, 3, 2)}),
    "transposed, output shape": (
        "h = ConvTranspose<strides=[2,2], output_shape=[7,6]>(x, k)", (2, 2, 4, 3), 13,
        {"k": weight(2, 2, 3, 3)}),
    "transposed, same upper": (
        'h = ConvTranspose<strides=[2,2], auto_pad="SAME_UPPER">(x, k)', (2, 2, 4, 3), 13,
        {"k": weight(2, 2, 3, 3)}),
    "transposed, same lower": (
        'h = ConvTranspose<strides=[2,2], auto_pad="SAME_LOWER">(x, k)', (2, 2, 4, 3), 13,
        {"k": weight(2, 2, 3, 3)}),
    "transposed 1d": ("h = ConvTranspose<strides=[2]>(x, k)", (2, 2, 4), 22,
                      {"k": weight(2, 2, 3)}),
    "transposed 3d": ("h = ConvTranspose<strides=[2,1,1]>(x, k)", (2, 2, 2, 3, 2), 22,
                      {"k": weight(2, 1, 3, 2, 1)}),
}  # fmt: skip
# Where the reference evaluator errs (output padding with dilations, output_shape) or is not to be
# trusted (how coordinates round), onnxruntime's own forward pass is the truth.
BY_ONNXRUNTIME = ("transposed, strides", "transposed, output", "resize", "upsample")
COORDINATES = ("asymmetric", "half_pixel", "align_corners", "pytorch_half_pixel")
ROUNDINGS = ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")


def resized(mode: str, coordinates: str, opset: int, more: str = "", **given: Any) -> Any:
    """Returns the arguments of `case` for a Resize, by `scales` or `sizes`."""
    inputs = "x, , scales" if "scales" in given else "x, , , sizes"
    if opset < 13:
        inputs = "x, roi, scales" if "scales" in given else "x, roi, none, sizes"
        given |= {"roi": np.zeros(0, np.float32), "none": np.zeros(0, np.float32)}
        given = {name: value for name, value in given.items() if name in inputs}
    attributes = f'mode="{mode}", coordinate_transformation_mode="{coordinates}"{more}'
    return f"h = Resize<{attributes}>({inputs})", (2, 2, 4, 5), opset, given


def scales(*values: float) -> np.ndarray[Any, Any]:
    return np.array(values, np.float32)


UP, DOWN, ODD = scales(1, 1, 2, 3), scales(1, 1, 0.5, 0.6), scales(1, 1, 1.3, 1)
CASES |= {
    f"resize {mode}, {coordinates}, {opset}, {'x'.join(map(str, by[2:]))}": resized(
        mode, coordinates, opset, scales=by
    )
    for mode in ("nearest", "linear", "cubic")
    for coordinates in COORDINATES
    for opset in (11, 13, 19)
    for by in (UP, DOWN, ODD)
}
CASES |= {
    f"resize nearest, {coordinates}, {rounding}": resized(
        "nearest", coordinates, 13, f', nearest_mode="{rounding}"', scales=UP
    )
    for rounding in ROUNDINGS
    for coordinates in COORDINATES
}
CASES |= {
    "resize to sizes 11": resized("linear", "half_pixel", 11, sizes=ints(2, 2, 7, 3)),
    "resize to sizes 13": resized("nearest", "asymmetric", 13, ', nearest_mode="floor"',
                                  sizes=ints(2, 2, 7, 3)),
    "resize to one": resized("linear", "pytorch_half_pixel", 13, sizes=ints(2, 2, 1, 1)),
    "resize axes": resized("linear", "half_pixel", 18, ", axes=[3,2]", sizes=ints(7, 3)),
    "resize symmetric": resized("linear", "half_pixel_symmetric", 19, scales=ODD),
    "resize cubic, outside excluded": resized("cubic", "half_pixel", 13,
                                              ", exclude_outside=1, cubic_coeff_a=-0.5", scales=UP),
    "resize keeping the aspect": resized(
        "linear", "half_pixel", 18, ', axes=[2,3], keep_aspect_ratio_policy="not_larger"',
        sizes=ints(7, 7)),
    "resize nearest, not larger": resized(
        "nearest", "half_pixel", 18, ', axes=[2,3], keep_aspect_ratio_policy="not_larger"',
        sizes=ints(7, 7)),
    "resize nearest, not smaller": resized(
        "nearest", "asymmetric", 19, ', axes=[3,2], keep_aspect_ratio_policy="not_smaller"',
        sizes=ints(3, 3)),
    "resize 10, nearest": ("h = Resize(x, s)", (2, 2, 4, 5), 10, {"s": scales(1, 1, 2, 1.5)}),
    "resize 10, linear": ('h = Resize<mode="linear">(x, s)', (2, 2, 4, 5), 10, {"s": UP}),
    "upsample 9": ("h = Upsample(x, s)", (2, 2, 4, 5), 9, {"s": UP}),
    "upsample 9, linear": ('h = Upsample<mode="linear">(x, s)', (2, 2, 4, 5), 9, {"s": UP}),
    "resize 3d": ("h = Resize(x, , s)", (2, 1, 2, 3, 2), 13, {"s": scales(1, 1, 2, 3, 2)}),
    "resize to a size from a shape": (
        "n = Shape(x) b = Slice(n, zero, two) s = Concat<axis=0>(b, sizes) "
        'h = Resize<mode="linear">(x, , , s)', (2, 2, 4, 5), 13,
        {"zero": ints(0), "two": ints(2), "sizes": ints(7, 3)}),
}  # fmt: skip


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("coordinates", [*COORDINATES, "half_pixel_symmetric"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_nearest_element_is_the_one_that_was_taken_at_ties_too(
    coordinates: str, rounding: str, dynamic: bool
) -> None:
    attributes = f'coordinate_transformation_mode="{coordinates}", nearest_mode="{rounding}"'
    for before, after in ((14, 19), (14, 31), (22, 13), (20, 24), (42, 49), (3, 1)):
        # By a size, and by a scale.
        # onnx and onnxruntime round the product of size and scale otherwise: it is no whole number.
        by_scale = scales(1, (after + 0.01) / before)
        for given, value in (("x, , , by", ints(1, after)), ("x, , by", by_scale)):
            body = f'z = Resize<mode="nearest", {attributes}>({given})'
            resizing = model(body, f"1, {'W' if dynamic else before}", 19, by=value)("float")
            graph = jr.input_gradient(resizing, loss="drift")
            x = np.arange(1, before + 1, dtype=np.float32)[None]
            taken = Session(resizing, device="cpu").run({"x": x})[0].astype(int)
            feeds = {graph.x: x, graph.compared["reference"]: np.zeros(taken.shape, np.float32)}
            (gradient,) = Session(graph.model, device="cpu").run(feeds, [graph.gradient])
            times = np.bincount(taken[0], minlength=before + 1)[1:]
            np.testing.assert_allclose(gradient[0], 2 * times * x[0], rtol=1e-6)


class Affine:
    """Looks like a `ReferenceEvaluator`: an affine model, measured on onnxruntime in float32."""

    def __init__(self, make: Any, shape: tuple[int, ...]) -> None:
        session, size = Session(make("float"), device="cpu"), int(np.prod(shape[1:]))
        probes = np.concatenate([np.zeros((1, size)), np.eye(size)]).astype(np.float32)
        batches = probes.reshape(-1, 1, *shape[1:]).repeat(shape[0], 1)
        z = np.concatenate([session.run({"x": batch})[0][:1] for batch in batches])
        self._bias = z[0].astype(np.float64)
        self._slope = z[1:].astype(np.float64) - self._bias

    def run(self, outputs: None, feeds: dict[str, Any]) -> list[Any]:
        x = feeds["x"]
        return [x.reshape(len(x), -1) @ self._slope + self._bias]


@pytest.mark.parametrize("name", CASES)
def test_a_rule_agrees_with_finite_differences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body, shape, opset, weights = CASES[name]
    make, _ = case(body, shape, opset, fixed=shape[0] == 1 or "sizes" in weights, **weights)
    if name.startswith(BY_ONNXRUNTIME):
        affine = Affine(make, shape)
        monkeypatch.setattr(gradient_checks, "ReferenceEvaluator", lambda _: affine)
    check(make, shape, "float")


def gradient(body: str, shape: str, x: Any, *, opset: int = 13, **weights: Any) -> Any:
    target = jr.Target(model(body, shape, opset, **weights)("float"), device="cpu")
    return target.loss_and_gradient(x, np.arange(len(x)) % 4)[1]


def test_p_norms_over_space_are_p_norms_over_one_large_window() -> None:
    x = np.random.default_rng(0).normal(size=IMAGE)
    rest = "f = Flatten(h) z = MatMul(f, w)"
    whole = gradient(f"h = GlobalLpPool<p=3>(x) {rest}", "N,2,6,7", x, w=weight(2, 4))
    window = gradient(
        f"h = LpPool<kernel_shape=[6,7], p=3>(x) {rest}", "N,2,6,7", x, w=weight(2, 4)
    )
    np.testing.assert_allclose(whole, window, rtol=1e-5)


REFUSED = {
    "with ceil_mode onnx infers [3, 5] windows, there are [2, 5]: take opset 22": (
        "AveragePool<kernel_shape=[1,2], strides=[2,1], pads=[0,1,0,1], ceil_mode=1>(y)"
    ),
    "antialias": 'Resize<mode="linear", antialias=1>(y, , s)',
    "coordinate_transformation_mode='tf_crop_and_resize'": "Resize<"
    'coordinate_transformation_mode="tf_crop_and_resize", mode="linear">(y, r, s)',
    "reduction='mul'": 'ScatterElements<reduction="mul">(y, i, i1)',
    "a diagonal in 'nhii->nhi'": 'Einsum<equation="nhii->nhi">(y)',
    "one letter, two sizes in 'nhij,nhij->nhij'": 'Einsum<equation="nhij,nhij->nhij">(y, i1)',
    "nearest, with coordinate_transformation_mode='tf_crop_and_resize'": "Resize<"
    'coordinate_transformation_mode="tf_crop_and_resize">(y, r, s)',
    "nearest, fitted to sizes, with coordinate_transformation_mode='align_corners'": "Resize<"
    'coordinate_transformation_mode="align_corners", axes=[2,3], '
    'keep_aspect_ratio_policy="not_larger">(y, , , p)',
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_say_why(reason: str) -> None:
    body = f"y = Reshape(x, t) h = {REFUSED[reason]} f = Flatten(h) z = MatMul(f, w)"
    make = model(
        body, "N,2,H,W", 18, k=weight(2, 2, 3, 3), s=scales(1, 1, 2, 2), w=weight(8, 4),
        t=ints(-1, 2, 4, 4), i=np.zeros((1, 1, 1, 1), np.int64), i1=weight(1, 1, 1, 1),
        r=np.array([0, 0, 0, 0, 1, 1, 1, 1], np.float32), p=ints(7, 7),
    )  # fmt: skip
    with pytest.raises(UnsupportedOpError, match=re.escape(reason)):
        jr.autodiff.input_gradient(make("float"))
