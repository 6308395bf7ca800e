"""Attacks that see outputs only: closed forms, budgets, layouts, and probabilities for logits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from classifiers import Folded, Linear, NumpyClassifier, points, random_linear

import jr_onnx as jr
from jr_onnx.attacks.attack import Attack
from jr_onnx.attacks.batch import Grid, generators, reseeded, scores
from jr_onnx.attacks.corruptions import CORRUPTIONS, Corruptions, resample
from jr_onnx.attacks.hopskipjump import HopSkipJump
from jr_onnx.attacks.noise import GaussianNoise, SaltAndPepperNoise, UniformNoise
from jr_onnx.attacks.simba import SimBA, cosines
from jr_onnx.attacks.square import Square
from jr_onnx.attacks.threat import ThreatModel
from jr_onnx.errors import ParameterError

Array = np.ndarray[Any, Any]
DUAL = {"linf": 1, "l2": 2, "l1": np.inf}
SHAPE = (6, 6)
ALL: list[tuple[Attack, str, float]] = [
    (Square(queries=300), "linf", 0.012),
    (Square(queries=300), "l2", 0.06),
    (Square(queries=300, polish=0.5), "linf", 0.012),
    (Square(queries=300, polish=0.5), "l2", 0.06),
    (SimBA(queries=300, step_size=0.02), "linf", 0.012),
    (SimBA(queries=300, step_size=0.02), "l2", 0.06),
    (SimBA(queries=300, step_size=0.02, basis="dct"), "l2", 0.06),
    (SimBA(queries=300, step_size=0.1), "l1", 0.15),
    (HopSkipJump(steps=3), "linf", 0.012),
    (HopSkipJump(steps=3), "l2", 0.06),
    (UniformNoise(draws=50), "linf", 0.012),
    (UniformNoise(draws=50), "l2", 0.06),
    (UniformNoise(draws=50), "l1", 0.15),
    (GaussianNoise(draws=50), "linf", 0.012),
    (GaussianNoise(draws=50), "l2", 0.06),
    (GaussianNoise(draws=50, std=0.1), "l1", 0.15),
    (SaltAndPepperNoise(draws=50), "l2", 0.06),
]
attacks = pytest.mark.parametrize(
    ("attack", "norm", "epsilon"), ALL, ids=[f"{attack.name}-{norm}" for attack, norm, _ in ALL]
)


class Blind(NumpyClassifier):
    """Another classifier's outputs, without its gradients; after a softmax if asked."""

    def __init__(self, inner: NumpyClassifier, *, softmax: bool = False) -> None:
        self.inner, self.softmax = inner, softmax
        self.asked = 0

    def logits(self, x: Array) -> Array:
        self.asked += len(x)
        z = self.inner.logits(x)
        if self.softmax:
            z = np.exp(z - z.max(axis=1, keepdims=True))
            z = z / z.sum(axis=1, keepdims=True)
        return z

    def pull_back(self, x: Array, seed: Array) -> Array:
        raise AssertionError("a black-box attack asked for a gradient")


@pytest.fixture(scope="module")
def linear() -> tuple[Linear, Array, Array]:
    model = random_linear(classes=5, shape=SHAPE)
    x, y = points(model, 120, SHAPE)
    return model, x, y


@pytest.mark.parametrize("shape", [(8, 8), (5, 11), (40,), (3, 6, 6), (6, 6, 3)])
def test_square_breaks_within_5_percent_of_the_distance(shape: tuple[int, ...]) -> None:
    model = random_linear(classes=5, shape=shape)
    x, y = points(model, 60, shape)
    distance = model.distances(x, y, dual=1)
    epsilon = float(np.median(distance))
    found = Square(queries=5000).run(Blind(model), x, y, ThreatModel(epsilon=epsilon))
    assert not found.robust[distance < epsilon / 1.05].any()
    assert found.robust[distance > epsilon * (1 + 1e-5)].all()


