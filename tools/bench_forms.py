"""Times every form of the jump in onnxruntime, relative to the model without it.

    model --retrofit, one form at a time--> sessions --run in turn, again and again--> ratios

One thread on the CPU, CPU time, the sessions interleaved; a ratio is the median over the rounds of
(hardened / original in the same round). The row `original again` is a second session of the same
model: what it differs from 1 is noise.

Example:
    python tools/bench_forms.py --rounds 15
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from jr_onnx.model import Model, load
from jr_onnx.rewrite import FORMS, retrofit

LENET = Path(__file__).resolve().parents[1] / "sample_models" / "lenet_mnist.onnx"
# Small enough that the activations of a network with random weights do not all vanish.
JUMP = 0.1
BATCHES = (1, 32)
CLASSES = 1000


class Network:
    """Writes a network layer by layer; `at` is the value the next layer takes."""

    def __init__(self, size: int) -> None:
        self.at, self._channels, self._size = "input", 3, size
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self._rng = np.random.default_rng(0)

    @property
    def channels(self) -> int:
        """Of the value the next layer takes."""
        return self._channels

    def conv(self, channels: int, kernel: int, stride: int = 1, *, depthwise: bool = False) -> None:
        """Appends a convolution with its batch norm folded in, padded to keep the size."""
        group = self._channels if depthwise else 1
        shape = (channels, self._channels // group, kernel, kernel)
        names = [self._weight(shape), self._weight((channels,))]
        self.op(
            "Conv",
            *names,
            kernel_shape=[kernel] * 2,
            strides=[stride] * 2,
            pads=[kernel // 2] * 4,
            group=group,
        )
        self._channels = channels

    def relu(self) -> None:
        """Appends a Relu."""
        self.op("Relu")

    def relu6(self) -> None:
        """Appends a Clip to 0..6, as exporters write ReLU6."""
        self.op("Clip", self._constant(0.0), self._constant(6.0))

    def op(self, op_type: str, *others: str, **attributes: Any) -> None:
        """Appends a node that takes the current value, and `others`."""
        output = f"{op_type.lower()}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(op_type, [self.at, *others], [output], **attributes))
        self.at = output

    def block(self, shortcut: str, channels: int) -> None:
        """Goes back to an earlier value with so many channels."""
        self.at, self._channels = shortcut, channels

    def classified(self) -> Model:
        """Appends pooling and a linear layer; returns the network as a model."""
        self.op("GlobalAveragePool")
        self.op("Flatten")
        self.op("Gemm", self._weight((CLASSES, self._channels)), transB=1)
        image: list[str | int | None] = ["batch", 3, self._size, self._size]
        graph = helper.make_graph(
            self._nodes,
            "network",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, image)],
            [helper.make_tensor_value_info(self.at, TensorProto.FLOAT, ["batch", CLASSES])],
            self._weights,
        )
        opset = helper.make_opsetid("", 18)
        return Model.of(helper.make_model(graph, ir_version=10, opset_imports=[opset]))

    def _weight(self, shape: Sequence[int]) -> str:
        """Adds weights that keep the variance of what passes a Relu (He et al.), or zeros."""
        spread = np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.0
        array = (self._rng.standard_normal(shape) * spread).astype(np.float32)
        return self._tensor(array)

    def _constant(self, value: float) -> str:
        return self._tensor(np.array(value, np.float32))

    def _tensor(self, array: NDArray[np.float32]) -> str:
        name = f"weight_{len(self._weights)}"
        self._weights.append(numpy_helper.from_array(array, name))
        return name


def resnet18(size: int) -> Model:
    """ResNet-18: a stem, four stages of two basic blocks, 17 Relu."""
    net = Network(size)
    net.conv(64, 7, 2)
    net.relu()
    net.op("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for stage, channels in enumerate((64, 128, 256, 512)):
        for stride in (1 if stage == 0 else 2, 1):
            x, before = net.at, net.channels
            net.conv(channels, 3, stride)
            net.relu()
            net.conv(channels, 3)
            y = net.at
            net.block(x, before)
            if stride > 1 or before != channels:
                net.conv(channels, 1, stride)
            shortcut = net.at
            net.block(y, channels)
            net.op("Add", shortcut)
            net.relu()
    return net.classified()


def mobilenet_v2(size: int, *, capped: bool = True) -> Model:
    """MobileNetV2: seventeen inverted residuals, 35 Clip to 0..6, or Relu if not capped."""
    net = Network(size)
    activate = net.relu6 if capped else net.relu
    net.conv(32, 3, 2)
    activate()
    settings = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    for expansion, channels, repeats, first in settings:
        for stride in (first, *[1] * (repeats - 1)):
            x, before = net.at, net.channels
            if expansion > 1:
                net.conv(before * expansion, 1)
                activate()
            net.conv(net.channels, 3, stride, depthwise=True)
            activate()
            net.conv(channels, 1)
            if stride == 1 and before == channels:
                net.op("Add", x)
    net.conv(1280, 1)
    activate()
    return net.classified()


MODELS: dict[str, Callable[[int], Model]] = {
    "LeNet (MNIST sample)": lambda _: load(LENET),
    "ResNet-18": resnet18,
    "MobileNetV2": mobilenet_v2,
    "MobileNetV2 with Relu": lambda size: mobilenet_v2(size, capped=False),
}
AGAIN = "original again"


def sessions(model: Model) -> dict[str, ort.InferenceSession]:
    """Returns a session for the original, for itself once more, and for each form."""
    variants = {"original": model, AGAIN: model}
    variants |= {form: retrofit(model, jump=JUMP, form=form).model for form in FORMS}
    return {name: _session(variant) for name, variant in variants.items()}


def _session(model: Model) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model.content, options, providers=["CPUExecutionProvider"])


def time_rounds(
    runs: Mapping[str, ort.InferenceSession], x: NDArray[np.float32], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Runs the sessions in turn; each turn lasts long enough for the clock.

    Args:
        runs: the sessions by name.
        x: the input, `(batch, channels, height, width)`.
        rounds: how often each has its turn.
        seconds: least CPU time of a turn of the first session; all repeat as often as it.

    Returns:
        CPU seconds of one inference, by name and round.
    """
    name = next(iter(runs.values())).get_inputs()[0].name
    for session in runs.values():
        session.run(None, {name: x})
    start = time.process_time()
    next(iter(runs.values())).run(None, {name: x})
    repeats = max(1, round(seconds / (time.process_time() - start)))
    found: dict[str, list[float]] = {variant: [] for variant in runs}
    order = list(runs)
    for number in range(rounds):
        # Another one begins each round, so that none always follows the same neighbour's heat.
        turn = number % len(order)
        for variant in order[turn:] + order[:turn]:
            start = time.process_time()
            for _ in range(repeats):
                runs[variant].run(None, {name: x})
            found[variant].append((time.process_time() - start) / repeats)
    return found


