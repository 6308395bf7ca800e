"""The smallest epsilon of each example, and curves, on models whose answers are known."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from classifiers import Folded, Linear, points, random_linear

import jr_onnx as jr
from jr_onnx.attacks import FGSM, PGD, Attack, Classifier, DeepFool, ThreatModel
from jr_onnx.cli import run
from jr_onnx.curves import (
    CurveInterrupted,
    MinimumEpsilon,
    between,
    minimum_epsilon,
    robustness_curve,
)
from jr_onnx.errors import DataError, ParameterError
from jr_onnx.report.curves import curve_verdict
from jr_onnx.statistics import wilson
from jr_onnx.suites import Suite, Trial, adaptive, naive

Array = np.ndarray[Any, Any]
REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def linear() -> tuple[Linear, Array, Array]:
    model = random_linear(classes=4)
    return model, *points(model, 300)


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_bisection_finds_the_exact_distance(norm: str, dual: float) -> None:
    model = random_linear(classes=2)
    x, y = points(model, 300)
    exact = model.distances(x, y, dual)
    most = float(np.median(exact))
    threat = ThreatModel(norm=norm, epsilon=most)
    found = minimum_epsilon(model, x, y, threat, PGD(steps=10, step_size=1.0), steps=8)
    clear = np.abs(exact - most) > 1e-4 * most
    assert np.array_equal(np.isfinite(found.epsilon)[clear], (exact < most)[clear])
    hit = np.isfinite(found.epsilon)
    cell, rounding = most / 2**8, 1e-4 * most
    assert (found.epsilon[hit] >= exact[hit] - rounding).all(), "the boundary is not nearer"
    assert (found.epsilon[hit] <= exact[hit] + cell + rounding).all()
    assert (found.failed[hit] <= exact[hit] + rounding).all()
    assert (found.epsilon[hit] - found.failed[hit] <= cell + rounding).all()
    assert (found.failed[~hit] == most).all()


def test_every_point_is_there(linear: Any) -> None:
    model, x, y = linear
    threat = ThreatModel(epsilon=0.02)
    found = minimum_epsilon(model, x, y, threat, PGD(steps=10), steps=5)
    hit = np.isfinite(found.epsilon)
    assert (model.logits(found.x_adv[hit]).argmax(axis=1) != y[hit]).all()
    assert np.array_equal(found.x_adv[~hit], x[~hit])
    away = np.abs(found.x_adv.astype(np.float64) - x).max(axis=1)
    assert np.array_equal(found.epsilon[hit], away[hit])


def test_a_try_is_what_the_attack_finds_there() -> None:
    """FGSM is deterministic and, on a linear model of two classes, monotone in epsilon."""
    model = random_linear(classes=2)
    x, y = points(model, 200)
    threat = ThreatModel(epsilon=0.02)
    found = minimum_epsilon(model, x, y, threat, FGSM(), steps=6)
    for epsilon in (0.02 * cell / 64 for cell in (1, 7, 32, 63)):
        alone = FGSM().run(model, x, y, ThreatModel(epsilon=epsilon))
        # the float32 point of the ball may end a hair inside of it
        assert found.robust_accuracy(epsilon + 1e-9) == alone.robust.mean()


def test_wrong_examples_need_no_epsilon(linear: Any) -> None:
    model, x, y = linear
    wrong = y.copy()
    wrong[:50] = (wrong[:50] + 1) % 4
    found = minimum_epsilon(model, x, wrong, ThreatModel(epsilon=0.1), FGSM(), steps=3)
    assert not found.correct[:50].any()
    assert (found.epsilon[:50] == 0).all()
    assert (found.failed[:50] == 0).all()
    assert found.robust_accuracy(0.0) == 250 / 300


class Recorder(Attack):
    """PGD that keeps what it is asked for; its examples break at an epsilon of their own."""

    name = "recorder"

    def __init__(self) -> None:
        self.batches: list[tuple[float, int]] = []

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
        self.batches.append((threat.epsilon, len(x)))
        return PGD(steps=10).search(target, x, y, threat, seed=seed, indices=indices)


def test_examples_share_their_tries(linear: Any) -> None:
    model, x, y = linear
    attack, threat = Recorder(), ThreatModel(epsilon=0.02)
    found = minimum_epsilon(model, x, y, threat, attack, steps=6, batch_size=1000)
    tried = [epsilon for epsilon, _ in attack.batches]
    assert attack.batches[0] == (0.02, 300)
    assert len(tried) == len(set(tried)) <= 64, "each epsilon once, for all that need it"
    assert sum(count for _, count in attack.batches) <= 7 * 300
    again = minimum_epsilon(model, x, y, threat, Recorder(), steps=6, batch_size=7)
    assert np.array_equal(found.epsilon, again.epsilon), "whatever the batches"


def test_a_point_well_inside_saves_tries() -> None:
    """DeepFool stops at the boundary, whatever the ball."""
    model = random_linear(classes=2)
    x, y = points(model, 100)
    threat = ThreatModel(epsilon=0.5)
    told: list[int] = []
    found = minimum_epsilon(model, x, y, threat, DeepFool(), steps=10, progress=told.append)
    exact = model.distances(x, y, dual=1)
    np.testing.assert_allclose(found.epsilon, exact, rtol=2e-3)
    # two gradients a try: eleven tries without looking where the points are
    assert found.counts.gradient < 2 * 5 * len(x)
    assert sum(told) == len(x)


def test_a_lucky_wide_ball_does_not_confuse_the_search() -> None:
    """PGD on a fold: the gradient at x may point away from the nearer boundary."""
    rng = np.random.default_rng(3)
    model = Folded(rng.normal(size=(6, 3)).astype(np.float32), np.zeros(3, np.float32), 0.5)
    x = rng.uniform(0, 1, (200, 6)).astype(np.float32)
    y = model.logits(x).argmax(axis=1)
    found = minimum_epsilon(model, x, y, ThreatModel(epsilon=0.4), PGD(steps=3), steps=7)
    hit = np.isfinite(found.epsilon)
    assert 0 < hit.sum() < 200
    assert (model.logits(found.x_adv[hit]).argmax(axis=1) != y[hit]).all()
    away = np.abs(found.x_adv.astype(np.float64) - x).max(axis=1)
    assert np.array_equal(found.epsilon[hit], away[hit])


@pytest.mark.parametrize(
    ("threat", "steps", "message"),
    [
        (ThreatModel(epsilon=float("inf")), 5, "bisection needs a finite epsilon"),
        (ThreatModel(epsilon=0.1), 0, "steps must be at least 1, got 0"),
    ],
)
def test_what_makes_no_sense(linear: Any, threat: ThreatModel, steps: int, message: str) -> None:
    model, x, y = linear
    with pytest.raises(ParameterError, match=message):
        minimum_epsilon(model, x, y, threat, FGSM(), steps=steps)


def test_examples_outside_the_bounds_are_refused(linear: Any) -> None:
    model, x, y = linear
    with pytest.raises(DataError, match="outside the bounds"):
        minimum_epsilon(model, 2 * x, y, ThreatModel(epsilon=0.1), FGSM())


@pytest.mark.parametrize("seed", range(3))
def test_between_is_strict_and_the_coarsest(seed: int) -> None:
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 500, 100)
    high = low + rng.integers(2, 524, 100)
    found = between(low, high)
    assert ((low < found) & (found < high)).all()
    for least, most, chosen in zip(low, high, found, strict=True):
        inside = np.arange(least + 1, most)
        power = inside & -inside  # the largest power of two that divides
        assert chosen & -chosen == power.max()


@pytest.fixture(scope="module")
def curve(lenet: jr.Model, mnist: jr.Dataset) -> Any:
    return robustness_curve(
        jr.retrofit(lenet, jump=1.0).model,
        mnist.x[:60],
        mnist.y[:60],
        threat=ThreatModel(epsilon=0.1),
        epsilons=(0.15, 0.05, 0.1, 0.1),
        suite=naive(steps=5),
        baseline=lenet,
        device="cpu",
    )


def test_a_curve_falls(curve: Any, mnist: jr.Dataset, lenet: jr.Model) -> None:
    assert curve.epsilons == (0.05, 0.1, 0.15)
    for model in curve.models:
        assert (model.first.correct >= model.robust[0]).all()
        assert (model.robust[:-1] >= model.robust[1:]).all(), "broken once, broken in a wider ball"
        assert (model.robust <= model.naive).all()
        shares = model.robust.mean(axis=1)
        assert shares[0] > shares[-1]
    alone = PGD(steps=5).run(
        jr.Target(lenet, device="cpu"), mnist.x[:60], mnist.y[:60], ThreatModel(epsilon=0.05)
    )
    assert curve.models[0].robust[0].mean() == pytest.approx(alone.robust.mean(), abs=1.5 / 60)


def test_the_json_of_a_curve_follows_its_schema(curve: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    document = json.loads(jr_report(curve))
    schema = json.loads((REPOSITORY / "docs/schemas/curve-1.json").read_bytes())
    jsonschema.Draft202012Validator(schema).validate(document)
    point, robust = document["models"][1]["points"][1], curve.models[1].robust[1]
    assert point["epsilon"] == 0.1
    assert point["robust_accuracy"] == robust.mean()
    assert point["robust_accuracy_interval"] == list(wilson(robust))
    change = robust.mean() - curve.models[0].robust[1].mean()
    assert document["gain"]["naive"][1]["change"] == pytest.approx(change)
    assert document["gain"]["adaptive"] == [], "the suite is not adaptive"


def jr_report(curve: Any) -> bytes:
    from jr_onnx import report

    return report.to_json(**curve.to_json())


class Fickle(Attack):
    """Finds what FGSM finds, but nothing in a ball wider than 0.08."""

    name = "fickle"

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
        if threat.epsilon > 0.08:
            return x
        return FGSM().search(target, x, y, threat, seed=seed, indices=indices)


def test_an_attack_that_loses_examples_is_called_invalid(
    lenet: jr.Model, mnist: jr.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trial, "to_json", lambda trial: {})
    found = robustness_curve(
        lenet,
        mnist.x[:100],
        mnist.y[:100],
        threat=ThreatModel(epsilon=0.1),
        epsilons=(0.08, 0.1),
        suite=Suite("fickle", (Trial(name="fickle", attack=Fickle()),)),
        device="cpu",
    )
    (model,) = found.models
    assert np.array_equal(model.robust[0], model.robust[1])
    assert model.missed[1] == (model.first.correct & ~model.robust[0]).sum() > 2
    assert any("that a smaller epsilon broke" in each.message for each in found.findings)
    assert found.gains("robust") == ()


@pytest.mark.parametrize("epsilons", [(), (0.1, float("inf"))])
def test_a_curve_needs_finite_epsilons(
    lenet: jr.Model, mnist: jr.Dataset, epsilons: tuple[float, ...]
) -> None:
    with pytest.raises(ParameterError, match="one finite epsilon or more"):
        robustness_curve(
            lenet, mnist.x[:5], mnist.y[:5], threat=ThreatModel(epsilon=0.1), epsilons=epsilons
        )


def test_the_command_line_draws_a_curve(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", "net.onnx", "--data", "test.npz", "--samples", "20", "--suite"]
    more = ["naive", "--curve", "0.02,8/255", "--device", "cpu", "--quiet", "--json", "curve.json"]
    assert run(arguments + more) == 0
    said = capsys.readouterr().out
    assert "epsilon, linf" in said
    assert "0.0313725" in said
    assert "a better one may" in said
    document = json.loads((here / "curve.json").read_bytes())
    assert document["schema"] == "jr-onnx/curve/1"
    assert document["epsilons"] == [0.02, 8 / 255]
    assert run([*arguments, "naive", "--curve", "0.1;0.2", "--device", "cpu"]) == 2
    assert "a number or a fraction" in capsys.readouterr().err


def test_the_verdict_speaks_of_the_worst_case(lenet: jr.Model, mnist: jr.Dataset) -> None:
    from jr_onnx.report.curves import curve_table, curve_verdict

    short = Suite("short", adaptive(steps=2).trials[:2], adaptive=True)

    def run(baseline: jr.Model) -> Any:
        return robustness_curve(
            jr.retrofit(lenet, jump=0.3).model,
            mnist.x[:20],
            mnist.y[:20],
            threat=ThreatModel(epsilon=0.1),
            epsilons=[0.01],
            suite=short,
            baseline=baseline,
            device="cpu",
        )

    other = run(jr.retrofit(lenet, jump=0.5).model)
    assert other.gains("robust") == ()
    assert curve_verdict(other).startswith("Inconclusive: by JR006 these")
    assert "Each figure is an upper bound" in curve_verdict(other)
    found = run(lenet)
    assert curve_verdict(found).startswith("No gain shown at any epsilon")
    titles = [column.header for column in curve_table(found).columns]
    assert titles == ["epsilon, linf", "original", "retrofitted", "change", "naive change"]
    assert len(found.to_json()["gain"]["adaptive"]) == 1


def test_results_are_frozen(linear: Any) -> None:
    model, x, y = linear
    found = minimum_epsilon(model, x[:3], y[:3], ThreatModel(epsilon=0.1), FGSM(), steps=1)
    assert isinstance(found, MinimumEpsilon)
    with pytest.raises(AttributeError):
        found.seconds = 0.0  # type: ignore[misc]


@pytest.mark.parametrize("finished", [0, 2])
def test_an_interrupted_curve_keeps_its_epsilons(
    lenet: jr.Model, mnist: jr.Dataset, monkeypatch: pytest.MonkeyPatch, finished: int
) -> None:
    curves = sys.modules["jr_onnx.curves"]
    evaluate, ran = curves.evaluate, [0]

    def counted(*args: Any, **options: Any) -> Any:
        ran[0] += 1
        if ran[0] > finished:
            raise KeyboardInterrupt
        return evaluate(*args, **options)

    monkeypatch.setattr(curves, "evaluate", counted)
    with pytest.raises(CurveInterrupted) as caught:
        robustness_curve(
            lenet,
            mnist.x[:10],
            mnist.y[:10],
            threat=ThreatModel(epsilon=0.1),
            epsilons=(0.01, 0.05, 0.1),
            suite=naive(steps=2),
            device="cpu",
        )
    partial = caught.value.partial
    assert (partial is None) == (finished == 0)
    if partial is not None:
        assert partial.epsilons == (0.01, 0.05)
        assert partial.to_json()["complete"] is False
        assert curve_verdict(partial).startswith("Interrupted: ")
