"""Models as torch's two exporters and skl2onnx write them, against the module with a jump in torch.

The weights are -1, 0 and 1 and the inputs multiples of 1/8, so that every sum is exact, in float16
too: the outputs must be equal bit for bit, and some activations lie exactly on the jump.
"""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import jr_onnx as jr
from jr_onnx.errors import HiddenActivationError, NothingToRewriteError

pytest.importorskip("onnxscript", reason="torch's dynamo exporter needs it")

JUMP = 0.375
Activation = Callable[[Tensor], Tensor]


class Calls(nn.Module):
    """Makes a module of a function."""

    def __init__(self, function: Activation) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Jump(nn.Module):
    """The oracle: what an activation gives above the jump, else 0."""

    def __init__(self, plain: nn.Module, jump: float = JUMP) -> None:
        super().__init__()
        self.plain, self.jump = plain, jump
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach())
        return torch.where(x > self.jump, self.plain(x), torch.zeros_like(x))


class Net(nn.Module):
    """A linear layer for each activation, and one over their sum."""

    def __init__(self, *activations: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 16) for _ in activations)
        self.activations = nn.ModuleList(activations)
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros((), dtype=x.dtype)
        for layer, activation in zip(self.layers, self.activations, strict=True):
            h = h + activation(layer(x))
        out: Tensor = self.last(h)
        return out


def exact(module: nn.Module) -> nn.Module:
    """Fills the layers of a module with -1, 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if "activations" not in name:
            parameter.data = torch.randint(-1, 2, parameter.shape, generator=generator).to(
                parameter
            )
    return module.eval()


def inputs(*shape: int) -> Tensor:
    """Returns multiples of 1/8 in [-2, 2]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-16, 17, shape, generator=generator) / 8


