"""What the tests share: the sample model and its data, small models as ONNX text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx.parser
import pytest

import jr_onnx as jr

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLES = REPOSITORY / "sample_models"


@pytest.fixture(scope="session")
def lenet() -> jr.Model:
    return jr.load(SAMPLES / "lenet_mnist.onnx")


@pytest.fixture(scope="session")
def mnist() -> jr.Dataset:
    return jr.load_npz(SAMPLES / "mnist_test.npz")


@pytest.fixture(scope="session")
def text_model() -> Callable[..., jr.Model]:
    """Makes a model from ONNX text: `text_model("agraph (...) => (...) {...}", opset=13)`."""

    def make(graph: str, *, opset: int = 18, ir_version: int = 8, extra: str = "") -> jr.Model:
        header = f'<ir_version: {ir_version}, opset_import: ["" : {opset}]{extra}>'
        return jr.Model(onnx.parser.parse_model(f"{header}\n{graph}").SerializeToString())

    return make


@pytest.fixture(scope="session")
def relu_model(text_model: Callable[..., jr.Model]) -> jr.Model:
    return text_model("one (float[n, 4] x) => (float[n, 4] y) { y = Relu(x) }")
