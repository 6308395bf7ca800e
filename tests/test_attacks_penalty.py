"""C&W and EAD: what they minimise, targets, confidence; foolbox on the same weights and points."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx.numpy_helper
import pytest
import torch
from classifiers import Linear, points, random_linear
from conftest import SAMPLES

import jr_onnx as jr
from jr_onnx.attacks import Attack, ThreatModel
from jr_onnx.attacks.carlini_wagner import CarliniWagner
from jr_onnx.attacks.deepfool import DeepFool
from jr_onnx.attacks.ead import EAD
from jr_onnx.attacks.nearest import margin
from jr_onnx.attacks.penalty import Plateau
from jr_onnx.errors import ParameterError

Array = np.ndarray[Any, Any]
L2, L1 = ThreatModel(norm="l2", epsilon=np.inf), ThreatModel(norm="l1", epsilon=np.inf)
both = pytest.mark.parametrize(
    ("kind", "threat"), [(CarliniWagner, L2), (EAD, L1)], ids=["carlini_wagner", "ead"]
)


@pytest.fixture(scope="module")
def linear() -> tuple[Linear, Array, Array]:
    """A linear model and points that are some Adam steps away from its boundaries."""
    model = random_linear(classes=4)
    x, y = points(model, 200)
    far = np.flatnonzero(model.distances(x, y, 2) > 0.1)[:30]
    return model, x[far], y[far]


def test_carlini_wagner_comes_near_to_the_minimal_distance(linear: Any) -> None:
    model, x, y = linear
    found = CarliniWagner(steps=400).run(model, x, y, L2)
    ratio = found.distance / model.distances(x, y, 2)
    assert not found.robust.any()
    assert ratio.min() >= 1 - 1e-6
    assert ratio.mean() < 1.03


def test_carlini_wagner_starts_from_data_that_float16_rounds_to_beyond_a_bound() -> None:
    model = random_linear(classes=4)
    model.dtype = np.dtype(np.float16)
    x = np.random.default_rng(0).uniform(-2.1179, 2.64, (200, 20))
    x[:, :10] = 2.64  # 2.641 in float16
    y = model.logits(x.astype(np.float16)).argmax(axis=1)
    threat = ThreatModel(norm="l2", epsilon=np.inf, bounds=(-2.1179, 2.64))
    found = CarliniWagner(steps=100).run(model, x, y, threat)
    assert not found.robust[found.correct].any()


def test_ead_comes_near_to_the_minimal_distance(linear: Any) -> None:
    model, x, y = linear
    threat = ThreatModel(norm="l1", epsilon=np.inf, bounds=(-3, 4))
    found = EAD(steps=400).run(model, x, y, threat)
    ratio = found.distance / model.distances(x, y, np.inf)
    assert not found.robust.any()
    assert ratio.min() >= 1 - 1e-6
    assert ratio.mean() < 1.1


def test_ead_changes_few_elements(linear: Any) -> None:
    model, x, y = linear
    dense, sparse = (
        attack.run(model, x, y, threat)
        for attack, threat in ((CarliniWagner(steps=100), L2), (EAD(steps=100), L1))
    )
    changed = [(found.x_adv != x).sum(axis=1).mean() for found in (dense, sparse)]
    assert changed[0] > 19
    assert changed[1] < 8


def test_the_decision_of_ead(linear: Any) -> None:
    model, x, y = linear
    l1, en = (
        EAD(steps=100, decision=decision).run(model, x, y, L1).x_adv.astype(np.float64) - x
        for decision in ("l1", "en")
    )

    def elastic(d: Array) -> float:
        return float((0.01 * np.abs(d) + d**2).sum())

    assert np.abs(l1).sum() < np.abs(en).sum()
    assert elastic(en) < elastic(l1)


@both
def test_a_target_is_reached(kind: Any, threat: ThreatModel, linear: Any) -> None:
    model, x, y = linear
    wanted = (y + 2) % 4
    found = kind(steps=100, target_classes=wanted.tolist()).run(model, x, y, threat, batch_size=11)
    free = kind(steps=100).run(model, x, y, threat)
    assert not found.robust.any()
    assert np.array_equal(model.logits(found.x_adv).argmax(axis=1), wanted)
    assert found.distance.mean() > 1.1 * free.distance.mean()


@both
@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([0, 1], "one class for each example"),
        ([0.5] * 40, "one class for each example, got float64"),
        ([7] * 40, "classes below 4 other than the label"),
        ([0, 1, 2, 3] * 10, "classes below 4 other than the label"),
    ],
)
def test_targets_that_do_not_fit(
    kind: Any, threat: ThreatModel, wanted: Any, message: str, linear: Any
) -> None:
    model, x, y = linear
    with pytest.raises(ParameterError, match=message):
        kind(target_classes=wanted).run(model, x, y, threat)


@both
def test_a_confidence_is_reached(kind: Any, threat: ThreatModel, linear: Any) -> None:
    model, x, y = linear
    found = kind(steps=100, confidence=0.5).run(model, x, y, threat)
    assert not found.robust.any()
    assert margin(model.logits(found.x_adv), y).min() > 0.5


@both
def test_aborting_early_saves_runs_and_costs_little(
    kind: Any, threat: ThreatModel, linear: Any
) -> None:
    model, x, y = linear
    early, late = (
        kind(steps=200, abort_early=early).run(model, x, y, threat) for early in (True, False)
    )
    assert early.counts.gradient < 0.8 * late.counts.gradient
    assert early.distance.mean() < 1.05 * late.distance.mean()


def test_a_plateau_is_where_neither_objective_nor_size_falls() -> None:
    plateau, rows = Plateau(3, steps=20, wanted=True), np.arange(3)
    none = np.full(3, np.inf)
    assert not plateau.stalled(0, rows, np.ones(3), none).any()
    assert not plateau.stalled(1, rows, np.full(3, 0.9), none).any()
    assert not plateau.stalled(2, rows, np.ones(3), none).any()  # 0.9 was lower
    size = np.array([np.inf, 1, np.inf])
    assert plateau.stalled(4, rows, np.array([0.9, 0.9, 0.8]), size).tolist() == [
        True,
        False,
        False,
    ]
    assert not Plateau(3, steps=20, wanted=False).stalled(4, rows, none, none).any()


class LeNet(torch.nn.Module):
    """The sample model in torch, with its weights."""

    def __init__(self) -> None:
        super().__init__()
        graph = onnx.load(SAMPLES / "lenet_mnist.onnx").graph
        self.weights = {
            each.name: torch.tensor(onnx.numpy_helper.to_array(each).copy())
            for each in graph.initializer
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w, f = self.weights, torch.nn.functional
        x = (x - w["val_1"]) / w["val_2"]
        for at in ("conv1", "conv2"):
            x = f.relu(f.max_pool2d(f.conv2d(x, w[f"{at}.weight"], w[f"{at}.bias"]), 2))
        x = x.flatten(1)
        for at in ("fc1", "fc2"):
            x = f.relu(f.linear(x, w[f"{at}.weight"], w[f"{at}.bias"]))
        return f.linear(x, w["fc3.weight"], w["fc3.bias"])


def foolbox_attacks() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports names that scipy deprecates
        return pytest.importorskip("foolbox", reason="foolbox is an optional oracle")


def foolbox_distance(network: Any, attack: Any, x: Array, y: Array, norm: str) -> Array:
    model = foolbox_attacks().PyTorchModel(network.eval(), bounds=(0, 1), device="cpu")
    _, x_adv, success = attack(model, torch.tensor(x), torch.tensor(y), epsilons=None)
    assert success.all()
    return ThreatModel(norm=norm, epsilon=np.inf).distance(x_adv.numpy(), x)


# Aborting early is left out: foolbox judges the batch together, we each example.
BUDGET: Any = {"abort_early": False, "steps": 150, "binary_search_steps": 5, "initial_const": 0.1}
CASES: dict[str, tuple[Attack, str, Callable[[Any], Any]]] = {
    "deepfool-l2": (DeepFool(bisections=0), "l2", lambda a: a.L2DeepFoolAttack()),
    "deepfool-linf": (DeepFool(bisections=0), "linf", lambda a: a.LinfDeepFoolAttack()),
    "carlini_wagner": (CarliniWagner(**BUDGET), "l2", lambda a: a.L2CarliniWagnerAttack(**BUDGET)),
    "ead": (EAD(**BUDGET), "l1", lambda a: a.EADAttack(**BUDGET, decision_rule="L1")),
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small networks are slower on many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("network", ["linear", "lenet"])
def test_foolbox_finds_nothing_nearer(case: str, network: str, mnist: jr.Dataset) -> None:
    attack, norm, theirs = CASES[case]
    if network == "linear":
        model = random_linear()
        x, y = points(model, 30)
        module: torch.nn.Module = torch.nn.Linear(20, 4)
        module.load_state_dict({"weight": torch.tensor(model.w.T), "bias": torch.tensor(model.b)})
        target: Any = model
    else:
        x, y, module = mnist.x[:5], mnist.y[:5], LeNet()
        target = jr.Target(SAMPLES / "lenet_mnist.onnx", device="cpu")
        with torch.no_grad():
            logits = module(torch.tensor(x)).numpy()
        np.testing.assert_allclose(target.logits(x), logits, atol=2e-5)
    theirs_at = foolbox_distance(module, theirs(foolbox_attacks().attacks), x, y, norm)
    found = attack.run(target, x, y, ThreatModel(norm=norm, epsilon=np.inf))
    assert not found.robust.any()
    assert found.distance.mean() <= 1.02 * theirs_at.mean()
