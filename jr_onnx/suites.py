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
from jr_onnx.autodiff.losses import TARGETS, find_loss
from jr_onnx.data import digest
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
        options = asdict(self.attack)  # type: ignore[call-overload]
        return {
            "attack": self.attack.name,
            **{name: _plain(value) for name, value in options.items()},
            "surrogate": self.surrogate,
            "source": self.source,
        }


def _plain(value: Any) -> Any:
    """Returns an option as JSON has it; of arrays but those of one axis, a hash."""
    if not isinstance(value, (np.ndarray, list, tuple)):
        return value
    array = np.asarray(value)
    return array.tolist() if array.ndim < 2 else f"sha256:{digest(array)}"


@dataclass(frozen=True)
class Outcome:
    """One trial on one model.

    Attributes:
        trial: the attack, and how it was used.
        threat: what it was allowed to do.
        indices: int, the examples it was tried on.
        result: what it found on these; without `x_adv` where these were not kept.
        size: float64, the norm of each of these examples.
        robust: bool `(samples,)`: correct, and broken neither by this trial nor, in a suite in
            which broken examples leave, by one before it.
    """

    trial: Trial
    threat: ThreatModel
    indices: Array = field(repr=False)
    result: AttackResult = field(repr=False)
    size: Array = field(repr=False)
    robust: Array = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Returns the entry of `attacks` in the result; distances are of the broken examples."""
        found = self.result
        broken = found.correct & ~found.robust
        distance, size = found.distance[broken], self.size[broken]
        relative = distance[size > 0] / size[size > 0]
        return {
            "name": self.trial.name,
            **self.threat.to_json(),
            "gradient": self.trial.gradient,
            "options": self.trial.to_json(),
            "tried": len(self.indices),
            "broken": int(broken.sum()),
            "robust_accuracy": float(self.robust.mean()),
            "mean_distance": float(distance.mean()) if len(distance) else None,
            "max_distance": float(distance.max()) if len(distance) else None,
            "mean_relative_distance": float(relative.mean()) if len(relative) else None,
            "max_relative_distance": float(relative.max()) if len(relative) else None,
            "seconds": found.seconds,
            "forward_passes": found.counts.forward,
            "gradient_passes": found.counts.gradient,
        }


@dataclass(frozen=True)
class Suite:
    """The trials of an evaluation.

    Attributes:
        name: for the result.
        trials: in their order.
        cascade: whether a broken example leaves, so that later trials see only what is left.
        adaptive: whether attackers are among them who know of the jump.
        left_out: trials that do not know the norm of the threat model.
        changed: in words, what is otherwise than in the suite of that name, and why.
    """

    name: str
    trials: tuple[Trial, ...]
    cascade: bool = True
    adaptive: bool = False
    left_out: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

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
            Trial(name="pgd-margin", attack=replace(margin, restarts=2)),
            Trial(name="apgd-ce", attack=APGD(steps=steps)),
            Trial(name="bpda-relu", attack=pgd, surrogate="relu"),
            Trial(name="bpda-soft-10", attack=pgd, surrogate="soft:10%"),
            Trial(name="bpda-soft-30", attack=pgd, surrogate="soft:30%"),
            Trial(name="bpda-soft-100", attack=pgd, surrogate="soft:100%"),
            Trial(name="bpda-soft-30-margin", attack=margin, surrogate="soft:30%"),
            Trial(name="transfer-original", attack=pgd, source=0.0),
            Trial(name="transfer-half", attack=pgd, source=0.5, surrogate="soft:30%"),
            Trial(name="transfer-double", attack=pgd, source=2.0, surrogate="soft:30%"),
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


def find_suite(
    suite: str | Suite, norm: str, *, epsilon: float = np.inf, classes: int | None = None
) -> Suite:
    """Returns a suite for a threat model and a number of classes.

    Trials that do not know the norm are left out. In a suite given by its name, an attack whose
    options make no sense there gets others, and `changed` says so; trials of one's own stay as
    they are.

    Args:
        suite: a name in `SUITES`, or the suite.
        norm: of the threat model.
        epsilon: of the threat model.
        classes: how many the models have; None if that is not known.

    Raises:
        ParameterError: there is none of that name, or nothing of it is left.
    """
    changed: tuple[str, ...] = ()
    if isinstance(suite, str):
        if suite not in SUITES:
            raise ParameterError(f"suite must be one of {', '.join(SUITES)}, got {suite!r}")
        suite = SUITES[suite]()
        fitted = [_fitted(trial, norm, epsilon, classes) for trial in suite.trials]
        suite = replace(suite, trials=tuple(trial for trial, _ in fitted))
        changed = tuple(why for _, why in fitted if why)
    kept = tuple(trial for trial in suite.trials if (trial.norm or norm) in trial.attack.norms)
    if not kept:
        known = sorted({name for trial in suite.trials for name in trial.attack.norms})
        raise ParameterError(
            f"no attack of the suite {suite.name} knows the norm {norm}, only {', '.join(known)}"
        )
    left_out = tuple(trial.name for trial in suite.trials if trial not in kept)
    return replace(suite, trials=kept, left_out=left_out, changed=changed)


def _fitted(trial: Trial, norm: str, epsilon: float, classes: int | None) -> tuple[Trial, str]:
    """Returns a trial whose options make sense, and what was changed in words."""
    attack = trial.attack
    if isinstance(attack, IFGSM) and trial.norm is None and norm != "linf":
        # 40 steps of 0.01 each would end far inside most balls of these norms.
        if not np.isfinite(epsilon):
            own = replace(trial, norm="linf")
            return own, f"{trial.name} steps in linf, as published: it has no length in {norm}"
        step = replace(attack, step_size=epsilon / 10)
        why = f"{trial.name} takes steps of epsilon / 10: the published ones are of linf"
        return replace(trial, attack=step), why
    if classes is None or not isinstance(attack, APGD):
        return trial, ""
    loss = find_loss(attack.loss)
    if classes >= loss.classes:
        return trial, ""
    instead = "logit_difference" if TARGETS in loss.compares else "margin"
    why = (
        f"{trial.name} ascends {instead}: its loss {attack.loss} needs {loss.classes} classes, "
        f"there are {classes}"
    )
    return replace(trial, attack=replace(attack, loss=instead)), why
