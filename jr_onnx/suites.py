"""Suites: which attacks make up an evaluation, and how each of them sees the model.

naive      PGD on the model's own gradient
paper      IFGSM, DeepFool linf and l2, Trust Region l2, C&W l2            arXiv:1904.03750
standard   APGD-CE, APGD-DLR targeted, FAB targeted, Square (AutoAttack)   arXiv:2003.01690
adaptive   own gradient with restarts; surrogate slopes of the jump (BPDA, arXiv:1802.00420);
           transfer from the original and from other jumps; Square; random noise
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from jr_onnx.attacks import (
    APGD,
    IFGSM,
    PGD,
    APGDTargeted,
    Attack,
    AttackResult,
    CarliniWagner,
    Classifier,
    DeepFool,
    Square,
    TargetedFAB,
    ThreatModel,
    TrustRegion,
    UniformNoise,
)
from jr_onnx.errors import ParameterError
from jr_onnx.target import SurrogateTarget, Target

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One attack of a suite.

    Attributes:
        name: unique in its suite.
        attack: the search.
        surrogate: the slope of the jumps it sees, as `input_gradient` takes it.
        source: the model it searches on: None for the one under attack, else that with its jumps
            times this, 0 for the original (transfer).
        norm: None for the threat model's; else it measures in a norm of its own, without a ball,
            and what it finds counts if it lies inside the threat model, too.
    """

    name: str
    attack: Attack
    surrogate: str = "exact"
    source: float | None = None
    norm: str | None = None

    @property
    def gradient(self) -> str:
        """What it follows: `exact`, `bpda-relu`, `bpda-soft`, `transfer`, or `none`."""
        if not self.attack.uses_gradients:
            return "none"
        if self.source is not None:
            return "transfer"
        kind = self.surrogate.partition(":")[0]
        return kind if kind == "exact" else f"bpda-{kind}"

    def sees(self, target: Target) -> Classifier:
        """Returns the target as the attack sees it."""
        return target if self.surrogate == "exact" else SurrogateTarget(target, self.surrogate)

    def threat_model(self, threat: ThreatModel) -> ThreatModel:
        """Returns what the attack may do."""
        return threat if self.norm is None else replace(threat, norm=self.norm, epsilon=np.inf)

    def to_json(self) -> dict[str, Any]:
        """Returns what there is to know of it, for the result."""
        return {
            "attack": self.attack.name,
            **asdict(self.attack),  # type: ignore[call-overload]
            "surrogate": self.surrogate,
            "source": self.source,
        }


@dataclass(frozen=True)
class Outcome:
    """One trial on one model.

    Attributes:
        trial: the attack, and how it was used.
        threat: what it was allowed to do.
        indices: int, the examples it was tried on.
        result: what it found on these.
        robust: bool `(samples,)`: correct, and broken neither by this trial nor, in a suite in
            which broken examples leave, by one before it.
    """

    trial: Trial
    threat: ThreatModel
    indices: Array = field(repr=False)
    result: AttackResult = field(repr=False)
    robust: Array = field(repr=False)


@dataclass(frozen=True)
class Suite:
    """The trials of an evaluation.

    Attributes:
        name: for the result.
        trials: in their order.
        cascade: whether a broken example leaves, so that later trials see only what is left.
        adaptive: whether attackers are among them who know of the jump.
        left_out: trials that do not know the norm of the threat model.
    """

    name: str
    trials: tuple[Trial, ...]
    cascade: bool = True
    adaptive: bool = False
    left_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [trial.name for trial in self.trials]
        if not names or len(set(names)) < len(names):
            raise ParameterError(
                f"a suite needs one trial or more, of different names, got {names}"
            )


def naive(*, steps: int = 40) -> Suite:
    """The paper's question: does PGD on the model's own gradient still work?"""
    return Suite("naive", (Trial(name="pgd", attack=PGD(steps=steps)),))


def paper() -> Suite:
    """The attacks of the JumpReLU paper, each on every example."""
    # A closing bisection would find nearer points on a jump, and half of the effect would be gone.
    published = DeepFool(steps=40, bisections=0)
    return Suite(
        "paper",
        (
            Trial(name="ifgsm", attack=IFGSM()),
            Trial(name="deepfool-linf", attack=published, norm="linf"),
            Trial(name="deepfool-l2", attack=published, norm="l2"),
            Trial(name="trust-region-l2", attack=TrustRegion(), norm="l2"),
            Trial(name="cw-l2", attack=CarliniWagner(), norm="l2"),
        ),
        cascade=False,
    )


def standard() -> Suite:
    """AutoAttack's attacks and defaults."""
    return Suite(
        "standard",
        (
            Trial(name="apgd-ce", attack=APGD()),
            Trial(name="apgd-t", attack=APGDTargeted()),
            Trial(name="fab-t", attack=TargetedFAB()),
            Trial(name="square", attack=Square()),
        ),
    )


def adaptive(*, steps: int = 40) -> Suite:
    """What an attacker tries who knows of the jump; on the original, as many runs of the same.

    The last three are the strongest that were measured (docs/benchmarks/attacks.md), and cost the
    most: they see only what the others left.

    Args:
        steps: of PGD, and of the first APGD.
    """
    pgd, margin = PGD(steps=steps), PGD(steps=steps, loss="margin")
    return Suite(
        "adaptive",
        (
            Trial(name="pgd", attack=pgd),
            Trial(name="pgd-again", attack=pgd),
            Trial(name="pgd-margin", attack=margin),
            Trial(name="apgd-ce", attack=APGD(steps=steps)),
            Trial(name="bpda-relu", attack=pgd, surrogate="relu"),
            Trial(name="bpda-soft-10", attack=pgd, surrogate="soft:10%"),
            Trial(name="bpda-soft-30", attack=pgd, surrogate="soft:30%"),
            Trial(name="bpda-soft-100", attack=pgd, surrogate="soft:100%"),
            Trial(name="bpda-soft-30-margin", attack=margin, surrogate="soft:30%"),
            Trial(name="transfer-original", attack=pgd, source=0.0),
            Trial(name="transfer-half", attack=pgd, source=0.5, surrogate="soft:30%"),
            Trial(name="square", attack=Square(queries=1000)),
            Trial(name="noise", attack=UniformNoise()),
            Trial(name="apgd-soft-10", attack=APGD(), surrogate="soft:10%"),
            Trial(name="apgd-soft-30", attack=APGD(), surrogate="soft:30%"),
            Trial(
                name="apgd-t-soft-10",
                attack=APGDTargeted(loss="logit_difference"),
                surrogate="soft:10%",
            ),
        ),
        adaptive=True,
    )


SUITES: dict[str, Callable[[], Suite]] = {
    "naive": naive,
    "paper": paper,
    "standard": standard,
    "adaptive": adaptive,
}


def find_suite(suite: str | Suite, norm: str) -> Suite:
    """Returns a suite, without the trials that do not know the norm.

    Args:
        suite: a name in `SUITES`, or the suite.
        norm: of the threat model.

    Raises:
        ParameterError: there is none of that name, or nothing of it is left.
    """
    if isinstance(suite, str):
        if suite not in SUITES:
            raise ParameterError(f"suite must be one of {', '.join(SUITES)}, got {suite!r}")
        suite = SUITES[suite]()
    kept = tuple(trial for trial in suite.trials if (trial.norm or norm) in trial.attack.norms)
    if not kept:
        raise ParameterError(f"no attack of the suite {suite.name} knows the norm {norm}")
    left_out = tuple(trial.name for trial in suite.trials if trial not in kept)
    return replace(suite, trials=kept, left_out=left_out)
