"""Statistics and the evaluation of two models."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import jr_onnx as jr
from jr_onnx import report
from jr_onnx.attacks import FGSM, PGD, Attack, DeepFool, ThreatModel
from jr_onnx.errors import DataError, ParameterError
from jr_onnx.evaluate import EvaluationInterrupted
from jr_onnx.statistics import mcnemar, wilson
from jr_onnx.suites import Suite, Trial, adaptive, naive

MakeModel = Callable[..., jr.Model]


@pytest.mark.parametrize(
    ("successes", "samples", "expected"),
    # R: binom::binom.wilson; and Agresti's example of 0 in 10.
    [(0, 10, (0.0, 0.27753)), (10, 10, (0.72247, 1.0)), (81, 263, (0.25531, 0.36621))],
)
def test_wilson(successes: int, samples: int, expected: tuple[float, float]) -> None:
    found = wilson(np.arange(samples) < successes)
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    # Twice the binomial tail P(X <= min | n, 1/2).
    ("lost", "won", "expected"),
    [(0, 0, 1.0), (5, 5, 1.0), (0, 5, 2 / 32), (5, 0, 2 / 32), (1, 3, 2 * 5 / 16)],
)
def test_mcnemar(lost: int, won: int, expected: float) -> None:
    assert mcnemar(lost, won) == pytest.approx(expected)


def test_mcnemar_of_many_pairs_does_not_overflow() -> None:
    assert 0 <= mcnemar(3000, 5000) < 1e-50


@pytest.fixture(scope="module")
def evaluation(lenet: jr.Model, mnist: jr.Dataset) -> jr.Evaluation:
    return jr.evaluate(
        jr.retrofit(lenet, jump=1.0).model,
        mnist.x[:200],
        mnist.y[:200],
        threat=ThreatModel(epsilon=0.1),
        suite=naive(steps=10),
        baseline=lenet,
        device="cpu",
    )


def test_a_fresh_session_confirms_every_figure(
    evaluation: jr.Evaluation, mnist: jr.Dataset
) -> None:
    for model in evaluation.models:
        target = jr.Target(model.model, device="cpu")
        outcome = model.outcomes["pgd"]
        x_adv = mnist.x[:200].copy()
        x_adv[outcome.indices] = outcome.result.x_adv
        clean = target.logits(mnist.x[:200]).argmax(1) == mnist.y[:200]
        attacked = target.logits(x_adv).argmax(1) == mnist.y[:200]
        assert np.array_equal(model.correct, clean)
        assert np.array_equal(model.robust, clean & attacked)
        assert evaluation.threat.contains(x_adv, mnist.x[:200]).all()


def test_json_follows_the_contract(evaluation: jr.Evaluation) -> None:
    document = json.loads(json.dumps(evaluation.to_json(), allow_nan=False))
    assert document["schema"] == "jr-onnx/evaluation/1"
    assert document["threat"] == {"norm": "linf", "epsilon": 0.1, "bounds": [0, 1]}
    assert [model["role"] for model in document["models"]] == ["original", "retrofitted"]
    assert document["models"][0]["jumps"] == {}
    assert document["models"][1]["jumps"]["relu_3"] == 1
    attack = document["models"][0]["attacks"][0]
    assert attack["gradient"] == "exact"
    assert 0 < attack["mean_distance"] <= attack["max_distance"] <= 0.1
    assert attack["gradient_passes"] > 200
    low, high = document["models"][0]["robust_accuracy_interval"]
    assert low < document["models"][0]["robust_accuracy"] < high
    first, second = (model["robust_accuracy"] for model in document["models"])
    assert document["gain"]["naive"]["change"] == second - first
    low, high = document["gain"]["naive"]["interval"]
    assert low < second - first < high
    assert document["gain"]["adaptive"] is None, "not measured yet, and not claimed"


def test_one_model_alone_has_no_gain(lenet: jr.Model, mnist: jr.Dataset) -> None:
    found = jr.evaluate(
        lenet,
        mnist.x[:5],
        mnist.y[:5],
        threat=ThreatModel(epsilon=0.1),
        suite=naive(steps=1),
        device="cpu",
    )
    assert found.naive_gain is None
    assert found.to_json()["gain"] == {"naive": None, "adaptive": None}


def test_labels_out_of_range_are_found_before_the_attack(
    lenet: jr.Model, mnist: jr.Dataset
) -> None:
    y = mnist.y[:5].copy()
    y[3] = 10
    with pytest.raises(DataError, match=r"label 10 at index 3 is out of range: .* has 10 classes"):
        jr.evaluate(lenet, mnist.x[:5], y, threat=ThreatModel(epsilon=0.1), device="cpu")


def test_two_trials_of_one_name_are_refused() -> None:
    with pytest.raises(ParameterError, match=r"different names, got \['pgd', 'pgd'\]"):
        Suite("mine", (Trial(name="pgd", attack=PGD(steps=2)), Trial(name="pgd", attack=PGD())))


def test_the_adaptive_suite_tells_what_the_naive_gain_is_worth(
    lenet: jr.Model, mnist: jr.Dataset
) -> None:
    """The measured fact that the whole tool is for: on MNIST the naive gain is masking.

    The whole suite, with less of the same: fewer steps, queries, draws and targets.
    """
    suite = adaptive(steps=10)
    found = jr.evaluate(
        jr.retrofit(lenet, jump=1.0).model,
        mnist.x[:40],
        mnist.y[:40],
        threat=ThreatModel(epsilon=0.1),
        suite=replace(suite, trials=tuple(map(_shorter, suite.trials))),
        baseline=lenet,
        device="cpu",
    )
    naive_gain, adaptive_gain = found.naive_gain, found.adaptive_gain
    assert naive_gain is not None
    assert adaptive_gain is not None
    assert naive_gain.change > adaptive_gain.change
    assert [finding.rule for finding in found.findings if finding.level == "error"] == ["JR004"]
    for model in found.models:
        assert model.robust_accuracy <= model.naive_accuracy <= model.clean_accuracy
        left = model.correct
        for outcome in model.outcomes.values():
            assert np.array_equal(outcome.indices, np.flatnonzero(left)), "a broken example leaves"
            left = left & outcome.robust
        assert np.array_equal(left, model.robust)


def _shorter(trial: Trial) -> Trial:
    most = {"steps": 20, "queries": 100, "draws": 50, "targets": 3}
    options = {
        name: min(most[name], value) for name, value in vars(trial.attack).items() if name in most
    }
    return replace(trial, attack=replace(trial.attack, **options))  # type: ignore[type-var]


def test_a_float16_model_is_as_fragile_as_its_float32_twin(text_model: MakeModel) -> None:
    """Pixels such as 7/255 are no float16: the ball is around what the model sees."""
    rng = np.random.default_rng(0)
    x = (rng.integers(80, 176, (100, 8)) / 255).astype(np.float32)
    one_step = Suite("fgsm", (Trial(name="fgsm", attack=FGSM()),))
    robust = []
    for kind in ("float", "float16"):
        model = text_model(
            f"g ({kind}[N, 8] x) => ({kind}[N, 2] z) <int64[1] zero = {{0}}, int64[1] one = {{1}}>"
            "{ half = Constant <value_float: float = 0.5> () c = CastLike (half, x) s = Sub (x, c)"
            " a = Slice (s, zero, one, one) b = Neg (a) z = Concat <axis: int = 1> (a, b) }"
        )
        y = jr.Target(model, device="cpu").logits(x).argmax(axis=1)
        found = jr.evaluate(
            model, x, y, threat=ThreatModel(epsilon=0.1), suite=one_step, device="cpu"
        )
        robust.append(found.models[0].robust_accuracy)
    assert 0 < robust[0] < 1
    # A float16 holds pixels around 0.5 to 0.0005.
    assert abs(robust[0] - robust[1]) <= 0.02


def test_a_search_without_a_ball_is_no_error(lenet: jr.Model, mnist: jr.Dataset) -> None:
    suite = Suite("deepfool", (Trial(name="deepfool", attack=DeepFool(steps=20)),))
    found = jr.evaluate(
        lenet,
        mnist.x[:5],
        mnist.y[:5],
        threat=ThreatModel(epsilon=np.inf),
        suite=suite,
        device="cpu",
    )
    assert found.models[0].robust_accuracy == 0


def _steps(*steps: int) -> Suite:
    return Suite(
        "steps", tuple(Trial(name=f"pgd-{each}", attack=PGD(steps=each)) for each in steps)
    )


def _stop_after(monkeypatch: pytest.MonkeyPatch, runs: int) -> None:
    """Presses Ctrl-C in the next attack."""
    run, ran = Attack.run, [0]

    def counted(self: Attack, *args: Any, **options: Any) -> Any:
        ran[0] += 1
        if ran[0] > runs:
            raise KeyboardInterrupt
        return run(self, *args, **options)

    monkeypatch.setattr(Attack, "run", counted)


def _lines(evaluation: jr.Evaluation) -> list[str]:
    from rich.console import Console

    console = Console(width=120)
    with console.capture() as captured:
        console.print(report.evaluation_table(evaluation))
    return captured.get().splitlines()


@pytest.mark.parametrize(
    ("runs", "trials"),
    # Both models take turns, so that they have the same trials but for one.
    [(0, [0, 0]), (1, [1, 0]), (2, [1, 1]), (3, [2, 1]), (6, [3, 3])],
)
def test_an_interruption_keeps_what_is_finished_and_claims_no_more(
    lenet: jr.Model,
    mnist: jr.Dataset,
    monkeypatch: pytest.MonkeyPatch,
    runs: int,
    trials: list[int],
) -> None:
    _stop_after(monkeypatch, runs)
    with pytest.raises(EvaluationInterrupted) as caught:
        jr.evaluate(
            jr.retrofit(lenet, jump=1.0).model,
            mnist.x[:20],
            mnist.y[:20],
            threat=ThreatModel(epsilon=0.05),
            suite=_steps(1, 2, 3),
            baseline=lenet,
            device="cpu",
        )
    partial = caught.value.partial
    assert [len(model.outcomes) for model in partial.models] == trials
    document = partial.to_json()
    assert not document["complete"]
    assert [model["complete"] for model in document["models"]] == [False, False]
    assert document["gain"] == {"naive": None, "adaptive": None}
    for model in partial.models:
        left = model.correct.copy()
        for outcome in model.outcomes.values():
            left &= outcome.robust
        assert np.array_equal(model.robust, left)
    lines = "\n".join(_lines(partial))
    assert "original, interrupted" in lines
    assert "retrofitted, interrupted" in lines
    assert "change" not in lines
    assert ("worst case so far" in lines) == (trials[0] > 1)
    for number in range(3):
        assert (f"pgd-{number + 1}" in lines) == (trials[0] > number)
    row = next((line for line in lines.splitlines() if f"pgd-{trials[0]}" in line), "")
    assert row.count("%") == (trials[0] > 0) + (trials[1] == trials[0] > 0)
    assert report.verdict(partial).startswith("Interrupted: ")


def test_the_seed_of_a_trial_does_not_depend_on_the_turns(
    evaluation: jr.Evaluation, lenet: jr.Model, mnist: jr.Dataset
) -> None:
    alone = jr.evaluate(
        lenet,
        mnist.x[:200],
        mnist.y[:200],
        threat=ThreatModel(epsilon=0.1),
        suite=naive(steps=10),
        device="cpu",
    )
    assert np.array_equal(alone.models[0].robust, evaluation.models[0].robust)


def test_parts_and_a_file_give_what_memory_gives(
    lenet: jr.Model, mnist: jr.Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    path = tmp_path / "digits.npz"
    np.savez(path, x=mnist.x[:50], y=mnist.y[:50])

    def run(**options: Any) -> jr.Evaluation:
        data = jr.load_npz(path)
        return jr.evaluate(
            lenet,
            data.x,
            data.y,
            threat=ThreatModel(epsilon=0.1),
            suite=_steps(2, 5),
            device="cpu",
            batch_size=8,
            **options,
        )

    whole = run()
    monkeypatch.setattr(sys.modules["jr_onnx.data.dataset"], "_IN_MEMORY", 0)
    parts = run(keep_examples=False)
    assert isinstance(parts.x, np.memmap)
    assert np.array_equal(parts.x, whole.x)
    for ours, theirs in zip(
        parts.models[0].outcomes.values(), whole.models[0].outcomes.values(), strict=True
    ):
        assert len(ours.result.x_adv) == 0
        assert len(theirs.result.x_adv) == len(theirs.indices)
        assert np.array_equal(ours.robust, theirs.robust)
        for key in ("counts", "distance"):
            assert np.array_equal(getattr(ours.result, key), getattr(theirs.result, key))
        assert {**ours.to_json(), "seconds": 0} == {**theirs.to_json(), "seconds": 0}


def test_no_room_for_the_examples_is_told(
    mnist: jr.Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    import shutil

    np.savez(tmp_path / "digits.npz", x=mnist.x[:50], y=mnist.y[:50])
    monkeypatch.setattr(sys.modules["jr_onnx.data.dataset"], "_IN_MEMORY", 0)
    used = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: used)
    with pytest.raises(DataError, match=r"50 examples take 0.0 GiB, .* Set TMPDIR"):
        jr.load_npz(tmp_path / "digits.npz")
