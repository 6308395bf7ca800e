"""Properties of the norms and the threat model, against definitions rather than formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jr_onnx.attacks.l1_box import project_l1_box
from jr_onnx.attacks.threat import NORMS, ThreatModel

Array = np.ndarray[Any, Any]
EPSILONS = {"linf": 0.05, "l2": 0.7, "l1": 3.0}
DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}
norms = pytest.mark.parametrize("norm", NORMS)


def _length(norm: str, delta: Array) -> Array:
    order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
    length: Array = np.linalg.norm(delta.reshape(len(delta), -1), ord=order, axis=1)
    return length


def _points(
    dtype: Any, count: int = 400, shape: tuple[int, ...] = (3, 5, 4)
) -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (count, *shape))
    x[:, 0, 0] = x[:, 0, 0].round()
    scale = 10.0 ** rng.uniform(-4, 2, (count, *[1] * len(shape)))
    return x.astype(dtype), x + scale * rng.normal(size=x.shape)


@norms
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_projection_is_inside_and_stays(norm: str, dtype: Any) -> None:
    x, wild = _points(dtype)
    threat = ThreatModel(norm=norm, epsilon=EPSILONS[norm])
    point = threat.project(wild, x)
    exact = point.astype(np.float64)
    assert point.dtype == dtype
    assert exact.min() >= 0
    assert exact.max() <= 1
    # The subtraction here may round up by one place of 1.
    assert (_length(norm, exact - x.astype(np.float64)) <= threat.epsilon + 2.3e-16).all()
    assert threat.contains(point, x).all()
    # What is inside is left alone, but for the last place of a length that is exactly epsilon.
    again = threat.project(point, x)
    np.testing.assert_allclose(again, point, rtol=0, atol=float(np.finfo(dtype).eps))
    near = x + (0.2 * (wild - x)).clip(-1e-3, 1e-3)
    inside = threat.project(np.clip(near, 0, 1).astype(dtype), x)
    np.testing.assert_allclose(inside, np.clip(near, 0, 1).astype(dtype), atol=1e-12)


@norms
def test_a_projection_on_the_ball_is_the_nearest_point(norm: str) -> None:
    """p is nearest to q if and only if <q - p, r - p> <= 0 for every r in the ball."""
    rng, epsilon = np.random.default_rng(1), EPSILONS[norm]
    far = rng.normal(size=(200, 12)) * 10.0 ** rng.uniform(-2, 2, (200, 1))
    near = NORMS[norm].project(far, epsilon)
    assert (_length(norm, near) <= epsilon).all()
    others = np.stack([NORMS[norm].sample((12,), epsilon, rng) for _ in range(2000)])
    # The corners of the cube and of the cross are where it is tight.
    corners = {"linf": np.sign(others) * epsilon, "l1": np.eye(12)[np.arange(2000) % 12] * epsilon}
    others = np.concatenate([others, corners.get(norm, others), -corners.get(norm, others)])
    products = (far - near) @ others.T - ((far - near) * near).sum(axis=1, keepdims=True)
    assert (products <= 1e-9 * (1 + _length("l2", far))[:, None]).all()


@pytest.mark.parametrize("epsilon", [0.01, 0.5, 3.0, 1e6])
def test_the_l1_ball_in_the_box_is_projected_on_exactly(epsilon: float) -> None:
    rng = np.random.default_rng(2)
    x = rng.uniform(0, 1, (100, 15))
    x[:, :4] = x[:, :4].round()
    delta = rng.normal(size=x.shape) * 10.0 ** rng.uniform(-2, 1, (100, 1))
    delta[:, 7] = 0
    found = project_l1_box(delta, x, epsilon, (0.0, 1.0))
    # Bisection on the amount by which all elements shrink: slow, but plain.
    low, high = np.zeros((100, 1)), np.abs(delta).max(axis=1, keepdims=True)
    room = np.where(delta > 0, 1 - x, x)

    def shrunk(amount: Array) -> Array:
        size: Array = np.clip(np.abs(delta) - amount, 0, room)
        return size

    for _ in range(200):
        middle = (low + high) / 2
        outside = shrunk(middle).sum(axis=1, keepdims=True) > epsilon
        low, high = np.where(outside, middle, low), np.where(outside, high, middle)
    np.testing.assert_allclose(found, np.sign(delta) * shrunk(high), atol=1e-9 * (1 + epsilon % 10))
    assert (np.abs(found).sum(axis=1) <= epsilon).all()
    assert (x + found >= 0).all()
    assert (x + found <= 1).all()


@norms
def test_samples_fill_the_ball_evenly(norm: str) -> None:
    """The share of the ball's volume inside radius r is r^n, so radius^n is uniform."""
    rng, n, count = np.random.default_rng(3), 6, 4000
    drawn = np.stack([NORMS[norm].sample((2, 3), EPSILONS[norm], rng) for _ in range(count)])
    radius = _length(norm, drawn) / EPSILONS[norm]
    assert (radius <= 1).all()
    expected = np.arange(count) / count
    # Kolmogorov-Smirnov at 0.1%: 1.95 / sqrt(count)
    assert np.abs(np.sort(radius**n) - expected).max() < 1.95 / count**0.5
    flat = drawn.reshape(count, n)
    assert np.abs(flat.mean(axis=0) / flat.std(axis=0)).max() < 4.5 / count**0.5
    np.testing.assert_allclose(flat.std(axis=0), flat.std(), rtol=0.08)
    halves = (flat > 0).mean(axis=0)
    np.testing.assert_allclose(halves, 0.5, atol=0.04)


