"""Models, data, a suite of attacks -> accuracies that can be defended.

An example counts as robust if no attack broke it; intervals are Wilson's, comparisons are paired.
Naive is what attacks find that follow the model's own gradient; adaptive is the worst case over
those that know of the jump, too. Only the second says something about an attacker.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from jr_onnx import rewrite
from jr_onnx.attacks import NORMS, AttackResult, ThreatModel, Transfer
from jr_onnx.attacks.attack import check_examples
from jr_onnx.checkpoint import Checkpoint, digest
from jr_onnx.errors import DataError
from jr_onnx.findings import Finding, diagnose
from jr_onnx.model import Model
from jr_onnx.preprocess import Preprocessing, normalized
from jr_onnx.statistics import mcnemar, paired_interval, wilson
from jr_onnx.suites import Outcome, Suite, Trial, find_suite
from jr_onnx.target import DEFAULT_BATCH_SIZE, Target, check_classes

Array = np.ndarray[Any, Any]
# told the role of the model, the trial, and how many examples more are finished
Progress = Callable[[str, str, int], None]
# Share of the examples by which the gains may differ before it is called masking.
MASKING = 0.05


@dataclass(frozen=True)
class ModelEvaluation:
    """One model under all attacks.

    Attributes:
        role: `original` or `retrofitted`.
        model: the model.
        jumps: effective jump by site path, empty for an original.
        provider: the execution provider that ran it.
        correct: bool `(samples,)`, without attack.
        naive: bool `(samples,)`, robust to the attacks on its own gradient.
        robust: bool `(samples,)`, the worst case over all attacks.
        outcomes: by name of the trial.
        findings: what makes its figures doubtful.
        complete: whether every trial of the suite was tried.
    """

    role: str
    model: Model = field(repr=False)
    jumps: dict[str, rewrite.Jump]
    provider: str
    correct: Array = field(repr=False)
    naive: Array = field(repr=False)
    robust: Array = field(repr=False)
    outcomes: dict[str, Outcome] = field(repr=False)
    findings: tuple[Finding, ...] = ()
    complete: bool = True

    @property
    def clean_accuracy(self) -> float:
        """Share classified correctly without attack, 0..1."""
        return float(self.correct.mean())

    @property
    def naive_accuracy(self) -> float:
        """Share that no attack on the model's own gradient broke, 0..1."""
        return float(self.naive.mean())

    @property
    def robust_accuracy(self) -> float:
        """Share that no attack broke, 0..1."""
        return float(self.robust.mean())

    def head_json(self) -> dict[str, Any]:
        """Returns what its entries in the results begin with: which model, and without attack."""
        return {
            "role": self.role,
            "path": str(self.model.path) if self.model.path else None,
            "sha256": self.model.sha256,
            "provider": self.provider,
            "jumps": self.jumps,
            "clean_accuracy": self.clean_accuracy,
            "clean_accuracy_interval": list(wilson(self.correct)),
        }


class EvaluationInterrupted(KeyboardInterrupt):
    """Ctrl-C, with what was finished before it.

    Attributes:
        partial: the evaluation as far as it went; its figures are too good.
    """

    def __init__(self, partial: Evaluation) -> None:
        super().__init__()
        self.partial = partial


@dataclass(frozen=True)
class Gain:
    """A change of a share from the first model to the second, on the same examples.

    Attributes:
        change: second minus first, -1..1.
        interval: its 95% interval.
        p_value: of McNemar's exact test.
    """

    change: float
    interval: tuple[float, float]
    p_value: float

    @classmethod
    def of(cls, before: Array, after: Array) -> Gain:
        """Compares two bool `(samples,)`."""
        lost, won = int((before & ~after).sum()), int((after & ~before).sum())
        change = float(after.mean()) - float(before.mean())
        return cls(change, paired_interval(before, after), mcnemar(lost, won))

    def to_json(self) -> dict[str, Any]:
        """Returns the entries of `gain` in the result."""
        return {
            "change": self.change,
            "interval": list(self.interval),
            "p_value": self.p_value,
        }


