"""What the tuner makes large: a score of each example, as low as the attacks can make it.

adaptive   1 for an example that no attack of a suite breaks that knows of the jump
naive      1 for an example that PGD on the model's own gradient does not break
distance   the smallest epsilon found by two attacks, one of which knows of the jump

Each is a cascade: a stage lowers the scores of the examples that are left, so that the sum so far
is an upper bound of what it will be.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from jr_onnx.attacks import PGD, ThreatModel, Transfer
from jr_onnx.curves import minimum_epsilon
from jr_onnx.errors import ParameterError
from jr_onnx.suites import Suite, Trial, find_suite
from jr_onnx.target import Target

Array = np.ndarray[Any, Any]
OBJECTIVES = ("adaptive", "naive", "distance")
# Tries of the bisection: epsilon is known to 1/64 of the threat model's.
_BISECTIONS = 6


@dataclass(frozen=True)
class Look:
    """A candidate as an attack sees it, and the examples to try.

    Attributes:
        target: the candidate.
        original: the model without a jump, to transfer from.
        x: `(batch, ...)`.
        y: int `(batch,)`, right without an attack.
        indices: int `(batch,)`, what identifies the examples for random numbers.
        seed: of all random numbers.
        batch_size: examples attacked together.
    """

    target: Target
    original: Target
    x: Array
    y: Array
    indices: Array
    seed: int
    batch_size: int


@dataclass(frozen=True)
class Objective(ABC):
    """Scores, stage by stage.

    Attributes:
        name: in `OBJECTIVES`.
        threat: the threat model.
        suite: its trials are the stages.
    """

    name: str
    threat: ThreatModel
    suite: Suite

    @property
    @abstractmethod
    def most(self) -> float:
        """The score of an example that nothing breaks."""

    @property
    @abstractmethod
    def measure(self) -> str:
        """What the mean score is, in words."""

    @abstractmethod
    def lowered(self, trial: Trial, look: Look) -> Array:
        """Returns the score of each example under one trial, float `(batch,)`."""

    def to_json(self) -> dict[str, Any]:
        """Returns the entry `objective` of the result."""
        trials = {trial.name: trial.to_json() for trial in self.suite.trials}
        return {"name": self.name, "trials": trials}


class RobustAccuracy(Objective):
    """The share of the examples that no trial breaks."""

    @property
    def most(self) -> float:
        """One example."""
        return 1.0

    @property
    def measure(self) -> str:
        """`adaptive accuracy` or `naive accuracy`."""
        return f"{self.name} accuracy"

    def lowered(self, trial: Trial, look: Look) -> Array:
        """Returns 1 for an example that the trial does not break, else 0."""
        attack = trial.attack
        if trial.source is not None:
            attack = Transfer(attack=attack, source=look.original)
        found = attack.run(
            trial.sees(look.target),
            look.x,
            look.y,
            self.threat,
            seed=look.seed,
            indices=look.indices,
            batch_size=look.batch_size,
        )
        return found.robust.astype(np.float64)


class Distance(Objective):
    """The smallest epsilon found, on average; the threat model's where none was."""

    @property
    def most(self) -> float:
        """The largest epsilon that is tried."""
        return self.threat.epsilon

    @property
    def measure(self) -> str:
        """A mean distance."""
        return "mean smallest epsilon"

    def lowered(self, trial: Trial, look: Look) -> Array:
        """Returns the smallest epsilon that the trial finds for each example."""
        found = minimum_epsilon(
            trial.sees(look.target),
            look.x,
            look.y,
            self.threat,
            trial.attack,
            steps=_BISECTIONS,
            seed=look.seed,
            batch_size=look.batch_size,
        )
        return np.minimum(found.epsilon, self.threat.epsilon)


def tuning_suite(*, steps: int = 20) -> Suite:
    """A short adaptive suite, the strongest attacks on a jump first.

    Args:
        steps: of each PGD.
    """
    pgd, margin = PGD(steps=steps), PGD(steps=steps, loss="margin")
    return Suite(
        "tuning",
        (
            Trial(name="bpda-soft-10", attack=pgd, surrogate="soft:10%"),
            Trial(name="pgd", attack=pgd),
            Trial(name="bpda-soft-30", attack=pgd, surrogate="soft:30%"),
            Trial(name="transfer-original", attack=pgd, source=0.0),
            Trial(name="bpda-soft-30-margin", attack=margin, surrogate="soft:30%"),
            Trial(name="pgd-margin", attack=margin),
        ),
        adaptive=True,
    )


def find_objective(name: str, threat: ThreatModel, *, steps: int) -> Objective:
    """Returns an objective by its name.

    Args:
        name: in `OBJECTIVES`.
        threat: the threat model.
        steps: of each PGD.

    Raises:
        ParameterError: there is none of that name, or it needs a finite epsilon.
    """
    if name not in OBJECTIVES:
        raise ParameterError(f"objective must be one of {', '.join(OBJECTIVES)}, got {name!r}")
    if not np.isfinite(threat.epsilon):
        raise ParameterError("tuning needs a finite epsilon, got inf")
    if name == "adaptive":
        return RobustAccuracy(name, threat, find_suite(tuning_suite(steps=steps), threat.norm))
    exact = Trial(name="pgd", attack=PGD(steps=steps))
    if name == "naive":
        return RobustAccuracy(name, threat, Suite(name, (exact,)))
    soft = Trial(name="bpda-soft-10", attack=PGD(steps=steps), surrogate="soft:10%")
    return Distance(name, threat, Suite(name, (soft, exact), adaptive=True))
