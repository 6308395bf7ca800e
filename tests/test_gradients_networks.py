"""Input gradients of whole networks against torch autograd, as exported and with the jump in them.

The oracle is torch in float64. In float32 torch's own gradient is off by percents where rounding
puts a unit on the other side of its kink: a whole term of the gradient more or less, and which unit
that is differs from engine to engine. So the oracle is told on which side onnxruntime saw each
unit, and asserts that the two differ only for units so close to the kink that rounding decides.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jr_onnx as jr
from jr_onnx.model import with_outputs
from jr_onnx.session import Session

torch = pytest.importorskip("torch")
TOOLS = Path(__file__).resolve().parents[1] / "tools"
TOLERANCE = 1e-4
# Of a layer's root mean square: what rounding may move a unit by.
ROUNDING = 1e-4
# A float64 MobileNetV2 takes its time.
EXAMPLES = {"LeNet": 16, "ResNet-20": 8, "MobileNetV2": 4, "VGG-11": 8, "ViT": 8}
JUMPS = {"LeNet": 0.2, "ResNet-20": 0.1, "MobileNetV2": 0.05, "VGG-11": 0.1}
CASES = [
    *((name, 0.0, False) for name in EXAMPLES),
    *((name, 0.0, True) for name in ("LeNet", "ResNet-20", "ViT")),
    *((name, jump, False) for name, jump in JUMPS.items()),
]


@pytest.fixture(scope="module")
def architectures() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield importlib.import_module("architectures")


@functools.cache
def exported(architectures: Any, name: str, dynamo: bool) -> jr.Model:
    module = architectures.network(name)
    model: jr.Model = architectures.exported(
        module, architectures.ARCHITECTURES[name].image, dynamo=dynamo
    )
    return model


class Activations:
    """Takes the place of torch's: each unit is where onnxruntime saw it, below, between, above.

    Args:
        jump: at which activations begin, 0 for what they are.
        seen: onnxruntime's results of the activations, in order.
    """

    def __init__(self, jump: float, seen: list[Any]) -> None:
        self._jump, self._seen = jump, iter(seen)

    def relu(self, z: Any, inplace: bool = False) -> Any:
        return self.hardtanh(z, 0, np.inf)

    def hardtanh(self, z: Any, low: float, high: float, inplace: bool = False) -> Any:
        assert low == 0
        y = torch.from_numpy(next(self._seen))
        close = ROUNDING * z.square().mean().sqrt()
        for above, kink in ((y > 0, self._jump), (y == high, high)):
            assert ((z - kink).abs()[above != (z > kink)] <= close).all()
        return torch.where(y == high, high, torch.where(y > 0, z, 0))


def exact_gradient(
    architectures: Any, name: str, x: Any, y: Any, activations: Activations
) -> np.ndarray[Any, Any]:
    module, functional = architectures.network(name).double(), torch.nn.functional
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "relu", activations.relu)
        patch.setattr(functional, "hardtanh", activations.hardtanh)
        images, labels = torch.from_numpy(x).double(), torch.from_numpy(y)
        _, gradient = architectures.loss_and_gradient(module, images, labels)
    result: np.ndarray[Any, Any] = gradient.numpy()
    return result


@pytest.mark.parametrize(("name", "jump", "dynamo"), CASES)
def test_a_network_has_torchs_gradient(
    architectures: Any, name: str, jump: float, dynamo: bool
) -> None:
    count = EXAMPLES[name]
    rng = np.random.default_rng(1)
    x = rng.random((count, *architectures.ARCHITECTURES[name].image), np.float32)
    y = np.arange(count) % 10
    model = exported(architectures, name, dynamo)
    sites = [n.output[0] for n in model.proto.graph.node if n.op_type in ("Relu", "Clip")]
    graph = jr.input_gradient(jr.retrofit(model, jump=jump).model if jump else model)
    session = Session(with_outputs(graph.model, sites), device="cpu")
    feeds: dict[str, Any] = {graph.x: x, graph.compared["labels"]: y}
    gradient, *seen = session.run(feeds, [graph.gradient, *sites])
    expected = exact_gradient(architectures, name, x, y, Activations(jump, seen))
    error = np.linalg.norm((gradient - expected).reshape(count, -1), axis=1)
    assert (error <= TOLERANCE * np.linalg.norm(expected.reshape(count, -1), axis=1)).all()