@pytest.mark.parametrize(
    ("shape", "polish", "short"),
    [
        ((8, 8), 0.0, 1.4),
        ((40,), 0.0, 1.4),
        ((8, 8), 0.5, 1.05),
        ((40,), 0.5, 1.05),
        ((3, 4, 4), 0.5, 1.05),
    ],
)
def test_square_in_l2_nears_the_distance(
    shape: tuple[int, ...], polish: float, short: float
) -> None:
    # Its smallest window has 3 pixels a side, and a random linear model no such structure.
    model = random_linear(classes=5, shape=shape)
    x, y = points(model, 40, shape)
    distance = model.distances(x, y, dual=2)
    epsilon = float(np.median(distance)) * 1.2
    threat = ThreatModel(norm="l2", epsilon=epsilon)
    found = Square(queries=5000, polish=polish).run(Blind(model), x, y, threat)
    assert not found.robust[distance < epsilon / short].any()
    assert found.robust[distance > epsilon].all()
    if polish:
        assert (np.abs(distance / epsilon - 0.93) < 0.06).any(), "the test needs close calls"


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("folded", [False, True])
def test_hopskipjump_is_within_5_percent_of_the_distance(norm: str, folded: bool) -> None:
    model = random_linear(classes=2)
    if folded:  # the boundary is bent, but not where it is nearest to the points
        model = Folded(model.w, -0.4 * model.w.sum(axis=0), 0.1)
    x, y = points(model, 12)
    distance = model.distances(x, y, DUAL[norm])
    found = HopSkipJump(steps=40).run(Blind(model), x, y, ThreatModel(norm=norm, epsilon=np.inf))
    assert not found.robust.any()
    assert (found.distance >= distance * (1 - 1e-4)).all()
    assert (found.distance <= distance * 1.05).all()


def test_hopskipjump_stops_inside_the_ball(linear: Any) -> None:
    model, x, y = linear
    distance = model.distances(x, y, dual=2)
    near, far = (
        HopSkipJump(steps=20).run(model, x[:30], y[:30], ThreatModel(norm="l2", epsilon=epsilon))
        for epsilon in (0.3, np.inf)
    )
    assert not near.robust.any()
    assert near.counts.forward < far.counts.forward / 2
    assert (far.distance >= distance[:30] * (1 - 1e-4)).all()
    assert np.median(far.distance / distance[:30]) < 1.1


def _distances_to(model: Linear, x: Array, wanted: Array) -> Array:
    """Returns the l2 distance of each example to the region of a class, by its active planes."""
    found = []
    for row, t in zip(x.reshape(len(x), -1).astype(np.float64), wanted, strict=True):
        others = [j for j in range(model.w.shape[1]) if j != t]
        normals = (model.w[:, [t]] - model.w[:, others]).T.astype(np.float64)
        missing = -(normals @ row + model.b[t] - model.b[others])
        lengths = []
        for chosen in map(list, _subsets(len(others))):
            step = np.linalg.pinv(normals[chosen]) @ missing[chosen]
            if (normals @ step >= missing - 1e-9).all():
                lengths.append(float(np.linalg.norm(step)))
        found.append(min(lengths))
    return np.array(found)


def _subsets(count: int) -> Iterator[tuple[int, ...]]:
    for size in range(1, count + 1):
        yield from combinations(range(count), size)


def test_hopskipjump_is_within_5_percent_of_the_distance_to_a_target() -> None:
    model = random_linear(classes=4)
    x, y = points(model, 12)
    wanted = (y + 2) % 4
    threat = ThreatModel(norm="l2", epsilon=np.inf, bounds=(-3, 4))
    pool, classes = points(model, 200)
    starts = np.stack([pool[np.flatnonzero(classes == t)[0]] for t in wanted])
    attack = HopSkipJump(steps=60, target_classes=wanted.tolist(), starting_points=starts)
    found = attack.run(Blind(model), x, y, threat)
    assert (model.logits(found.x_adv).argmax(axis=1) == wanted).all()
    distance = _distances_to(model, x, wanted)
    assert (found.distance >= distance * (1 - 1e-4)).all()
    assert (found.distance <= distance * 1.05).all()
    nearest = HopSkipJump(steps=10).run(Blind(model), x, y, threat)
    assert (nearest.distance < found.distance).any(), "the test needs targets that are not nearest"