def table(results: Mapping[str, Mapping[int, Mapping[str, list[float]]]]) -> str:
    """Returns the ratios as Markdown: form x model, one number for each batch size."""
    batches = " / ".join(map(str, BATCHES))
    lines = [f"| batch {batches} | {' | '.join(results)} |", "|---|" + "--:|" * len(results)]
    row = [
        " / ".join(f"{median(times['original']) * 1e3:.3g}" for times in batched.values())
        for batched in results.values()
    ]
    lines.append(f"| original, ms | {' | '.join(row)} |")
    for variant in (AGAIN, *FORMS):
        row = [
            " / ".join(_ratio(times[variant], times["original"]) for times in batched.values())
            for batched in results.values()
        ]
        lines.append(f"| {variant} | {' | '.join(row)} |")
    return "\n".join(lines)


def _ratio(hardened: Sequence[float], original: Sequence[float]) -> str:
    ratios = [one / other for one, other in zip(hardened, original, strict=True)]
    return f"{median(ratios):.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="turns of each session")
    parser.add_argument("--size", type=int, default=224, metavar="PIXELS", help="of the images")
    parser.add_argument(
        "--turn", type=float, default=0.2, metavar="SECONDS", help="least CPU time of a turn"
    )
    given = parser.parse_args(arguments)
    results: dict[str, dict[int, dict[str, list[float]]]] = {}
    for name, make in MODELS.items():
        runs = sessions(make(given.size))
        shape = next(iter(runs.values())).get_inputs()[0].shape[1:]
        rng = np.random.default_rng(0)
        results[name] = {}
        for batch in BATCHES:
            x = rng.random((batch, *shape), np.float32)
            results[name][batch] = time_rounds(runs, x, given.rounds, given.turn)
            print(f"{name}, batch {batch}: done", file=sys.stderr)
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
