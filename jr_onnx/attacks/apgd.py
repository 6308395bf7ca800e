"""Auto-PGD (Croce and Hein, arXiv:2003.01690; l1: arXiv:2103.01208).

z_t     = project(x_t + step * direction(gradient))
x_{t+1} = project(x_t + 0.75 (z_t - x_t) + 0.25 (x_t - x_{t-1}))

At checkpoints the step is halved and the best point so far taken up again, where the loss rose in
too few of the steps, or its best did not since the last checkpoint. In l1 there is no momentum, and
the checkpoints adapt the number of elements that a step moves to the number moved so far.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from jr_onnx.attacks.attack import Attack, Classifier
from jr_onnx.attacks.batch import (
    Goal,
    check_classes,
    check_classes_of,
    check_loss,
    climb,
    finer,
    generators,
    in_turn,
    radius,
    reseeded,
)
from jr_onnx.attacks.l1_box import project_l1_box
from jr_onnx.attacks.nearest import check_at_least, ranked_rivals
from jr_onnx.attacks.threat import NORMS, ThreatModel, per_example
from jr_onnx.errors import ParameterError

Array = np.ndarray[Any, Any]

# l1: epsilons, in units of the ball's, and the shares of the steps they are given.
_L1_PHASES = ((3, 0.3), (2, 0.3), (1, 0.4))


@dataclass(frozen=True, kw_only=True)
class APGD(Attack):
    """PGD that chooses its step size; the defaults are AutoAttack's.

    Attributes:
        steps: gradients of each restart.
        restarts: random starts, each on what the ones before did not break.
        loss: `cross_entropy` (APGD-CE), `dlr` (APGD-DLR, 3 classes), `margin`, `cw` or `cw:K`.
        step_size: of the first steps, in units of epsilon; 2, and 1 in l1, if None.
        rho: the step is halved where the loss rose in no more than this share of the steps.
        momentum: weight of the new step; the rest is the weight of the last one.

    References:
        Croce and Hein: Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
        Parameter-free Attacks (arXiv:2003.01690); Mind the Box (arXiv:2103.01208).
    """

    name = "apgd"
    steps: int = 100
    restarts: int = 1
    loss: str = "cross_entropy"
    step_size: float | None = None
    rho: float = 0.75
    momentum: float = 0.75

    def __post_init__(self) -> None:
        check_at_least(1, steps=self.steps, restarts=self.restarts)
        self._check_loss()
        if self.step_size is not None and not 0 < self.step_size < np.inf:
            raise ParameterError(f"step_size must be > 0, got {self.step_size}")
        for option in ("rho", "momentum"):
            if not 0 < getattr(self, option) <= 1:
                raise ParameterError(f"{option} must be in (0, 1], got {getattr(self, option)}")

    def _check_loss(self) -> None:
        check_loss(self.loss)

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
        """Returns the first misclassified iterate of each example, or its last.

        Raises:
            ParameterError: epsilon is inf, or the loss needs more classes.
        """
        radius(self.name, threat)

        def run(number: int, targets: Array | None, rows: Array) -> Array:
            start = _start(x[rows], threat, reseeded(seed, number), indices[rows])
            aims = None if targets is None else targets[rows]
            return self._run(target, x[rows], y[rows], threat, start, aims)

        searches: Iterator[Callable[[Array], Array]] = (
            partial(run, number, targets)
            for number, targets in enumerate(self._targets(target, x, y))
        )
        return in_turn(target, x, Goal(y), searches)

    def _targets(self, target: Classifier, x: Array, y: Array) -> list[Array | None]:
        """Returns the targets of each run, None for no target."""
        check_classes_of(self.name, self.loss, target, x)
        return [None] * self.restarts

    def _run(
        self,
        target: Classifier,
        x: Array,
        y: Array,
        threat: ThreatModel,
        start: Array,
        targets: Array | None,
    ) -> Array:
        run = partial(climb, target, x, Goal(y), loss=self.loss, targets=targets)
        x, start = finer(x), finer(start)
        if threat.norm != "l1":
            ascent: _Ascent = _Momentum(self, x, threat, start, self.steps)
            return run(threat, ascent, start=start, steps=self.steps)
        left = self.steps
        for factor, share in _L1_PHASES:
            last = factor == 1
            steps = left if last else min(math.ceil(share * self.steps), left - 1)
            wider = replace(threat, epsilon=factor * threat.epsilon)
            start = x + project_l1_box(
                start.astype(np.float64) - x, x, wider.epsilon, threat.bounds
            )
            start = wider.project(start, x)
            ascent = _Sparse(self, x, wider, start, steps)
            end = run(wider, ascent, start=start, steps=steps, leave=last)
            start, left = (ascent.best if steps else start), left - steps
        return end


@dataclass(frozen=True, kw_only=True)
class APGDDLR(APGD):
    """APGD on the difference of logits ratio, which no rescaling of the logits flattens."""

    name = "apgd-dlr"
    loss: str = "dlr"


@dataclass(frozen=True, kw_only=True)
class APGDTargeted(APGD):
    """APGD towards one class after another, the likeliest first; needs 4 classes.

    Attributes:
        targets: at most so many classes; 9 in AutoAttack.
        loss: `targeted_dlr`, or `logit_difference`, which 2 classes are enough for.
    """

    name = "apgd-t"
    loss: str = "targeted_dlr"
    targets: int = 9

    def _check_loss(self) -> None:
        check_at_least(1, targets=self.targets)
        if self.loss not in ("targeted_dlr", "logit_difference"):
            raise ParameterError(
                f"loss must be targeted_dlr or logit_difference, got {self.loss!r}"
            )

    def _targets(self, target: Classifier, x: Array, y: Array) -> list[Array | None]:
        # A model that ends in softmax may round the logits of far rivals to the same 0.
        z = target.differentiate(x, y, loss="margin").logits
        check_classes(self.name, self.loss, z.shape[1], "the loss logit_difference")
        rivals = ranked_rivals(z, y, self.targets)
        return [column for column in rivals.T for _ in range(self.restarts)]


def _start(x: Array, threat: ThreatModel, seed: int, indices: Array) -> Array:
    if threat.norm != "l1":
        return threat.random_start(x, seed, indices)
    # Sparse: the nearest points to noise far outside the ball.
    noise = np.stack([rng.standard_normal(x.shape[1:]) for rng in generators(seed, indices)])
    wide = _L1_PHASES[0][0] * threat.epsilon
    moved: Array = x + project_l1_box(noise * np.ptp(threat.bounds), x, wide, threat.bounds)
    return moved


class _Ascent(ABC):
    """What APGD knows of each example, and its next point.

    Attributes:
        best: like x, the points of highest loss.
    """

    def __init__(
        self, options: APGD, x: Array, threat: ThreatModel, start: Array, steps: int, step: float
    ) -> None:
        self._options, self._x, self._threat, self._steps = options, x, threat, steps
        self._largest = step * threat.epsilon
        self._step = np.full(len(x), self._largest)
        self.best, self._best_gradient = start.copy(), np.zeros(x.shape)
        self._best_loss = np.full(len(x), -np.inf)
        # No step leads to the start: its loss has not risen.
        self._loss, self._rose = np.full(len(x), np.inf), np.zeros(len(x))
        self._checkpoints = self._plan()
        self._taken = 0

    def __call__(self, rows: Array, points: Array, loss: Array, gradient: Array) -> Array:
        higher = loss > self._best_loss[rows]
        found = rows[higher]
        self.best[found], self._best_gradient[found] = points[higher], gradient[higher]
        self._best_loss[found] = loss[higher]
        self._rose[rows] += loss > self._loss[rows]
        self._loss[rows] = loss
        if self._taken in self._checkpoints:
            back = self._adapt(rows, self._checkpoints[self._taken])
            points = np.where(per_example(back, points), self.best[rows], points)
            gradient = np.where(per_example(back, points), self._best_gradient[rows], gradient)
        self._taken += 1
        return self._move(rows, points.astype(np.float64), gradient.astype(np.float64))

    @abstractmethod
    def _plan(self) -> dict[int, int]:
        """Returns the checkpoints: steps taken -> steps since the last checkpoint."""

    @abstractmethod
    def _adapt(self, rows: Array, since: int) -> Array:
        """Changes step sizes at a checkpoint; returns who goes back to the best point."""

    @abstractmethod
    def _move(self, rows: Array, points: Array, gradient: Array) -> Array:
        """Returns the next points."""


class _Momentum(_Ascent):
    """In linf and l2."""

    def __init__(
        self, options: APGD, x: Array, threat: ThreatModel, start: Array, steps: int
    ) -> None:
        super().__init__(options, x, threat, start, steps, options.step_size or 2.0)
        self._before = start.astype(np.float64)
        self._halved = np.ones(len(x), bool)
        self._best_then = np.full(len(x), -np.inf)

    def _plan(self) -> dict[int, int]:
        # 22% of the steps, then less and less by 3%, not below 6%.
        part, least, less = (max(int(share * self._steps), 1) for share in (0.22, 0.06, 0.03))
        plan, at = {}, part
        while at < self._steps:
            plan[at] = part
            part = max(part - less, least)
            at += part
        return plan

    def _adapt(self, rows: Array, since: int) -> Array:
        stuck = np.logical_and(~self._halved[rows], self._best_then[rows] >= self._best_loss[rows])
        halved = np.logical_or(self._rose[rows] <= self._options.rho * since, stuck)
        self._step[rows[halved]] /= 2
        self._halved[rows], self._best_then[rows] = halved, self._best_loss[rows]
        self._rose[rows] = 0
        return halved

    def _move(self, rows: Array, points: Array, gradient: Array) -> Array:
        x, new = self._x[rows], self._options.momentum if self._taken > 1 else 1.0
        step = per_example(self._step[rows], points)
        along = points + step * NORMS[self._threat.norm].direction(gradient)
        along = self._threat.project(along, x).astype(np.float64)
        moved = points + new * (along - points) + (1 - new) * (points - self._before[rows])
        self._before[rows] = points
        return moved


class _Sparse(_Ascent):
    """In l1: a step moves the elements with the largest gradients, by equal amounts."""

    def __init__(
        self, options: APGD, x: Array, threat: ThreatModel, start: Array, steps: int
    ) -> None:
        super().__init__(options, x, threat, start, steps, options.step_size or 1.0)
        self._moved = self._count(start, np.arange(len(x)))
        self._few = self._moved / 1.5

    def _count(self, points: Array, rows: Array) -> Array:
        changed: Array = (points != self._x[rows]).reshape(len(rows), -1).sum(axis=1)
        return changed.astype(np.float64)

    def _plan(self) -> dict[int, int]:
        since = max(int(0.04 * self._steps), 1)
        return dict.fromkeys(range(since, self._steps, since), since)

    def _adapt(self, rows: Array, since: int) -> Array:
        moved = self._count(self.best[rows], rows)
        sparser = moved < 0.95 * self._moved[rows]
        shorter = np.maximum(self._step[rows] / 1.5, self._largest / 10)
        self._step[rows] = np.where(sparser, self._largest, shorter)
        self._moved[rows], self._few[rows] = moved, moved / 1.5
        return sparser

    def _move(self, rows: Array, points: Array, gradient: Array) -> Array:
        x = self._x[rows]
        size = np.abs(gradient.reshape(len(rows), -1))
        falling = -np.sort(-size, axis=1)
        # Rounded up, but for the last two elements, which would be moving for ever.
        few = np.where(self._few[rows] < 2, 1, np.ceil(self._few[rows])).astype(int)
        last = np.clip(few, 1, size.shape[1]) - 1
        least = np.take_along_axis(falling, last[:, None], axis=1)[:, 0]
        chosen = np.sign(gradient) * (np.abs(gradient) >= per_example(least, gradient))
        count = np.maximum(NORMS["l1"].distance(chosen), 1)
        moved = points + per_example(self._step[rows] / count, points) * chosen
        threat = self._threat
        nearest: Array = x + project_l1_box(moved - x, x, threat.epsilon, threat.bounds)
        return nearest
