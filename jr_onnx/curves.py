"""Robustness over epsilon: the smallest for each example, and the share that withstands each.

minimum_epsilon    bisection for each example with an attack that needs a ball:

    0 --------- failed ====== ? ====== found ----------- epsilon of the threat model
                            the next try

robustness_curve   one evaluation for each epsilon; robust at e: broken at no epsilon up to e

A try is at the multiple of epsilon / 2^k between `failed` and `found` of the smallest k, so that
examples at different places share it, and run in one batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jr_onnx.attacks import Attack, Classifier, ThreatModel
from jr_onnx.attacks.attack import Counts, Progress
from jr_onnx.checkpoint import Checkpoint
from jr_onnx.errors import ParameterError
from jr_onnx.evaluate import Evaluation, Gain, ModelEvaluation, evaluate
from jr_onnx.evaluate import Progress as Told
from jr_onnx.findings import Finding, is_inconclusive
from jr_onnx.model import Model
from jr_onnx.preprocess import Preprocessing
from jr_onnx.statistics import wilson
from jr_onnx.suites import Suite
from jr_onnx.target import DEFAULT_BATCH_SIZE

Array = np.ndarray[Any, Any]
# Share of the examples that a wider ball may lose before the attack is called invalid.
_TOLERANCE = 0.02


@dataclass(frozen=True)
class MinimumEpsilon:
    """The smallest perturbation found of each example.

    Attributes:
        x_adv: like x: the misclassified point; x itself where there is none.
        correct: bool `(batch,)`: classified correctly without an attack.
        epsilon: float64 `(batch,)`, distance of x_adv: a misclassified point is there. 0 where the
            example was wrong already, inf where none was found.
        failed: float64 `(batch,)`, the largest ball in which the attack found nothing. That is no
            proof: a wider ball may have led to a point inside it, and then epsilon is the smaller.
        seconds: wall time.
        counts: examples run forward, and forward and backward.
    """

    x_adv: Array = field(repr=False)
    correct: Array = field(repr=False)
    epsilon: Array = field(repr=False)
    failed: Array = field(repr=False)
    seconds: float
    counts: Counts

    def robust_accuracy(self, epsilon: float) -> float:
        """Share of the examples that no point found within epsilon breaks, 0..1."""
        return float((self.epsilon > epsilon).mean())


def minimum_epsilon(
    target: Classifier,
    x: Array,
    y: Array,
    threat: ThreatModel,
    attack: Attack,
    *,
    steps: int = 10,
    seed: int = 0,
    batch_size: int = DEFAULT_BATCH_SIZE,
    progress: Progress = lambda done: None,
) -> MinimumEpsilon:
    """Bisects epsilon for each example; every point is confirmed by the attack's runner.

    A try at epsilon e finds what `attack.run` finds at e with the same seed.

    Args:
        target: the classifier.
        x: `(batch, ...)`, inside the bounds.
        y: int `(batch,)`.
        threat: its epsilon is the largest that is tried, and must be finite.
        attack: any that searches inside a ball, such as `PGD`.
        steps: tries after the first, at most: `failed` and `epsilon` are then no further apart
            than epsilon / 2^steps.
        seed: of all random numbers.
        batch_size: examples attacked together.
        progress: called with the number of examples that are finished.

    Raises:
        DataError: x is empty or outside the bounds, or the labels do not fit it.
        ParameterError: epsilon is inf, steps below 1, or the attack does not know the norm.
    """
    if not np.isfinite(threat.epsilon):
        raise ParameterError("bisection needs a finite epsilon, the largest to try: got inf")
    if steps < 1:
        raise ParameterError(f"steps must be at least 1, got {steps}")
    return _Bisection(target, x, y, threat, attack, steps, seed, batch_size, progress).run()


class _Bisection:
    """Each example's largest failure and smallest success, in units of epsilon / 2^steps."""

    def __init__(
        self,
        target: Classifier,
        x: Array,
        y: Array,
        threat: ThreatModel,
        attack: Attack,
        steps: int,
        seed: int,
        batch_size: int,
        progress: Progress,
    ) -> None:
        self._target, self._x, self._y, self._attack = target, x, y, attack
        self._threat, self._seed, self._batch_size = threat, seed, batch_size
        self._told, self._finished = progress, 0
        self._cells = 2**steps
        self._failed = np.zeros(len(x), int)
        # Beyond the last cell: nothing found yet.
        self._found = np.full(len(x), self._cells + 1)
        self._epsilon, self._x_adv = np.full(len(x), np.inf), x.astype(target.dtype)
        self._counts = np.zeros(2, int)

    def run(self) -> MinimumEpsilon:
        start = time.perf_counter()
        correct = self._try(self._cells, np.arange(len(self._x)))
        self._epsilon[~correct] = 0
        left = np.flatnonzero(correct & np.isfinite(self._epsilon))
        while len(left := left[self._found[left] - self._failed[left] > 1]):
            self._tell(left)
            tries = between(self._failed[left], self._found[left])
            for each in np.unique(tries):
                self._try(int(each), left[tries == each])
        self._tell(left)
        width = self._threat.epsilon / self._cells
        return MinimumEpsilon(
            x_adv=self._x_adv,
            correct=correct,
            epsilon=self._epsilon,
            failed=np.where(correct, self._failed * width, 0.0),
            seconds=time.perf_counter() - start,
            counts=Counts(*map(int, self._counts)),
        )

    def _try(self, cell: int, rows: Array) -> Array:
        """Attacks the examples `rows` in a ball; returns who is classified correctly."""
        radius = self._threat.epsilon * cell / self._cells
        found = self._attack.run(
            self._target,
            self._x[rows],
            self._y[rows],
            replace(self._threat, epsilon=radius),
            seed=self._seed,
            indices=rows,
            batch_size=self._batch_size,
        )
        self._counts += found.counts
        broken = found.correct & ~found.robust
        self._failed[rows[found.robust]] = cell
        hit = rows[broken]
        self._x_adv[hit], self._epsilon[hit] = found.x_adv[broken], found.distance[broken]
        # The point may lie well inside the ball: no need to look between.
        inside = np.ceil(self._epsilon[hit] / self._threat.epsilon * self._cells).astype(int)
        self._found[hit] = np.clip(inside, self._failed[hit] + 1, cell)
        return found.correct

    def _tell(self, left: Array) -> None:
        finished = len(self._x) - len(left)
        self._told(finished - self._finished)
        self._finished = finished