def export(
    module: nn.Module | torch.jit.ScriptModule, *x: Tensor, dynamo: bool, opset: int, **more: Any
) -> jr.Model:
    """Exports a module; what torch warns of is its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            program = torch.onnx.export(
                module, x, dynamo=True, opset_version=opset, verbose=False, **more
            )
            assert program is not None
            return jr.Model(program.model_proto.SerializeToString())
        file: Any = io.BytesIO()  # which torch takes, and does not declare
        torch.onnx.export(module, x, file, dynamo=False, opset_version=opset, **more)
        return jr.Model(file.getvalue())


def run(model: jr.Model, *x: Tensor) -> np.ndarray[Any, Any]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model.content, options, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]
    feeds = {name: value.numpy() for name, value in zip(names, x, strict=True)}
    return np.asarray(session.run(None, feeds)[0])


def check(
    model: jr.Model, expected: list[str], before: nn.Module, after: nn.Module, *x: Tensor
) -> jr.Retrofit:
    """Compares sites, and a retrofit for each target with the modules before and after."""
    sites, _ = jr.find_sites(model)
    assert [site.op_type for site in sites] == expected
    assert len({site.path for site in sites}) == len(sites)
    with torch.no_grad():
        plain, wanted = before(*x).numpy(), after(*x).numpy()
    assert not np.array_equal(plain, wanted), "the jump must matter, or nothing is tested"
    assert np.array_equal(run(model, *x), plain)
    for target in ("portable", "onnxruntime"):
        result = jr.retrofit(model, jump=JUMP, target=target)
        assert len(result.sites) == len(expected)
        assert jr.verify(model, result.model).equivalent
        assert jr.restore(result.model).content == model.content
        assert np.array_equal(run(result.model, *x), wanted)
    return result


def zero_slopes(module: nn.PReLU) -> nn.PReLU:
    nn.init.zeros_(module.weight)
    return module


# By name: a fresh activation, and the operators that the dynamo and TorchScript exporters make it.
ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "nn.ReLU": (nn.ReLU, "Relu", "Relu"),
    "functional.relu": (lambda: Calls(functional.relu), "Relu", "Relu"),
    "relu6": (nn.ReLU6, "Clip", "Clip"),
    "hardtanh(0, 4)": (lambda: nn.Hardtanh(0, 4), "Clip", "Clip"),
    "clamp(min=0)": (lambda: Calls(lambda x: x.clamp(min=0)), "Max", "Clip"),
    "maximum(x, 0)": (lambda: Calls(lambda x: torch.maximum(x, torch.zeros(()))), "Max", "Max"),
    "maximum(0, x)": (lambda: Calls(lambda x: torch.maximum(torch.zeros(()), x)), "Max", "Max"),
    "leaky_relu(0)": (lambda: nn.LeakyReLU(0.0), "LeakyRelu", "LeakyRelu"),
    "PReLU of one 0": (lambda: zero_slopes(nn.PReLU()), "PRelu", "PRelu"),
    "PReLU of zeros": (lambda: zero_slopes(nn.PReLU(16)), "PRelu", "PRelu"),
}


@pytest.mark.slow  # all of them in one model are not
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_of_the_dynamo_exporter(name: str) -> None:
    activation, op_type, _ = ACTIVATIONS[name]
    before, jump, x = exact(Net(activation())), Jump(activation()), inputs(32, 6)
    model = export(before, x, dynamo=True, opset=18)
    check(model, [op_type], before, exact(Net(jump)), x)


@pytest.mark.parametrize("opset", [13, 23])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_of_the_torchscript_exporter(name: str, opset: int) -> None:
    activation, _, op_type = ACTIVATIONS[name]
    before, jump, x = exact(Net(activation())), Jump(activation()), inputs(32, 6)
    model = export(before, x, dynamo=False, opset=opset)
    check(model, [op_type], before, exact(Net(jump)), x)
    assert (jump.seen[0] == JUMP).any()
    assert (jump.seen[0] > 6).any()


# From 18 to 25 the dynamo exporter has opsets of its own; beyond, onnx converts what it makes.
# Below 15 that fails for some of these, and the exporter writes 18 instead.
@pytest.mark.parametrize(
    ("dynamo", "opset"),
    [
        *((True, opset) for opset in (15, 17, 18, 21, 25, 28)),
        *((False, opset) for opset in range(13, 24)),
    ],
)
def test_all_activations_in_one_model(dynamo: bool, opset: int) -> None:
    kinds = ACTIVATIONS.values()
    before = exact(Net(*(make() for make, _, _ in kinds)))
    after = exact(Net(*(Jump(make()) for make, _, _ in kinds)))
    x = inputs(32, 6)
    free: dict[str, Any] = (
        {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
        if dynamo
        else {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    )
    model = export(before, x, dynamo=dynamo, opset=opset, **free)
    assert max(entry.version for entry in model.proto.opset_import) == opset
    result = check(
        model,
        [of_dynamo if dynamo else of_script for _, of_dynamo, of_script in kinds],
        before,
        after,
        x,
    )
    assert {site.site.tensor.shape for site in result.sites} == {("batch", 16)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("dynamo", [True, False])
def test_a_module_of_another_type(dtype: torch.dtype, dynamo: bool) -> None:
    before, after = exact(Net(nn.ReLU()).to(dtype)), exact(Net(Jump(nn.ReLU())).to(dtype))
    x = inputs(32, 6).to(dtype)
    result = check(export(before, x, dynamo=dynamo, opset=18), ["Relu"], before, after, x)
    assert str(dtype) == f"torch.{result.sites[0].site.tensor.dtype}"


class Cond(nn.Module):
    """An activation in either branch of torch.cond."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.last, self.activation = nn.Linear(6, 16), nn.Linear(16, 3), activation

    def forward(self, x: Tensor) -> Tensor:
        def minus(h: Tensor) -> Tensor:
            y: Tensor = self.activation(-h)
            return y

        def plus(h: Tensor) -> Tensor:
            y: Tensor = self.activation(h) * 2
            return y

        branched = torch.cond(x.sum() > 0, plus, minus, (self.first(x),))
        out: Tensor = self.last(branched)
        return out


class ScriptedIf(Cond):
    """The same with an `if`, which the tracer would not see."""

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.first(x)
        h = self.activation(h) * 2 if bool(x.sum() > 0) else self.activation(-h)
        out: Tensor = self.last(h)
        return out


