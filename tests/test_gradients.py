"""Input gradients against torch autograd and finite differences."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from gradient_checks import model, weight

import jr_onnx as jr
from jr_onnx.autodiff import vjp
from jr_onnx.errors import (
    DataError,
    ModelError,
    ParameterError,
    UnsupportedOpError,
    UnsupportedOpsetError,
)
from jr_onnx.session import Session

MakeModel = Callable[..., jr.Model]
REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def torch_lenet(monkeypatch: pytest.MonkeyPatch, lenet: jr.Model) -> Any:
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    return importlib.import_module("train_samples").load_weights(lenet.path)


def _torch_gradient(module: Any, x: Any, y: Any) -> tuple[Any, Any]:
    import torch

    inputs = torch.tensor(x, requires_grad=True)
    losses = torch.nn.functional.cross_entropy(module(inputs), torch.tensor(y), reduction="none")
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert inputs.grad is not None
    return losses.detach().numpy(), inputs.grad.numpy()


def test_the_sample_agrees_with_torch_autograd(
    torch_lenet: Any, lenet: jr.Model, mnist: jr.Dataset
) -> None:
    # Labels one off: correct ones give losses and gradients that are zero up to rounding.
    x, y = mnist.x[:256], (mnist.y[:256] + 1) % 10
    loss, gradient = jr.Target(lenet, device="cpu").loss_and_gradient(x, y)
    expected_loss, expected = _torch_gradient(torch_lenet, x, y)
    assert np.linalg.norm(loss - expected_loss) <= 1e-5 * np.linalg.norm(expected_loss)
    error = np.linalg.norm((gradient - expected).reshape(256, -1), axis=1)
    assert (error <= 1e-5 * np.linalg.norm(expected.reshape(256, -1), axis=1)).all()


def test_the_hardened_sample_agrees_with_torch_autograd(
    torch_lenet: Any, lenet: jr.Model, mnist: jr.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def jump_relu(z: Any) -> Any:
        return torch.where(z > 0.5, z, torch.zeros_like(z))

    monkeypatch.setattr(torch, "relu", jump_relu)
    monkeypatch.setattr(torch.nn.functional, "relu", jump_relu)
    monkeypatch.setattr(torch.nn.ReLU, "forward", lambda self, z: jump_relu(z))
    x, y = mnist.x[:256], (mnist.y[:256] + 1) % 10
    hardened = jr.retrofit(lenet, jump=0.5).model
    _, gradient = jr.Target(hardened, device="cpu").loss_and_gradient(x, y)
    _, expected = _torch_gradient(torch_lenet, x, y)
    error = np.linalg.norm((gradient - expected).reshape(256, -1), axis=1)
    close = error <= 1e-5 * np.linalg.norm(expected.reshape(256, -1), axis=1)
    # A unit within rounding of the jump is on in one engine and off in the other: a whole term.
    assert close.mean() >= 0.99


def test_the_loss_is_the_cross_entropy(text_model: MakeModel) -> None:
    model = text_model("g (float[N, 3] x) => (float[N, 3] z) { z = Identity(x) }")
    z = np.array([[1, 2, 3], [100, 0, 0], [0, 0, 1000]], np.float32)
    found = jr.Target(model, device="cpu").differentiate(z, np.array([0, 1, 2]))
    exact = [np.log(np.exp(1.0) + np.exp(2.0) + np.exp(3.0)) - 1, 100, 0]
    np.testing.assert_allclose(found.loss, exact, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.gradient.sum(axis=1), 0, atol=1e-6)
    assert np.array_equal(found.logits, z)


def test_the_gradient_of_a_sure_prediction_is_not_rounded_to_zero(text_model: MakeModel) -> None:
    model = text_model("g (float[N, 3] x) => (float[N, 3] z) { z = Identity(x) }")
    z = np.array([[40, 0, 2]], np.float32)
    _, found = jr.Target(model, device="cpu").loss_and_gradient(z, np.array([0]))
    others = np.exp([-40.0, -38.0])  # p of the label is 1 in float32
    np.testing.assert_allclose(found, [[-others.sum(), *others]], rtol=1e-5)


def test_float16_losses_do_not_overflow(text_model: MakeModel) -> None:
    model = text_model("g (float16[N, 3] x) => (float16[N, 3] z) { z = Identity(x) }")
    z = np.array([[60000, 0, 0]], np.float16)
    found = jr.Target(model, device="cpu").differentiate(z, np.array([1]))
    assert found.loss.tolist() == [float(np.float16(60000))]
    assert found.loss.dtype == np.float32
    assert found.gradient.tolist() == [[1, -1, 0]]


def test_a_batch_may_be_cut_in_any_way(lenet: jr.Model, mnist: jr.Dataset) -> None:
    x, y = mnist.x[:10], mnist.y[:10]
    whole = jr.Target(lenet, device="cpu").differentiate(x, y)
    parts = jr.Target(lenet, device="cpu", batch_size=3).differentiate(x, y)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("cores", "examples", "shared"),
    [(1, 30, True), (2, 7, False), (2, 30, True), (16, 30, False), (16, 64, True)],
)
def test_cores_share_a_batch_that_is_large_enough(
    lenet: jr.Model,
    mnist: jr.Dataset,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    examples: int,
    shared: bool,
) -> None:
    x, y = mnist.x[:examples], mnist.y[:examples]
    graph = jr.input_gradient(lenet)
    wanted = (graph.logits, graph.loss, graph.gradient)
    feeds = {graph.x: x, graph.compared["labels"]: y}
    expected = Session(graph.model, device="cpu").run(feeds, wanted)
    run, threads = Session.run, set()

    def seen(self: Session, *arguments: Any) -> Any:
        threads.add(threading.current_thread().name.partition("_")[0])
        return run(self, *arguments)

    monkeypatch.setattr(Session, "run", seen)
    with ThreadPoolExecutor(cores, thread_name_prefix="worker") as workers:
        for name, value in (("_cores", cores), ("_workers", workers)):
            monkeypatch.setattr(f"jr_onnx.target.{name}", lambda value=value: value)
        found = jr.Target(lenet, device="cpu").differentiate(x, y)
    assert threads == {"worker" if shared else "MainThread"}
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_forked_child_has_threads_of_its_own() -> None:
    """In processes of their own: a fork of the tests' would have their threads' locks."""
    script = """
