"""Models, data, attacks -> accuracies that can be defended.

An example counts as robust if no attack broke it; intervals are Wilson's, comparisons are paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jr_onnx import rewrite
from jr_onnx.attacks import NORMS, PGD, Attack, AttackResult, ThreatModel
from jr_onnx.attacks.attack import check_examples
from jr_onnx.errors import DataError, ParameterError
from jr_onnx.model import Model
from jr_onnx.target import DEFAULT_BATCH_SIZE, Target

Array = np.ndarray[Any, Any]
# told the role of the model, the attack, and how many examples more are finished
Progress = Callable[[str, str, int], None]
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class ModelEvaluation:
    """One model under all attacks.

    Attributes:
        role: `original` or `retrofitted`.
        model: the model.
        jumps: effective jump by site path, empty for an original.
        provider: the execution provider that ran it.
        correct: bool `(samples,)`, without attack.
        robust: bool `(samples,)`, the worst case over all attacks.
        attacks: what each attack found, by name.
    """

    role: str
    model: Model = field(repr=False)
    jumps: dict[str, rewrite.Jump]
    provider: str
    correct: Array = field(repr=False)
    robust: Array = field(repr=False)
    attacks: dict[str, AttackResult] = field(repr=False)

    @property
    def clean_accuracy(self) -> float:
        """Share classified correctly without attack, 0..1."""
        return float(self.correct.mean())

    @property
    def robust_accuracy(self) -> float:
        """Share that no attack broke, 0..1."""
        return float(self.robust.mean())


@dataclass(frozen=True)
class Evaluation:
    """One or two models on the same examples.

    Attributes:
        models: the original first, where there are two.
        threat: the threat model.
        seed: of all random numbers.
        x: the examples, for relative distances.
    """

    models: tuple[ModelEvaluation, ...]
    threat: ThreatModel
    seed: int
    x: Array = field(repr=False)

    @property
    def naive_gain(self) -> float | None:
        """Robust accuracy of the second model minus the first's, -1..1; None for one model.

        Naive: measured with plain gradient attacks, which a discontinuity such as the jump can
        mislead (gradient masking).
        """
        if len(self.models) < 2:
            return None
        first, second = self.models
        return second.robust_accuracy - first.robust_accuracy

    @property
    def p_value(self) -> float | None:
        """McNemar's exact test of the gain, paired per example; None for one model."""
        if len(self.models) < 2:
            return None
        first, second = self.models
        lost = int((first.robust & ~second.robust).sum())
        won = int((second.robust & ~first.robust).sum())
        return mcnemar(lost, won)

    def to_json(self) -> dict[str, Any]:
        """Returns the result, schema `jr-onnx/evaluation/1`."""
        return {
            "schema": "jr-onnx/evaluation/1",
            "threat": self.threat.to_json(),
            "seed": self.seed,
            "samples": len(self.x),
            "models": [self._model_json(model) for model in self.models],
            "gain": {"naive": self.naive_gain, "adaptive": None, "p_value": self.p_value},
            "findings": [],
        }

    def _model_json(self, model: ModelEvaluation) -> dict[str, Any]:
        return {
            "role": model.role,
            "path": str(model.model.path) if model.model.path else None,
            "sha256": model.model.sha256,
            "provider": model.provider,
            "jumps": model.jumps,
            "clean_accuracy": model.clean_accuracy,
            "robust_accuracy": model.robust_accuracy,
            "robust_accuracy_interval": list(wilson(model.robust)),
            "attacks": [self._attack_json(name, found) for name, found in model.attacks.items()],
        }

    def _attack_json(self, name: str, found: AttackResult) -> dict[str, Any]:
        broken = found.correct & ~found.robust
        distance = found.distance[broken]
        size = NORMS[self.threat.norm].distance(self.x[broken].astype(np.float64))
        return {
            "name": name,
            "norm": self.threat.norm,
            "epsilon": self.threat.epsilon,
            "gradient": "exact",
            "robust_accuracy": float(found.robust.mean()),
            "mean_distance": float(distance.mean()) if len(distance) else None,
            "max_distance": float(distance.max()) if len(distance) else None,
            "mean_relative_distance": _mean_ratio(distance, size),
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
    attacks: Sequence[Attack] = (PGD(),),
    baseline: Model | None = None,
    device: str = "auto",
    seed: int = 0,
    batch_size: int = DEFAULT_BATCH_SIZE,
    progress: Progress = lambda role, attack, done: None,
) -> Evaluation:
    """Measures clean and robust accuracy, of the baseline too where one is given.

    Args:
        model: a classifier with one input and one output (the logits).
        x: `(samples, ...)`, inside the threat model's bounds.
        y: int `(samples,)`.
        threat: norm, epsilon and bounds, in units of x.
        attacks: what to try; an example is robust if it withstands all.
        baseline: the model before the retrofit.
        device: `auto`, `cpu` or `cuda`.
        seed: of all random numbers.
        batch_size: most examples in one run.
        progress: told role, attack, and the number of examples just finished.

    Raises:
        DataError: the data does not fit the model or the bounds.
        ParameterError: no attack, or two of the same name.
        ModelError: the model is no such classifier, or has no gradient.
        SessionError: onnxruntime is not there, or refuses the model or the device.
    """
    check_examples(x, y, threat)
    names = [attack.name for attack in attacks]
    if not names or len(set(names)) < len(names):
        raise ParameterError(f"attacks must be one or more with different names, got {names}")
    targets = [
        Target(part, device=device, batch_size=batch_size)
        for part in ((baseline, model) if baseline else (model,))
    ]
    for target in targets:
        check_fit(target, x, y)
    evaluated = tuple(
        _evaluate_one(target, x, y, threat, attacks, seed, batch_size, progress)
        for target in targets
    )
    return Evaluation(evaluated, threat, seed, x)


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
    classes = logits.shape[1]
    if len(y) and int(y.max()) >= classes:
        at = int(y.argmax())
        raise DataError(
            f"label {int(y[at])} at index {at} is out of range: {target.model.name} has {classes} "
            f"classes (0..{classes - 1}). Do the labels start at 1?"
        )


