"""What makes the figures of an evaluation doubtful, each under the code of its rule.

    JR004  masking-suspected   a weaker or blinder attack breaks what the gradient did not
    JR005  attack-invalid      the attack itself does not work: a weakness of the figure
    JR006  input-contract      the data, or the baseline, is not what the model was made for or from
    JR008  gradient-health     zero or non-finite gradients

Sources: Athalye et al. (arXiv:1802.00420), Carlini et al. (arXiv:1902.06705), Tramer et al.
(arXiv:2002.08347).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jr_onnx import rewrite
from jr_onnx.attacks import APGD, FGSM, IFGSM, MIFGSM, NORMS, PGD, ThreatModel
from jr_onnx.errors import JrOnnxError, ModelError
from jr_onnx.health import are_probabilities, gradient_health
from jr_onnx.model import Model
from jr_onnx.model.differences import Difference, compare_fields, compare_repeated
from jr_onnx.model.external import data_file, first_difference, locations
from jr_onnx.model.graphs import ONNX_DOMAINS
from jr_onnx.statistics import wilson
from jr_onnx.suites import Outcome
from jr_onnx.target import Target

Array = np.ndarray[Any, Any]
# Examples that the diagnostics try attacks of their own on.
_SAMPLES = 100
# Examples that labels and outputs are compared on.
_LOOKED_AT = 1000
# Differences below this share of the examples are noise.
_TOLERANCE = 0.02
# Share that twice the steps, or twenty plain ones, may break of what the whole suite left.
_SETTLED = 0.05
# Attacks of which twice the steps is little work.
_STEPWISE = (PGD, IFGSM, MIFGSM, APGD)
_ROUNDING = ("Round", "Floor", "Ceil", "Sign")
_BLIND = ("transfer", "none")
# Whose errors leave nothing to conclude from.
_INVALID = ("JR005", "JR006")


@dataclass(frozen=True)
class Finding:
    """One reason for doubt.

    Attributes:
        rule: its code, `JR004`.
        level: `error`, `warning`, or `note`, which casts no doubt.
        message: what was seen, in words.
    """

    rule: str
    level: str
    message: str

    def to_json(self) -> dict[str, str]:
        """Returns the entry of `findings` in the result."""
        return {"rule": self.rule, "level": self.level, "message": self.message}


def is_inconclusive(findings: Iterable[Finding]) -> bool:
    """Whether one of them says that the figures mean nothing: neither a pass nor a fail."""
    return any(each.level == "error" and each.rule in _INVALID for each in findings)


def of_the_model(target: Target, x: Array) -> tuple[Finding, ...]:
    """Looks for what makes a model one that cannot be attacked, example by example.

    Args:
        target: the model.
        x: `(samples, ...)`.
    """
    found = []
    x = x[:_LOOKED_AT]
    outputs = target.logits(x)
    if not np.allclose(outputs, target.logits(x), rtol=1e-3, atol=1e-3):
        found.append(
            Finding(
                "JR005",
                "error",
                "the model gives different outputs for the same input: average over its "
                "randomness before it is attacked",
            )
        )
    elif _is_coupled(target, x[:8]):  # of random outputs that would be no news
        found.append(
            Finding(
                "JR005",
                "error",
                "the outputs of an example depend on the others in its batch: neither an attack "
                "nor an accuracy means anything. Fix the batch to 1, or take the coupling out",
            )
        )
    return _named(target, [*found, *_of_the_ending(target, x[:8], outputs)])


def _of_the_ending(target: Target, x: Array, outputs: Array) -> list[Finding]:
    """Outputs that are probabilities: are they those of a softmax that attacks see through?

    Args:
        target: the model.
        x: a few examples.
        outputs: of these and more.
    """
    logarithms = (outputs <= 0).all() and are_probabilities(np.exp(outputs))
    if not logarithms and not are_probabilities(outputs):
        return []
    try:
        ending = target.gradient().ending
    except ModelError:  # no gradient, so nothing follows it
        return []
    if ending == "logits" and logarithms:
        return []  # which are logits as good as any
    if ending == "logits":
        seen = (
            "the outputs are probabilities, and no softmax was recognised at the end of the model"
        )
    elif are_probabilities(target.differentiate(x, outputs[: len(x)].argmax(axis=1)).logits):
        seen = f"the {ending} at the end of the model is given probabilities, not logits"
    else:
        seen = f"the model ends in a {ending}: attacks follow the logits that it is given"
        return [Finding("JR006", "note", seen)]
    return [
        Finding(
            "JR006",
            "warning",
            f"{seen}, so attacks follow these instead of the logits, and may stall where it is "
            "sure: export the logits",
        )
    ]


def without_a_gradient(target: Target, error: ModelError) -> Finding:
    """Says what attacks that see outputs alone are worth on a model without an input gradient.

    Args:
        target: the model.
        error: why it has none.
    """
    rounding = _rounding(target.model)
    likely = ""
    if rounding:
        likely = f" Rounding ({', '.join(rounding)}) may be there as a defence: attack without it."
    return Finding(
        "JR005",
        "warning",
        f"{target.model.name}: has no input gradient, so every attack sees outputs alone, and what "
        f"withstands them may fall to more.{likely} {error}",
    )


def _rounding(model: Model) -> list[str]:
    """Returns the nodes of the main graph that round what varies with examples."""
    graph = model.parse().graph
    weights = {tensor.name for tensor in graph.initializer}
    varying = {value.name for value in graph.input} - weights
    found = []
    for node in graph.node:
        if varying.isdisjoint(node.input):
            continue
        varying.update(node.output)
        if node.op_type in _ROUNDING and node.domain in ONNX_DOMAINS:
            found.append(f"{node.op_type} {node.name or node.output[0]!r}")
    return found


def of_the_data(target: Target, x: Array, y: Array, correct: Array) -> tuple[Finding, ...]:
    """Looks for signs that a model was made for other data.

    Args:
        target: the model; of an original and a hardened one the original, which no jump harmed.
        x: `(samples, ...)`.
        y: int `(samples,)`.
        correct: bool `(samples,)`, without attack.
    """
    return _named(target, _of_the_data(target, x, y, correct))


def diagnose(
    target: Target,
    x: Array,
    y: Array,
    threat: ThreatModel,
    correct: Array,
    outcomes: Mapping[str, Outcome],
    seed: int,
) -> tuple[Finding, ...]:
    """Looks for signs that an evaluation is too good, once the attacks have run.

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
    if not len(chosen):
        return ()
    found = []
    if any(outcome.trial.attack.uses_gradients for outcome in outcomes.values()):
        found += _of_the_gradient(target, x[chosen], y[chosen])
        if np.isfinite(threat.epsilon):
            left = np.logical_and.reduce([each.robust[chosen] for each in outcomes.values()])
            probe = _Probe(target, x[chosen], y[chosen], threat, chosen, left, seed)
            found += _of_the_attack(probe, outcomes)
            found += _of_the_steps(probe, outcomes)
    found += _of_the_blind(target, outcomes, correct)
    return _named(target, found)


