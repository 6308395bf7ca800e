"""Tuning: its parts against oracles of their own, and the whole on a small model."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_data, tiny_model

import jr_onnx as jr
from jr_onnx.curves import minimum_epsilon
from jr_onnx.errors import DataError, ParameterError, TuningError
from jr_onnx.report import to_json
from jr_onnx.report.tuning import tuning_chart, tuning_verdict
from jr_onnx.suites import naive
from jr_onnx.tune import JumpTarget, Point, Tuning, tuning_suite
from jr_onnx.tune.judge import Judge
from jr_onnx.tune.lines import Line, clean_curve
from jr_onnx.tune.objective import find_objective
from jr_onnx.tune.points import best_of, front
from jr_onnx.tune.split import Part, split

Array = np.ndarray[Any, Any]
REPOSITORY = Path(__file__).resolve().parents[1]
THREAT = jr.ThreatModel(epsilon=0.05)
TINY = tiny_model()
X, Y = tiny_data(TINY)


def _tune(**options: Any) -> Tuning:
    given = {"threat": THREAT, "max_accuracy_drop": 0.05, "steps": 4, "suite": "naive", **options}
    return jr.tune(TINY, X, Y, device="cpu", **given)


def _point(clean: float, robust: float, *, pruned: bool = False, n: int = 100) -> Point:
    correct, score = np.arange(n) < clean * n, np.arange(n) < robust * n
    return Point(
        {"site": 1.0},
        "global",
        {},
        correct,
        score.astype(np.float32),
        "given up" if pruned else None,
    )


# The data is split


def test_the_parts_are_the_whole_and_share_nothing(mnist: jr.Dataset) -> None:
    tuned, reported = split(mnist.x, mnist.y, report_share=0.3, seed=1)
    assert len(tuned) + len(reported) == 1000
    seen = {example.tobytes() for example in tuned.x} | {e.tobytes() for e in reported.x}
    assert len(seen) == 1000
    for label in range(10):
        share = (reported.y == label).sum() / (mnist.y == label).sum()
        assert share == pytest.approx(0.3, abs=0.02), "class by class"
    again = split(mnist.x, mnist.y, report_share=0.3, seed=1)[1]
    other = split(mnist.x, mnist.y, report_share=0.3, seed=2)[1]
    assert np.array_equal(reported.x, again.x)
    assert not np.array_equal(reported.x, other.x)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_that_leaves_nothing(share: float) -> None:
    with pytest.raises(ParameterError, match="report_share must be above 0 and below 1"):
        split(X, Y, report_share=share, seed=0)


def test_one_example_cannot_be_split() -> None:
    with pytest.raises(DataError, match=r"^1 example cannot be split"):
        split(X[:1], Y[:1], report_share=0.5, seed=0)


def test_two_files_may_share_no_example() -> None:
    with pytest.raises(DataError, match=r"10 of the 60 examples to report on are among"):
        jr.tune(TINY, X[:70], Y[:70], threat=THREAT, held_out=(X[60:], Y[60:]), device="cpu")
    wider = (X[60:].astype(np.float64), Y[60:])
    with pytest.raises(DataError, match=r"10 of the 60 examples to report on are among"):
        jr.tune(TINY, X[:70], Y[:70], threat=THREAT, held_out=wider, device="cpu")


# The front and the best


def test_the_front_is_what_nothing_beats() -> None:
    rng = np.random.default_rng(0)
    points = [
        _point(*rng.integers(0, 10, 2) / 10, pruned=bool(rng.integers(4) == 0)) for _ in range(60)
    ]

    def beats(one: Point, other: Point) -> bool:
        ahead = (one.clean_accuracy - other.clean_accuracy, one.robustness - other.robustness)
        return min(ahead) >= 0 and max(ahead) > 0

    finished = [point for point in points if not point.pruned]
    left = {
        (point.clean_accuracy, point.robustness)
        for point in finished
        if not any(beats(other, point) for other in finished)
    }
    found = front(points)
    assert {(point.clean_accuracy, point.robustness) for point in found} == left
    assert len(found) == len(left), "equals are there once"


def test_the_best_point_meets_the_budget() -> None:
    points = [_point(0.9, 0.8), _point(0.95, 0.6), _point(0.97, 0.6), _point(1.0, 0.5)]
    hidden = _point(1.0, 0.9, pruned=True)
    assert best_of([hidden, *points], 0.95) is points[2], "of equals that of the cleaner"
    assert best_of([hidden, *points], 0.0) is points[0]
    assert best_of(points[:1], 0.95) is None
    original = replace(points[0], jumps={})
    assert best_of([original, original], 0.0) is None, "processes that start together find it twice"


# The line


def _one(jumps: Mapping[str, Any]) -> float:
    return float(jumps["site"])


@pytest.mark.parametrize("limit", [0.003, 0.21, 0.5, 1.7, 1.99])
def test_the_limit_is_where_accuracy_falls_below_the_budget(limit: float) -> None:
    line = Line("global", 2.0, lambda value: {"site": value})
    curve = clean_curve(line, lambda jumps: 0.9 if _one(jumps) <= limit else 0.8, 0.85)
    assert limit * 0.99 <= curve.limit <= limit
    assert curve.values == tuple(sorted(curve.values))
    tried = curve.candidates(4)
    np.testing.assert_allclose(tried, curve.limit * np.arange(1, 5) / 4)


def test_a_second_stretch_within_the_budget_does_not_count() -> None:
    line = Line("global", 2.0, lambda value: {"site": value})
    curve = clean_curve(line, lambda jumps: 0.8 if 0.5 < _one(jumps) < 1.0 else 0.9, 0.85)
    assert 0.495 <= curve.limit <= 0.5


def test_where_no_jump_meets_the_budget_there_is_no_candidate() -> None:
    line = Line("global", 2.0, lambda value: {"site": value})
    curve = clean_curve(line, lambda jumps: 0.9 if not _one(jumps) else 0.1, 0.85)
    assert curve.limit == 0
    assert curve.candidates(5) == []
    whole = clean_curve(line, lambda jumps: 0.9, 0.85)
    assert whole.limit == 2.0


# The judge


def _judge(objective: str, budget: float = 0.05) -> Judge:
    target = JumpTarget(TINY, jr.find_sites(TINY)[0], device="cpu")
    aim = find_objective(objective, THREAT, steps=4)
    return Judge(target, Part(X, Y), aim, budget, 0, 64)


def test_the_adaptive_score_is_that_of_an_evaluation_of_the_retrofitted_model() -> None:
    jumps = {"relu0": 0.3, "relu1": 0.2}
    point = _judge("adaptive").point(jumps, "global", {})
    hardened = jr.retrofit(TINY, jumps=jumps).model
    found = jr.evaluate(
        hardened, X, Y, threat=THREAT, suite=tuning_suite(steps=4), baseline=TINY, device="cpu"
    ).models[1]
    assert np.array_equal(point.correct, found.correct)
    assert 0.1 < point.robustness < 0.95
    assert np.array_equal(point.score > 0, found.robust)


def test_the_distance_is_that_of_the_better_of_two_attacks() -> None:
    judge = _judge("distance")
    jumps = {"relu0": 0.3, "relu1": 0.2}
    point = judge.point(jumps, "global", {})
    hardened = jr.Target(jr.retrofit(TINY, jumps=jumps).model, device="cpu")
    exact = minimum_epsilon(hardened, X, Y, THREAT, jr.attacks.PGD(steps=4), steps=6)
    assert (point.score <= THREAT.epsilon + 1e-7).all()
    assert (point.score[~point.correct] == 0).all()
    # Random starts differ with the batches, so that single examples may be a little further.
    assert point.robustness <= np.minimum(exact.epsilon, THREAT.epsilon).mean() * 1.02


def test_giving_up_keeps_an_upper_bound_and_never_the_better_candidate() -> None:
    judge = _judge("adaptive")
    jumps = [{}, {"relu0": 0.3}, {"relu0": 0.8, "relu1": 0.5}, {"relu1": 0.2}]
    whole = [judge.point(each, "per-site", {}) for each in jumps]
    for one, other in itertools.permutations(range(len(jumps)), 2):
        quick = judge.point(jumps[one], "per-site", {}, rivals=[whole[other]])
        if quick.pruned:
            assert (quick.score >= whole[one].score).all()
            assert whole[one].robustness <= whole[other].robustness
            assert whole[one].clean_accuracy <= whole[other].clean_accuracy
        else:
            assert np.array_equal(quick.score, whole[one].score)
    assert any(judge.point(each, "per-site", {}, rivals=whole).pruned for each in jumps)


def test_the_budget_is_counted_in_examples() -> None:
    assert _judge("naive").accuracy({}) == 1.0, "the labels are the model's own"
    for budget, lost in [(0.0, 0), (0.05, 6), (0.0583, 6), (0.0584, 7)]:
        assert _judge("naive", budget).least == (120 - lost) / 120


# The whole


@pytest.fixture(scope="module")
def tuned() -> Tuning:
    return _tune(trials=5, suite="adaptive")


def test_the_curve_agrees_with_single_evaluations(tuned: Tuning) -> None:
    part, _ = split(X, Y, report_share=0.5, seed=0)
    curve = tuned.curves[0]
    for at in np.linspace(0, len(curve.values) - 1, 5).astype(int):
        alone = jr.Target(jr.retrofit(TINY, jump=curve.values[at]).model, device="cpu")
        assert (alone.logits(part.x).argmax(1) == part.y).mean() == curve.accuracy[at]
    assert curve.limit in curve.values
    assert all(
        accuracy >= tuned.least
        for value, accuracy in zip(curve.values, curve.accuracy, strict=True)
        if value <= curve.limit
    )


def test_figures_come_from_the_retrofitted_model_on_examples_that_were_not_seen(
    tuned: Tuning,
) -> None:
    _, held_out = split(X, Y, report_share=0.5, seed=0)
    assert tuned.best is not None
    assert np.array_equal(tuned.report.x, held_out.x)
    hardened = jr.retrofit(TINY, jumps=tuned.best.jumps)
    assert tuned.report.models[1].model.content == hardened.model.content
    alone = jr.evaluate(
        hardened.model, held_out.x, held_out.y, threat=THREAT, suite="adaptive", baseline=TINY,
        device="cpu",
    )  # fmt: skip
    assert alone.adaptive_gain == tuned.report.adaptive_gain
    assert tuned.clean_change is not None
    assert tuned.within_budget == (-tuned.clean_change.change <= 0.05)


def test_the_search_does_not_see_the_part_to_report_on() -> None:
    parts = split(X, Y, report_share=0.5, seed=0)
    (x, y), held_out = (parts[0].x, parts[0].y), parts[1]
    other = 1 - held_out.x
    found = [
        jr.tune(
            TINY, x, y, threat=THREAT, held_out=given, trials=3, steps=3, suite="naive",
            device="cpu",
        )
        for given in ((held_out.x, held_out.y), (other, np.zeros_like(held_out.y)))
    ]  # fmt: skip
    assert found[0].points[0].key == found[1].points[0].key
    for one, two in zip(*(each.points for each in found), strict=True):
        assert one.jumps == two.jumps
        assert np.array_equal(one.score, two.score)
    assert found[0].report.models[0].clean_accuracy != found[1].report.models[0].clean_accuracy


@pytest.mark.parametrize("scope", ["quantile", "per-site", "per-channel"])
def test_every_scope_ends_in_a_model(scope: str) -> None:
    found = _tune(jump_scope=scope, trials=4, objective="naive")
    origins = {point.origin for point in found.points}
    assert (
        origins
        == {
            "quantile": {"original", "quantile"},
            "per-site": {"original", "global", "quantile", "per-site"},
            "per-channel": {"original", "global", "quantile", "per-channel"},
        }[scope]
    )
    assert found.best is not None
    hardened = jr.retrofit(TINY, jumps=found.best.jumps).model
    assert jr.verify(TINY, hardened).equivalent
    proposed = [point for point in found.points if point.origin == scope]
    assert all(point.clean_accuracy >= found.least for point in proposed), "all in the budget"
    lines = [point for point in found.points if point.origin in ("global", "quantile")]
    assert found.best.robustness >= max(point.robustness for point in lines)
    if scope == "per-channel":
        spread = [p for p in found.points if p.origin == scope and p.parameters["jr_onnx/spread"]]
        assert all(isinstance(jump, tuple) for point in spread for jump in point.jumps.values())


def test_a_proposal_spreads_over_the_channels_in_proportion_to_their_means() -> None:
    from jr_onnx.activations import observe
    from jr_onnx.tune.trials import Space

    sites = jr.find_sites(TINY)[0]
    seen = observe(TINY, sites, X, device="cpu")
    space = Space(sites, {"relu0": 2.0, "relu1": 2.0}, seen, True)
    given = {"relu0": 0.5, "relu1": 0.0, "jr_onnx/spread": 1.0}
    jumps = space.jumps(given)
    means = seen["relu0"].channel_means
    assert set(jumps) == {"relu0"}
    assert means is not None
    np.testing.assert_allclose(jumps["relu0"], 0.5 * means / means[means > 0].mean())
    assert space.jumps({**given, "jr_onnx/spread": 0.0}) == {"relu0": 0.5}
    np.testing.assert_allclose(space.jumps(given, 0.5)["relu0"], np.array(jumps["relu0"]) / 2)


def test_a_budget_that_no_jump_meets_is_a_result(text_model: Callable[..., jr.Model]) -> None:
    """Class 0 hangs on an activation that any jump sets to 0."""
    model = text_model(
        """thin (float[n, 2] x) => (float[n, 2] y) {
            w = Constant<value = float[2, 2] {1e20, 0.0, 0.0, 1.0}>()
            z = Relu(x)
            y = MatMul(z, w)
        }"""
    )
    x = np.tile(np.array([[1e-20, 0.5]], np.float32), (40, 1))
    found = jr.tune(
        model, x, np.zeros(40, int), threat=THREAT, trials=3, steps=2, suite="naive", device="cpu"
    )
    assert [point.origin for point in found.points] == ["original"]
    assert found.curves[0].limit == 0
    assert found.best is None
    assert found.jumps == {}
    assert len(found.report.models) == 1
    assert "No jump keeps clean accuracy within 1.0%" in tuning_verdict(found)
    assert tuning_chart(found).row_count == 1


def test_that_no_jump_helps_is_said(tmp_path: Path) -> None:
    """In a ball that breaks nothing, none can be better than the original."""
    found = _tune(trials=2, threat=jr.ThreatModel(epsilon=1e-9))
    assert found.original.robustness == 1.0
    assert found.best is not None
    assert not found.helps
    assert not found.confirmed
    assert found.jumps == {}
    assert "No jump helps: none of 2 candidates" in tuning_verdict(found)
    assert len(found.report.models) == 2, "the best jump is there, to be looked at"
    path = tmp_path / "jumps.toml"
    path.write_bytes(found.jumps_file())
    assert jr.load_jumps(path) == {"relu0": 0.0, "relu1": 0.0}


def test_the_naive_objective_is_called_naive() -> None:
    found = _tune(objective="naive", trials=2)
    assert "The objective is naive" in tuning_verdict(found)
    assert tuning_chart(found).row_count == len(found.points)


def test_the_jumps_file_is_read_again(tuned: Tuning, tmp_path: Path) -> None:
    path = tmp_path / "jumps.toml"
    path.write_bytes(tuned.jumps_file("two\nlines", "and one"))
    expected = tuned.jumps or {"relu0": 0.0, "relu1": 0.0}
    assert jr.load_jumps(path) == expected
    assert path.read_text().splitlines()[:3] == ["# two", "# lines", "# and one"]


@pytest.mark.parametrize("scope", ["global", "per-channel"])
def test_the_json_follows_its_schema(scope: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    found = _tune(jump_scope=scope, trials=2)
    document = json.loads(to_json(**found.to_json()))
    schema = json.loads((REPOSITORY / "docs/schemas/tuning-1.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(document, schema)
    assert len(document["points"]) == len(found.points)
    clean = [point["clean_accuracy"] for point in document["front"]]
    assert clean == sorted(clean, reverse=True)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "best"}, "objective must be one of adaptive, naive, distance, got 'best'"),
        ({"jump_scope": "layer"}, "jump_scope must be one of global, quantile, per-site"),
        (
            {"max_accuracy_drop": -0.1},
            r"must be at least 0 and below 1 \(0.01 is one point\), got -0.1",
        ),
        ({"max_accuracy_drop": float("nan")}, "must be at least 0 and below 1 .*got nan"),
        ({"trials": 0}, "trials must be at least 1, got 0"),
        ({"suite": "strong"}, "suite must be one of"),
        ({"threat": jr.ThreatModel(epsilon=float("inf"))}, "tuning needs a finite epsilon"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        _tune(**options)


def test_a_model_without_a_site(text_model: Callable[..., jr.Model]) -> None:
    model = text_model("plain (float[n, 6] x) => (float[n, 6] y) { y = Identity(x) }")
    with pytest.raises(TuningError, match=r"there is no site to tune \(it has no Relu\)"):
        jr.tune(model, X, Y, threat=THREAT, device="cpu")


def test_a_site_that_never_fires(text_model: Callable[..., jr.Model]) -> None:
    model = text_model("dead (float[n, 6] x) => (float[n, 6] y) { z = Neg(x) y = Relu(z) }")
    with pytest.raises(TuningError, match="it is never above 0 on the data"):
        jr.tune(model, X, Y, threat=THREAT, device="cpu")


def test_without_optuna(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ParameterError, match=r"pip install 'jr-onnx\[tune\]'"):
        _tune(jump_scope="per-site")
    with pytest.raises(ParameterError, match=r"pip install 'jr-onnx\[tune\]'"):
        _tune(resume=tmp_path)
    assert _tune(trials=1, suite=naive(steps=2)).points
