"""The graphs that a convolution and a pooling may go backwards by, each in all its variants."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx.parser
import pytest
from gradient_checks import check, model, weight
from test_gradients_shape import case

import jr_onnx as jr
from jr_onnx.autodiff.dense import write_as_matrices
from jr_onnx.model import Constants, ValueTypes, with_outputs
from jr_onnx.session import Session

WIDE = (2, 16, 5, 6)
# name -> node, shape of x, kernel
FLIPPED: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "uneven pads": ("Conv<pads=[1,0,2,1]>", WIDE, (16, 16, 3, 2)),
    "dilated": ("Conv<dilations=[2,1], pads=[1,2,1,0]>", WIDE, (16, 16, 3, 3)),
    "one pixel": ("Conv", WIDE, (32, 16, 1, 1)),
    "channels filled up": ("Conv<pads=[1,1,1,1]>", (2, 12, 5, 6), (16, 12, 3, 3)),
    "each channel by itself": ("Conv<group=16, pads=[1,1,1,1]>", WIDE, (16, 1, 3, 2)),
    "odd channels by themselves": ("Conv<group=5>", (2, 5, 5, 6), (5, 1, 3, 2)),
    "groups of blocks": ("Conv<group=2>", (2, 32, 4, 3), (32, 16, 2, 3)),
    "same upper": ('Conv<auto_pad="SAME_UPPER">', WIDE, (16, 16, 2, 3)),
    "1d": ("Conv<pads=[2,1]>", (2, 16, 7), (16, 16, 4)),
    "3d": ("Conv<pads=[1,0,1,0,1,0]>", (2, 16, 3, 4, 3), (16, 16, 2, 2, 2)),
}  # fmt: skip
TRANSPOSED: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "few channels": ("Conv<pads=[1,1,1,1]>", (2, 3, 5, 6), (16, 3, 3, 3)),
    "outputs that fill no block": ("Conv", (2, 16, 5, 6), (10, 16, 3, 3)),
    "strides": ("Conv<strides=[2,1], pads=[1,1,1,1]>", WIDE, (16, 16, 3, 3)),
    "pads beyond the kernel": ("Conv<pads=[3,0,2,1]>", WIDE, (16, 16, 3, 2)),
    "groups that fill no block": ("Conv<group=4>", WIDE, (16, 4, 3, 3)),
}
TINY: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "2 x 2": ("Conv<pads=[1,1,1,1]>", (2, 3, 2, 2), (5, 3, 3, 3)),
    "1 x 1": ("Conv<pads=[1,1,1,1]>", (2, 3, 1, 1), (5, 3, 3, 3)),
    "uneven": ("Conv<pads=[1,0,0,2]>", (2, 3, 2, 3), (5, 3, 3, 4)),
    "strides": ("Conv<strides=[2,3], pads=[2,1,1,1]>", (2, 3, 3, 2), (5, 3, 3, 3)),
    "dilated": ("Conv<dilations=[2,1], pads=[2,1,2,1]>", (2, 3, 2, 2), (5, 3, 3, 3)),
    "no pads": ("Conv", (2, 3, 3, 3), (5, 3, 3, 3)),
    "1d": ("Conv<pads=[2,2]>", (2, 3, 2), (5, 3, 5)),
}


def backwards(make: Any) -> Counter[str]:
    """Counts the operators of the way back."""
    nodes = jr.input_gradient(make("float")).model.proto.graph.node
    return Counter(node.op_type for node in nodes if node.name.startswith("gradient/"))


def conv(node: str, shape: tuple[int, ...], kernel: tuple[int, ...], opset: int = 18) -> Any:
    return case(f"h = {node}(x, k)", shape, opset, k=weight(*kernel))


@pytest.mark.parametrize("name", FLIPPED)
def test_stride_1_goes_back_by_flipped_kernels(name: str) -> None:
    make, shape = conv(*FLIPPED[name])
    assert backwards(make)["Conv"] == 1
    check(make, shape, "float")


@pytest.mark.parametrize("name", TRANSPOSED)
def test_what_fits_no_block_goes_back_by_the_transposed_convolution(name: str) -> None:
    make, shape = conv(*TRANSPOSED[name])
    assert backwards(make)["ConvTranspose"] == 1
    check(make, shape, "float")


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_map_goes_back_by_a_matrix(name: str) -> None:
    make, shape = conv(*TINY[name])
    assert backwards(make)["Gemm"] == 1
    check(make, shape, "float")


@pytest.mark.parametrize("opset", [9, 11, 22])
@pytest.mark.parametrize("table", [FLIPPED, TINY], ids=["flipped", "tiny"])
def test_other_opsets(table: Any, opset: int) -> None:
    node, shape, kernel = next(iter(table.values()))
    make, _ = conv(node, shape, kernel, opset)
    check(make, shape, "float")


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("bias", [False, True])
def test_a_tiny_map_can_be_a_matrix_before(name: str, bias: bool) -> None:
    node, shape, kernel = TINY[name]
    weights: dict[str, Any] = {"k": weight(*kernel)} | ({"b": weight(5)} if bias else {})
    make, _ = case(f"h = {node}(x, {', '.join(weights)})", shape, **weights)
    before = make("float")
    types, constants = ValueTypes(before), Constants(before)
    scope, proto = before.scopes[0], before.parse()
    written = write_as_matrices(
        proto, lambda name: types.of(scope, name), lambda name: constants.value(scope, name)
    )
    assert written
    assert "Conv" not in {node.op_type for node in proto.graph.node}
    after = jr.Model(proto.SerializeToString())
    onnx.checker.check_model(proto, full_check=True)
    x, y = np.random.default_rng(0).normal(size=shape), np.array([0, 1])
    results = [jr.Target(each, device="cpu").differentiate(x, y) for each in (before, after)]
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", ["4,4", "H,W"])
def test_larger_maps_and_unknown_sizes_stay_convolutions(size: str) -> None:
    make = model("z = Conv<pads=[1,1,1,1]>(x, k)", f"N,3,{size}", k=np.ones((5, 3, 3, 3)))
    before = make("float")
    types, scope = ValueTypes(before), before.scopes[0]
    assert not write_as_matrices(before.parse(), lambda n: types.of(scope, n), lambda _: None)


TILES: dict[str, tuple[str, tuple[int, ...], int]] = {
    "2 x 2": ("kernel_shape=[2,2], strides=[2,2]", (2, 3, 6, 4), 18),
    "3 x 2": ("kernel_shape=[3,2], strides=[3,2]", (2, 3, 6, 8), 18),
    "rows and columns left over": ("kernel_shape=[2,3], strides=[2,3]", (2, 3, 7, 8), 18),
    "one window": ("kernel_shape=[3,4], strides=[3,4]", (2, 3, 3, 4), 18),
    "ceil mode, nothing left over": ("kernel_shape=[2,2], strides=[2,2], ceil_mode=1",
                                     (2, 3, 4, 6), 18),
    "same, nothing left over": ('kernel_shape=[2,2], strides=[2,2], auto_pad="SAME_UPPER"',
                                (2, 3, 4, 6), 18),
    "opset 13": ("kernel_shape=[2,2], strides=[2,2]", (2, 3, 5, 4), 13),
    "opset 22": ("kernel_shape=[2,2], strides=[2,2]", (2, 3, 5, 4), 22),
}  # fmt: skip
SCATTERED = {
    "strides": ("kernel_shape=[2,2], strides=[2,1]", (2, 3, 6, 4), 18),
    "pads": ("kernel_shape=[2,2], strides=[2,2], pads=[1,0,1,0]", (2, 3, 6, 4), 18),
    "dilated": ("kernel_shape=[2,2], strides=[2,2], dilations=[2,1]", (2, 3, 6, 4), 18),
    "ceil mode": ("kernel_shape=[2,2], strides=[2,2], ceil_mode=1", (2, 3, 5, 4), 18),
    "same upper": ('kernel_shape=[2,2], strides=[2,2], auto_pad="SAME_UPPER"', (2, 3, 5, 4), 18),
    "1d": ("kernel_shape=[2], strides=[2]", (2, 3, 6), 18),
    "opset 11": ("kernel_shape=[2,2], strides=[2,2]", (2, 3, 6, 4), 11),
}


@pytest.mark.parametrize("name", TILES)
def test_windows_that_tile_a_picture_are_compared(name: str) -> None:
    attributes, shape, opset = TILES[name]
    make, _ = case(f"h = MaxPool<{attributes}>(x)", shape, opset)
    assert "ScatterElements" not in backwards(make)
    check(make, shape, "float")


@pytest.mark.parametrize("name", SCATTERED)
def test_other_windows_are_scattered(name: str) -> None:
    attributes, shape, opset = SCATTERED[name]
    make, _ = case(f"h = MaxPool<{attributes}>(x)", shape, opset)
    assert {"Scatter", "ScatterElements"} & set(backwards(make))
    check(make, shape, "float")


# torch has no other windows, or pads by a share of the kernel at most.
BY_TORCH = {
    name: given
    for name, given in (TILES | SCATTERED).items()
    if len(given[1]) == 4
    and not any(word in given[0] for word in ("auto_pad", "pads", "dilations"))
}


@pytest.mark.parametrize("name", BY_TORCH)
def test_of_equal_maxima_the_first_gets_the_gradient(name: str) -> None:
    torch = pytest.importorskip("torch")
    attributes, shape, opset = BY_TORCH[name]
    make, _ = case(f"h = MaxPool<{attributes}>(x)", shape, opset)
    x = np.random.default_rng(0).integers(-1, 2, shape).astype(np.float32)
    y = np.array([0, 1])
    _, gradient = jr.Target(make("float"), device="cpu").loss_and_gradient(x, y)
    values = eval(f"dict({attributes})")  # the attributes are written as Python arguments
    images = torch.tensor(x, requires_grad=True)
    pooled = torch.nn.functional.max_pool2d(
        images, values["kernel_shape"], values["strides"], ceil_mode=bool(values.get("ceil_mode"))
    )
    logits = pooled.flatten(1) @ torch.tensor(weight(pooled[0].numel(), 4), dtype=torch.float32)
    torch.nn.functional.cross_entropy(logits, torch.tensor(y), reduction="sum").backward()
    np.testing.assert_allclose(gradient, images.grad.numpy(), rtol=1e-4, atol=1e-5)


def test_a_mean_over_space_in_blocks() -> None:
    make, shape = case("h = GlobalAveragePool(x)", (2, 32, 3, 5))
    assert backwards(make)["Resize"] == 1
    check(make, shape, "float")


@pytest.mark.parametrize("opset", [9, 13, 22])
def test_relu6_has_no_slope_at_its_bounds_and_pixels_have_one(opset: int) -> None:
    x = np.array([[-1, -0.0, 0, 1e-30, 1, 5.9999995, 6, 7]], np.float32)
    inside = {"relu6": [0, 0, 0, 1, 1, 1, 0, 0], "pixels": [0, 1, 1, 1, 1, 0, 0, 0]}
    for name, high in (("relu6", 6.0), ("pixels", 1.0)):
        bounds = {"low": np.array(0.0), "high": np.array(high)} if opset >= 11 else {}
        node = "Clip(x, low, high)" if bounds else f"Clip<min=0.0, max={high}>(x)"
        make = model(f"c = {node} z = MatMul(c, w)", "N,8", opset, w=np.ones((8, 2)) * [1, 2],
                     **bounds)  # fmt: skip
        _, gradient = jr.Target(make("float"), device="cpu").loss_and_gradient(x, np.array([0]))
        assert ((gradient != 0) == np.array([inside[name]], bool)).all(), name


def test_the_slope_of_a_unit_is_0_or_1() -> None:
    x = np.array([[-np.inf, -1, -0.0, 0, 1.2e-38, 2e-30, 1, 3e38]], np.float32)
    make = model("a = Relu(x) z = MatMul(a, w)", "N,8", w=np.full((8, 2), 1e-38))
    graph = jr.input_gradient(make("float"))
    (step,) = (n for n in graph.model.proto.graph.node if n.op_type == "HardSigmoid")
    session = Session(with_outputs(graph.model, step.output), device="cpu")
    feeds = {graph.x: x, graph.compared["labels"]: np.array([0])}
    (slope,) = session.run(feeds, list(step.output))
    assert slope.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]
