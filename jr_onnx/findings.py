"""What makes the figures of an evaluation doubtful, each under the code of its rule.

    JR004  masking-suspected   a weaker or blinder attack breaks what the gradient did not
    JR005  attack-invalid      the attack itself does not work: a weakness of the figure
    JR006  input-contract      the data does not look like what the model was made for
    JR008  gradient-health     zero or non-finite gradients

Sources: Athalye et al. (arXiv:1802.00420), Carlini et al. (arXiv:1902.06705), Tramer et al.
(arXiv:2002.08347).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jr_onnx.attacks import FGSM, PGD, ThreatModel
from jr_onnx.health import gradient_health
from jr_onnx.suites import Outcome
from jr_onnx.target import Target

Array = np.ndarray[Any, Any]
# Examples that the diagnostics try attacks of their own on.
_SAMPLES = 100
# Examples that labels and outputs are compared on.
_LOOKED_AT = 1000
# Differences below this share of the examples are noise.
_TOLERANCE = 0.02
_BLIND = ("transfer", "none")


@dataclass(frozen=True)
class Finding:
    """One reason for doubt.

    Attributes:
        rule: its code, `JR004`.
        level: `error` or `warning`.
        message: what was seen, in words.
    """

    rule: str
    level: str
    message: str

    def to_json(self) -> dict[str, str]:
        """Returns the entry of `findings` in the result."""
        return {"rule": self.rule, "level": self.level, "message": self.message}


def of_the_input(target: Target, x: Array, y: Array, correct: Array) -> tuple[Finding, ...]:
    """Looks for models that cannot be attacked, and data they were not made for.

    Args:
        target: the model.
        x: `(samples, ...)`.
        y: int `(samples,)`.
        correct: bool `(samples,)`, without attack.
    """
    return _named(target, _of_the_input(target, x, y, correct))


def diagnose(
    target: Target,
    x: Array,
    y: Array,
    threat: ThreatModel,
    correct: Array,
    outcomes: Mapping[str, Outcome],
    seed: int,
) -> tuple[Finding, ...]:
    """Looks for signs that an evaluation is too good.

    Args:
        target: the model.
        x: `(samples, ...)`.
        y: int `(samples,)`.
        threat: what the attacks were allowed.
        correct: bool `(samples,)`, without attack.
        outcomes: what the attacks found.
        seed: of all random numbers.
    """
    chosen = np.flatnonzero(correct)[:_SAMPLES]
    found = [*_of_the_input(target, x, y, correct)]
    if not len(chosen):
        return tuple(found)
    x, y = x[chosen], y[chosen]
    if any(outcome.trial.attack.uses_gradients for outcome in outcomes.values()):
        found += _of_the_gradient(target, x, y)
        if np.isfinite(threat.epsilon):
            found += _of_the_attack(target, x, y, threat, chosen, seed)
    found += _of_the_blind(outcomes, correct)
    return _named(target, found)


def _named(target: Target, found: Iterable[Finding]) -> tuple[Finding, ...]:
    return tuple(replace(each, message=f"{target.model.name}: {each.message}") for each in found)


def _of_the_input(target: Target, x: Array, y: Array, correct: Array) -> list[Finding]:
    x, y = x[:_LOOKED_AT], y[:_LOOKED_AT]
    logits, again = target.logits(x), target.logits(x)
    predicted, classes, share = logits.argmax(axis=1), logits.shape[1], float(correct.mean())
    found = []
    if not np.allclose(logits, again, rtol=1e-3, atol=1e-3):
        found.append(
            Finding(
                "JR005",
                "error",
                "the model gives different outputs for the same input: average over its "
                "randomness before it is attacked",
            )
        )
    if _is_coupled(target, x[:8]):
        found.append(
            Finding(
                "JR005",
                "error",
                "the outputs of an example depend on the others in its batch: neither an attack "
                "nor an accuracy means anything. Fix the batch to 1, or take the coupling out",
            )
        )
    if len(predicted) > 1 and len(np.unique(predicted)) == 1 and len(np.unique(y)) > 1:
        found.append(
            Finding("JR006", "error", f"all examples are predicted as class {predicted[0]}")
        )
    for shift in (-1, 1):
        shifted = float((predicted == y + shift).mean())
        if shifted > max(0.5, 2 * share):
            found.append(
                Finding(
                    "JR006",
                    "error",
                    f"{shifted:.0%} of the predictions equal the label {shift:+d}, {share:.0%} the "
                    "label itself: the labels are shifted by one",
                )
            )
    for what, other in _otherwise(x[:_SAMPLES]):
        right = float((target.logits(other).argmax(axis=1) == y[:_SAMPLES]).mean())
        if right > max(0.5, 1.5 * share):
            found.append(
                Finding(
                    "JR006",
                    "error",
                    f"{share:.0%} of the examples are classified correctly as they are, "
                    f"{right:.0%} {what}: the data is not scaled as in training",
                )
            )
    if classes > 1 and len(y) >= 50 and share <= 1.2 / classes:
        found.append(
            Finding(
                "JR006",
                "error",
                f"{share:.1%} of the examples are classified correctly, about what guessing gives: "
                "is the data scaled and laid out as in training?",
            )
        )
    return found


def _is_coupled(target: Target, x: Array) -> bool:
    if target.fixed_batch is not None:
        return False  # such a model is given what it asks for
    alone = np.concatenate([target.logits(x[at : at + 1]) for at in range(len(x))])
    return not np.allclose(target.logits(x), alone, rtol=1e-2, atol=1e-2)


def _otherwise(x: Array) -> Iterator[tuple[str, Array]]:
    """Yields the examples as other preprocessing would have made them."""
    yield "times 255", x * 255
    yield "divided by 255", x / 255
    yield "moved from [0, 1] to [-1, 1]", 2 * x - 1
    yield "moved from [-1, 1] to [0, 1]", (x + 1) / 2
    if x.ndim == 4 and x.shape[1] == 3:
        yield "with red and blue exchanged", x[:, ::-1]


def _of_the_gradient(target: Target, x: Array, y: Array) -> list[Finding]:
    found = []
    for loss in ("cross_entropy", "margin"):
        health = gradient_health(target, x, y, loss=loss)
        if health.vanished > _TOLERANCE * len(x) or health.non_finite:
            reasons = "; ".join(health.reasons)
            level = "error" if loss == "margin" else "warning"
            found.append(
                Finding(
                    "JR008",
                    level,
                    f"the gradient of the loss {loss} vanishes at {health.vanished} of {len(x)} "
                    f"examples and is not finite at {health.non_finite}: {reasons}",
                )
            )
    return found


def _of_the_attack(
    target: Target, x: Array, y: Array, threat: ThreatModel, indices: Array, seed: int
) -> list[Finding]:
    def kept(attack: Any, at: ThreatModel) -> float:
        found = attack.run(target, x, y, at, seed=seed, indices=indices)
        return float(found.robust.mean())

    found = []
    steps = kept(PGD(steps=20), threat)
    one = kept(FGSM(), threat)
    if one < steps - _TOLERANCE:
        found.append(
            Finding(
                "JR005",
                "error",
                f"one step breaks more ({1 - one:.0%}) than twenty ({1 - steps:.0%})",
            )
        )
    low, high = threat.bounds
    if threat.norm == "linf":
        # Half of the range takes every input to the same grey.
        everything = kept(PGD(steps=20), replace(threat, epsilon=(high - low) / 2))
        if everything > _TOLERANCE:
            found.append(
                Finding(
                    "JR005",
                    "error",
                    f"{everything:.0%} withstand PGD even where every input can be made the same "
                    "grey: it is the attack that fails, not the model that resists",
                )
            )
        wider = kept(PGD(steps=20), replace(threat, epsilon=min(2 * threat.epsilon, high - low)))
        if wider > steps + _TOLERANCE:
            found.append(
                Finding(
                    "JR005",
                    "error",
                    f"twice the epsilon leaves more ({wider:.0%}) than epsilon ({steps:.0%})",
                )
            )
    return found


def _of_the_blind(outcomes: Mapping[str, Outcome], correct: Array) -> list[Finding]:
    """Attacks that do not follow the model's gradient must break nothing that it does not show."""
    seen = [each for each in outcomes.values() if each.trial.gradient not in _BLIND]
    if not seen:
        return []
    left = np.logical_and.reduce([outcome.robust for outcome in seen])
    found = []
    for name, outcome in outcomes.items():
        extra = int((left & ~outcome.robust).sum())
        if outcome.trial.gradient in _BLIND and extra > _TOLERANCE * correct.sum():
            found.append(
                Finding(
                    "JR004",
                    "error",
                    f"gradient masking: {name}, which does not see the model's gradient, breaks "
                    f"{extra} of {int(left.sum())} examples that all attacks on it left",
                )
            )
    return found