@dataclass(frozen=True)
class Evaluation:
    """One or two models on the same examples.

    Attributes:
        models: the original first, where there are two.
        threat: the threat model.
        suite: the attacks.
        seed: of all random numbers.
        x: the examples, for relative distances.
        preprocessing: its mean and std came before the models.
    """

    models: tuple[ModelEvaluation, ...]
    threat: ThreatModel
    suite: Suite
    seed: int
    x: Array = field(repr=False)
    preprocessing: Preprocessing

    @cached_property
    def naive_gain(self) -> Gain | None:
        """Gain under attacks on the model's own gradient; None for one model.

        A discontinuity such as the jump can mislead them (gradient masking).
        """
        return self._gain("naive")

    @cached_property
    def adaptive_gain(self) -> Gain | None:
        """Gain in the worst case; None for one model, or where the suite is not adaptive."""
        return self._gain("robust") if self.suite.adaptive else None

    @property
    def masked(self) -> bool:
        """Whether a gain under attacks on the model's own gradient is gone under the others.

        That is, whether what these still break grew by more than `MASKING` from the original to
        the hardened model.
        """
        naive, adaptive = self.naive_gain, self.adaptive_gain
        if naive is None or adaptive is None or naive.change <= 0:
            return False
        return adaptive.change <= 0 or naive.change - adaptive.change > MASKING

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """What makes the figures doubtful, of each model and of the comparison."""
        found = [finding for model in self.models for finding in model.findings]
        if self.suite.left_out:
            names = ", ".join(self.suite.left_out)
            message = f"{names} of the suite {self.suite.name} do not know {self.threat.norm}"
            found.append(Finding("JR005", "warning", f"{message}: they were left out"))
        naive, adaptive = self.naive_gain, self.adaptive_gain
        if naive and adaptive and self.masked:
            found.append(
                Finding(
                    "JR004",
                    "error",
                    f"gradient masking: the change of {100 * naive.change:+.1f} points under "
                    "attacks on the model's own gradient becomes "
                    f"{100 * adaptive.change:+.1f} under the adaptive suite",
                )
            )
        if adaptive and adaptive.interval[0] <= 0:
            low, high = (100 * end for end in adaptive.interval)
            what = "which is a loss" if high < 0 else "which does not exclude zero"
            found.append(
                Finding(
                    "JR003",
                    "warning",
                    f"no gain shown: the change of the worst case is {low:+.1f} to {high:+.1f} "
                    f"points (95%), {what}",
                )
            )
        return tuple(found)

    def _gain(self, kind: str) -> Gain | None:
        if len(self.models) < 2:
            return None
        first, second = (getattr(model, kind) for model in self.models)
        return Gain.of(first, second)

    def to_json(self) -> dict[str, Any]:
        """Returns the result, schema `jr-onnx/evaluation/1`."""
        naive, adaptive = self.naive_gain, self.adaptive_gain
        return {
            "schema": "jr-onnx/evaluation/1",
            "threat": self.threat.to_json(),
            "suite": self.suite.name,
            "complete": all(model.complete for model in self.models),
            "seed": self.seed,
            "samples": len(self.x),
            "mean": self.preprocessing.mean,
            "std": self.preprocessing.std,
            "models": [self._model_json(model) for model in self.models],
            "gain": {
                "naive": naive.to_json() if naive else None,
                "adaptive": adaptive.to_json() if adaptive else None,
            },
            "findings": [finding.to_json() for finding in self.findings],
        }

    def _model_json(self, model: ModelEvaluation) -> dict[str, Any]:
        return {
            **model.head_json(),
            "naive_accuracy": model.naive_accuracy,
            "robust_accuracy": model.robust_accuracy,
            "robust_accuracy_interval": list(wilson(model.robust)),
            "attacks": [self.attack_json(each) for each in model.outcomes.values()],
        }

    def attack_json(self, outcome: Outcome) -> dict[str, Any]:
        """Returns the entry of `attacks` in the result; distances are of the broken examples."""
        found, threat = outcome.result, outcome.threat
        broken = found.correct & ~found.robust
        distance = found.distance[broken]
        size = NORMS[threat.norm].distance(self.x[outcome.indices[broken]].astype(np.float64))
        relative = distance[size > 0] / size[size > 0]
        return {
            "name": outcome.trial.name,
            **threat.to_json(),
            "gradient": outcome.trial.gradient,
            "options": outcome.trial.to_json(),
            "tried": len(outcome.indices),
            "broken": int(broken.sum()),
            "robust_accuracy": float(outcome.robust.mean()),
            "mean_distance": float(distance.mean()) if len(distance) else None,
            "max_distance": float(distance.max()) if len(distance) else None,
            "mean_relative_distance": float(relative.mean()) if len(relative) else None,
            "max_relative_distance": float(relative.max()) if len(relative) else None,
            "seconds": found.seconds,
            "forward_passes": found.counts.forward,
            "gradient_passes": found.counts.gradient,
        }


