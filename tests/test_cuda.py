"""What of a gradient graph onnxruntime can run on CUDA, and does.

Which operators have a kernel is read from onnxruntime's docs/OperatorKernels.md: an entry that
ends at an opset, "[11, 12]", is all there is for the versions after it, and one that is open,
"13+", fits models whose operator has that very since-version, not a later one.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from gradient_checks import model, weight

import jr_onnx as jr
from jr_onnx.autodiff import input_gradient
from jr_onnx.autodiff.registry import registered

REPOSITORY = Path(__file__).resolve().parents[1]
NEWEST = onnx.defs.onnx_opset_version()
# The since-version of the open entry of each operator: of the CUDA entries of ai.onnx, those that a
# model or a gradient may have. What is not here has none.
# fmt: off
OPEN = {
    1: "GlobalAveragePool GlobalMaxPool Not RandomNormalLike RandomUniformLike Softplus Softsign",
    6: "Elu InstanceNormalization Selu",
    7: "And Cos Or Sin Xor",
    9: "ConstantOfShape EyeLike Scatter Shrink Upsample",
    10: "ReverseSequence ThresholdedRelu",
    11: "Compress ConvTranspose OneHot Range Round TopK",
    12: "Einsum MaxPool",
    13: "Abs ArgMax ArgMin Ceil Clip Concat DepthToSpace Dropout Equal Erf Exp Expand Flatten "
        "Floor Gather GatherElements GatherND Gemm Greater LRN Less Log LogSoftmax MatMul Max Min "
        "Mod Neg NonZero Reciprocal ReduceSum Sigmoid Sign Size Slice Softmax SpaceToDepth "
        "Sqrt Sum Tanh Tile",
    14: "Add CumSum Div Mul Relu Sub Trilu",
    15: "BatchNormalization Pow",
    16: "GreaterOrEqual LeakyRelu LessOrEqual PRelu Where",
    17: "LayerNormalization",
    18: "Pad ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin "
        "ReduceProd ReduceSumSquare ScatterElements ScatterND Split",
    19: "Identity If Loop Resize Scan",
    20: "Gelu IsInf IsNaN",
    21: "DequantizeLinear QuantizeLinear",
    22: "AveragePool Conv HardSigmoid HardSwish",
    23: "Cast RMSNormalization Reshape RotaryEmbedding Shape Squeeze Transpose Unsqueeze",
    24: "Attention",
}
# fmt: on
NEWEST_KERNEL = {name: since for since, names in OPEN.items() for name in names.split()}
# Where the first kernel is younger than the operator.
OLDEST_KERNEL = {"OneHot": 11, "Sign": 13}
NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "convolutions": (
        "a = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, k1) r = Relu(a) "
        "p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r) "
        "b = Conv<kernel_shape=[3,3], strides=[2,2], group=2>(p, k2) "
        "n = BatchNormalization(b, s, o, o, s) t = LeakyRelu(n) v = ReduceMax(t, axes) "
        "c = Clip(v, low, high) f = Flatten(c) z = MatMul(f, w)",
        {"k1": weight(4, 2, 3, 3), "k2": weight(4, 2, 3, 3), "s": np.abs(weight(4)) + 1,
         "o": weight(4), "w": weight(4, 5), "low": np.float32(-1), "high": np.float32(1),
         "axes": np.array([2, 3])},
    ),
    "overlapping pools": (
        "a = MaxPool<kernel_shape=[3,3], strides=[1,1]>(x) f = Flatten(a) z = MatMul(f, w)",
        {"w": weight(72, 5)},
    ),
    "transformer": (
        "e = Reshape(x, rows) q = MatMul(e, w1) k = MatMul(e, w2) "
        "t = Transpose<perm=[0,2,1]>(k) c = MatMul(q, t) p = Softmax<axis=-1>(c) "
        "h = MatMul(p, e) d = Add(h, e) y = LayerNormalization(d, s, o) u = Erf(y) "
        "f = Flatten(u) z = MatMul(f, w)",
        {"rows": np.array([0, 8, 16]), "w1": weight(16, 16), "w2": weight(16, 17)[:, :16],
         "s": weight(16), "o": weight(16), "w": weight(128, 5)},
    ),
    "norms": (
        "a = Abs(x) n = ReduceL1<axes=[2], keepdims=0>(a) f = Flatten(n) z = MatMul(f, w)",
        {"w": weight(16, 5)},
    ),
}  # fmt: skip
SHAPE = (3, 2, 8, 8)
RUNS = [(name, opset) for name in NETS for opset in ((12,) if name == "norms" else (18, 20))]
JUMPS = (0.0, 1.0)  # of the hardened sample; 0 gives the original's function


def _net(name: str, opset: int) -> jr.Model:
    body, weights = NETS[name]
    return model(body, "N,2,8,8", opset=opset, **weights)("float")


def _is_missing(op_type: str, opset: int) -> bool:
    if op_type == "Constant":  # becomes a weight
        return False
    since = int(onnx.defs.get_schema(op_type, opset).since_version)
    return not OLDEST_KERNEL.get(op_type, 0) <= since <= NEWEST_KERNEL.get(op_type, 0)


def _lacking(source: jr.Model) -> tuple[set[str], set[str]]:
    """Returns the operators without a kernel: of the model, and those the gradient adds."""
    original = source.parse()
    opset = next(entry.version for entry in original.opset_import if not entry.domain)
    before, after = (
        {node.op_type for node in proto.graph.node if _is_missing(node.op_type, opset)}
        for proto in (original, input_gradient(source).model.parse())
    )
    return before, after - before


@pytest.mark.parametrize(("name", "opset"), RUNS)
def test_what_has_no_kernel_is_avoided(name: str, opset: int) -> None:
    """The gradient adds none to those that the model itself has."""
    assert _lacking(_net(name, opset))[1] == set()


@pytest.mark.parametrize("jump", JUMPS)
def test_what_has_no_kernel_is_avoided_for_the_sample(lenet: jr.Model, jump: float) -> None:
    assert _lacking(jr.retrofit(lenet, jump=jump).model) == (set(), set())


@pytest.fixture(scope="module")
def architectures() -> Iterator[Any]:
    pytest.importorskip("torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "tools"))
        yield importlib.import_module("architectures")


ARCHITECTURES = ("LeNet", "ResNet-20", "MobileNetV2", "VGG-11", "ViT")


def _architecture(architectures: Any, name: str) -> tuple[jr.Model, Any]:
    image = architectures.ARCHITECTURES[name].image
    source = architectures.exported(architectures.network(name), image)
    x = np.random.default_rng(0).uniform(size=(3, *image)).astype(np.float32)
    return source, x


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_node_of_an_architecture_has_a_kernel(architectures: Any, name: str) -> None:
    assert _lacking(_architecture(architectures, name)[0]) == (set(), set())


def _opsets(spelled: str) -> set[int]:
    """Reads `9, 10`, `9 to 12`, `from 19 on`, `any`."""
    numbers = [int(number) for number in re.findall(r"\d+", spelled)]
    if spelled == "any":
        return set(range(9, NEWEST + 1))
    if " on" in spelled:
        return set(range(numbers[0], NEWEST + 1))
    return set(range(numbers[0], numbers[1] + 1)) if " to " in spelled else set(numbers)


def test_the_page_says_what_has_no_kernel() -> None:
    page = (REPOSITORY / "docs" / "gradients.md").read_text().split("## On CUDA")[1]
    rows = re.findall(r"^\| (`.*`) \| (.*) \|$", page.split("\n## ")[0], re.MULTILINE)
    told: dict[str, set[int]] = {}
    for names, opsets in rows:
        for name in re.findall(r"`(\w+)`", names):
            told[name] = told.get(name, set()) | _opsets(opsets)
    ours = {"Equal", "ConstantOfShape", "OneHot", "Round", "Shape", "Sign", "Size"}
    for op_type in ours | {name for domain, name, _ in registered() if not domain}:
        missing = set()
        for opset in range(9, NEWEST + 1):
            try:
                schema = onnx.defs.get_schema(op_type, opset)
            except onnx.defs.SchemaError:
                continue
            if not schema.deprecated and _is_missing(op_type, opset):
                missing.add(opset)
        there = {at for at in told.get(op_type, set()) if onnx.defs.has(op_type, at, "")}
        assert there == missing, op_type


def _on_the_cpu(source: jr.Model, x: Any, folder: Path) -> list[str]:
    """Runs the gradient graph on CUDA; returns the nodes that ran on the CPU instead.

    Shape arithmetic is put there on purpose: its results are a few integers, or one number.
    `session.disable_cpu_ep_fallback` would refuse a model for that, too.
    """
    import onnxruntime

    graph = input_gradient(source)
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(
        graph.model.content, options, providers=["CUDAExecutionProvider"]
    )
    assert session.get_providers()[0] == "CUDAExecutionProvider"
    labels = np.zeros(len(x), np.int64)
    session.run(None, {graph.x: x, graph.compared["labels"]: labels})
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = [event["args"] for event in events if event.get("args", {}).get("provider")]
    assert any(args["provider"] == "CUDAExecutionProvider" for args in ran)
    return [
        args["op_name"]
        for args in ran
        if args["provider"] == "CPUExecutionProvider" and not _is_shape_arithmetic(args)
    ]


def _is_shape_arithmetic(args: dict[str, Any]) -> bool:
    outputs = [pair for tensor in args["output_type_shape"] for pair in tensor.items()]
    return all(math.prod(shape) <= (64 if kind == "int64" else 1) for kind, shape in outputs)


@pytest.fixture
def cuda() -> None:
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs a CUDA device and onnxruntime-gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", NETS)
def test_no_node_falls_back_to_the_cpu(cuda: None, name: str, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    assert _on_the_cpu(_net(name, dict(RUNS[::-1])[name]), x, tmp_path) == []


@pytest.mark.gpu
@pytest.mark.parametrize("jump", JUMPS)
def test_no_node_of_the_sample_falls_back(
    cuda: None, lenet: jr.Model, jump: float, tmp_path: Path
) -> None:
    x = np.random.default_rng(0).uniform(size=(3, 1, 28, 28)).astype(np.float32)
    assert _on_the_cpu(jr.retrofit(lenet, jump=jump).model, x, tmp_path) == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_node_of_an_architecture_falls_back(
    cuda: None, architectures: Any, name: str, tmp_path: Path
) -> None:
    assert _on_the_cpu(*_architecture(architectures, name), tmp_path) == []


@pytest.mark.parametrize(
    ("kind", "shape", "counts"),
    [("int64", [4], False), ("float", [], False), ("float", [3, 2, 8, 8], True),
     ("int64", [3, 2, 8, 8], True)],
)  # fmt: skip
def test_what_is_no_shape_arithmetic_counts(kind: str, shape: list[int], counts: bool) -> None:
    assert _is_shape_arithmetic({"output_type_shape": [{kind: shape}]}) is not counts