def test_a_start_in_l2_has_a_radius_of_even_density() -> None:
    """A point of the ball would be at its surface: half of them beyond 0.993 in 100 dimensions."""
    rng, count = np.random.default_rng(3), 4000
    drawn = np.stack([NORMS["l2"].start((4, 25), 0.7, rng) for _ in range(count)])
    radius = _length("l2", drawn) / 0.7
    assert np.abs(np.sort(radius) - np.arange(count) / count).max() < 1.95 / count**0.5
    unit = drawn.reshape(count, 100) / _length("l2", drawn)[:, None]
    assert np.abs(unit.mean(axis=0)).max() < 4.5 * 0.1 / count**0.5


@norms
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_direction_has_norm_one_and_goes_uphill(norm: str, scale: float) -> None:
    gradient = (np.random.default_rng(4).normal(size=(300, 2, 150)) * scale).astype(np.float32)
    gradient[:3] = 0
    step = NORMS[norm].direction(gradient).astype(np.float64)
    exact = gradient.astype(np.float64)
    assert (_length(norm, step) <= 1 + 1e-5).all()
    assert not step[:3].any()
    rise = (step * exact).sum(axis=(1, 2))
    steepest = _length(DUAL[norm], exact)
    assert (rise[3:] > 0).all()
    if norm == "l1":  # spread over the largest 1%, here 3 elements, on purpose
        assert (rise >= steepest / 3).all()
    else:
        np.testing.assert_allclose(rise, steepest, rtol=1e-4)


@norms
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_million_points_are_inside(norm: str, dtype: Any) -> None:
    rng = np.random.default_rng(5)
    x = rng.uniform(0, 1, (350_000, 3)).astype(dtype)
    threat = ThreatModel(norm=norm, epsilon=8 / 255)
    point = threat.project(x + rng.normal(scale=0.03, size=x.shape), x)
    exact = point.astype(np.float64)
    assert exact.min() >= 0
    assert exact.max() <= 1
    assert _length(norm, exact - x.astype(np.float64)).max() <= 8 / 255 + 1e-15
    assert threat.contains(point, x).all()


@norms
def test_a_random_start_is_inside_and_the_example_s_own(norm: str) -> None:
    x, _ = _points(np.float32, 50)
    threat = ThreatModel(norm=norm, epsilon=EPSILONS[norm])
    start = threat.random_start(x, 7, np.arange(50))
    assert threat.contains(start, x).all()
    part = threat.random_start(x[20:30], 7, np.arange(20, 30))
    assert part.tobytes() == start[20:30].tobytes()
    assert threat.random_start(x, 8, np.arange(50)).tobytes() != start.tobytes()


@norms
def test_without_a_ball_only_the_bounds_count(norm: str) -> None:
    x, wild = _points(np.float32)
    threat = ThreatModel(norm=norm, epsilon=np.inf)
    point = threat.project(wild, x)
    np.testing.assert_allclose(point, np.clip(wild, 0, 1), atol=1.2e-7)
    assert threat.contains(point, x).all()


@norms
def test_the_distance_is_the_norm(norm: str) -> None:
    x, wild = _points(np.float64)
    threat = ThreatModel(norm=norm, epsilon=EPSILONS[norm])
    np.testing.assert_allclose(threat.distance(wild, x), _length(norm, wild - x), rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_data_at_a_bound_that_its_dtype_rounds_is_inside(dtype: Any) -> None:
    """MNIST normalised: the background is -0.1307 / 0.3081, rounded to the dtype."""
    bounds = (-0.1307 / 0.3081, (1 - 0.1307) / 0.3081)
    threat = ThreatModel(epsilon=0.1, bounds=bounds)
    x = np.array([bounds, bounds[::-1]]).astype(dtype)
    assert threat.contains(x, x).all()
    assert threat.contains(threat.project(x + 0.05, x), x).all()
    assert threat.contains(threat.project(x - 0.05, x), x).all()


@pytest.mark.parametrize("norm", NORMS)
def test_an_empty_batch_is_no_error(norm: str) -> None:
    assert NORMS[norm].project(np.zeros((0, 4)), 1.0).shape == (0, 4)