def of_the_threat(threat: ThreatModel) -> tuple[Finding, ...]:
    """Looks for an epsilon in other units than the data's."""
    low, high = threat.bounds
    if threat.norm != "linf" or high - low <= 2 or threat.epsilon > (high - low) / 1000:
        return ()
    return (
        Finding(
            "JR006",
            "warning",
            f"epsilon {threat.epsilon:g} is less than a thousandth of the bounds [{low:g}, "
            f"{high:g}]. It is in units of x: what is 8/255 in [0, 1] is 8 in [0, 255]",
        ),
    )


def of_the_baseline(baseline: Model, model: Model) -> tuple[Finding, ...]:
    """Compares a baseline with the original that a hardened model carries, weights included.

    The bytes may be others: an exporter or `onnx.save` writes the same graph anew.
    """
    where = f"{baseline.name} is the baseline of {model.name}"
    try:
        original = rewrite.original_of(model)
        if original is model:
            return (
                Finding(
                    "JR006",
                    "warning",
                    f"{where}, which carries no record of a retrofit: that only the jumps differ "
                    "was not checked",
                ),
            )
        found = next(_differences(original, baseline), None)
    except JrOnnxError as error:
        return (Finding("JR006", "error", f"{where}; that it is its original is not so: {error}"),)
    if found is None:
        return ()
    return (
        Finding(
            "JR006",
            "error",
            f"{where}, and is not its original ({found.where}: {found.what}): the change is that "
            "between two networks, and says nothing of the jump. Leave the baseline out to compare "
            "with the original that the model carries",
        ),
    )