class ScriptedLoop(nn.Module):
    """The same layer `n` times."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.layer, self.activation = nn.Linear(6, 6), activation

    def forward(self, x: Tensor, n: int) -> Tensor:
        for _ in range(n):
            x = self.activation(self.layer(x)) * 0.5
        return x


def scripted(module: nn.Module) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(module)


@functools.cache
def branched(opset: int | None) -> jr.Model:
    """Exports a model with an If: by the dynamo exporter without an opset."""
    if opset is None:
        return export(exact(Cond(nn.ReLU())), inputs(32, 6), dynamo=True, opset=18)
    return export(scripted(exact(ScriptedIf(nn.ReLU()))), inputs(32, 6), dynamo=False, opset=opset)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("opset", [None, 13, 17, 23])
def test_an_activation_in_either_branch(opset: int | None, sign: int) -> None:
    before, after = exact(ScriptedIf(nn.ReLU())), exact(ScriptedIf(Jump(nn.ReLU())))
    x = inputs(32, 6).abs() * sign
    sites = check(branched(opset), ["Relu", "Relu"], before, after, x).sites
    branches = [site.site.path.split(">")[0].split(".")[-1] for site in sites]
    assert branches == ["then_branch", "else_branch"]


@pytest.mark.parametrize("opset", [13, 17, 23])
def test_an_activation_in_a_scripted_loop(opset: int) -> None:
    before, after = exact(ScriptedLoop(nn.ReLU())), exact(ScriptedLoop(Jump(nn.ReLU())))
    x, n = inputs(32, 6), torch.tensor(3)
    model = export(scripted(before), x, n, dynamo=False, opset=opset)
    (site,) = check(model, ["Relu"], before, after, x, n).sites
    assert ".body>" in site.site.path


class Block(nn.Module):
    """A layer and an activation."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.layer, self.activation = nn.Linear(6, 6), activation

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activation(self.layer(x))
        return out


def blocks(activation: Callable[[], nn.Module]) -> nn.Module:
    return exact(nn.Sequential(Block(activation()), Block(activation())))


def test_modules_as_local_functions() -> None:
    x = inputs(32, 6)
    before, after = blocks(nn.ReLU), blocks(lambda: Jump(nn.ReLU()))
    model = export(before, x, dynamo=False, opset=17, export_modules_as_functions={Block})
    assert [node.op_type for node in model.proto.graph.node] == ["Block", "Block"]
    (site,) = check(model, ["Relu"], before, after, x).sites
    assert "::Block>" in site.site.path


def test_a_local_function_with_a_jump_that_float16_rounds() -> None:
    x = inputs(32, 6)
    model = export(blocks(nn.ReLU), x, dynamo=False, opset=17, export_modules_as_functions={Block})
    assert jr.verify(model, jr.retrofit(model, jump=0.3).model).differences == ()


HARD: dict[str, tuple[Activation, str]] = {
    "hardswish": (functional.hardswish, "HardSwish is no ReLU|HardSigmoid is no ReLU"),
    "hardsigmoid": (functional.hardsigmoid, "HardSigmoid is no ReLU"),
    "x relu6(x + 3) / 6": (lambda x: x * functional.relu6(x + 3) / 6, r"Clip\(x \+ 3, 0, 6\)"),
    "relu6(x + 3) / 6": (lambda x: functional.relu6(x + 3) / 6, r"Clip\(x \+ 3, 0, 6\)"),
    "relu6(3 + x) x": (lambda x: functional.relu6(3 + x) * x, r"Clip\(x \+ 3, 0, 6\)"),
    "leaky_relu": (functional.leaky_relu, r"its slope below 0 is 0\.01"),
    "elu": (functional.elu, "Elu is no ReLU"),
}


@pytest.mark.parametrize("opset", [13, 14, 17, 20, 23])
@pytest.mark.parametrize("name", HARD)
def test_what_is_no_relu_is_left_alone(name: str, opset: int) -> None:
    activation, reason = HARD[name]
    x = inputs(32, 6)
    model = export(exact(Net(Calls(activation))), x, dynamo=False, opset=opset)
    assert jr.find_sites(model)[0] == ()
    with pytest.raises(NothingToRewriteError, match=reason):
        jr.retrofit(model, jump=JUMP)


def test_what_is_no_relu_is_left_alone_from_the_dynamo_exporter_too() -> None:
    plain = Net(*(Calls(activation) for activation, _ in HARD.values()))
    model = export(exact(plain), inputs(32, 6), dynamo=True, opset=18)
    sites, skipped = jr.find_sites(model)
    assert sites == ()
    for entry, (_, reason) in zip(skipped, HARD.values(), strict=True):
        assert re.search(reason, entry.reason)


def test_prelu_with_slopes_is_left_alone() -> None:
    model = export(Net(nn.PReLU(16)).eval(), inputs(2, 6), dynamo=False, opset=17)
    with pytest.raises(NothingToRewriteError, match="its slopes below 0 are not all 0"):
        jr.retrofit(model, jump=JUMP)


@pytest.mark.parametrize("opset", [13, 23])
def test_threshold_at_zero_of_the_torchscript_exporter(opset: int) -> None:
    before, x = exact(Net(nn.Threshold(0, 0))), inputs(32, 6)
    model = export(before, x, dynamo=False, opset=opset)
    check(model, ["Relu"], before, exact(Net(Jump(nn.ReLU()))), x)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_threshold_of_the_dynamo_exporter_is_listed(threshold: float) -> None:
    activation = Calls(lambda x: functional.threshold(x, threshold, 0.0))
    model = export(exact(Net(activation)), inputs(32, 6), dynamo=True, opset=18)
    assert [node.op_type for node in model.proto.graph.node].count("Where") == 1
    sites, skipped = jr.find_sites(model)
    assert [*sites, *skipped] != []


