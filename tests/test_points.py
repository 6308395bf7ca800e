"""What the runner returns, point by point: inside ball and bounds, and as it is counted.

Measured by definition in extended precision, with none of the code that projects and judges.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from classifiers import Linear

from jr_onnx.attacks import (
    APGD,
    APGDDLR,
    EAD,
    FAB,
    FGSM,
    IFGSM,
    MIFGSM,
    PGD,
    AdaptiveTrustRegion,
    APGDTargeted,
    Attack,
    CarliniWagner,
    Corruptions,
    DeepFool,
    GaussianNoise,
    HopSkipJump,
    SaltAndPepperNoise,
    SimBA,
    Square,
    TargetedFAB,
    ThreatModel,
    TrustRegion,
    UniformNoise,
)
from jr_onnx.attacks.options import ATTACKS

Array = np.ndarray[Any, Any]
SHAPE = (1, 3, 3)
# In units of the range, so that most of the points are misclassified somewhere in the ball.
EPSILONS = {"linf": 0.2, "l2": 0.5, "l1": 1.2}
BOUNDS = ((0.0, 1.0), (-2.1179, 2.64), (0.0, 255.0))
# With few steps: how a search ends, not how well it does. The faster, the more points it is given.
ALL: list[tuple[Attack, float]] = [
    (FGSM(), 10),
    (PGD(steps=4, restarts=2), 1),
    (IFGSM(steps=4, step_size=0.1), 10),
    (MIFGSM(steps=4), 10),
    (APGD(steps=6), 1),
    (APGDDLR(steps=6), 1),
    (APGDTargeted(steps=4, targets=2), 1),
    (DeepFool(steps=4, bisections=3), 4),
    (TrustRegion(steps=6, radius=0.1, bisections=3), 4),
    (AdaptiveTrustRegion(steps=6, radius=0.1, bisections=3), 4),
    (CarliniWagner(steps=8, binary_search_steps=2, initial_const=10.0, learning_rate=0.5), 4),
    (EAD(steps=8, binary_search_steps=2, initial_const=10.0, learning_rate=0.1), 4),
    (FAB(steps=3, bisections=3), 1),
    (TargetedFAB(steps=3, targets=2, restarts=2, bisections=3), 1),
    (Square(queries=12), 0.3),
    (HopSkipJump(steps=2, evaluations=8, starts=3, gamma=10.0), 0.03),
    (SimBA(queries=12, step_size=0.3), 0.3),
    (UniformNoise(draws=4), 0.5),
    (GaussianNoise(draws=4), 0.5),
    (SaltAndPepperNoise(draws=4), 0.5),
    (Corruptions(severities=2), 0.5),
]


def _balls(attack: Attack) -> list[tuple[str, float]]:
    """The balls to try: none for what is bounded otherwise, with and without one for the rest."""
    if isinstance(attack, Corruptions):
        return [("linf", np.inf)]
    sized = [(norm, EPSILONS[norm]) for norm in attack.norms]
    searches = isinstance(attack, (IFGSM, DeepFool, TrustRegion, CarliniWagner, EAD, FAB))
    return sized + ([(attack.norms[0], np.inf)] if searches else [])


def _examples(
    count: int, dtype: Any, bounds: tuple[float, float], seed: int
) -> tuple[Linear, Array, Array]:
    """Points of the box, a third of their elements at its sides, and a model of five classes."""
    rng = np.random.default_rng(seed)
    low, high = bounds
    unit = np.clip(rng.uniform(-0.25, 1.25, (count, *SHAPE)), 0, 1)
    x = (low + (high - low) * unit).astype(dtype)
    w = (rng.normal(size=(9, 5)) / (high - low)).astype(np.float32)
    model = Linear(w, (-w.sum(axis=0) * (low + high) / 2).astype(np.float32))
    model.dtype = np.dtype(dtype)
    return model, x, model.logits(x).argmax(axis=1)


def _moved(
    attack: Attack, ball: tuple[str, float], dtype: Any, bounds: tuple[float, float], count: int
) -> int:
    """Runs an attack, checks all that it returns, and counts the points that it moved."""
    model, x, y = _examples(count, dtype, bounds, seed=len(attack.name) + count)
    norm, size = ball
    epsilon = size * (bounds[1] - bounds[0])
    threat = ThreatModel(norm=norm, epsilon=epsilon, bounds=bounds)
    found = attack.run(model, x, y, threat, seed=1, batch_size=5000)
    assert found.x_adv.dtype == dtype
    sides = np.array(bounds).astype(dtype).astype(float)  # data at a bound is rounded like it
    assert sides[0] <= found.x_adv.min()
    assert found.x_adv.max() <= sides[1]
    delta = np.abs(found.x_adv.astype(np.longdouble) - x.astype(np.longdouble)).reshape(count, -1)
    length = {
        "linf": delta.max(axis=1),
        "l2": np.sqrt((delta**2).sum(axis=1)),
        "l1": delta.sum(axis=1),
    }[norm]
    # One place of float64 for what measuring in it, as the runner does, may round.
    assert length.max() <= epsilon + 2.0**-52 * max(np.abs(sides).max(), 1)
    # What counts as broken is misclassified; what does not is where it was.
    assert np.array_equal(found.robust, model.logits(found.x_adv).argmax(axis=1) == y)
    moved = (delta > 0).any(axis=1)
    assert np.array_equal(moved, ~found.robust)
    return int(moved.sum())


def test_every_attack_is_tried() -> None:
    assert {attack.name for attack, _ in ALL} == set(ATTACKS)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize(("attack", "share"), ALL, ids=[attack.name for attack, _ in ALL])
def test_what_counts_is_inside(attack: Attack, share: float) -> None:
    kinds = zip(BOUNDS, (np.float16, np.float32, np.float64), strict=True)
    moved = [
        _moved(attack, ball, dtype, bounds, int(min(300 * share, 300)) + 10)
        for bounds, dtype in kinds
        for ball in _balls(attack)
    ]
    assert sum(moved), "the test needs points that moved"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow")
def test_millions_of_points_are_inside() -> None:
    """Points that count as broken: those that do not are the examples themselves."""
    total = 0
    for attack, share in ALL:
        for ball in _balls(attack):
            for bounds in BOUNDS:
                for dtype in (np.float16, np.float32, np.float64):
                    total += _moved(attack, ball, dtype, bounds, int(share * 2000))
    print(f"{total:,} points inside")
    assert total > 2_000_000