def _differences(original: Model, baseline: Model) -> Iterator[Difference]:
    if original.sha256 != baseline.sha256:
        mine, yours = original.proto, baseline.proto
        yield from compare_fields(mine.graph, yours.graph, "graph", ("name", "doc_string"))
        for field in ("functions", "opset_import"):
            yield from compare_repeated(getattr(mine, field), getattr(yours, field), field)
    if original.folder != baseline.folder:
        for name in locations(original):
            at = first_difference(data_file(original, name), data_file(baseline, name))
            if at is not None:
                yield Difference(name, f"the weights differ from byte {at:,} of the file on")


def _named(target: Target, found: Iterable[Finding]) -> tuple[Finding, ...]:
    model, name = target.model, target.model.name
    if model.path is None and rewrite.jumps_of(
        model
    ):  # has the graph's name, as its original may have
        name = f"the retrofitted {name}"
    return tuple(replace(each, message=f"{name}: {each.message}") for each in found)


def _of_the_data(target: Target, x: Array, y: Array, correct: Array) -> list[Finding]:
    x, y = x[:_LOOKED_AT], y[:_LOOKED_AT]
    logits = target.logits(x)
    predicted, classes, share = logits.argmax(axis=1), logits.shape[1], float(correct.mean())
    found = []
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
    guessed, low = 1 / classes, wilson(correct)[0]
    as_guessed = share <= 1.2 * guessed or (low <= guessed and share < 1.5 * guessed)
    if classes > 1 and len(y) >= 50 and as_guessed:
        found.append(
            Finding(
                "JR006",
                "error",
                f"{share:.1%} of {len(correct):,} examples are classified correctly, about what "
                f"guessing gives ({guessed:.1%}): is the data scaled and laid out as in training?",
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


@dataclass(frozen=True)
class _Probe:
    """The examples that the diagnostics try attacks of their own on.

    Attributes:
        target: the model.
        x: `(examples, ...)`, all classified correctly.
        y: int `(examples,)`.
        threat: what the attacks were allowed.
        indices: int `(examples,)`, which examples of the data these are.
        left: bool `(examples,)`, robust to all that was measured.
        seed: of all random numbers.
    """

    target: Target
    x: Array
    y: Array
    threat: ThreatModel
    indices: Array
    left: Array
    seed: int

    def robust(
        self, attack: Any, *, epsilon: float | None = None, rows: Any = slice(None)
    ) -> Array:
        """Returns which of the examples `rows` withstand an attack, bool."""
        threat = self.threat if epsilon is None else replace(self.threat, epsilon=epsilon)
        x, y, indices = self.x[rows], self.y[rows], self.indices[rows]
        found: Array = attack.run(self.target, x, y, threat, seed=self.seed, indices=indices).robust
        return found

    def outdone(self, broken: int) -> bool:
        """Whether so many that were left are more than another start breaks on honest models."""
        return broken > max(_SETTLED * len(self.x), 2)


def _of_the_attack(probe: _Probe, outcomes: Mapping[str, Outcome]) -> list[Finding]:
    x, threat = probe.x, probe.threat
    found = []
    tolerance = max(_TOLERANCE, 1.5 / len(x))  # one example is an accident
    # In l1 PGD gets stuck on honest models, too: its steps go along few elements.
    twenty = APGD(steps=20) if threat.norm == "l1" else PGD(steps=20)
    by_twenty = probe.robust(twenty)
    found += _of_the_measured(probe, outcomes, by_twenty, twenty.name)
    steps = float(by_twenty.mean())
    one = float(probe.robust(FGSM()).mean())
    if one < steps - tolerance:
        found.append(
            Finding(
                "JR005",
                "error",
                f"one step breaks more ({1 - one:.0%}) than twenty ({1 - steps:.0%})",
            )
        )
    low, high = threat.bounds
    # Half of the range takes every input to the same grey; in l2 and l1 that is as far away as all
    # elements together.
    grey = float(NORMS[threat.norm].distance(np.full_like(x[:1], (high - low) / 2))[0])
    everything = float(probe.robust(twenty, epsilon=grey).mean())
    if everything > tolerance:
        found.append(
            Finding(
                "JR005",
                "error",
                f"{everything:.0%} withstand {twenty.name} even where every input can be made the "
                "same grey: it is the attack that fails, not the model that resists",
            )
        )
    wider = float(probe.robust(twenty, epsilon=min(2 * threat.epsilon, 2 * grey)).mean())
    if wider > steps + tolerance:
        found.append(
            Finding(
                "JR005",
                "error",
                f"twice the epsilon leaves more ({wider:.0%}) than epsilon ({steps:.0%})",
            )
        )
    return found


def _of_the_measured(
    probe: _Probe, outcomes: Mapping[str, Outcome], by_twenty: Array, name: str
) -> list[Finding]:
    """Twenty plain steps must not break much of what all attacks left."""
    attacks = [outcome.trial.attack for outcome in outcomes.values()]
    # One that goes for a class of its own leaves more, and is asked for no worst case.
    if not any(
        each.uses_gradients and getattr(each, "target_classes", None) is None for each in attacks
    ):
        return []
    left, broken = probe.left, int((probe.left & ~by_twenty).sum())
    if not probe.outdone(broken):
        return []
    return [
        Finding(
            "JR005",
            "error",
            f"twenty steps of {name} break {broken} of {int(left.sum())} examples that all "
            f"attacks left ({by_twenty.mean():.0%} withstand the steps, {left.mean():.0%} the "
            "attacks): what was measured is too weak. Give it more steps or a larger step size, or "
            "take a stronger attack (apgd)",
        )
    ]


def _of_the_steps(probe: _Probe, outcomes: Mapping[str, Outcome]) -> list[Finding]:
    """Twice the steps of the first attack must not break much of what all of them left."""
    trials = [outcome.trial for outcome in outcomes.values()]
    own = [each for each in trials if each.gradient == "exact" and each.norm is None]
    first = next((each for each in own if type(each.attack) in _STEPWISE), None)
    left = probe.left
    if first is None or not left.any():
        return []
    longer: Any = replace(first.attack, steps=2 * vars(first.attack)["steps"])  # type: ignore[type-var]
    broken = int((~probe.robust(longer, rows=left)).sum())
    if not probe.outdone(broken):
        return []
    return [
        Finding(
            "JR005",
            "error",
            f"twice the steps of {first.name} break {broken} of {int(left.sum())} examples that "
            "the whole suite left: give it more steps or restarts, or take a stronger attack "
            "(apgd); the figures have not settled",
        )
    ]


def _of_the_blind(target: Target, outcomes: Mapping[str, Outcome], correct: Array) -> list[Finding]:
    """Attacks that do not follow the model's gradient must break nothing that it does not show."""
    # Without a jump a transfer searches on the model itself.
    blind = _BLIND if rewrite.jumps_of(target.model) else ("none",)
    tried, shown = np.zeros_like(correct), np.zeros_like(correct)
    for outcome in outcomes.values():
        if outcome.trial.gradient not in blind:
            tried[outcome.indices] = True
            shown |= _broken(outcome)
    # In a cascade an attack that comes later saw nothing of what a blind one broke.
    left = tried & ~shown
    found = []
    for name, outcome in outcomes.items():
        extra = int((left & _broken(outcome)).sum())
        if outcome.trial.gradient in blind and extra > max(_TOLERANCE * correct.sum(), 1):
            found.append(
                Finding(
                    "JR004",
                    "error",
                    f"gradient masking: {name}, which does not see the model's gradient, breaks "
                    f"{extra} of {int(left.sum())} examples that the attacks on it left",
                )
            )
    return found


def _broken(outcome: Outcome) -> Array:
    """Returns bool `(samples,)`: what this trial broke itself, and none before it."""
    broken = np.zeros_like(outcome.robust)
    broken[outcome.indices] = ~outcome.robust[outcome.indices]
    return broken
