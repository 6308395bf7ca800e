"""What the tests share: the sample model and its data, small models as ONNX text."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
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


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mnist: jr.Dataset) -> Path:
    """A folder with net.onnx and test.npz (50 images), made the working directory."""
    shutil.copy(SAMPLES / "lenet_mnist.onnx", tmp_path / "net.onnx")
    np.savez(tmp_path / "test.npz", x=mnist.x[:50], y=mnist.y[:50])
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