def wilson(successes: Array) -> tuple[float, float]:
    """Returns the 95% Wilson score interval of a share.

    Args:
        successes: bool `(samples,)`.

    References:
        Wilson: Probable Inference, the Law of Succession, and Statistical Inference (1927).
    """
    n, share = len(successes), float(successes.mean())
    spread = _Z95**2 / n
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(lost: int, won: int) -> float:
    """Returns the two-sided p-value of McNemar's exact test.

    >>> mcnemar(0, 0), mcnemar(1, 7)
    (1.0, 0.0703125)

    Args:
        lost: pairs in which only the first succeeds.
        won: pairs in which only the second does.

    References:
        McNemar: Note on the sampling error of the difference between correlated proportions (1947).
    """
    total = lost + won
    tail = sum(math.comb(total, k) for k in range(min(lost, won) + 1))
    return min(1.0, float(2 * tail / 2**total))


def _evaluate_one(
    target: Target,
    x: Array,
    y: Array,
    threat: ThreatModel,
    attacks: Sequence[Attack],
    seed: int,
    batch_size: int,
    progress: Progress,
) -> ModelEvaluation:
    jumps = rewrite.jumps_of(target.model)
    role = "retrofitted" if jumps else "original"
    results = {
        attack.name: attack.run(
            target,
            x,
            y,
            threat,
            seed=seed,
            batch_size=batch_size,
            progress=lambda done, name=attack.name: progress(role, name, done),  # type: ignore[misc]
        )
        for attack in attacks
    }
    found = list(results.values())
    return ModelEvaluation(
        role=role,
        model=target.model,
        jumps=jumps,
        provider=target.provider,
        correct=found[0].correct,
        robust=np.logical_and.reduce([result.robust for result in found]),
        attacks=results,
    )


def _mean_ratio(distance: Array, size: Array) -> float | None:
    known = size > 0
    return float((distance[known] / size[known]).mean()) if known.any() else None
