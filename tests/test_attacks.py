"""Attacks on models whose answers are known in closed form; the runner's own checks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from classifiers import Linear, points, random_linear

import jr_onnx as jr
from jr_onnx.attacks import PGD, Attack, Classifier, ThreatModel, parse_epsilon
from jr_onnx.errors import DataError, ModelError, ParameterError

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def linear() -> tuple[Linear, Array, Array, Array]:
    """A linear model, points, labels, and each point's exact linf distance to the boundary."""
    model = random_linear(classes=2)
    x, y = points(model, 500)
    return model, x, y, model.distances(x, y, dual=1)


@pytest.mark.parametrize("random_start", [True, False])
def test_pgd_breaks_exactly_what_can_be_broken(linear: Any, random_start: bool) -> None:
    model, x, y, distance = linear
    threat = ThreatModel(epsilon=0.05)
    found = PGD(steps=40, random_start=random_start).run(model, x, y, threat, seed=1)
    clear = np.abs(distance - 0.05) > 1e-6  # not within float32 rounding of the boundary
    assert 50 < (distance < 0.05).sum() < 490, "the test needs both kinds"
    assert np.array_equal(found.robust[clear], (distance > 0.05)[clear])


def test_pgd_ends_at_the_vertex_of_the_cube(linear: Any) -> None:
    model, x, y, distance = linear
    threat = ThreatModel(epsilon=0.05)
    x_adv = PGD(steps=40).search(model, x, y, threat, seed=0, indices=np.arange(len(x)))
    kept = distance > 0.06
    sign = np.where(y == 0, -1, 1)[:, None] * np.sign(model.w[:, 0] - model.w[:, 1])
    np.testing.assert_allclose(x_adv[kept], (x + 0.05 * sign)[kept], atol=1e-7)


def test_the_result_does_not_depend_on_the_batching(linear: Any) -> None:
    model, x, y, _ = linear
    threat = ThreatModel(epsilon=0.04)
    one = PGD(steps=5).run(model, x, y, threat, seed=3, batch_size=500)
    other = PGD(steps=5).run(model, x, y, threat, seed=3, batch_size=7)
    assert np.array_equal(one.robust, other.robust)


def test_seeds_make_runs_reproducible(lenet: jr.Model, mnist: jr.Dataset) -> None:
    target, threat = jr.Target(lenet, device="cpu"), ThreatModel(epsilon=0.1)
    x, y = mnist.x[:50], mnist.y[:50]
    runs = [PGD(steps=5).run(target, x, y, threat, seed=seed).x_adv for seed in (1, 1, 2)]
    assert runs[0].tobytes() == runs[1].tobytes() != runs[2].tobytes()


def test_no_point_leaves_ball_or_bounds() -> None:
    rng = np.random.default_rng(5)
    x = rng.uniform(0, 1, (2000, 500)).astype(np.float32)
    x[:, :50] = np.round(x[:, :50])
    threat = ThreatModel(epsilon=8 / 255)
    wild = x + rng.normal(scale=0.1, size=x.shape)
    points = [threat.project(wild, x), threat.random_start(x[:50], 0, np.arange(50))]
    for point, centre in zip(points, (x, x[:50]), strict=True):
        exact = point.astype(np.float64)
        assert exact.min() >= 0
        assert exact.max() <= 1
        assert np.abs(exact - centre.astype(np.float64)).max() <= 8 / 255 + 1e-16
        assert threat.contains(point, centre).all()
    # the projection is tight, too: at most one step of float32 inside
    moved = np.clip(x + np.clip(wild - x, -8 / 255, 8 / 255), 0, 1)
    np.testing.assert_allclose(points[0], moved, atol=1.2e-7)


class Liar(Attack):
    """Returns what no attack may: points outside, NaN, or a point that breaks nothing."""

    name = "liar"

    def __init__(self, candidate: float) -> None:
        self.candidate = candidate

    def search(
        self,
        target: Classifier,
        x: Array,
        y: Array,
        threat: ThreatModel,
        *,
        seed: int,
        indices: Array,
    ) -> Array:
        return np.full_like(x, self.candidate)