@pytest.mark.parametrize(
    ("make", "norm"),
    [
        (partial(Square, queries=2000), "linf"),
        (partial(Square, queries=2000, polish=0.5), "l2"),
        (partial(SimBA, queries=2000, step_size=0.05), "l2"),
        (partial(SimBA, queries=2000, step_size=0.05, basis="dct"), "linf"),
        (partial(HopSkipJump, steps=10), "l2"),
    ],
)
def test_a_target_is_reached(make: Any, norm: str) -> None:
    model = random_linear(classes=4, shape=SHAPE)
    x, y = points(model, 60, SHAPE)
    wanted = (y + 2) % 4
    bounds = (-3.0, 4.0)
    size = 3 * float(np.median(model.distances(x, y, DUAL[norm])))
    threat = ThreatModel(norm=norm, epsilon=size, bounds=bounds)
    free, aimed = (
        model.logits(attack.run(Blind(model), x, y, threat, batch_size=25).x_adv).argmax(axis=1)
        for attack in (make(), make(target_classes=wanted.tolist()))
    )
    assert (aimed == wanted).mean() > max(0.4, (free == wanted).mean() + 0.1)


@pytest.mark.parametrize("make", [Square, SimBA, HopSkipJump])
def test_targets_that_do_not_fit(make: Any, linear: Any) -> None:
    model, x, y = linear
    with pytest.raises(ParameterError, match="other than the label"):
        make(target_classes=y.tolist()).run(model, x, y, ThreatModel(norm="l2", epsilon=0.1))


def test_starting_points_that_do_not_fit(linear: Any) -> None:
    model, x, y = linear
    threat = ThreatModel(norm="l2", epsilon=0.1)
    for starts in (x[:5], x[:, :3], x[:5].tolist()):
        with pytest.raises(ParameterError, match="one for each example of the data, got shape"):
            HopSkipJump(starting_points=starts).run(model, x, y, threat)
    for starts in (255 * x, np.where(x > 0.5, np.nan, x)):
        with pytest.raises(ParameterError, match="outside the bounds"):
            HopSkipJump(starting_points=starts).run(model, x, y, threat)


def test_a_target_that_is_not_reached_leaves_the_example_as_it_is() -> None:
    # The third class never wins, and any noise is of the second.
    w = np.stack([-np.ones(64), np.ones(64), np.zeros(64)], axis=1).astype(np.float32)
    model = Linear(w, np.array([30, 0, -90], np.float32))
    x, y = np.full((3, 64), 0.1, np.float32), np.zeros(3, int)
    attack = HopSkipJump(target_classes=[2, 2, 2], steps=3)
    found = attack.run(model, x, y, ThreatModel(norm="l2", epsilon=np.inf))
    assert found.robust.all()
    assert np.array_equal(found.x_adv, x)


def test_hopskipjump_starts_where_noise_is_not_misclassified() -> None:
    # Class 0 but in a corner of the cube that uniform noise does not meet.
    w = np.stack([np.zeros(64), np.ones(64)], axis=1).astype(np.float32)
    model = Linear(w, np.array([0, -0.9 * 64], np.float32))
    x = np.full((3, 64), 0.2, np.float32)
    found = HopSkipJump(steps=10).run(
        model, x, np.zeros(3, int), ThreatModel(norm="l2", epsilon=np.inf)
    )
    assert not found.robust.any()
    np.testing.assert_allclose(found.distance, 0.7 * 8, rtol=0.05)


def test_hopskipjump_gives_up_where_there_is_no_other_class() -> None:
    model = Linear(np.zeros((8, 2), np.float32), np.array([1, 0], np.float32))
    x = np.full((3, 8), 0.5, np.float32)
    found = HopSkipJump().run(model, x, np.zeros(3, int), ThreatModel(norm="l2", epsilon=np.inf))
    assert found.robust.all()
    assert found.counts.forward <= 3 * (100 + 4 + 2)