def between(low: Array, high: Array) -> Array:
    """Returns the integers strictly between that most powers of two divide.

    >>> between(np.array([0, 3, 5]), np.array([1024, 9, 8]))
    array([512,   8,   6])

    Args:
        low: int `(n,)`, at least 0.
        high: int `(n,)`, at least low + 2.
    """
    chosen, unit = low + 1, 1
    while True:
        unit *= 2
        coarser = (low // unit + 1) * unit
        fits = coarser < high
        if not fits.any():
            return chosen
        chosen = np.where(fits, coarser, chosen)


@dataclass(frozen=True)
class ModelCurve:
    """One model over all epsilons.

    Attributes:
        first: its evaluation at the smallest epsilon.
        naive: bool `(epsilons, samples)`: no attack on its own gradient broke it up to there.
        robust: the same, of all attacks.
        missed: int `(epsilons,)`, examples broken at a smaller epsilon, and not again at this one.
    """

    first: ModelEvaluation
    naive: Array = field(repr=False)
    robust: Array = field(repr=False)
    missed: Array = field(repr=False)

    def to_json(self, epsilons: Sequence[float]) -> dict[str, Any]:
        """Returns the entry of `models` in the result."""
        return {
            **self.first.head_json(),
            "points": [
                {
                    "epsilon": epsilon,
                    "naive_accuracy": float(naive.mean()),
                    "naive_accuracy_interval": list(wilson(naive)),
                    "robust_accuracy": float(robust.mean()),
                    "robust_accuracy_interval": list(wilson(robust)),
                    "missed": int(missed),
                }
                for epsilon, naive, robust, missed in zip(
                    epsilons, self.naive, self.robust, self.missed, strict=True
                )
            ],
        }


class CurveInterrupted(KeyboardInterrupt):
    """Ctrl-C, with what was finished before it.

    Attributes:
        partial: the curve over the epsilons that were finished; None if none was.
    """

    def __init__(self, partial: RobustnessCurve | None) -> None:
        super().__init__()
        self.partial = partial


@dataclass(frozen=True)
class RobustnessCurve:
    """Accuracy over epsilon, falling by construction: what broke an example stays in the ball.

    Attributes:
        epsilons: ascending.
        evaluations: one for each epsilon.
        models: the original first, where there are two.
        complete: whether these are all the epsilons that were asked for.
    """

    epsilons: tuple[float, ...]
    evaluations: tuple[Evaluation, ...] = field(repr=False)
    models: tuple[ModelCurve, ...] = field(repr=False)
    complete: bool = True

    @classmethod
    def of(cls, evaluations: Sequence[Evaluation], *, complete: bool = True) -> RobustnessCurve:
        """Takes evaluations at one epsilon each, ascending."""
        epsilons = tuple(each.threat.epsilon for each in evaluations)
        roles = zip(*(each.models for each in evaluations), strict=True)
        return cls(epsilons, tuple(evaluations), tuple(map(_curve, roles)), complete)

    @property
    def inconclusive(self) -> bool:
        """Whether a finding says that the figures mean nothing: neither a pass nor a fail."""
        return is_inconclusive(self.findings)

    def gains(self, kind: str) -> tuple[Gain, ...]:
        """Returns the change from the original at each epsilon, none without a comparison.

        Args:
            kind: `naive` or `robust`.
        """
        whole = all(evaluation.naive_gain for evaluation in self.evaluations)
        if len(self.models) < 2 or not whole:
            return ()
        first, second = (getattr(model, kind) for model in self.models)
        return tuple(Gain.of(*pair) for pair in zip(first, second, strict=True))

    @property
    def adaptive(self) -> bool:
        """Whether attackers are among the attacks who know of the jump."""
        return self.evaluations[0].suite.adaptive

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What makes the figures doubtful: of each evaluation, and that a wider ball lost some."""
        seen: dict[Finding, list[float]] = {}
        for epsilon, evaluation in zip(self.epsilons, self.evaluations, strict=True):
            for finding in evaluation.findings:
                seen.setdefault(finding, []).append(epsilon)
        found = [
            replace(finding, message=f"{finding.message} (at epsilon {_listed(where)})")
            for finding, where in seen.items()
        ]
        for model in self.models:
            lost = model.missed > _TOLERANCE * len(model.first.correct)
            for epsilon, missed in zip(
                np.array(self.epsilons)[lost], model.missed[lost], strict=True
            ):
                found.append(
                    Finding(
                        "JR005",
                        "error",
                        f"{model.first.model.name}: the attacks at epsilon {epsilon:g} leave "
                        f"{missed} examples that a smaller epsilon broke: they are too weak",
                    )
                )
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """Returns the result, schema `jr-onnx/curve/1`."""
        first = self.evaluations[0]
        naive, robust = self.gains("naive"), self.gains("robust")
        return {
            "schema": "jr-onnx/curve/1",
            "norm": first.threat.norm,
            "bounds": list(first.threat.bounds),
            "epsilons": list(self.epsilons),
            "suite": first.suite.name,
            "seed": first.seed,
            "samples": len(first.x),
            "complete": self.complete,
            "inconclusive": self.inconclusive,
            "mean": first.preprocessing.mean,
            "std": first.preprocessing.std,
            "models": [model.to_json(self.epsilons) for model in self.models],
            "gain": {
                "naive": [gain.to_json() for gain in naive],
                "adaptive": [gain.to_json() for gain in robust] if self.adaptive else [],
            },
            "findings": [finding.to_json() for finding in self.findings],
        }


def robustness_curve(
    model: Model,
    x: Array,
    y: Array,
    *,
    threat: ThreatModel,
    epsilons: Sequence[float],
    suite: str | Suite = "naive",
    baseline: Model | None = None,
    preprocessing: Preprocessing | None = None,
    device: str = "auto",
    seed: int = 0,
    batch_size: int = DEFAULT_BATCH_SIZE,
    checkpoint: Checkpoint | None = None,
    progress: Told = lambda role, trial, done: None,
    output: str | None = None,
    keep_examples: bool = True,
    on_finding: Callable[[Finding], None] = lambda finding: None,
) -> RobustnessCurve:
    """Evaluates at each epsilon, of the baseline too where one is given.

    Args:
        model: a classifier with one input.
        x: `(samples, ...)`, inside the bounds.
        y: int `(samples,)`.
        threat: norm and bounds; its epsilon is not used.
        epsilons: in any order; each is evaluated once.
        suite: a name in `SUITES`, or trials of one's own.
        baseline: the model before the retrofit.
        preprocessing: its mean and std come before the models, in units of x.
        device: `auto`, `cpu` or `cuda`.
        seed: of all random numbers.
        batch_size: most examples in one run.
        checkpoint: keeps finished batches, and gives back those that are finished already.
        progress: told role, trial with its epsilon, and the number of examples just finished.
        output: the output with the logits; None for the only one.
        keep_examples: as `evaluate` takes it.
        on_finding: told what is wrong with models and data before the first attack.

    Raises:
        ParameterError: no epsilon, one that is inf or makes no sense, or no such suite.
        DataError: the data does not fit the model or the bounds.
        CurveInterrupted: Ctrl-C; it carries what was finished.
    """
    rising = tuple(sorted({float(epsilon) for epsilon in epsilons}))
    if not rising or not np.isfinite(rising).all():
        raise ParameterError(f"a curve needs one finite epsilon or more, got {list(epsilons)}")
    threats = [replace(threat, epsilon=epsilon) for epsilon in rising]

    def at(each: ThreatModel) -> Evaluation:
        return evaluate(
            model,
            x,
            y,
            threat=each,
            suite=suite,
            baseline=baseline,
            preprocessing=preprocessing,
            device=device,
            seed=seed,
            batch_size=batch_size,
            checkpoint=checkpoint,
            progress=lambda role, trial, done: progress(role, f"{trial} {each.epsilon:g}", done),
            output=output,
            keep_examples=keep_examples,
            on_finding=tell,
        )

    told: set[Finding] = set()

    def tell(finding: Finding) -> None:
        if finding not in told:  # each epsilon says it again
            told.add(finding)
            on_finding(finding)

    evaluations: list[Evaluation] = []
    try:
        for each in threats:
            evaluations.append(at(each))
    except KeyboardInterrupt as stop:
        done = RobustnessCurve.of(evaluations, complete=False) if evaluations else None
        raise CurveInterrupted(done) from stop
    return RobustnessCurve.of(evaluations)


def _curve(models: tuple[ModelEvaluation, ...]) -> ModelCurve:
    naive, robust = (np.stack([getattr(model, kind) for model in models]) for kind in _KINDS)
    up_to = np.logical_and.accumulate(robust)
    missed = (robust & ~up_to).sum(axis=1)
    return ModelCurve(models[0], np.logical_and.accumulate(naive), up_to, missed)


_KINDS = ("naive", "robust")


def _listed(epsilons: Sequence[float]) -> str:
    return ", ".join(f"{epsilon:g}" for epsilon in epsilons)