@pytest.mark.parametrize("candidate", [-50.0, 50.0, np.nan, np.inf])
def test_the_runner_trusts_no_claim(linear: Any, candidate: float) -> None:
    model, x, y, distance = linear
    threat = ThreatModel(epsilon=0.01)
    found = Liar(candidate).run(model, x, y, threat)
    assert threat.contains(found.x_adv, x).all()
    assert found.robust[distance > 0.0101].all()
    assert np.array_equal(found.robust, model.logits(found.x_adv).argmax(axis=1) == y)


def test_wrong_examples_are_left_alone(linear: Any) -> None:
    model, x, y, _ = linear
    wrong = y.copy()
    wrong[:100] = 1 - wrong[:100]
    found = PGD(steps=3).run(model, x, wrong, ThreatModel(epsilon=0.05))
    assert not found.correct[:100].any()
    assert not found.robust[:100].any()
    assert np.array_equal(found.x_adv[:100], x[:100])
    assert found.counts.gradient <= 3 * 400


def test_distances_and_counts_are_of_what_was_returned(linear: Any) -> None:
    model, x, y, _ = linear
    found = PGD(steps=3).run(model, x, y, ThreatModel(epsilon=0.05))
    exact = np.abs(found.x_adv.astype(np.float64) - x).max(axis=1)
    assert np.array_equal(found.distance, exact)
    assert (found.distance[found.robust] == 0).all()
    assert found.counts.forward == 2 * len(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0.0}, "epsilon must be a number > 0, or inf, got 0.0"),
        ({"epsilon": float("nan")}, "epsilon must be a number > 0"),
        ({"epsilon": 8.0}, r"epsilon 8 is wider than the bounds \[0, 1\]"),
        ({"epsilon": 0.1, "norm": "l7"}, "norm must be one of linf, l2, l1, got 'l7'"),
        ({"epsilon": 0.1, "bounds": (1.0, 0.0)}, "bounds must be finite and ascending"),
    ],
)
def test_a_threat_model_that_makes_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        ThreatModel(**options)


@pytest.mark.parametrize(("text", "value"), [("0.1", 0.1), ("8/255", 8 / 255), ("1e-3", 1e-3)])
def test_epsilon_is_a_number_or_a_fraction(text: str, value: float) -> None:
    assert parse_epsilon(text) == value


@pytest.mark.parametrize("text", ["", "a", "1/0", "1/2/3", "8:255"])
def test_an_epsilon_that_is_no_number(text: str) -> None:
    with pytest.raises(ParameterError, match="a number or a fraction"):
        parse_epsilon(text)


@pytest.mark.parametrize("options", [{"steps": 0}, {"step_size": 0.0}, {"step_size": -1.0}])
def test_pgd_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=next(iter(options))):
        PGD(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": 255}, r"x ranges over .* outside the bounds \[0, 1\]"),
        ({"x": np.nan}, "outside the bounds"),
        ({"y": -1}, "one integer label >= 0 for each"),
        ({"y": 0.5}, "one integer label >= 0 for each"),
    ],
)
def test_examples_that_do_not_fit_are_refused(linear: Any, change: Any, message: str) -> None:
    model, x, y, _ = linear
    x, y = x * change.get("x", 1), y * change.get("y", 1) + (change.get("y", 1) < 0) * -1
    with pytest.raises(DataError, match=message):
        PGD(steps=1).run(model, x, y, ThreatModel(epsilon=0.05))


def test_no_examples_are_refused(linear: Any) -> None:
    model, x, y, _ = linear
    with pytest.raises(DataError, match=r"got x of shape \(0, 20\)"):
        PGD(steps=1).run(model, x[:0], y[:0], ThreatModel(epsilon=0.05))


def test_logits_that_are_not_finite_mean_nothing(linear: Any) -> None:
    _, x, y, _ = linear
    with pytest.raises(ModelError, match="logits are not finite"):
        PGD(steps=1).run(
            Linear(np.full((20, 2), np.nan), np.zeros(2)), x, y, ThreatModel(epsilon=0.05)
        )


def test_a_float16_model_is_attacked_inside_the_ball_that_it_sees(linear: Any) -> None:
    model, x, y, _ = linear
    model = Linear(model.w, model.b)
    model.dtype = np.dtype(np.float16)
    threat = ThreatModel(epsilon=0.05)
    found = PGD(steps=5).run(model, x, y, threat)
    assert found.x_adv.dtype == np.float16
    assert threat.contains(found.x_adv, x.astype(np.float16)).all()
