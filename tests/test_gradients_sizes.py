"""Gradients where height and width are known at run time only.

Each is compared with the gradient of the same model with a fixed size, which the other tests hold
against finite differences, and with finite differences itself where the ONNX reference evaluator
agrees with onnxruntime on the way forward.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import pytest
from gradient_checks import check, model, weight
from test_gradients_pooling import COORDINATES, ROUNDINGS, gradient, scales
from test_gradients_shape import ints

import jr_onnx as jr

SIZES = [(6, 7), (9, 8)]
GIVEN: dict[str, Any] = {
    "k": weight(2, 2, 3, 2), "k1": weight(2, 1, 3, 2), "k2": weight(2, 2, 1, 1),
    "from": ints(1), "to": ints(-1), "space": ints(2, 3), "ones": ints(1, 1), "last": ints(-1, -2),
    "pads": ints(0, 0, 1, 2, 0, 0, 1, 0), "two": ints(2), "zero": ints(0), "three": ints(3),
    "up": scales(1, 1, 2, 3), "down": scales(1, 1, 0.5, 0.6), "odd": scales(1, 1, 1.3, 1),
    "to_size": ints(7, 5), "roi": np.zeros(0, np.float32), "bottom": ints(2), "behind": ints(4),
}  # fmt: skip
# name -> body from x to h, opset
SLIDING: dict[str, tuple[str, int]] = {
    "conv": ("h = Conv<strides=[2,3], pads=[1,0,2,1]>(x, k)", 18),
    "conv 9": ("h = Conv<strides=[2,3], pads=[1,0,2,1]>(x, k)", 9),
    "conv, groups": ("h = Conv<group=2, dilations=[2,1]>(x, k1)", 18),
    "conv, same": ('h = Conv<auto_pad="SAME_LOWER">(x, k)', 18),
    "conv, same, strides": (
        'h = Conv<auto_pad="SAME_UPPER", strides=[2,3]>(x, k)', 18),
    "conv, same, long strides": ('h = Conv<auto_pad="SAME_LOWER", strides=[4,3]>(x, k)', 18),
    "conv, same, strides, 9": ('h = Conv<auto_pad="SAME_LOWER", strides=[2,2]>(x, k)', 9),
    "average": ("h = AveragePool<kernel_shape=[3,2], strides=[2,1]>(x)", 18),
    "average, pads counted": (
        "h = AveragePool<kernel_shape=[3,2], strides=[2,1], pads=[1,1,0,1], "
        "count_include_pad=1>(x)", 18),
    "average, pads": (
        "h = AveragePool<kernel_shape=[3,4], strides=[2,3], pads=[1,2,2,1]>(x)", 18),
    "average, pads, 9": (
        "h = AveragePool<kernel_shape=[3,4], strides=[2,3], pads=[1,2,2,1]>(x)", 9),
    "average, ceil": (
        "h = AveragePool<kernel_shape=[3,2], strides=[2,3], ceil_mode=1>(x)", 18),
    "average, ceil, dilated": (
        "h = AveragePool<kernel_shape=[3,2], strides=[2,3], dilations=[2,3], ceil_mode=1, "
        "pads=[1,1,1,0]>(x)", 19),
    "average, ceil, pads counted": (
        "h = AveragePool<kernel_shape=[3,2], strides=[2,3], ceil_mode=1, pads=[1,1,1,0], "
        "count_include_pad=1>(x)", 22),
    "average, same": (
        'h = AveragePool<kernel_shape=[3,2], strides=[2,2], auto_pad="SAME_UPPER">(x)', 18),
    "average, same, 9": (
        'h = AveragePool<kernel_shape=[3,2], strides=[2,2], auto_pad="SAME_LOWER">(x)', 9),
    "average, same, pads counted": (
        'h = AveragePool<kernel_shape=[3,2], strides=[2,2], auto_pad="SAME_UPPER", '
        "count_include_pad=1>(x)", 18),
    "p-norm": ("h = LpPool<kernel_shape=[3,2], strides=[2,1], pads=[1,1,0,1]>(x)", 18),
    "p-norm, ceil": ("h = LpPool<kernel_shape=[3,2], strides=[2,3], ceil_mode=1>(x)", 18),
    "p-norm, same": (
        'h = LpPool<kernel_shape=[3,2], strides=[2,3], auto_pad="SAME_UPPER">(x)', 18),
    "transposed": ("h = ConvTranspose<strides=[2,3], pads=[1,0,0,1]>(x, k)", 18),
    "transposed, same": ('h = ConvTranspose<strides=[2,3], auto_pad="SAME_UPPER">(x, k)', 18),
    "transposed, same, gaps": ('h = ConvTranspose<strides=[2,3], auto_pad="SAME_LOWER">(x, k2)',
                               18),
    "average over space": ("h = GlobalAveragePool(x)", 18),
    "maximum": ("h = MaxPool<kernel_shape=[3,2], strides=[2,1]>(x)", 18),
    "maximum, ceil": (
        "h = MaxPool<kernel_shape=[3,2], strides=[2,1], pads=[1,0,0,1], ceil_mode=1>(x)", 18),
    "maximum, tiles": ("h = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x)", 18),
    "maximum 9": ("h = MaxPool<kernel_shape=[3,2], strides=[2,1]>(x)", 9),
    "maximum 12, same": (
        'h = MaxPool<kernel_shape=[3,2], strides=[2,2], auto_pad="SAME_LOWER">(x)', 12),
    "cut": ("h = Slice(x, ones, last, space)", 18),
    "cut 9": ("h = Slice<starts=[1,1], ends=[-1,-2], axes=[2,3]>(x)", 9),
    "padded": ("h = Pad(x, pads)", 18),
    "reflected": ('h = Pad<mode="reflect">(x, pads)', 18),
    "reflected 13": ('h = Pad<mode="reflect">(x, pads)', 13),
    "reflected 9": ('h = Pad<mode="reflect", pads=[0,0,1,2,0,0,1,0]>(x)', 9),
    "edges 11": ('h = Pad<mode="edge">(x, pads)', 11),
    "neighbouring channels": ("h = LRN<size=3, alpha=0.5>(x)", 18),
    "concatenated 9": ("y = Neg(x) h = Concat<axis=3>(x, y, x)", 9),
    "channels of blocks": ("h = SpaceToDepth<blocksize=1>(x)", 18),
    "broadcast rows": ("a = AveragePool<kernel_shape=[2,1]>(x) r = Slice(x, zero, from, bottom) "
                       "h = Mul(a, r)", 18),
    "broadcast rows 12": ("n = Shape(x) i = Slice(n, two, three) j = Sub(i, i) e = Add(j, from) "
                          "r = Slice(x, zero, e, bottom) h = Mul(x, r)", 12),
    "broadcast no rows 11": ("n = Shape(x) i = Slice(n, two, three) r = Slice(x, zero, i, bottom) "
                             "h = Mul(r, x)", 11),
    "resized to a size": ("n = Shape(x) b = Slice(n, zero, two) t = Concat<axis=0>(b, to_size) "
                          'h = Resize<mode="linear">(x, , , t)', 13),
    "resized to another's size": (
        'p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x) n = Shape(x) '
        'h = Resize<mode="linear">(p, , , n)', 13),
    "resized by computed scales": (
        "n = Shape(x) m = Div(n, n) d = Cast<to=1>(m) t = Mul(d, up) h = Resize(x, , t)", 13),
    "resized 11": ('h = Resize<mode="linear">(x, roi, up)', 11),
    "resized 10": ("h = Resize(x, down)", 10),
    "resized 9": ('h = Upsample<mode="linear">(x, up)', 9),
    "resized axes": ('h = Resize<mode="linear", axes=[3,2]>(x, , , to_size)', 18),
    "resized, keeping the aspect": (
        'h = Resize<mode="linear", axes=[2,3], keep_aspect_ratio_policy="not_larger">'
        "(x, , , to_size)", 18),
    "resized, outside excluded": (
        'h = Resize<mode="cubic", exclude_outside=1, cubic_coeff_a=-0.5>(x, , odd)', 18),
    "resized, symmetric": (
        'h = Resize<mode="linear", coordinate_transformation_mode="half_pixel_symmetric">'
        "(x, , odd)", 19),
}  # fmt: skip
SLIDING |= {
    f"resized {by}, {mode}, {coordinates}": (
        f'h = Resize<mode="{mode}", coordinate_transformation_mode="{coordinates}">(x, , {by})',
        18,
    )
    for mode in ("nearest", "linear", "cubic")
    for coordinates in COORDINATES
    for by in ("up", "down", "odd")
}
SLIDING |= {
    f"resized, {rounding}": (f'h = Resize<nearest_mode="{rounding}">(x, , down)', 18)
    for rounding in ROUNDINGS
}

# Where the reference evaluator computes something else than onnxruntime on the way forward.
DISAGREE = ("resized", "average, ceil, dilated", "p-norm, ceil", "transposed, same", "maximum 12")


def squared(name: str) -> tuple[str, int, dict[str, Any]]:
    body, opset = SLIDING[name]
    whole = f"{body} q = Mul(h, h) s = GlobalAveragePool(q) f = Flatten(s) z = MatMul(f, w)"
    used = {key: value for key, value in GIVEN.items() if f"{key})" in whole or f"{key}," in whole}
    return whole, opset, {**used, "w": weight(2, 4)}


@pytest.mark.parametrize("name", SLIDING)
@pytest.mark.parametrize("size", SIZES)
def test_the_gradient_is_that_of_the_fixed_size(name: str, size: tuple[int, int]) -> None:
    body, opset, weights = squared(name)
    x = np.random.default_rng(0).normal(size=(2, 2, *size))
    known = gradient(body, f"N,2,{size[0]},{size[1]}", x, opset=opset, **weights)
    unknown = gradient(body, "N,2,H,W", x, opset=opset, **weights)
    np.testing.assert_allclose(unknown, known, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in SLIDING if not name.startswith(DISAGREE)])
def test_the_gradient_agrees_with_finite_differences(name: str) -> None:
    body, opset, weights = squared(name)
    for size in SIZES:
        check(model(body, "N,2,H,W", opset, **weights), (2, 2, *size), "float")


@pytest.mark.parametrize("size", SIZES)
def test_a_network_for_pictures_of_any_size_has_torchs_gradient(size: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    nn, functional = torch.nn, torch.nn.functional

    class Skipping(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Conv2d(2, 4, 3, 2, 1), nn.Conv2d(6, 4, 3)
            self.pool = nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)

        def forward(self, x: Any) -> Any:
            y = self.pool(self.down(x).tanh())
            y = functional.interpolate(y, x.shape[2:], mode="bilinear", align_corners=True)
            return self.up(torch.cat([x, y], 1)).tanh().mean((2, 3))

    torch.manual_seed(0)
    module, buffer = Skipping().eval(), io.BytesIO()
    x = torch.randn(2, 2, *size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the TorchScript exporter is deprecated
        torch.onnx.export(
            module, torch.randn(1, 2, 11, 12), buffer, dynamo=False, opset_version=17,
            input_names=["x"], dynamic_axes={"x": {0: "N", 2: "H", 3: "W"}},
        )  # fmt: skip
    target = jr.Target(buffer.getvalue(), device="cpu")
    _, found = target.loss_and_gradient(x.numpy(), np.array([1, 2]))
    leaf = x.double().requires_grad_()
    losses = functional.cross_entropy(module.double()(leaf), torch.tensor([1, 2]), reduction="sum")
    (expected,) = torch.autograd.grad(losses, leaf)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-7)
