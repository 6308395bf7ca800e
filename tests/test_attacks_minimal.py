"""Attacks that look for the smallest perturbation, where it is known in closed form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from classifiers import Folded, Linear, points, random_linear

import jr_onnx as jr
from jr_onnx.attacks import Attack, ThreatModel
from jr_onnx.attacks.carlini_wagner import CarliniWagner
from jr_onnx.attacks.deepfool import DeepFool
from jr_onnx.attacks.ead import EAD
from jr_onnx.attacks.fab import FAB, TargetedFAB, move_onto
from jr_onnx.attacks.nearest import margin, misclassified, ranked_rivals
from jr_onnx.attacks.threat import NORMS
from jr_onnx.attacks.trust_region import AdaptiveTrustRegion, TrustRegion
from jr_onnx.errors import ParameterError

Array = np.ndarray[Any, Any]
ORDER_OF_DUAL = {"linf": 1.0, "l2": 2.0, "l1": np.inf}
# With norms, and steps that suffice for the models here.
EXACT: list[tuple[Attack, str]] = [
    *((attack, norm) for attack in (DeepFool(), TrustRegion()) for norm in ("linf", "l2")),
    *((AdaptiveTrustRegion(), norm) for norm in ("linf", "l2")),
    *((attack, norm) for attack in (FAB(), TargetedFAB()) for norm in ("linf", "l2", "l1")),
]
ALL = [*EXACT, (CarliniWagner(steps=100), "l2"), (EAD(steps=100), "l1")]
each_exact = pytest.mark.parametrize(
    ("attack", "norm"), EXACT, ids=[f"{attack.name}-{norm}" for attack, norm in EXACT]
)
each = pytest.mark.parametrize(
    ("attack", "norm"), ALL, ids=[f"{attack.name}-{norm}" for attack, norm in ALL]
)


def nearest(norm: str, bounds: tuple[float, float] = (0, 1)) -> ThreatModel:
    return ThreatModel(norm=norm, epsilon=np.inf, bounds=bounds)


@each_exact
@pytest.mark.parametrize("classes", [2, 12])
def test_the_minimal_distance_is_found(attack: Attack, norm: str, classes: int) -> None:
    model = random_linear(classes=classes)
    x, y = points(model, 40)
    found = attack.run(model, x, y, nearest(norm, (-3, 4)))
    distance = model.distances(x, y, ORDER_OF_DUAL[norm])
    clear = distance > 1e-3  # above float32 rounding
    assert not found.robust.any()
    assert (found.distance[clear] >= distance[clear] * (1 - 1e-6)).all()
    # bisections=10 leave 2^-10 of the way
    np.testing.assert_allclose(found.distance[clear], distance[clear], rtol=2e-3)


@each_exact
def test_the_minimal_distance_is_found_past_folds_of_the_gradient(
    attack: Attack, norm: str
) -> None:
    linear = random_linear()
    model = Folded(linear.w, -0.15 * linear.w.sum(axis=0), centre=0.5)
    rng = np.random.default_rng(3)
    x = (0.5 + rng.choice([-1, 1], (40, 20)) * rng.uniform(0.1, 0.2, (40, 20))).astype(np.float32)
    y = model.logits(x).argmax(axis=1)
    distance = model.distances(x, y, ORDER_OF_DUAL[norm])
    # closer than any fold, and above rounding
    clear = (distance > 1e-3) & (distance < 0.09)
    found = attack.run(model, x, y, nearest(norm))
    assert clear.sum() > 15
    np.testing.assert_allclose(found.distance[clear], distance[clear], rtol=2e-3)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_deepfool_as_published_overshoots_by_what_it_says(norm: str) -> None:
    model = random_linear(classes=2)
    x, y = points(model, 40)
    found = DeepFool(bisections=0).run(model, x, y, nearest(norm, (-3, 4)))
    distance = model.distances(x, y, ORDER_OF_DUAL[norm])
    np.testing.assert_allclose(found.distance, 1.02 * (distance + 1e-4), rtol=1e-5, atol=1e-7)
    assert found.counts.gradient == 2 * len(x)  # the ranking of rivals, and one step


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_trust_region_steps_are_no_longer_than_the_radius(norm: str) -> None:
    model = random_linear(classes=2)
    x, y = points(model, 40)
    attack = TrustRegion(steps=3, radius=1e-3, bisections=0)
    x_adv = attack.search(model, x, y, nearest(norm), seed=0, indices=np.arange(len(x)))
    size = nearest(norm).distance(x_adv, x)
    far = model.distances(x, y, ORDER_OF_DUAL[norm]) > 4e-3
    np.testing.assert_allclose(size[far], 3 * 1.02 * (1e-3 + 1e-4), rtol=1e-4)


def test_the_radius_follows_the_gain_inside_its_range() -> None:
    attack, radius = AdaptiveTrustRegion(), np.array([0.008, 0.008, 0.008, 0.01, 1.05e-4, 0.5])
    gain = np.array([0.95, 0.7, 0.4, 0.95, 0.1, np.nan])
    adapted = attack.adapt(radius, gain, "linf")
    np.testing.assert_allclose(adapted, [0.0096, 0.008, 0.008 / 1.2, 0.01, 1e-4, 0.5])


def test_an_adaptive_radius_saves_steps() -> None:
    model = random_linear()
    x, y = points(model, 40)
    fixed, adaptive = (
        attack.run(model, x, y, nearest("l2"))
        for attack in (TrustRegion(radius=1e-3), AdaptiveTrustRegion(radius=1e-3))
    )
    assert adaptive.counts.gradient < fixed.counts.gradient / 2
    np.testing.assert_allclose(adaptive.distance, fixed.distance, rtol=2e-3, atol=1e-6)


def slow_move(x: Array, g: Array, rise: float, norm: str) -> Array:
    """The same as `move_onto` for one example, by 200 halvings of the unknown number."""
    room = np.where(g * rise > 0, 1 - x, np.where(g * rise < 0, x, 0))
    steep = np.abs(g)

    def size(s: float) -> Array:
        if norm == "l1":  # s: the slope down to which elements go all the way
            return np.where(steep * s > 1, room, 0)
        return np.minimum(s * (np.ones_like(x) if norm == "linf" else steep), room)

    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if steep @ size(middle) >= abs(rise) else (middle, high)
    d = size(low)
    if norm == "l1":  # the rest from the element that is next
        at = np.argmax(np.where((d < room) & (g != 0), steep, 0))
        d[at] = min(room[at], d[at] + (abs(rise) - steep @ d) / steep[at])
    return np.sign(g * rise) * d


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_move_onto_a_boundary_inside_the_bounds(norm: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (200, 12))
    x[:80, :5] = np.round(x[:80, :5])
    g = rng.normal(size=x.shape)
    g[:, 3] = 0
    rise = rng.normal(size=200) * rng.choice([0, 0.1, 1, 4], 200)
    d = move_onto(x, g, rise, (0, 1), norm)
    reachable = np.where((g * rise[:, None]) > 0, 1 - x, x) * np.abs(g)
    reached = reachable.sum(axis=1) > np.abs(rise)
    assert 120 < reached.sum() < 195, "the test needs both kinds"
    np.testing.assert_allclose((g * d).sum(axis=1)[reached], rise[reached], atol=1e-12)
    np.testing.assert_allclose(
        np.abs((g * d).sum(axis=1))[~reached], reachable[~reached].sum(axis=1), atol=1e-12
    )
    assert (x + d).min() >= -1e-15
    assert (x + d).max() <= 1 + 1e-15
    slow = np.stack([slow_move(*each, norm) for each in zip(x, g, rise, strict=True)])
    np.testing.assert_allclose(d[reached], slow[reached], atol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_fab_is_exact_where_the_bounds_are_in_the_way(norm: str) -> None:
    model = random_linear(classes=2)
    x, y = points(model, 60)
    x[:, ::2] = np.round(x[:, ::2])
    y = model.logits(x).argmax(axis=1)
    slope = (model.w[:, 1] - model.w[:, 0]) * np.where(y == 0, 1, -1)[:, None]
    rise = -margin(model.logits(x), y)
    d = move_onto(x.astype(np.float64), slope, rise, (0, 1), norm)
    distance, free = NORMS[norm].distance(d), model.distances(x, y, ORDER_OF_DUAL[norm])
    reached = np.abs((slope * d).sum(axis=1) - rise) < 1e-6
    found = FAB().run(model, x, y, nearest(norm))
    assert (distance > 1.01 * free)[reached].sum() > 10, "the bounds must matter"
    assert np.array_equal(found.robust, ~reached)
    clear = reached & (distance > 1e-3)  # above float32 rounding
    np.testing.assert_allclose(found.distance[clear], distance[clear], rtol=2e-3)


def test_fab_t_works_towards_its_targets_alone() -> None:
    model = random_linear(classes=6)
    x, y = points(model, 60)
    one, all_ = (TargetedFAB(targets=targets).run(model, x, y, nearest("l2")) for targets in (1, 9))
    assert all_.counts.gradient > 4 * one.counts.gradient
    assert (all_.distance <= one.distance + 1e-7).all()
    assert (all_.distance < 0.95 * one.distance).any()


def test_restarts_find_more_and_depend_on_the_seed() -> None:
    linear = random_linear()
    model = Folded(linear.w, -0.25 * linear.w.sum(axis=0), centre=0.5)
    x = np.random.default_rng(1).uniform(0.45, 0.55, (20, 20)).astype(np.float32)
    y = model.logits(x).argmax(axis=1)
    single = FAB(steps=5).run(model, x, y, nearest("l1"))
    first, same, other = (
        FAB(steps=5, restarts=4).run(model, x, y, nearest("l1"), seed=seed) for seed in (0, 0, 1)
    )
    assert (first.robust <= single.robust).all()
    assert first.robust.sum() < single.robust.sum() - 10
    assert np.array_equal(first.x_adv, same.x_adv)
    assert not np.array_equal(first.x_adv, other.x_adv)


def test_a_restart_without_a_find_starts_anywhere_inside_the_bounds() -> None:
    model = Linear(np.eye(2, dtype=np.float32), np.array([3, 0], np.float32))  # x cannot win
    x = np.full((4, 2), 0.5, np.float32)
    found = FAB(steps=3, restarts=3).run(model, x, np.zeros(4, int), nearest("linf"))
    assert found.robust.all()


class DeadAround(Linear):
    """Has a gradient only where the first element is off 0.5: like units that a jump silences."""

    def pull_back(self, x: Array, seed: Array) -> Array:
        return super().pull_back(x, seed) * (np.abs(x[:, :1] - 0.5) > 0.05)


def test_a_restart_leaves_a_start_without_a_gradient() -> None:
    plain = random_linear()
    model = DeadAround(plain.w, plain.b)
    x, _ = points(model, 20)
    x[:, 0] = 0.5
    y = model.logits(x).argmax(axis=1)
    single, restarted = (
        FAB(steps=30, restarts=restarts).run(model, x, y, nearest("linf")) for restarts in (1, 4)
    )
    assert single.robust.all()
    assert single.counts.gradient == 4 * len(x)  # the ranking, and one look
    assert not restarted.robust.any()


class Half(Linear):
    """In and out in float16, whose points are 5e-4 apart at 0.5."""

    dtype = np.dtype(np.float16)

    def logits(self, x: Array) -> Array:
        return super().logits(x.astype(np.float32)).astype(np.float16)


@each
def test_steps_finer_than_float16_are_not_lost(attack: Attack, norm: str) -> None:
    plain = random_linear()
    model = Half(plain.w, plain.b)
    x, y = points(model, 60)
    x = x.astype(np.float16)
    y = model.logits(x).argmax(axis=1)
    found = attack.run(model, x, y, nearest(norm))
    assert found.x_adv.dtype == np.float16
    assert not found.robust.any()


@each
def test_the_bounds_are_kept(attack: Attack, norm: str) -> None:
    model = random_linear(classes=3)
    x = np.random.default_rng(2).uniform(-1, 2, (30, 20)).astype(np.float32)
    x[:, :5] = np.where(x[:, :5] > 0.5, 2, -1)
    y, threat = model.logits(x).argmax(axis=1), nearest(norm, (-1, 2))
    x_adv = attack.search(model, x, y, threat, seed=0, indices=np.arange(len(x)))
    assert x_adv.dtype == np.float32
    assert x_adv.min() >= -1
    assert x_adv.max() <= 2
    assert threat.contains(x_adv, x).all()
    assert misclassified(model.logits(x_adv), y).any()


@each
def test_what_lies_inside_a_ball_counts(attack: Attack, norm: str) -> None:
    model = random_linear(classes=3)
    x, y = points(model, 40)
    # C&W oscillates around what it minimises; EAD is a heuristic
    slack = 1.35 if norm == "l1" or isinstance(attack, CarliniWagner) else 1.002
    distance = model.distances(x, y, ORDER_OF_DUAL[norm])
    threat = ThreatModel(norm=norm, epsilon=float(np.median(distance)))
    found = attack.run(model, x, y, threat)
    assert found.robust[distance > threat.epsilon].all()
    assert not found.robust[distance * slack < threat.epsilon].any()
    assert (found.distance <= threat.epsilon + 1e-15).all()
    free = attack.run(model, x, y, replace(threat, epsilon=np.inf))
    assert found.counts.gradient <= free.counts.gradient


@each
def test_the_result_does_not_depend_on_the_batching(attack: Attack, norm: str) -> None:
    model = random_linear(classes=3)
    x, y = points(model, 30)
    together, apart = (
        attack.run(model, x, y, nearest(norm), seed=1, batch_size=size) for size in (30, 7)
    )
    assert np.array_equal(together.robust, apart.robust)
    # matrix products round differently for another batch
    np.testing.assert_allclose(together.distance, apart.distance, rtol=2e-3, atol=1e-6)


@each
def test_no_gradient_is_no_success(attack: Attack, norm: str) -> None:
    model = Linear(np.zeros((20, 3), np.float32), np.array([1, 0, 0], np.float32))
    x = np.full((5, 20), 0.5, np.float32)
    x_adv = attack.search(model, x, np.zeros(5, int), nearest(norm), seed=0, indices=np.arange(5))
    assert np.array_equal(x_adv, x)
    assert attack.run(model, x, np.zeros(5, int), nearest(norm)).robust.all()


@each
def test_a_rival_with_the_same_gradient_is_passed_over(attack: Attack, norm: str) -> None:
    plain = random_linear(classes=3)
    model = Linear(plain.w[:, [0, 1, 2, 0, 1, 2]], np.tile(plain.b, 2) - np.repeat([0, 1e-3], 3))
    x, y = points(model, 20)  # the twin of the label is the best rival, and has no boundary
    found, expected = (attack.run(each_model, x, y, nearest(norm)) for each_model in (model, plain))
    assert np.isfinite(found.x_adv).all()
    if not isinstance(attack, CarliniWagner | EAD):  # their hinge sees the best rival alone
        np.testing.assert_allclose(found.distance, expected.distance, rtol=3e-3)


@each
def test_one_class_has_no_rival(attack: Attack, norm: str) -> None:
    model = Linear(np.ones((20, 1), np.float32), np.zeros(1, np.float32))

    class Single(Linear):
        def differentiate(self, x: Array, y: Array, **options: Any) -> Any:
            return jr.target.Derivative(self.logits(x), np.zeros(len(x)), np.zeros_like(x))

    model = Single(model.w, model.b)
    x = np.full((2, 20), 0.5, np.float32)
    with pytest.raises(ParameterError, match="needs a rival class"):
        attack.run(model, x, np.zeros(2, int), nearest(norm))


@pytest.mark.parametrize(
    ("attack", "norm"),
    [(DeepFool(), "l1"), (TrustRegion(), "l1"), (CarliniWagner(), "linf"), (EAD(), "l2")],
)
def test_a_norm_that_the_attack_does_not_minimise(attack: Attack, norm: str) -> None:
    model = random_linear()
    x, y = points(model, 2)
    with pytest.raises(ParameterError, match=f"not {norm}"):
        attack.run(model, x, y, nearest(norm))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {"steps": 0}) for kind in (DeepFool, TrustRegion, CarliniWagner, EAD, FAB)),
        *((kind, {"bisections": -1}) for kind in (DeepFool, TrustRegion, FAB)),
        *((kind, {"overshoot": 0.9}) for kind in (DeepFool, TrustRegion)),
        (DeepFool, {"rivals": 0}),
        (TrustRegion, {"radius": 0.0}),
        (AdaptiveTrustRegion, {"factor": 0.5}),
        (AdaptiveTrustRegion, {"grow": 0.1}),
        (FAB, {"alpha_max": 1.5}),
        (FAB, {"beta": 0.0}),
        (FAB, {"eta": float("nan")}),
        (TargetedFAB, {"targets": 0}),
        (CarliniWagner, {"confidence": -1.0}),
        (CarliniWagner, {"learning_rate": 0.0}),
        (EAD, {"initial_const": float("inf")}),
        (EAD, {"beta": 0.0}),
        (EAD, {"decision": "l2"}),
    ],
)
def test_options_that_make_no_sense(kind: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=next(iter(options))):
        kind(**options)


def test_a_model_that_ends_in_softmax_hides_no_rival(text_model: Any) -> None:
    rng = np.random.default_rng(0)
    w = 400 * rng.normal(size=(4, 12))  # far rivals' probabilities are 0 in float32
    numbers = ", ".join(f"{value:.6f}" for value in w.ravel())
    shape = f"(float[n, 4] x) => (float[n, 12] y) <float[4, 12] w = {{{numbers}}}>"
    x = rng.uniform(0.3, 0.7, (20, 4)).astype(np.float32)
    targets = [
        jr.Target(text_model(f"one {shape} {{ {body} }}"), device="cpu")
        for body in ("y = MatMul (x, w)", "z = MatMul (x, w) y = Softmax <axis = 1> (z)")
    ]
    y = targets[0].logits(x).argmax(axis=1)
    assert ((targets[1].logits(x) > 0).sum(axis=1) < 5).any()
    for attack in (DeepFool(rivals=3), TrustRegion(rivals=3), TargetedFAB(targets=3, steps=20)):
        plain, soft = (attack.run(target, x, y, nearest("linf")) for target in targets)
        np.testing.assert_allclose(soft.distance, plain.distance, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("jump", [0.0, 1.0])
def test_on_the_sample_model(lenet: jr.Model, mnist: jr.Dataset, jump: float) -> None:
    target = jr.Target(jr.retrofit(lenet, jump=jump).model, device="cpu")
    x, y = mnist.x[:8], mnist.y[:8]
    for attack in (DeepFool(), AdaptiveTrustRegion(steps=200), TargetedFAB(steps=5, targets=2)):
        found = attack.run(target, x, y, nearest("linf"))
        broken = found.correct & ~found.robust
        assert broken.sum() >= 7
        assert (found.distance[broken] > 0).all()
        assert (found.distance[broken] < 0.5).all()


def test_a_win_by_rounding_is_none() -> None:
    z = np.array([[1, 1 + 1e-6], [1, 1 + 1e-5], [0, np.nan], [1, 0.5]], np.float32)
    y = np.array([0, 0, 0, 0])
    assert misclassified(z, y).tolist() == [False, True, False, False]
    assert misclassified(z.astype(np.float64), y).tolist() == [True, True, False, False]


def test_rivals_are_ranked_without_the_label() -> None:
    z = np.array([[3, 1, 2, 0], [0, 5, 5, 1]], np.float32)
    assert ranked_rivals(z, np.array([0, 2])).tolist() == [[2, 1, 3], [1, 3, 0]]
    assert ranked_rivals(z, np.array([1, 1]), 2).tolist() == [[0, 2], [2, 3]]
