"""Checking a gradient rule against finite differences of the ONNX reference evaluator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

import jr_onnx as jr


def weight(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(sum(shape)).normal(size=shape)


Case = Callable[[str], jr.Model]


def model(body: str, shape: str, opset: int = 18, **weights: Any) -> Case:
    """Returns a function that makes a model in `float` or `double`.

    Args:
        body: ONNX text from the input `x` to the logits `z`, `(N, C)` with at least 4 classes.
        shape: of x, as ONNX text: `N,2,7,9`.
        opset: of the model.
        weights: arrays the body uses; float64 ones take the dtype of the model.
    """

    def make(dtype: str) -> jr.Model:
        proto = onnx.parser.parse_model(
            f'<ir_version: 8, opset_import: ["": {opset}]> '
            f"g ({dtype}[{shape}] x) => ({dtype}[N, C] z) {{ {body} }}"
        )
        for name, value in weights.items():
            array = np.asarray(value)
            if array.dtype == np.float64 and dtype == "float":
                array = array.astype(np.float32)
            proto.graph.initializer.append(numpy_helper.from_array(array, name))
        return jr.Model(proto.SerializeToString())

    return make


def check(make: Case, shape: tuple[int, ...], dtype: str) -> None:
    """Asserts that the input gradient equals the slope of the loss.

    The gradient comes from onnxruntime in `dtype`; the loss from the reference evaluator in float64
    and numpy, so neither the loss head nor onnxruntime is its own witness.
    """
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=shape).astype(np.float32).astype(np.float64), np.arange(shape[0]) % 4
    _, gradient = jr.Target(make(dtype), device="cpu").loss_and_gradient(x, y)
    assert gradient.dtype == {"float": np.float32, "double": np.float64}[dtype]
    assert gradient.shape == x.shape
    reference, step = ReferenceEvaluator(make("double").proto), 1e-6
    tolerance = {"float": 1e-4, "double": 1e-6}[dtype]
    for _ in range(5):  # random projections, central differences
        direction = rng.normal(size=shape)
        up = _loss(reference, x + step * direction, y)
        down = _loss(reference, x - step * direction, y)
        slope = (gradient * direction).reshape(shape[0], -1).sum(axis=1)
        # Truncation is about step^2, cancellation about 1e-16 / step.
        np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=tolerance, atol=tolerance)


def _loss(reference: ReferenceEvaluator, x: Any, y: Any) -> Any:
    z = np.asarray(reference.run(None, {"x": x})[0])  # type: ignore[index]
    z = z - z.max(axis=1, keepdims=True)
    return np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(y)), y]