@attacks
def test_no_gradient_is_used(attack: Attack, norm: str, epsilon: float, linear: Any) -> None:
    model, x, y = linear
    assert not attack.uses_gradients
    found = attack.run(Blind(model), x, y, ThreatModel(norm=norm, epsilon=epsilon))
    assert found.counts.gradient == 0
    assert 0 < found.robust.sum() < len(x)
    distance = model.distances(x, y, DUAL[norm])
    assert found.robust[distance > epsilon * (1 + 1e-4)].all()


@attacks
def test_nothing_leaves_ball_and_bounds(
    attack: Attack, norm: str, epsilon: float, linear: Any
) -> None:
    model, x, _ = linear
    edge = np.clip((x - 0.5) * 6 + 0.5, 0, 1)
    y = model.logits(edge).argmax(axis=1)
    for wider in (1, 20):
        threat = ThreatModel(norm=norm, epsilon=epsilon * wider)
        candidates = attack.search(model, edge, y, threat, seed=0, indices=np.arange(len(x)))
        exact = candidates.astype(np.float64)
        assert exact.min() >= 0
        assert exact.max() <= 1
        if not isinstance(attack, HopSkipJump):  # which returns what it has, however far
            assert threat.contains(candidates, edge).all()
        found = attack.run(model, edge, y, threat)
        assert threat.contains(found.x_adv, edge).all()


@attacks
def test_the_batching_changes_nothing(
    attack: Attack, norm: str, epsilon: float, linear: Any
) -> None:
    model, x, y = linear
    threat = ThreatModel(norm=norm, epsilon=epsilon)
    one, other = (attack.run(model, x, y, threat, seed=3, batch_size=n) for n in (120, 7))
    # numpy multiplies batches of other sizes in another order: a hair may tip the scales.
    assert (one.robust != other.robust).sum() <= 1
    again = attack.run(model, x, y, threat, seed=3, batch_size=120)
    assert again.x_adv.tobytes() == one.x_adv.tobytes()
    assert again.counts == one.counts


@pytest.mark.parametrize("queries", [1, 2, 50, 5000])
@pytest.mark.parametrize(
    ("make", "norm"),
    [
        (lambda n: Square(queries=n), "linf"),
        (lambda n: Square(queries=n), "l2"),
        (lambda n: Square(queries=n, polish=0.5), "l2"),
        (lambda n: SimBA(queries=n), "l2"),
        (lambda n: SimBA(queries=n, basis="dct"), "linf"),
        (lambda n: HopSkipJump(queries=n), "l2"),
        (lambda n: HopSkipJump(queries=n), "linf"),
        (lambda n: UniformNoise(draws=n), "linf"),
        (lambda n: GaussianNoise(draws=n), "l2"),
        (lambda n: SaltAndPepperNoise(draws=n), "l2"),
    ],
)
def test_budgets_are_kept(make: Any, norm: str, queries: int) -> None:
    model = random_linear(classes=2, shape=SHAPE)
    x, y = points(model, 1, SHAPE)
    threat = ThreatModel(norm=norm, epsilon=1e-5)
    for number in range(2):
        blind = Blind(model)
        make(queries).search(blind, x, y, threat, seed=number, indices=np.arange(1))
        assert blind.asked <= queries
        # A coordinate search has nothing left to try once it is in the corner.
        if queries < 100 and not isinstance(make(1), (HopSkipJump, SimBA)):
            assert blind.asked == queries


def test_a_broken_example_leaves_at_once(linear: Any) -> None:
    model, x, y = linear
    for attack in (Square(), SimBA(), UniformNoise(), SaltAndPepperNoise()):
        found = attack.run(model, x, y, ThreatModel(epsilon=0.9))
        assert not found.robust.any()
        assert found.counts.forward < 70 * len(x)


@attacks
def test_probabilities_serve_as_well_as_logits(
    attack: Attack, norm: str, epsilon: float, linear: Any
) -> None:
    model, x, y = linear
    sure = Linear(model.w * 6, model.b * 6)
    threat = ThreatModel(norm=norm, epsilon=epsilon)
    plain = attack.run(sure, x, y, threat)
    soft = attack.run(Blind(sure, softmax=True), x, y, threat)
    assert abs(int(plain.robust.sum()) - int(soft.robust.sum())) <= 6


