"""One function a rule: what was measured -> checks.

Thresholds on figures are compared with the end of the 95% interval that is the worse one: a gate
that passes has shown what it asks for, and one that is too close to tell says no.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from jr_onnx.evaluate import Gain, ModelEvaluation
from jr_onnx.findings import Finding
from jr_onnx.gate.measure import Measured, size_of
from jr_onnx.gate.verdict import Check, Status
from jr_onnx.model.graphs import opset_of
from jr_onnx.statistics import wilson

_OWN = ("JR003", "JR004", "JR005", "JR008")
_NO_ORIGINAL = "there is no original to compare with"


def checks_of(measured: Measured) -> tuple[Check, ...]:
    """Returns the outcome of every gate, in the order of the rules."""
    return tuple(check for gate in GATES for check in gate(measured))


def clean_drop(measured: Measured) -> Iterator[Check]:
    """JR001."""
    key, most = "gates.max_clean_accuracy_drop", measured.subject.gates.max_clean_accuracy_drop
    pair = _pair(measured)
    if most is None or pair is None:
        yield _skipped("JR001", key, _why(measured, most is not None))
        return
    before, after = pair
    gain = Gain.of(before.correct, after.correct)
    largest = -gain.interval[0]
    yield Check(
        code="JR001",
        gate=key,
        status=_ok(largest <= most),
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
        yield _skipped("JR002", key, _why(measured, least is not None))
        return
    judged = measured.evaluation.models[-1]
    low, high = wilson(judged.robust)
    yield _unless_invalid(
        measured,
        Check(
            code="JR002",
            gate=key,
            status=_ok(low >= least),
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
        yield _skipped("JR003", key, _why(measured, True))
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
            status=_ok(gain.interval[0] > least),
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
        yield _skipped("JR004", key, measured.not_attacked)
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
        yield _skipped("JR006", "data", measured.not_attacked)
        return
    others = {each.rule for each in measured.evaluation.findings} - {*_OWN}
    yield _of_findings(measured, "JR006", "data", Status.FAIL, fine, *others)


def parity(measured: Measured) -> Iterator[Check]:
    """JR007."""
    if measured.evaluation is None:
        yield _skipped("JR007", "attacks.parity", measured.not_attacked)
        return
    count = measured.disputed
    yield Check(
        code="JR007",
        gate="attacks.parity",
        status=_ok(not count),
        message=f"{count} examples count as broken that a fresh session classifies correctly",
        measured=float(count),
        threshold=0.0,
    )


def gradients(measured: Measured) -> Iterator[Check]:
    """JR008: a warning; where no gradient of the margin is left, the attacks say nothing."""
    fine = "gradients are there and finite"
    yield _of_findings(measured, "JR008", "attacks.gradients", Status.INCONCLUSIVE, fine)


def equivalence(measured: Measured) -> Iterator[Check]:
    """JR009."""
    key, subject, found = "gates.verify_equivalent", measured.subject, measured.verification
    if subject.edits:
        changed = f"was edited since it was hardened: {', '.join(subject.edits)}"
        status = Status.FAIL if subject.gates.verify_equivalent else Status.WARNING
        yield Check(code="JR009", gate=key, status=status, message=changed, places=subject.edits)
    elif found is None:
        switched_off = subject.original is not None
        yield _skipped("JR009", key, "switched off" if switched_off else _NO_ORIGINAL)
    elif found.differences:
        told = "; ".join(f"{each.where}: {each.what}" for each in found.differences[:_TOLD])
        more = len(found.differences) - _TOLD
        yield Check(
            code="JR009",
            gate=key,
            status=Status.FAIL,
            message=f"not the original with its jumps: {told}{_and(more)}",
            places=tuple(dict.fromkeys(each.where for each in found.differences)),
        )
    elif found.not_compared:
        message = f"weights could not be compared: {'; '.join(found.not_compared)}"
        yield Check(code="JR009", gate=key, status=Status.INCONCLUSIVE, message=message)
    else:
        message = f"the original with its jumps ({found.values_compared:,} values compared)"
        yield Check(code="JR009", gate=key, status=Status.PASS, message=message)


def left_out(measured: Measured) -> Iterator[Check]:
    """JR010."""
    key, missing = "gates.all_sites_retrofitted", measured.without_jump
    if measured.subject.original is None or not measured.subject.gates.all_sites_retrofitted:
        switched_off = measured.subject.original is not None
        yield _skipped("JR010", key, "switched off" if switched_off else _NO_ORIGINAL)
        return
    listed = ", ".join(missing[:_TOLD]) + _and(len(missing) - _TOLD)
    yield Check(
        code="JR010",
        gate=key,
        status=_ok(not missing),
        message=f"without a jump: {listed}" if missing else "every site has a jump",
        measured=float(len(missing)),
        threshold=0.0,
        places=missing,
    )


def latency(measured: Measured) -> Iterator[Check]:
    """JR011."""
    key, most = "gates.max_latency_ratio", measured.subject.gates.max_latency_ratio
    found = measured.latency
    if most is None or found is None:
        yield _skipped("JR011", key, "not configured" if most is None else _NO_ORIGINAL)
        return
    low, high = found.quartiles
    yield Check(
        code="JR011",
        gate=key,
        status=_ok(found.ratio <= most),
        message=f"takes {found.ratio:.2f} times as long as the original (half of {found.pairs} "
        f"pairs: {low:.2f} to {high:.2f}); at most {most:g} is allowed",
        measured=found.ratio,
        threshold=most,
    )


def opset(measured: Measured) -> Iterator[Check]:
    """JR012."""
    gates = measured.subject.gates
    found = opset_of(measured.subject.model.proto.opset_import)
    for name, limit, fine in (
        ("min_opset", gates.min_opset, "at least"),
        ("max_opset", gates.max_opset, "at most"),
    ):
        key = f"gates.{name}"
        if limit is None:
            yield _skipped("JR012", key, "not configured")
            continue
        yield Check(
            code="JR012",
            gate=key,
            status=_ok(found >= limit if name == "min_opset" else found <= limit),
            message=f"the opset is {found}; {fine} {limit} is asked for",
            measured=float(found),
            threshold=float(limit),
        )


def size(measured: Measured) -> Iterator[Check]:
    """JR013."""
    subject, gates = measured.subject, measured.subject.gates
    found = size_of(subject.model)
    if gates.max_size is None:
        yield _skipped("JR013", "gates.max_size", "not configured")
    else:
        yield Check(
            code="JR013",
            gate="gates.max_size",
            status=_ok(found <= gates.max_size),
            message=f"{found:,} bytes; at most {gates.max_size:,} are allowed",
            measured=float(found),
            threshold=float(gates.max_size),
        )
    key, most = "gates.max_size_ratio", gates.max_size_ratio
    if most is None or subject.original is None:
        yield _skipped("JR013", key, "not configured" if most is None else _NO_ORIGINAL)
        return
    before = size_of(subject.original)
    yield Check(
        code="JR013",
        gate=key,
        status=_ok(found <= most * before),
        message=f"{found:,} bytes, {found / before:.3f} times the original's {before:,}; at most "
        f"{most:g} is allowed",
        measured=found / before,
        threshold=most,
    )


def regression(measured: Measured) -> Iterator[Check]:
    """JR014."""
    subject, evaluation = measured.subject, measured.evaluation
    if subject.baseline is None or subject.earlier is None or evaluation is None:
        why = measured.not_attacked
        if subject.baseline is None:
            why = "not configured"
        elif subject.earlier is None:
            why = f"the baseline has no model {subject.name!r}"
        yield _skipped("JR014", "baseline", why)
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
        # Rounding of the shares must not decide: half an example is less than any real drop.
        drop = was - now
        check = Check(
            code="JR014",
            gate=f"baseline.max_{name}_accuracy_drop",
            status=_ok(drop <= most + 0.5 / len(judged.correct)),
            message=f"{name} accuracy {was:.1%} in the baseline, {now:.1%} now; a drop of at most "
            f"{100 * most:.1f} points is allowed",
            measured=drop,
            threshold=most,
        )
        yield _unless_invalid(measured, check) if name == "robust" else check


GATES: tuple[Callable[[Measured], Iterator[Check]], ...] = (
    clean_drop,
    robust_floor,
    no_gain,
    masking,
    attack_validity,
    input_contract,
    parity,
    gradients,
    equivalence,
    left_out,
    latency,
    opset,
    size,
    regression,
)
_TOLD = 3


def _pair(measured: Measured) -> tuple[ModelEvaluation, ModelEvaluation] | None:
    models = measured.evaluation.models if measured.evaluation else ()
    return (models[0], models[1]) if len(models) == 2 else None


def _why(measured: Measured, configured: bool) -> str:
    if not configured:
        return "not configured"
    return measured.not_attacked or _NO_ORIGINAL


def _ok(fine: bool) -> Status:
    return Status.PASS if fine else Status.FAIL


def _skipped(code: str, gate: str, why: str) -> Check:
    return Check(code=code, gate=gate, status=Status.SKIPPED, message=why)


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
        return _skipped(code, gate, measured.not_attacked)
    found = [each for rule in dict.fromkeys((code, *more)) for each in _found(measured, rule)]
    errors = [each for each in found if each.level == "error"]
    if errors:
        return Check(code=code, gate=gate, status=status, message=_messages(errors))
    if found:
        return Check(code=code, gate=gate, status=Status.WARNING, message=_messages(found))
    return Check(code=code, gate=gate, status=Status.PASS, message=fine)


def _found(measured: Measured, rule: str) -> list[Finding]:
    findings = measured.evaluation.findings if measured.evaluation else ()
    return [each for each in findings if each.rule == rule]


def _messages(found: list[Finding]) -> str:
    return "; ".join(each.message for each in found)


def _points(gain: Gain) -> str:
    low, high = (100 * end for end in gain.interval)
    return f"{100 * gain.change:+.1f} points (95% {low:+.1f} to {high:+.1f})"


def _too_few(reached: bool, samples: int) -> str:
    """Says that the figure itself is good enough, where only its interval is not."""
    return f", which {samples:,} examples are too few to show" if reached else ""


def _and(more: int) -> str:
    return f" and {more} more" if more > 0 else ""