import os, sys, threading
import numpy as np, onnx
import jr_onnx as jr
header = '<ir_version: 8, opset_import: ["": 18]>'
text = header + "g (float[N,4] x) => (float[N,4] z) { z = Mul(x, x) }"
model = jr.Model(onnx.parser.parse_model(text).SerializeToString())
x, y = np.ones((64, 4), np.float32), np.arange(64) % 4
jr.Target(model, device="cpu").differentiate(x, y)
child = os.fork()
if child == 0:
    jr.Target(model, device="cpu").differentiate(x, y)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "7\n", done.stderr


def test_the_batch_is_that_of_the_examples_whatever_comes_first(text_model: MakeModel) -> None:
    model = text_model("g (float[K] t, float[N, 3] x) => (float[N, 3] z) { z = Mul(x, t) }")
    x, t = np.ones((70, 3), np.float32), np.array([1, 2, 3], np.float32)
    target = jr.Target(model, device="cpu", given={"t": t})
    found = target.differentiate(x, np.zeros(70, int), loss="margin")
    assert np.array_equal(found.gradient, np.tile([-1, 0, 3], (70, 1)).astype(np.float32))


def test_batch_sizes_are_positive(lenet: jr.Model) -> None:
    for size in (0, -1):
        with pytest.raises(ParameterError, match=f"at least 1, got {size}"):
            jr.Target(lenet, batch_size=size)


@pytest.mark.parametrize("examples", [5, 70])
def test_every_example_has_a_reference_of_its_own(text_model: MakeModel, examples: int) -> None:
    model = text_model("g (float[N, 3] x) => (float[N, 3] z) { z = Neg(x) }")
    x = np.ones((examples, 3), np.float32)
    target = jr.Target(model, device="cpu")
    for rows in (1, examples - 1, examples + 1):
        with pytest.raises(DataError, match=f"for each of {examples} examples, got shape"):
            target.differentiate(x, np.zeros((rows, 3), np.float32), loss="drift")


def test_a_fixed_batch_is_filled_up(text_model: MakeModel) -> None:
    model = text_model("g (float[2, 3] x) => (float[2, 3] z) { z = Neg(x) }")
    x = np.arange(15, dtype=np.float32).reshape(5, 3)
    target = jr.Target(model, device="cpu")
    assert np.array_equal(target.logits(x), -x)
    assert target.differentiate(x, np.zeros(5, int)).gradient.shape == (5, 3)


