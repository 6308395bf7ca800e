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
from jr_onnx.attacks import ThreatModel
from jr_onnx.attacks.attack import check_examples
from jr_onnx.checkpoint import Checkpoint
from jr_onnx.errors import DataError
from jr_onnx.findings import Finding, is_inconclusive, of_the_baseline, of_the_threat
from jr_onnx.model import Model
from jr_onnx.preprocess import Preprocessing, normalized
from jr_onnx.runs import Job, ModelRun
from jr_onnx.runs import Progress as Progress
from jr_onnx.statistics import mcnemar, paired_interval, wilson
from jr_onnx.suites import Outcome, Suite, find_suite
from jr_onnx.target import DEFAULT_BATCH_SIZE, Target, check_classes

Array = np.ndarray[Any, Any]
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
        complete: whether it went through the whole suite; its figures are too good if not.
        left_out: names of the trials that could not be run: no gradient, nothing to transfer from.
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
    left_out: tuple[str, ...] = ()

    @classmethod
    def of(cls, run: ModelRun) -> ModelEvaluation:
        """Takes what a model's run has come to."""
        return cls(
            role=run.role,
            model=run.model,
            jumps=run.jumps,
            provider=run.target.provider,
            correct=run.correct,
            naive=run.naive,
            robust=run.robust,
            outcomes=run.outcomes,
            findings=run.findings,
            complete=run.complete,
            left_out=run.left_out,
        )

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
        partial: the evaluation as far as it went, of every model; its figures are too good, and
            it has no gain.
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
        x: the examples.
        preprocessing: its mean and std came before the models.
        doubts: what makes the comparison or the threat model doubtful.
    """

    models: tuple[ModelEvaluation, ...]
    threat: ThreatModel
    suite: Suite
    seed: int
    x: Array = field(repr=False)
    preprocessing: Preprocessing
    doubts: tuple[Finding, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every model went through the whole suite."""
        return all(model.complete for model in self.models)

    @property
    def inconclusive(self) -> bool:
        """Whether a finding says that the figures mean nothing: neither a pass nor a fail."""
        return is_inconclusive(self.findings)

    @cached_property
    def naive_gain(self) -> Gain | None:
        """Gain under attacks on the model's own gradient; None where there is no comparison.

        That is, for one model, after an interruption, where trials were left out, or the baseline
        is not the original. A discontinuity such as the jump can mislead these attacks (gradient
        masking).
        """
        return self._gain("naive")

    @cached_property
    def adaptive_gain(self) -> Gain | None:
        """Gain in the worst case; None as `naive_gain`, or where the suite is not adaptive."""
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
        found = [*self.doubts]
        found += [finding for model in self.models for finding in model.findings]
        changed = "; ".join(self.suite.changed)
        if changed:
            found.append(Finding("JR005", "warning", f"suite {self.suite.name}: {changed}"))
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
        whole = all(model.complete and not model.left_out for model in self.models)
        wrong = any(finding.level == "error" for finding in self.doubts)
        if len(self.models) < 2 or not whole or wrong:
            return None
        first, second = (getattr(model, kind) for model in self.models)
        return Gain.of(first, second)

    def to_json(self) -> dict[str, Any]:
        """Returns the result, schema `jr-onnx/evaluation/1`; the command line adds `tool`."""
        naive, adaptive = self.naive_gain, self.adaptive_gain
        return {
            "schema": "jr-onnx/evaluation/1",
            "threat": self.threat.to_json(),
            "suite": self.suite.name,
            "complete": self.complete,
            "inconclusive": self.inconclusive,
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
            "complete": model.complete,
            "left_out": list(model.left_out),
            "naive_accuracy": model.naive_accuracy,
            "robust_accuracy": model.robust_accuracy,
            "robust_accuracy_interval": list(wilson(model.robust)),
            "attacks": [each.to_json() for each in model.outcomes.values()],
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
    output: str | None = None,
    keep_examples: bool = True,
    on_finding: Callable[[Finding], None] = lambda finding: None,
) -> Evaluation:
    """Measures clean and robust accuracy, of the baseline too where one is given.

    Both models get the same trials with the same budgets and seeds, one trial after the other, so
    that an interruption leaves both with the same trials. Of a model without an input gradient
    only the trials that need none are run, and a finding says so.

    Args:
        model: a classifier with one input.
        x: `(samples, ...)`, inside the threat model's bounds; a `numpy.memmap` is read part by
            part.
        y: int `(samples,)`.
        threat: norm, epsilon and bounds, in units of x.
        suite: a name in `SUITES`, or trials of one's own.
        baseline: the model before the retrofit; that it is, is checked.
        preprocessing: its mean and std come before the models, in units of x.
        device: `auto`, `cpu` or `cuda`.
        seed: of all random numbers.
        batch_size: most examples in one run.
        checkpoint: keeps finished batches, and gives back those that are finished already.
        progress: told role, trial, and the number of examples just finished.
        output: the output with the logits; None for the only one.
        keep_examples: whether the results have the adversarial examples, as large as x for each
            trial; without them a large x needs no memory but for a part of it.
        on_finding: told what is wrong with models and data before the first attack.

    Raises:
        DataError: the data does not fit the model or the bounds.
        ParameterError: no such suite.
        ModelError: the model is no such classifier, or has no gradient and the suite needs one.
        SessionError: onnxruntime is not there, or refuses the model or the device.
        EvaluationInterrupted: Ctrl-C; it carries what was finished.
    """
    check_examples(x, y, threat)
    steps = preprocessing or Preprocessing()
    parts, targets = [baseline, model] if baseline else [model], []
    for part in parts:
        seen = normalized(part, steps.mean, steps.std, layout=steps.layout)
        targets.append(Target(seen, device=device, batch_size=batch_size, output=output))
    classes = min(check_fit(target, x, y) for target in targets)
    suite = find_suite(suite, threat.norm, epsilon=threat.epsilon, classes=classes)
    job = Job(x, y, threat, suite, seed, batch_size, checkpoint, keep_examples, progress)
    doubts = of_the_threat(threat)
    if baseline:
        doubts += of_the_baseline(baseline, model)
    runs = [
        ModelRun(job, part, target, judges=part is parts[0])
        for part, target in zip(parts, targets, strict=True)
    ]
    for finding in (*doubts, *(finding for run in runs for finding in run.findings)):
        on_finding(finding)
    try:
        for number, trial in enumerate(suite.trials):
            for run in runs:
                run.attempt(number, trial)
        for run in runs:
            run.diagnose()
    except KeyboardInterrupt as stop:
        raise EvaluationInterrupted(_evaluation(job, runs, steps, doubts)) from stop
    return _evaluation(job, runs, steps, doubts)


def _evaluation(
    job: Job, runs: list[ModelRun], steps: Preprocessing, doubts: tuple[Finding, ...]
) -> Evaluation:
    models = tuple(map(ModelEvaluation.of, runs))
    return Evaluation(models, job.threat, job.suite, job.seed, job.x, steps, doubts)


def check_fit(target: Target, x: Array, y: Array) -> int:
    """Runs one example and compares shapes and labels, before any long work.

    Returns:
        How many classes the model has.

    Raises:
        DataError: x or y does not fit the model.
    """
    logits = target.logits(x[:1])
    if logits.ndim != 2:
        raise DataError(
            f"{target.model.name}: the output has shape {logits.shape} for one example; expected "
            "(1, classes)"
        )
    classes = logits.shape[1]
    if classes < 2:
        raise DataError(
            f"{target.model.name}: has one output value an example, so there is no rival class to "
            "attack towards. Export two logits: (0, z) for a sigmoid of z"
        )
    check_classes(y, classes, target.model.name)
    return int(classes)