def evaluate(
    model: Model,
    x: Array,
    y: Array,
    *,
    threat: ThreatModel,
    suite: str | Suite = "naive",
    baseline: Model | None = None,
    preprocessing: Preprocessing | None = None,
    device: str = "auto",
    seed: int = 0,
    batch_size: int = DEFAULT_BATCH_SIZE,
    checkpoint: Checkpoint | None = None,
    progress: Progress = lambda role, trial, done: None,
) -> Evaluation:
    """Measures clean and robust accuracy, of the baseline too where one is given.

    Both models get the same trials with the same budgets and seeds.

    Args:
        model: a classifier with one input and one output.
        x: `(samples, ...)`, inside the threat model's bounds.
        y: int `(samples,)`.
        threat: norm, epsilon and bounds, in units of x.
        suite: a name in `SUITES`, or trials of one's own.
        baseline: the model before the retrofit.
        preprocessing: its mean and std come before the models, in units of x.
        device: `auto`, `cpu` or `cuda`.
        seed: of all random numbers.
        batch_size: most examples in one run.
        checkpoint: keeps finished trials, and gives back those that are finished already.
        progress: told role, trial, and the number of examples just finished.

    Raises:
        DataError: the data does not fit the model or the bounds.
        ParameterError: no such suite.
        ModelError: the model is no such classifier, or has no gradient.
        SessionError: onnxruntime is not there, or refuses the model or the device.
        EvaluationInterrupted: Ctrl-C; it carries what was finished.
    """
    check_examples(x, y, threat)
    steps = preprocessing or Preprocessing()
    pairs = []
    for part in (baseline, model) if baseline else (model,):
        seen = normalized(part, steps.mean, steps.std, layout=steps.layout)
        pairs.append((part, Target(seen, device=device, batch_size=batch_size)))
        check_fit(pairs[-1][1], x, y)
    suite = find_suite(suite, threat.norm)
    job = _Job(x, y, threat, suite, seed, batch_size, checkpoint, progress)
    models: list[ModelEvaluation] = []
    for part, target in pairs:
        models.append(job.evaluate(part, target))
        if not models[-1].complete:
            raise EvaluationInterrupted(Evaluation(tuple(models), threat, suite, seed, x, steps))
    return Evaluation(tuple(models), threat, suite, seed, x, steps)


def check_fit(target: Target, x: Array, y: Array) -> None:
    """Runs one example and compares shapes and labels, before any long work.

    Raises:
        DataError: x or y does not fit the model.
    """
    logits = target.logits(x[:1])
    if logits.ndim != 2:
        raise DataError(
            f"{target.model.name}: the output has shape {logits.shape} for one example; expected "
            "(1, classes)"
        )
    check_classes(y, logits.shape[1], target.model.name)


@dataclass(frozen=True)
class _Job:
    """What is the same for every model of an evaluation."""

    x: Array
    y: Array
    threat: ThreatModel
    suite: Suite
    seed: int
    batch_size: int
    checkpoint: Checkpoint | None
    progress: Progress

    def evaluate(self, model: Model, target: Target) -> ModelEvaluation:
        jumps = rewrite.jumps_of(model)
        role = "retrofitted" if jumps else "original"
        correct = target.logits(self.x).argmax(axis=1) == self.y
        naive, robust = correct.copy(), correct.copy()
        outcomes: dict[str, Outcome] = {}
        complete = True
        for number, trial in enumerate(self.suite.trials):
            chosen = np.flatnonzero(robust if self.suite.cascade else correct)
            self.progress(role, trial.name, len(self.x) - len(chosen))
            if not len(chosen):
                continue
            start = robust if self.suite.cascade else correct
            try:
                outcome = self._outcome(target, trial, number, chosen, start, role)
            except KeyboardInterrupt:
                complete = False
                break
            outcomes[trial.name] = outcome
            robust = robust & outcome.robust
            if trial.gradient == "exact":
                naive = naive & outcome.robust
        findings: tuple[Finding, ...] = ()
        if complete:
            findings = diagnose(target, self.x, self.y, self.threat, correct, outcomes, self.seed)
        return ModelEvaluation(
            role=role,
            model=model,
            jumps=jumps,
            provider=target.provider,
            correct=correct,
            naive=naive,
            robust=robust,
            outcomes=outcomes,
            findings=findings,
            complete=complete,
        )

    def _outcome(
        self, target: Target, trial: Trial, number: int, chosen: Array, correct: Array, role: str
    ) -> Outcome:
        threat = trial.threat_model(self.threat)
        attack, seen = trial.attack, trial.sees(target)
        if trial.source is not None:
            attack = Transfer(attack=attack, source=_source(target, trial.source))

        def run() -> AttackResult:
            return attack.run(
                seen,
                self.x[chosen],
                self.y[chosen],
                threat,
                seed=self.seed + number,
                indices=chosen,
                batch_size=self.batch_size,
                progress=lambda done: self.progress(role, trial.name, done),
            )

        if self.checkpoint is None:
            result = run()
        else:
            key = (target.model.sha256, trial.to_json(), threat.to_json(), self.seed + number)
            result = self.checkpoint.recall((*key, digest(self.x, self.y, chosen)), run)
        broken = result.correct & ~result.robust
        # A trial may look further than the threat model; only what is inside counts against it.
        # The model sees the examples rounded to its dtype, and the ball is around these.
        x = self.x[chosen].astype(result.x_adv.dtype)
        broken &= self.threat.contains(result.x_adv, x)
        robust = correct.copy()
        robust[chosen[broken]] = False
        return Outcome(trial, threat, chosen, result, robust)


def _source(target: Target, scale: float) -> Target:
    """Returns the model to transfer from; for one without jumps the model itself."""
    jumps = rewrite.jumps_of(target.model)
    if not jumps:
        return target
    original = rewrite.original_of(target.model)
    if scale == 0:
        return target.of(original)
    scaled = {
        path: [scale * each for each in jump] if isinstance(jump, tuple) else scale * jump
        for path, jump in jumps.items()
    }
    return target.of(rewrite.retrofit(original, jumps=scaled, partial=True).model)