def test_every_node_without_a_rule_is_listed() -> None:
    model = _with_constants("a = Unique(x) b = Add(a, x) c = my.Gate(b) z = Unique(c)")
    with pytest.raises(UnsupportedOpError) as caught:
        jr.input_gradient(model)
    listed = [problem.split()[0] for problem in caught.value.problems]
    assert listed == ["Unique", "my::Gate", "Unique"]
    assert "no rule at opset 18" in str(caught.value)
    assert "jr_onnx.autodiff.vjp" in str(caught.value)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("h, m = LayerNormalization(x, s) z = Add(h, m)", "gradient of its outputs ['m']"),
        ("a = Unique(x) z = Add(a, x)", "Unique"),
        (
            "q, s, p = DynamicQuantizeLinear(x) d = DequantizeLinear(q, s, p) z = Add(d, x)",
            "Dynamic",
        ),
        ("a = my.Sign(x) z = Add(a, x)", "my::Sign"),
        (
            "l = ReduceSum <keepdims: int = 0> (x) c = Cast <to: int = 9> (l)"
            " w = If (c) <then_branch = t () => (float[N, 4] p) { p = Neg(x) },"
            " else_branch = e () => (float[N, 4] q) { q = Neg(x) }> z = Add(w, x)",
            "its body uses values that depend on the input",
        ),
    ],
)
def test_a_path_without_a_rule_is_never_silently_zero(body: str, problem: str) -> None:
    with pytest.raises(UnsupportedOpError, match=re.escape(problem)):
        jr.input_gradient(_with_constants(body))


def _with_constants(body: str) -> jr.Model:
    return jr.Model(
        onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["": 18, "my": 1]> g (float[N, 4] x) => (float[N, C] z) '
            f"<float s = {{0.1}}> {{ {body} }}"
        ).SerializeToString()
    )


def test_a_rule_of_ones_own_domain_is_found_by_its_version() -> None:
    vjp("Twice", 1, domain="my")(lambda call: call.emit.op("Add", call.g, call.g))
    assert jr.input_gradient(_with_constants("z = my.Twice(x)")).gradient


def test_an_opset_that_is_too_old_is_named(text_model: MakeModel) -> None:
    model = text_model("g (float[N, 3] x) => (float[N, 3] z) { z = Relu(x) }", opset=6)
    with pytest.raises(UnsupportedOpsetError, match="need opset 7 or newer, the model has 6"):
        jr.input_gradient(model)


def test_an_unknown_loss_is_refused(relu_model: jr.Model) -> None:
    with pytest.raises(ParameterError, match="loss must be one of cross_entropy, margin"):
        jr.input_gradient(relu_model, loss="mse")


def test_two_inputs_are_refused(text_model: MakeModel) -> None:
    model = text_model("g (float[N,3] a, float[N,3] b) => (float[N,3] z) { z = Add(a, b) }")
    with pytest.raises(ModelError, match=r"one input is needed.*\['a', 'b'\]"):
        jr.input_gradient(model)


def test_an_output_that_does_not_depend_on_the_input_is_told() -> None:
    fixed = model("a = Neg(x) z = Identity(w)", "N,4", w=weight(3, 4))("float")
    with pytest.raises(ModelError, match="does not depend on the input"):
        jr.input_gradient(fixed)


def test_registering_a_rule_twice_raises() -> None:
    with pytest.raises(ValueError, match="registered already"):
        vjp("Relu", 14)(lambda call: call.g)


def test_the_gradient_graph_is_valid_onnx(lenet: jr.Model) -> None:
    graph = jr.input_gradient(jr.retrofit(lenet, jump=1).model)
    onnx.checker.check_model(graph.model.proto, full_check=True)
    outputs = [value.name for value in graph.model.proto.graph.output]
    assert outputs == ["logits", graph.loss, graph.gradient]


def test_weights_that_a_retrofit_moved_out_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = model("r = Relu(x) z = MatMul(r, w)", "N,64", w=weight(64, 200))("float")
    monkeypatch.setattr("jr_onnx.model.model.LARGEST", len(original.content) + 300)
    hardened = jr.retrofit(original, jump=0.5).model
    assert hardened.attachments
    x, y = np.random.default_rng(0).normal(size=(4, 64)), np.arange(4)
    _, found = jr.Target(hardened, device="cpu").loss_and_gradient(x, y)
    monkeypatch.undo()
    _, expected = jr.Target(jr.retrofit(original, jump=0.5).model, device="cpu").loss_and_gradient(
        x, y
    )
    np.testing.assert_array_equal(found, expected)