def test_scores_are_logits_up_to_a_constant(linear: Any) -> None:
    model, x, _ = linear
    z = model.logits(x).astype(np.float64)
    assert np.array_equal(scores(model, x), z)
    found = scores(Blind(model, softmax=True), x)
    offset = found - z
    np.testing.assert_allclose(offset - offset[:, :1], 0, atol=1e-4)


def test_draws_depend_on_seed_and_index_alone() -> None:
    one, other = generators(3, np.array([5, 9])), generators(3, np.array([9]))
    assert one[1].random() == other[0].random()
    assert reseeded(3, 0) == 3
    assert len({reseeded(seed, number) for seed in range(5) for number in range(5)}) == 25


@pytest.mark.parametrize(
    ("shape", "images"),
    [
        ((), (1, 1, 1)),
        ((7,), (1, 1, 7)),
        ((4, 5), (1, 4, 5)),
        ((3, 4, 5), (3, 4, 5)),
        ((9, 5, 3), (3, 9, 5)),
        ((4, 5, 3), (4, 5, 3)),
        ((8, 4, 5), (8, 4, 5)),
        ((2, 3, 4, 5), (6, 4, 5)),
        ((2, 9, 5, 3), (6, 9, 5)),
    ],
)
def test_examples_are_laid_out_as_images(shape: tuple[int, ...], images: Any) -> None:
    x = np.arange(2 * int(np.prod(shape))).reshape(2, *shape)
    grid = Grid(shape)
    assert grid.images(x).shape == (2, *images)
    assert np.array_equal(grid.restore(grid.images(x)), x)
    if shape == (9, 5, 3):
        assert np.array_equal(grid.images(x)[0, 1], x[0, :, :, 1])


@pytest.mark.parametrize("side", [1, 2, 7, 28])
def test_cosines_are_orthonormal(side: int) -> None:
    np.testing.assert_allclose(cosines(side) @ cosines(side).T, np.eye(side), atol=1e-12)


def test_simba_reaches_the_corner_of_the_ball() -> None:
    model = random_linear(classes=2, shape=SHAPE)
    x, y = points(model, 60, SHAPE)
    distance = model.distances(x, y, dual=1)
    epsilon = float(np.median(distance))
    found = SimBA(step_size=1.0, queries=80).run(model, x, y, ThreatModel(epsilon=epsilon))
    assert not found.robust[distance < epsilon * 0.999].any()


def test_corruptions_are_ordered_and_need_no_ball(lenet: jr.Model, mnist: jr.Dataset) -> None:
    target, threat = jr.Target(lenet, device="cpu"), ThreatModel(epsilon=np.inf)
    x, y = mnist.x[:200], mnist.y[:200]
    weak, strong = (
        Corruptions(kinds=kinds).run(target, x, y, threat)
        for kinds in (("blur",), ("blur", "rotation", "shift"))
    )
    assert (strong.robust <= weak.robust).all()
    assert 0.02 < strong.robust.mean() < weak.robust.mean() <= 1
    # a corrupted image is found again at the severity that broke it, the mildest
    fewer = Corruptions(kinds=("blur", "rotation", "shift"), severities=1)
    assert (fewer.run(target, x, y, threat).robust >= strong.robust).all()


