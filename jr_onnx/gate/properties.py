"""The rules on the model itself, JR009 to JR013: what was measured -> checks."""

from __future__ import annotations

from collections.abc import Iterator

from jr_onnx.gate.measure import Measured, size_of
from jr_onnx.gate.verdict import NO_ORIGINAL, Check, Status
from jr_onnx.model.graphs import opset_of

# Differences and sites that a message lists.
_TOLD = 3


def equivalence(measured: Measured) -> Iterator[Check]:
    """JR009."""
    key, subject, found = "gates.verify_equivalent", measured.subject, measured.verification
    if subject.edits:
        changed = f"was edited since it was hardened: {', '.join(subject.edits)}"
        # Its original is lost, so it was not attacked: no threshold is shown to hold.
        status = Status.FAIL if subject.gates.verify_equivalent else Status.INCONCLUSIVE
        yield Check(code="JR009", gate=key, status=status, message=changed, places=subject.edits)
    elif found is None:
        switched_off = subject.original is not None
        yield Check.skipped("JR009", key, "switched off" if switched_off else NO_ORIGINAL)
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
        yield Check.skipped("JR010", key, "switched off" if switched_off else NO_ORIGINAL)
        return
    listed = ", ".join(missing[:_TOLD]) + _and(len(missing) - _TOLD)
    yield Check(
        code="JR010",
        gate=key,
        status=Status.of(not missing),
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
        why = "not configured" if most is None else measured.not_attacked or NO_ORIGINAL
        yield Check.skipped("JR011", key, why)
        return
    low, high = found.quartiles
    yield Check(
        code="JR011",
        gate=key,
        status=Status.of(found.ratio <= most),
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
            yield Check.skipped("JR012", key, "not configured")
            continue
        yield Check(
            code="JR012",
            gate=key,
            status=Status.of(found >= limit if name == "min_opset" else found <= limit),
            message=f"the opset is {found}; {fine} {limit} is asked for",
            measured=float(found),
            threshold=float(limit),
        )


def size(measured: Measured) -> Iterator[Check]:
    """JR013."""
    subject, gates = measured.subject, measured.subject.gates
    found = size_of(subject.model)
    if gates.max_size is None:
        yield Check.skipped("JR013", "gates.max_size", "not configured")
    else:
        yield Check(
            code="JR013",
            gate="gates.max_size",
            status=Status.of(found <= gates.max_size),
            message=f"{found:,} bytes; at most {gates.max_size:,} are allowed",
            measured=float(found),
            threshold=float(gates.max_size),
        )
    key, most = "gates.max_size_ratio", gates.max_size_ratio
    if most is None or subject.original is None:
        yield Check.skipped("JR013", key, "not configured" if most is None else NO_ORIGINAL)
        return
    before = size_of(subject.original)
    yield Check(
        code="JR013",
        gate=key,
        status=Status.of(found <= most * before),
        message=f"{found:,} bytes, {found / before:.3f} times the original's {before:,}; at most "
        f"{most:g} is allowed",
        measured=found / before,
        threshold=most,
    )


def _and(more: int) -> str:
    return f" and {more} more" if more > 0 else ""
