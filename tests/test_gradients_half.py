"""float16 models: their gradients are those of torch in float64, however confident they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import jr_onnx as jr
from jr_onnx.autodiff import LOSSES

SHAPE = (6, 3, 8, 8)
NETWORK = (
    "a = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>({x}, k1) r = {act}(a) "
    "p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r) b = Conv<kernel_shape=[3,3]>(p, k2) "
    "t = Tanh(b) m = GlobalAveragePool(t) f = Flatten(m) {z} = Gemm(f, w, c)"
)
ACTS = {"relu": ("Relu", 0.0), "jump": ("ThresholdedRelu<alpha=0.25>", 0.25)}


def weights(scale: float) -> dict[str, Any]:
    """Returns weights that float16 holds; the scale of the logits says how confident they make."""
    rng = np.random.default_rng(3)
    drawn = {
        "k1": rng.normal(size=(8, 3, 3, 3)) / 3, "k2": rng.normal(size=(8, 8, 3, 3)) / 4,
        "w": rng.normal(size=(8, 10)) * scale, "c": rng.normal(size=10),
    }  # fmt: skip
    return {name: value.astype(np.float16) for name, value in drawn.items()}


def network(act: str, scale: float, *, inside: bool = False) -> jr.Model:
    """Returns a float16 network; with float32 input and output if float16 is only `inside`."""
    if inside:
        cast = NETWORK.format(x="x1", act=ACTS[act][0], z="z1")
        outer, body = "float", f"x1 = Cast<to=10>(x) {cast} z = Cast<to=1>(z1)"
    else:
        outer, body = "float16", NETWORK.format(x="x", act=ACTS[act][0], z="z")
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 18]> '
        f"g ({outer}[N,3,8,8] x) => ({outer}[N,10] z) {{ {body} }}"
    )
    for name, value in weights(scale).items():
        proto.graph.initializer.append(numpy_helper.from_array(value, name))
    return jr.Model(proto.SerializeToString())


def gradient_of(torch: Any, act: str, scale: float, x: Any, loss: Any) -> Any:
    """Returns torch's gradient of the losses of the logits, summed, in float64."""
    functional, jump = torch.nn.functional, ACTS[act][1]
    given = {name: torch.from_numpy(value).double() for name, value in weights(scale).items()}
    leaf = torch.from_numpy(x).double().requires_grad_()
    a = functional.conv2d(leaf, given["k1"], padding=1)
    r = torch.where(a > jump, a, 0)
    b = functional.conv2d(functional.max_pool2d(r, 2), given["k2"])
    z = b.tanh().mean((2, 3)) @ given["w"] + given["c"]
    (found,) = torch.autograd.grad(loss(z).sum(), leaf)
    return found.numpy()


def rows(gradient: Any) -> Any:
    return gradient.reshape(len(gradient), -1).astype(np.float64)


@pytest.fixture
def x() -> Any:
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float16)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("scale", [1.0, 8.0, 20.0])
def test_the_gradient_of_a_confident_model_does_not_vanish(
    act: str, scale: float, inside: bool, x: Any
) -> None:
    torch = pytest.importorskip("torch")
    target = jr.Target(network(act, scale, inside=inside), device="cpu")
    y = target.logits(x).argmax(axis=1)
    found = target.differentiate(x, y).gradient
    assert found.dtype == np.float32

    def less_p(z: Any) -> Any:  # whose gradient is exact, unlike that of log_softmax near 0
        others = z.masked_fill(torch.nn.functional.one_hot(torch.from_numpy(y), 10).bool(), -1e9)
        return torch.nn.functional.softplus(
            others.logsumexp(1) - z[range(len(y)), y], threshold=1e9
        )

    exact = rows(gradient_of(torch, act, scale, x, less_p))
    size = np.linalg.norm(exact, axis=1)
    assert scale < 20 or size.min() < 1e-8  # float16 holds nothing below 6e-8
    # How confident it is depends on the rounding of the logits, the direction hardly does.
    cosine = (rows(found) * exact).sum(axis=1) / np.linalg.norm(rows(found), axis=1) / size
    assert cosine.min() > 0.999


@pytest.mark.parametrize("loss", ["cross_entropy", "margin", "dlr", "logit_difference"])
def test_the_gradient_is_that_of_float64(loss: str, x: Any) -> None:
    torch = pytest.importorskip("torch")
    target = jr.Target(network("relu", 8.0), device="cpu")
    order = target.logits(x).argsort(axis=1)
    y, t = order[:, 4], order[:, 1]
    found = target.differentiate(x, y, loss=loss, targets=t).gradient
    at = range(len(x))
    exact = gradient_of(torch, "relu", 8.0, x, {
        "cross_entropy": lambda z: -z.log_softmax(1)[at, y],
        "margin": lambda z: z[at, order[:, -1]] - z[at, y],
        "dlr": lambda z: (z[at, order[:, -1]] - z[at, y])
        / (z[at, order[:, -1]] - z[at, order[:, -3]]),
        "logit_difference": lambda z: z[at, t] - z[at, y],
    }[loss])  # fmt: skip
    error = np.linalg.norm(rows(found - exact), axis=1) / np.linalg.norm(rows(exact), axis=1)
    assert error.max() <= 0.01


@pytest.mark.parametrize("loss", LOSSES)
def test_a_gradient_that_is_zero_stays_zero(loss: str, x: Any) -> None:
    flat = jr.Target(network("relu", 0.0), device="cpu")
    y = np.zeros(len(x), np.int64)
    given = flat.logits(x).astype(np.float32) if loss == "drift" else y
    gradient = flat.differentiate(x, given, loss=loss, targets=y + 1).gradient
    assert gradient.shape == x.shape
    assert not gradient.any()
