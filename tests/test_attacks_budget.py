"""Attacks inside a ball: closed forms, other implementations, and what every attack must keep."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
from classifiers import Linear, NumpyClassifier, points, random_linear

from jr_onnx.attacks.apgd import APGD, APGDDLR, APGDTargeted
from jr_onnx.attacks.attack import Attack
from jr_onnx.attacks.fgsm import FGSM
from jr_onnx.attacks.ifgsm import IFGSM
from jr_onnx.attacks.mifgsm import MIFGSM
from jr_onnx.attacks.pgd import PGD
from jr_onnx.attacks.threat import NORMS, ThreatModel
from jr_onnx.errors import ParameterError

Array = np.ndarray[Any, Any]
DUAL = {"linf": 1, "l2": 2, "l1": np.inf}
SHAPE = (2, 3, 4)
norms = pytest.mark.parametrize("norm", NORMS)
ALL: list[Attack] = [
    FGSM(),
    PGD(steps=10),
    PGD(steps=10, loss="margin", restarts=3),
    PGD(steps=10, loss="dlr"),
    IFGSM(steps=10, step_size=0.005),
    MIFGSM(),
    APGD(steps=20),
    APGD(steps=10, restarts=3),
    APGDDLR(steps=20),
    APGDTargeted(steps=10, targets=2),
]
attacks = pytest.mark.parametrize(
    "attack", ALL, ids=lambda a: f"{a.name}-{getattr(a, 'loss', '')}{getattr(a, 'restarts', '')}"
)


class Mlp(NumpyClassifier):
    """logits = tanh(x @ first) @ second."""

    def __init__(self, classes: int = 5, seed: int = 0) -> None:
        rng, size = np.random.default_rng(seed), int(np.prod(SHAPE))
        self.first = (rng.normal(size=(size, 32)) * 0.6).astype(np.float32)
        self.second = rng.normal(size=(32, classes)).astype(np.float32)

    def hidden(self, x: Array) -> Array:
        hidden: Array = np.tanh((x.reshape(len(x), -1) - np.float32(0.5)) @ self.first)
        return hidden

    def logits(self, x: Array) -> Array:
        logits: Array = self.hidden(x) @ self.second
        return logits

    def pull_back(self, x: Array, seed: Array) -> Array:
        slope = 1 - self.hidden(x) ** 2
        back: Array = ((seed @ self.second.T * slope) @ self.first.T).reshape(x.shape)
        return back


@pytest.fixture(scope="module")
def mlp() -> tuple[Mlp, Array, Array]:
    model = Mlp()
    x, y = points(model, 200, SHAPE)
    return model, x, y


def _most(w: Array, x: Array, threat: ThreatModel) -> Array:
    """The point of the ball, in the box, where w @ x is largest."""
    delta = np.zeros(w.shape)
    if threat.norm == "linf":
        delta = threat.epsilon * np.sign(w)
    elif threat.norm == "l2":
        delta = threat.epsilon * w / np.linalg.norm(w)
    else:
        left = threat.epsilon
        for at in np.argsort(-np.abs(w)):
            room = 1 - x[at] if w[at] > 0 else x[at]
            delta[at] = np.sign(w[at]) * min(room, left)
            left -= abs(delta[at])
    moved: Array = x + delta
    return moved


@norms
@pytest.mark.parametrize(
    "attack",
    [PGD(), PGD(loss="margin"), MIFGSM(), FGSM(), APGD(), APGD(loss="margin")],
    ids=lambda attack: f"{attack.name}-{attack.loss}",
)
def test_two_classes_of_a_linear_model_are_broken_exactly(attack: Attack, norm: str) -> None:
    model = random_linear(classes=2, shape=SHAPE)
    x, y = points(model, 300, SHAPE)
    distance = model.distances(x, y, DUAL[norm])
    epsilon = float(np.median(distance))
    found = attack.run(model, x, y, ThreatModel(norm=norm, epsilon=epsilon))
    # In l2 steps of one length turn towards the optimum, 40 of them to within half a percent.
    clear = np.abs(distance / epsilon - 1) > (1e-2 if norm == "l2" else 1e-3)
    assert np.array_equal(found.robust[clear], (distance > epsilon)[clear])


@norms
@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_apgd_ends_at_the_optimum(norm: str, epsilon: float) -> None:
    model = random_linear(classes=2, shape=(20,))
    model = Linear(model.w, model.b + np.array([100, 0], np.float32))  # out of anybody's reach
    x, y = points(model, 100)
    epsilon *= {"linf": 0.02, "l2": 0.1, "l1": 0.3}[norm]
    threat = ThreatModel(norm=norm, epsilon=epsilon)
    x_adv = APGD(loss="margin").search(model, x, y, threat, seed=0, indices=np.arange(100))
    w = (model.w[:, 1] - model.w[:, 0]).astype(np.float64)
    best = np.stack([_most(w, each.astype(np.float64), threat) for each in x])
    reached = ((x_adv.astype(np.float64) - x) @ w) / ((best - x) @ w)
    assert reached.max() <= 1 + 1e-5
    # l2 turns towards it step by step; l1 moves more elements than the optimum does.
    assert reached.min() >= {"linf": 1 - 1e-5, "l2": 0.9999, "l1": 0.98}[norm]


@norms
@pytest.mark.parametrize(
    "attack",
    [APGDTargeted(), APGDTargeted(loss="logit_difference", steps=40)],
    ids=["targeted_dlr", "logit_difference"],
)
def test_targets_find_the_nearest_of_many_classes(attack: Attack, norm: str) -> None:
    model = random_linear(classes=6, shape=SHAPE)
    x, y = points(model, 200, SHAPE)
    distance = model.distances(x, y, DUAL[norm])
    epsilon = float(np.median(distance))
    found = attack.run(model, x, y, ThreatModel(norm=norm, epsilon=epsilon))
    clear = np.abs(distance / epsilon - 1) > 2e-3
    assert np.array_equal(found.robust[clear], (distance > epsilon)[clear])


@norms
@pytest.mark.parametrize(
    "make",
    [FGSM, PGD, partial(PGD, loss="margin", restarts=2), MIFGSM],
    ids=["fgsm", "pgd", "pgd-margin", "mifgsm"],
)
def test_a_target_is_reached_as_far_as_it_can_be(make: Any, norm: str) -> None:
    model = random_linear(classes=4, shape=SHAPE)
    x, y = points(model, 200, SHAPE)
    wanted = (y + 2) % 4
    z, rows = model.logits(x).astype(np.float64), np.arange(len(x))
    slope = np.linalg.norm(model.w.T[wanted] - model.w.T[y], ord=DUAL[norm], axis=1)
    distance = (z[rows, y] - z[rows, wanted]) / slope  # to the target, past the label alone
    epsilon = 3 * float(np.median(distance))
    threat = ThreatModel(norm=norm, epsilon=epsilon, bounds=(-3, 4))
    attack = make(target_classes=wanted.tolist())
    found = attack.run(model, x, y, threat, batch_size=64)
    there = model.logits(found.x_adv).argmax(axis=1) == wanted
    assert not there[distance > epsilon * (1 + 1e-4)].any()
    free = make().run(model, x, y, threat)
    assert there.mean() > 0.5 > (model.logits(free.x_adv).argmax(axis=1) == wanted).mean()
    if not isinstance(attack, FGSM):  # whose one step need not end at the target's vertex
        assert there[distance < epsilon / 2].mean() > 0.9


class Half(Linear):
    """Sees its input in float16, and computes in float32."""

    dtype: np.dtype[Any] = np.dtype(np.float16)

    def logits(self, x: Any) -> Any:
        return super().logits(x.astype(np.float32))


@norms
@pytest.mark.parametrize(
    "attack", [PGD(steps=100), PGD(steps=400), MIFGSM(steps=40), APGD(), IFGSM(step_size=2e-4)]
)
def test_short_steps_count_in_float16(attack: Attack, norm: str) -> None:
    # Steps shorter than half of the resolution, 5e-4 here, would not move a point of float16.
    inner = random_linear(classes=3, shape=SHAPE)
    model = Half(inner.w, inner.b)
    x = np.random.default_rng(5).uniform(0.5, 0.95, (200, *SHAPE)).astype(np.float16)
    y = model.logits(x).argmax(axis=1)
    distance = model.distances(x, y, DUAL[norm])
    epsilon = {"linf": 4 / 255, "l2": 0.1, "l1": 0.6}[norm]
    found = attack.run(model, x, y, ThreatModel(norm=norm, epsilon=epsilon))
    exact = x.astype(np.float32)
    expected = attack.run(inner, exact, y, ThreatModel(norm=norm, epsilon=epsilon))
    assert 0.05 < (distance < epsilon).mean() < 0.95
    assert found.robust.mean() <= expected.robust.mean() + 0.04


@pytest.mark.parametrize("make", [FGSM, PGD, MIFGSM])
@pytest.mark.parametrize("loss", ["cw", "cw:5", "dlr"])
def test_losses_that_are_flat_far_from_a_target_are_refused(make: Any, loss: str) -> None:
    make(loss=loss)
    with pytest.raises(ParameterError, match="must be cross_entropy or margin, got"):
        make(loss=loss, target_classes=[1])


@pytest.mark.parametrize("make", [FGSM, PGD, MIFGSM])
@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([0, 1], "one class for each example"),
        ([7] * 200, "classes below 5 other than the label"),
        ([0, 1, 2, 3, 4] * 40, "classes below 5 other than the label"),
    ],
)
def test_targets_that_do_not_fit(make: Any, wanted: Any, message: str, mlp: Any) -> None:
    model, x, y = mlp
    with pytest.raises(ParameterError, match=message):
        make(target_classes=wanted).run(model, x, y, ThreatModel(epsilon=0.05))


def test_restarts_break_more_and_lose_nothing(mlp: Any) -> None:
    model, x, y = mlp
    threat = ThreatModel(epsilon=0.03)
    one, many = (PGD(steps=5, restarts=n).run(model, x, y, threat) for n in (1, 8))
    assert not (many.robust & ~one.robust).any()
    assert many.robust.sum() <= one.robust.sum()


def test_iterations_are_stronger_than_one_step(mlp: Any) -> None:
    model, x, y = mlp
    threat = ThreatModel(epsilon=0.04)
    one, pgd, auto = (
        attack.run(model, x, y, threat).robust.mean() for attack in (FGSM(), PGD(), APGD())
    )
    assert auto <= pgd + 0.005 < one + 0.005


@attacks
@norms
def test_nothing_leaves_ball_and_bounds(attack: Attack, norm: str, mlp: Any) -> None:
    model, x, y = mlp
    threat = ThreatModel(norm=norm, epsilon={"linf": 0.05, "l2": 0.2, "l1": 0.8}[norm])
    edge = x.copy()
    edge[:100] = np.clip((x[:100] - 0.5) * 8 + 0.5, 0, 1)
    y = model.logits(edge).argmax(axis=1)
    for seed in (0, 1):
        candidates = attack.search(model, edge, y, threat, seed=seed, indices=np.arange(len(x)))
        assert threat.contains(candidates, edge).all()
        exact = candidates.astype(np.float64)
        order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
        delta = (exact - edge.astype(np.float64)).reshape(len(x), -1)
        assert np.linalg.norm(delta, ord=order, axis=1).max() <= threat.epsilon + 1e-15


@attacks
@norms
def test_the_batching_changes_nothing(attack: Attack, norm: str, mlp: Any) -> None:
    model, x, y = mlp
    threat = ThreatModel(norm=norm, epsilon={"linf": 0.03, "l2": 0.15, "l1": 0.6}[norm])
    one, other = (attack.run(model, x, y, threat, seed=3, batch_size=n) for n in (200, 7))
    # numpy multiplies batches of other sizes in another order: a hair may tip the scales.
    assert (one.robust != other.robust).sum() <= 1
    again = attack.run(model, x, y, threat, seed=3, batch_size=200)
    assert again.x_adv.tobytes() == one.x_adv.tobytes()


@attacks
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_dtypes(attack: Attack, dtype: Any, mlp: Any) -> None:
    _, x, _ = mlp
    model = Mlp()
    model.dtype = np.dtype(dtype)
    x = x.astype(dtype)
    y = model.logits(x).argmax(axis=1)
    threat = ThreatModel(epsilon=0.04)
    found = attack.run(model, x, y, threat)
    assert found.x_adv.dtype == dtype
    assert threat.contains(found.x_adv, x).all()
    assert 0 < found.robust.sum() < len(x)


@pytest.mark.parametrize(
    ("attack", "gradients"),
    [
        (FGSM(), 1),
        (PGD(steps=7), 7),
        (PGD(steps=7, restarts=3), 21),
        (IFGSM(steps=7), 7),
        (MIFGSM(steps=7), 7),
        (APGD(steps=7), 7),
        (APGD(steps=7, restarts=3), 21),
        (APGDTargeted(steps=7, targets=3), 22),  # and the one that ranks the targets
        (APGDTargeted(steps=7, targets=9, restarts=2), 57),  # 4 rivals of 5 classes
    ],
)
@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_gradients_are_counted(attack: Attack, gradients: int, norm: str, mlp: Any) -> None:
    model, x, y = mlp
    found = attack.run(model, x, y, ThreatModel(norm=norm, epsilon=1e-6))
    assert found.robust.all()
    assert found.counts.gradient == gradients * len(x)


def test_a_broken_example_leaves_at_once(mlp: Any) -> None:
    model, x, y = mlp
    for attack in (PGD(steps=50, restarts=4), APGD(steps=50, restarts=4), MIFGSM(steps=50)):
        found = attack.run(model, x, y, ThreatModel(epsilon=0.4))
        assert not found.robust.any()
        assert found.counts.gradient <= 12 * len(x)


def test_ifgsm_walks_where_no_ball_ends(mlp: Any) -> None:
    model, x, y = mlp
    found = IFGSM(steps=40, step_size=0.01).run(model, x, y, ThreatModel(epsilon=np.inf))
    assert not found.robust.any()
    taken = np.ceil(found.distance / 0.01 - 1e-3)
    assert found.distance.max() > 0.03
    # stopped at the first misclassified iterate: one step for each 0.01, and one to notice
    assert found.counts.gradient == (taken + (taken < 40)).sum()


def test_momentum_forgets_how_large_a_gradient_is() -> None:
    model = random_linear(classes=2)
    x, y = points(model, 50)
    larger = Linear(model.w * 8, model.b * 8)
    threat = ThreatModel(norm="l2", epsilon=0.01)
    attack, numbers = MIFGSM(loss="margin"), np.arange(50)
    ends = [attack.search(m, x, y, threat, seed=0, indices=numbers) for m in (model, larger)]
    np.testing.assert_allclose(ends[0], ends[1], atol=1e-6)


@pytest.mark.parametrize(
    ("attack", "classes", "message"),
    [
        (PGD(loss="dlr"), 2, "pgd with the loss dlr needs 3 classes, the model has 2: take the"),
        (FGSM(loss="dlr"), 2, "fgsm with the loss dlr needs 3 classes"),
        (MIFGSM(loss="dlr"), 2, "mifgsm with the loss dlr needs 3 classes"),
        (APGDDLR(), 2, "apgd-dlr with the loss dlr needs 3 classes"),
        (APGDTargeted(), 3, "needs 4 classes, the model has 3: take the loss logit_difference"),
    ],
)
def test_too_few_classes(attack: Attack, classes: int, message: str) -> None:
    model = random_linear(classes=classes)
    x, y = points(model, 5)
    with pytest.raises(ParameterError, match=message):
        attack.run(model, x, y, ThreatModel(epsilon=0.01))


@pytest.mark.parametrize("attack", [FGSM(), PGD(), MIFGSM(), APGD(), APGDDLR(), APGDTargeted()])
def test_a_ball_is_needed(attack: Attack, mlp: Any) -> None:
    model, x, y = mlp
    with pytest.raises(ParameterError, match=f"{attack.name} needs a finite epsilon, got inf"):
        attack.run(model, x, y, ThreatModel(epsilon=np.inf))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (PGD, {"restarts": 0}, "restarts must be at least 1"),
        (PGD, {"restarts": 2, "random_start": False}, "would all be the same run"),
        (PGD, {"loss": "targeted_dlr"}, "loss must be one of cross_entropy, margin, cw, dlr"),
        (PGD, {"loss": "hinge"}, "loss must be one of"),
        (FGSM, {"loss": "drift"}, "loss must be one of"),
        (IFGSM, {"steps": 0}, "steps must be at least 1"),
        (IFGSM, {"step_size": 0.0}, "step_size must be > 0"),
        (MIFGSM, {"momentum": -1.0}, "momentum must be at least 0"),
        (MIFGSM, {"step_size": 0.0}, "step_size must be > 0"),
        (APGD, {"rho": 0.0}, r"rho must be in \(0, 1\]"),
        (APGD, {"momentum": 2.0}, r"momentum must be in \(0, 1\]"),
        (APGD, {"step_size": -1.0}, "step_size must be > 0"),
        (APGD, {"loss": "logit_difference"}, "loss must be one of"),
        (APGDTargeted, {"loss": "dlr"}, "loss must be targeted_dlr or logit_difference"),
        (APGDTargeted, {"targets": 0}, "targets must be at least 1"),
    ],
)
def test_options_that_make_no_sense(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        make(**options)


@pytest.fixture(scope="module")
def foolbox() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("foolbox")


@pytest.mark.parametrize(
    ("norm", "epsilon", "theirs", "options", "ours"),
    [
        ("linf", 0.03, "LinfFastGradientAttack", {}, FGSM()),
        ("l2", 0.15, "L2FastGradientAttack", {}, FGSM()),
        ("linf", 0.03, "LinfPGD", {"steps": 40}, PGD(random_start=False)),
        ("l2", 0.15, "L2PGD", {"steps": 40}, PGD(random_start=False)),
        (
            "linf",
            0.03,
            "LinfMomentumIterativeFastGradientMethod",
            {"steps": 10, "rel_stepsize": 0.1},
            MIFGSM(),
        ),
        (
            "l2",
            0.15,
            "L2MomentumIterativeFastGradientMethod",
            {"steps": 10, "rel_stepsize": 0.1},
            MIFGSM(),
        ),
    ],
)
def test_as_strong_as_foolbox(
    norm: str, epsilon: float, theirs: str, options: Any, ours: Attack, foolbox: Any, mlp: Any
) -> None:
    torch = pytest.importorskip("torch")
    model, x, y = mlp
    first, second = torch.from_numpy(model.first), torch.from_numpy(model.second)
    if "PGD" in theirs:
        options = {"rel_stepsize": 2.5 / 40, "random_start": False, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = foolbox.PyTorchModel(_module(torch, first, second), bounds=(0, 1), device="cpu")
        attack = getattr(foolbox.attacks, theirs)(**options)
        _, x_adv, _ = attack(net, torch.from_numpy(x), torch.from_numpy(y), epsilons=epsilon)
    their_robust = (model.logits(x_adv.numpy()).argmax(axis=1) == y).mean()
    our_robust = ours.run(model, x, y, ThreatModel(norm=norm, epsilon=epsilon)).robust.mean()
    assert 0.02 < their_robust < 0.98, "the test needs both kinds"
    assert our_robust <= their_robust + 0.005


def _module(torch: Any, first: Any, second: Any) -> Any:
    class Net(torch.nn.Module):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return torch.tanh((x.flatten(1) - 0.5) @ first) @ second

    return Net().eval()
