"""Candidates on the part to tune on: jumps -> Point, stopped where they cannot win.

first quarter of the examples, all stages --clearly worse than its rival?--> the rest, stage by
                                       stage --cannot reach its rival any more?--> Point

Its rival is the most robust finished point of at least the same clean accuracy. After the first
quarter a candidate is given up if its rival is better on it at 95%, which may be wrong; later only
if it is certain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jr_onnx.target import Target
from jr_onnx.tune.objective import Look, Objective
from jr_onnx.tune.points import Point
from jr_onnx.tune.split import Part
from jr_onnx.tune.target import Jumps, JumpTarget

Array = np.ndarray[Any, Any]
_Z95 = 1.959963984540054
_FIRST = 4  # one in so many examples is tried first


@dataclass(frozen=True)
class Judge:
    """Measures candidates.

    Attributes:
        target: the model at any jumps.
        part: the examples to tune on.
        objective: what to make large.
        max_accuracy_drop: the budget, a share of the examples.
        seed: of all random numbers.
        batch_size: most examples in one run.
    """

    target: JumpTarget
    part: Part
    objective: Objective
    max_accuracy_drop: float
    seed: int
    batch_size: int

    def correct(self, jumps: Jumps) -> Array:
        """Returns which examples are classified correctly, without attack; bool `(samples,)`."""
        predicted = self.target.at(jumps).logits(self.part.x).argmax(axis=1)
        right: Array = predicted == self.part.y
        return right

    def accuracy(self, jumps: Jumps) -> float:
        """Returns the share of them."""
        return float(self.correct(jumps).mean())

    @cached_property
    def least(self) -> float:
        """The clean accuracy that the budget asks for."""
        # A budget of 1% of 500 examples is 5 examples, however its decimals round.
        allowed = np.floor(self.max_accuracy_drop * len(self.part) + 1e-9)
        return float((self._original.sum() - allowed) / len(self.part))

    @cached_property
    def _original(self) -> Array:
        return self.correct({})

    def point(
        self,
        jumps: Jumps,
        origin: str,
        parameters: Mapping[str, float],
        *,
        rivals: Iterable[Point] = (),
    ) -> Point:
        """Attacks a candidate.

        Args:
            jumps: of the candidate.
            origin: what proposed it.
            parameters: what it was proposed as.
            rivals: finished points; none never gives up.
        """
        view = self.target.at(jumps)
        correct = self.correct(jumps)
        as_clean = [each for each in rivals if each.correct.sum() >= correct.sum()]
        rival = max(as_clean, key=lambda each: each.robustness, default=None)
        score = np.where(correct, self.objective.most, 0.0)
        pruned = self._lower(view, score, rival)
        return Point(
            dict(jumps), origin, dict(parameters), correct, score.astype(np.float32), pruned
        )

    def _lower(self, view: Target, score: Array, rival: Point | None) -> str | None:
        order = np.random.default_rng(self.seed).permutation(len(score))
        first, rest = np.split(order, [len(order) // _FIRST])
        for number in range(len(self.objective.suite.trials)):
            self._stage(view, number, np.sort(first), score)
        if rival is not None and _clearly_better(rival.score[first], score[first]):
            return f"worse on the first {len(first)} examples"
        for number, trial in enumerate(self.objective.suite.trials):
            self._stage(view, number, np.sort(rest), score)
            last = number + 1 == len(self.objective.suite.trials)
            if not last and rival is not None and rival.robustness >= score.mean():
                return f"beaten already after {trial.name}"
        return None

    def _stage(self, view: Target, number: int, rows: Array, score: Array) -> None:
        rows = rows[score[rows] > 0]
        if not len(rows):
            return
        look = Look(
            target=view,
            original=self.target.original,
            x=self.part.x[rows],
            y=self.part.y[rows],
            indices=rows,
            seed=self.seed + number,
            batch_size=self.batch_size,
        )
        trial = self.objective.suite.trials[number]
        score[rows] = np.minimum(score[rows], self.objective.lowered(trial, look))


def _clearly_better(one: Array, other: Array) -> bool:
    """Whether the mean of the first is larger at 95%, both on the same examples."""
    if len(one) < 2:
        return False
    more = one.astype(np.float64) - other
    return bool(more.mean() > _Z95 * more.std(ddof=1) / np.sqrt(len(more)))