def test_a_relu_inside_an_rnn_is_hidden() -> None:
    module = nn.Sequential(nn.ReLU(), nn.RNN(6, 4, nonlinearity="relu")).eval()
    model = export(module, inputs(5, 2, 6), dynamo=False, opset=17)
    with pytest.raises(HiddenActivationError):
        jr.retrofit(model, jump=JUMP)


class Residual(nn.Module):
    """A residual network with batch normalisation, of random weights; one activation used twice."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.stem(x))
        h = functional.max_pool2d(self.activation(h + self.body(h)), 2)
        out: Tensor = self.head(h.mean((2, 3)))
        return out


@pytest.mark.parametrize(("dynamo", "opset"), [(True, 18), (False, 13), (False, 23)])
def test_a_residual_network(dynamo: bool, opset: int) -> None:
    torch.manual_seed(0)
    plain = Residual(nn.ReLU()).eval()
    jump = Jump(nn.ReLU())
    oracle = Residual(jump).double().eval()
    oracle.load_state_dict(plain.state_dict())
    x = torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        wanted, unchanged = oracle(x.double()).numpy(), plain(x).numpy()
    model = export(plain, x, dynamo=dynamo, opset=opset)
    result = jr.retrofit(model, jump=JUMP)
    assert len({site.site.path for site in result.sites}) == 2
    assert jr.verify(model, result.model).equivalent
    assert jr.restore(result.model).content == model.content
    got = run(result.model, x)
    # Sums of 3 x 3 x 8 + 1 products of about 1, three layers deep, lose in float32 at most some
    # 3 * 73 units in the last place; no activation is that near to the jump.
    tolerance = 3 * 73 * float(np.finfo(np.float32).eps)
    assert min(float((seen - JUMP).abs().min()) for seen in jump.seen) > tolerance
    assert np.abs(got - wanted).max() < tolerance
    assert np.abs(got - unchanged).max() > 100 * tolerance


@pytest.mark.parametrize("opset", [9, 11, 13, 15, 18, 21])
def test_a_multilayer_perceptron_of_skl2onnx(opset: int) -> None:
    neural_network = pytest.importorskip("sklearn.neural_network")
    skl2onnx = pytest.importorskip("skl2onnx")
    rng = np.random.default_rng(0)
    x = rng.integers(-16, 17, (64, 4)).astype(np.float32) / 8
    fitted = neural_network.MLPClassifier((8, 8), activation="relu", max_iter=1, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not converged
        fitted.fit(x, np.arange(len(x)) % 3)
        # Exact numbers, as above.
        fitted.coefs_ = [rng.integers(-1, 2, c.shape).astype(np.float64) for c in fitted.coefs_]
        fitted.intercepts_ = [np.zeros_like(each) for each in fitted.intercepts_]
        domains = {"": opset, "ai.onnx.ml": 1}
        options = {"zipmap": False}
        proto = skl2onnx.to_onnx(fitted, x[:1], target_opset=domains, options=options)
    model = jr.Model(proto.SerializeToString())
    result = jr.retrofit(model, jump=JUMP)
    assert [site.site.op_type for site in result.sites] == ["Relu", "Relu"]
    assert jr.verify(model, result.model).equivalent
    assert jr.restore(result.model).content == model.content

    def probabilities(jump: float) -> np.ndarray[Any, Any]:
        h = x.astype(np.float64)
        for weights in fitted.coefs_[:-1]:
            h = h @ weights
            h = np.where(h > jump, h, 0)
        exponentials = np.exp(h @ fitted.coefs_[-1])
        return np.asarray(exponentials / exponentials.sum(1, keepdims=True))

    # Softmax in float32: an exponential, a sum of three and a quotient, a few units each.
    tolerance = 16 * float(np.finfo(np.float32).eps)
    for tested, jump in ((model, 0.0), (result.model, JUMP)):
        session = ort.InferenceSession(tested.content, providers=["CPUExecutionProvider"])
        got = session.run(None, {session.get_inputs()[0].name: x})[1]
        assert np.abs(np.asarray(got) - probabilities(jump)).max() < tolerance
    assert np.abs(probabilities(JUMP) - probabilities(0)).max() > 0.01
