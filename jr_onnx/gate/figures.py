"""The rules on figures, JR001 to JR008 and JR014: what was measured -> checks.

Thresholds are compared with the end of the 95% interval that is the worse one: a gate that passes
has shown what it asks for, and one that is too close to tell says no.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from jr_onnx.evaluate import Gain, ModelEvaluation
from jr_onnx.findings import Finding
from jr_onnx.gate.measure import Measured
from jr_onnx.gate.verdict import NO_ORIGINAL, Check, Status
from jr_onnx.statistics import wilson

# Rules with a gate of their own; the rest is input_contract's.
_OWN = ("JR003", "JR004", "JR005", "JR008")


def clean_drop(measured: Measured) -> Iterator[Check]:
    """JR001."""
    key, most = "gates.max_clean_accuracy_drop", measured.subject.gates.max_clean_accuracy_drop
    pair = _pair(measured)
    if most is None or pair is None:
        yield Check.skipped("JR001", key, _why(measured, most is not None))
        return
    before, after = pair
    gain = Gain.of(before.correct, after.correct)
    largest = -gain.interval[0]
    yield Check(
        code="JR001",
        gate=key,
        status=Status.of(largest <= most),
        message=f"clean accuracy {before.clean_accuracy:.1%} to {after.clean_accuracy:.1%}: a "
        f"change of {_points(gain)}; a drop of at most {100 * most:.1f} is allowed"
        f"{_too_few(-gain.change <= most < largest, len(after.correct))}",
        measured=largest,
        threshold=most,
    )


def robust_floor(measured: Measured) -> Iterator[Check]:
    """JR002."""
    key, least = "gates.min_robust_accuracy", measured.subject.gates.min_robust_accuracy
    if least is None or measured.evaluation is None:
        yield Check.skipped("JR002", key, _why(measured, least is not None))
        return
    judged = measured.evaluation.models[-1]
    low, high = wilson(judged.robust)
    yield _unless_invalid(
        measured,
        Check(
            code="JR002",
            gate=key,
            status=Status.of(low >= least),
            message=f"robust accuracy in the worst case {judged.robust_accuracy:.1%} (95% "
            f"{100 * low:.1f} to {100 * high:.1f}); at least {100 * least:.1f} is asked for"
            f"{_too_few(low < least <= judged.robust_accuracy, len(judged.robust))}",
            measured=low,
            threshold=least,
        ),
    )


def no_gain(measured: Measured) -> Iterator[Check]:
    """JR003."""
    gates = measured.subject.gates
    key, least = "gates.min_adaptive_gain", gates.min_adaptive_gain
    evaluation = measured.evaluation
    if evaluation is None or _pair(measured) is None:
        yield Check.skipped("JR003", key, _why(measured, True))
        return
    gain = evaluation.adaptive_gain
    if gain is None:
        blind = f"the suite {evaluation.suite.name} has no attacks that know of the jumps"
        if evaluation.suite.adaptive:
            blind = "the two models cannot be compared: see JR005 and JR006"
        asked = evaluation.suite.adaptive or "min_adaptive_gain" in gates.model_fields_set
        status = Status.INCONCLUSIVE if asked else Status.SKIPPED
        yield Check(code="JR003", gate=key, status=status, message=blind)
        return
    yield _unless_invalid(
        measured,
        Check(
            code="JR003",
            gate=key,
            status=Status.of(gain.interval[0] > least),
            message=f"the worst case changes by {_points(gain)}; more than {100 * least:+.1f} is "
            f"asked for{_too_few(gain.interval[0] <= least < gain.change, len(evaluation.x))}",
            measured=gain.interval[0],
            threshold=least,
        ),
    )


def masking(measured: Measured) -> Iterator[Check]:
    """JR004: no score waives it."""
    key, evaluation = "gates.masking", measured.evaluation
    if evaluation is None:
        yield Check.skipped("JR004", key, measured.not_attacked)
        return
    fails = measured.subject.gates.masking == "fail"
    found = [each for each in _found(measured, "JR004") if each.level == "error"]
    if found:
        status = Status.FAIL if fails else Status.WARNING
        yield Check(code="JR004", gate=key, status=status, message=_messages(found))
    elif len(evaluation.models) > 1 and not evaluation.suite.adaptive:
        status = Status.INCONCLUSIVE if fails else Status.WARNING
        message = f"not measured: the suite {evaluation.suite.name} cannot see it, adaptive can"
        yield Check(code="JR004", gate=key, status=status, message=message)
    else:
        message = "no attack broke what attacks on the gradient left, beyond the tolerance"
        yield Check(code="JR004", gate=key, status=Status.PASS, message=message)


def attack_validity(measured: Measured) -> Iterator[Check]:
    """JR005: neither a pass nor a fail."""
    yield _of_findings(measured, "JR005", "attacks", Status.INCONCLUSIVE, "the attacks work")


def input_contract(measured: Measured) -> Iterator[Check]:
    """JR006: that of the original was checked before; and whatever has no gate of its own."""
    fine = "the data looks like what the model was made for"
    if measured.evaluation is None:
        yield Check.skipped("JR006", "data", measured.not_attacked)
        return
    others = {each.rule for each in measured.evaluation.findings} - {*_OWN}
    yield _of_findings(measured, "JR006", "data", Status.FAIL, fine, *others)


def parity(measured: Measured) -> Iterator[Check]:
    """JR007."""
    if measured.evaluation is None:
        yield Check.skipped("JR007", "attacks.parity", measured.not_attacked)
        return
    count = measured.disputed
    yield Check(
        code="JR007",
        gate="attacks.parity",
        status=Status.of(not count),
        message=f"{count} examples count as broken that a fresh session classifies correctly",
        measured=float(count),
        threshold=0.0,
    )


def gradients(measured: Measured) -> Iterator[Check]:
    """JR008: a warning; where no gradient of the margin is left, the attacks say nothing."""
    fine = "gradients are there and finite"
    yield _of_findings(measured, "JR008", "attacks.gradients", Status.INCONCLUSIVE, fine)


def regression(measured: Measured) -> Iterator[Check]:
    """JR014."""
    subject, evaluation = measured.subject, measured.evaluation
    if subject.baseline is None or evaluation is None:
        why = measured.not_attacked if subject.baseline else "not configured"
        yield Check.skipped("JR014", "baseline", why)
        return
    if subject.earlier is None:
        message = f"the baseline has no model {subject.name!r}: a new one, or another name?"
        yield Check(code="JR014", gate="baseline", status=Status.WARNING, message=message)
        return
    judged, before = evaluation.models[-1], subject.earlier
    for name, was, now, most in (
        (
            "clean",
            before.clean_accuracy,
            judged.clean_accuracy,
            subject.baseline.max_clean_accuracy_drop,
        ),
        (
            "robust",
            before.robust_accuracy,
            judged.robust_accuracy,
            subject.baseline.max_robust_accuracy_drop,
        ),
    ):
        # Whole examples are compared, so that rounding of the shares does not decide.
        drop, samples = was - now, len(judged.correct)
        check = Check(
            code="JR014",
            gate=f"baseline.max_{name}_accuracy_drop",
            status=Status.of(round(drop * samples) <= most * samples + 1e-9),
            message=f"{name} accuracy {was:.1%} in the baseline, {now:.1%} now; a drop of at most "
            f"{100 * most:.1f} points is allowed",
            measured=drop,
            threshold=most,
        )
        yield _unless_invalid(measured, check) if name == "robust" else check


def _pair(measured: Measured) -> tuple[ModelEvaluation, ModelEvaluation] | None:
    models = measured.evaluation.models if measured.evaluation else ()
    return (models[0], models[1]) if len(models) == 2 else None


def _why(measured: Measured, configured: bool) -> str:
    if not configured:
        return "not configured"
    return measured.not_attacked or NO_ORIGINAL


def _unless_invalid(measured: Measured, check: Check) -> Check:
    """Returns the check; one that passes is in doubt where an attack is invalid."""
    invalid = [
        each
        for rule in ("JR005", "JR008")
        for each in _found(measured, rule)
        if each.level == "error"
    ]
    if check.status is not Status.PASS or not invalid:
        return check
    message = f"{check.message}; but {invalid[0].rule} says that the attacks are not valid"
    return replace(check, status=Status.INCONCLUSIVE, message=message)


def _of_findings(
    measured: Measured, code: str, gate: str, status: Status, fine: str, *more: str
) -> Check:
    """Returns what the findings of a rule come to; its warnings never more than a warning."""
    if measured.evaluation is None:
        return Check.skipped(code, gate, measured.not_attacked)
    found = [each for rule in dict.fromkeys((code, *more)) for each in _found(measured, rule)]
    errors = [each for each in found if each.level == "error"]
    if errors:
        return Check(code=code, gate=gate, status=status, message=_messages(errors))
    if found:
        return Check(code=code, gate=gate, status=Status.WARNING, message=_messages(found))
    return Check(code=code, gate=gate, status=Status.PASS, message=fine)


def _found(measured: Measured, rule: str) -> list[Finding]:
    """Returns the findings of a rule that cast doubt."""
    findings = measured.evaluation.findings if measured.evaluation else ()
    return [each for each in findings if each.rule == rule and each.level != "note"]


def _messages(found: list[Finding]) -> str:
    return "; ".join(each.message for each in found)


def _points(gain: Gain) -> str:
    low, high = (100 * end for end in gain.interval)
    return f"{100 * gain.change:+.1f} points (95% {low:+.1f} to {high:+.1f})"


def _too_few(reached: bool, samples: int) -> str:
    """Says that the figure itself is good enough, where only its interval is not."""
    return f", which {samples:,} examples are too few to show" if reached else ""