def test_corruptions_do_what_they_say() -> None:
    images = np.random.default_rng(0).uniform(0.4, 0.6, (2, 3, 12, 16))
    made = {kind: list(each(images, 1.0, (0.0, 1.0))) for kind, each in CORRUPTIONS.items()}
    np.testing.assert_allclose(made["brightness"][0], images + 0.5)
    np.testing.assert_allclose(made["contrast"][0].mean(), images.mean(), rtol=1e-2)
    assert made["contrast"][0].std() < 0.25 * images.std()
    assert made["blur"][0].std() < 0.7 * images.std()
    constant = np.full((1, 1, 9, 9), 0.3)
    for each in CORRUPTIONS.values():
        for corrupted in each(constant, 0.5, (0.0, 1.0)):
            assert corrupted.shape == constant.shape
            assert np.ptp(corrupted) < 1e-12
    row, column = np.indices((12, 16)).astype(float)
    np.testing.assert_allclose(resample(images, row, column), images)
    moved = resample(images, row + 1, column)
    np.testing.assert_allclose(moved[:, :, :-1], images[:, :, 1:])
    turned = resample(images[..., :12], column[:, :12], 11 - row[:, :12])
    np.testing.assert_allclose(
        turned, np.rot90(images[..., :12], k=-1, axes=(2, 3))[..., ::-1, ::-1]
    )


@pytest.mark.parametrize(
    ("attack", "threat", "message"),
    [
        (Square(), ThreatModel(norm="l1", epsilon=1), "square knows the norms linf, l2"),
        (Square(), ThreatModel(epsilon=np.inf), "square needs a finite epsilon"),
        (HopSkipJump(), ThreatModel(norm="l1", epsilon=1), "hopskipjump knows the norms l2, linf"),
        (GaussianNoise(), ThreatModel(epsilon=np.inf), "without std needs a finite epsilon"),
        (Corruptions(), ThreatModel(epsilon=0.1), "bounded by their severity, not by a norm"),
        (
            Corruptions(),
            ThreatModel(epsilon=np.inf),
            r"blur, rotation, shift need images, got examples of shape \(20,\)",
        ),
    ],
)
def test_threat_models_that_do_not_fit(attack: Attack, threat: ThreatModel, message: str) -> None:
    model = random_linear()
    x, y = points(model, 5)
    with pytest.raises(ParameterError, match=message):
        attack.run(model, x, y, threat)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Square, {"queries": 0}, "queries must be at least 1"),
        (Square, {"area": 0.0}, r"area must be in \(0, 1\]"),
        (Square, {"polish": 1.5}, r"polish must be in \[0, 1\]"),
        (SimBA, {"basis": "wavelet"}, "basis must be one of pixel, dct, got 'wavelet'"),
        (SimBA, {"step_size": 0.0}, "step_size must be > 0"),
        (SimBA, {"frequencies": 0}, "frequencies must be at least 1"),
        (HopSkipJump, {"steps": 0}, "steps must be at least 1"),
        (HopSkipJump, {"queries": 0}, "queries must be at least 1"),
        (HopSkipJump, {"gamma": 0.0}, "gamma must be > 0"),
        (UniformNoise, {"draws": 0}, "draws must be at least 1"),
        (GaussianNoise, {"std": 0.0}, "std must be > 0"),
        (SaltAndPepperNoise, {"share": 2.0}, r"share must be in \(0, 1\]"),
        (Corruptions, {"kinds": ("fog",)}, "kinds must be some of brightness"),
        (Corruptions, {"kinds": ()}, "kinds must be some of brightness"),
        (Corruptions, {"severities": 0}, "severities must be at least 1"),
    ],
)
def test_options_that_make_no_sense(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        make(**options)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_hopskipjump_is_as_near_as_foolbox_s(norm: str) -> None:
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        foolbox = pytest.importorskip("foolbox")
    model = random_linear(classes=3, shape=(16,))
    x, y = points(model, 24, (16,))
    w, b = torch.from_numpy(model.w), torch.from_numpy(model.b)

    class Net(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            return x @ w + b

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = foolbox.PyTorchModel(Net().eval(), bounds=(0, 1), device="cpu")
        attack = foolbox.attacks.HopSkipJumpAttack(steps=10, constraint=norm)
        torch.manual_seed(0)
        _, x_adv, _ = attack(net, torch.from_numpy(x), torch.from_numpy(y), epsilons=None)
    threat = ThreatModel(norm=norm, epsilon=np.inf)
    theirs = threat.distance(x_adv.numpy(), x)
    ours = HopSkipJump(steps=10).run(model, x, y, threat)
    assert not ours.robust.any()
    assert np.median(ours.distance) <= np.median(theirs) * 1.02
