"""subject --examine--> what is cheap to know --attack--> all that the gates look at."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from jr_onnx import rewrite
from jr_onnx.errors import NotRetrofittedError
from jr_onnx.evaluate import Evaluation, Progress, evaluate
from jr_onnx.gate.latency import Latency, compare_latency
from jr_onnx.gate.subject import Subject
from jr_onnx.model import Model
from jr_onnx.model.external import data_files


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is known of a subject.

    Attributes:
        subject: the model, and what it is held to.
        verification: None without an original, or where it is switched off.
        without_jump: paths of the original's activations that have no jump.
        latency: None where it is not asked for.
        evaluation: None where the model was not attacked.
        not_attacked: why it was not.
        disputed: how many examples count as broken that a fresh session classifies correctly.
    """

    subject: Subject
    verification: rewrite.Verification | None = None
    without_jump: tuple[str, ...] = ()
    latency: Latency | None = None
    evaluation: Evaluation | None = field(default=None, repr=False)
    not_attacked: str = ""
    disputed: int = 0


def examine(subject: Subject) -> Measured:
    """Measures what needs no attack.

    A model that is not the original with its jumps is not run: the attacks start from what it
    claims to be, and its figures would be compared with those of another model.

    Args:
        subject: the model, and what it is held to.

    Raises:
        ModelError: a model has several inputs.
        ExternalDataError: weights are missing.
        SessionError: onnxruntime refuses a model or the device.
    """
    original, gates = subject.original, subject.gates
    known = Measured(subject=subject)
    if original is not None:
        known = replace(known, without_jump=_without_jump(original, subject.model))
        if gates.verify_equivalent:
            known = replace(known, verification=rewrite.verify(original, subject.model))
    if subject.edits or (known.verification is not None and not known.verification.equivalent):
        return replace(known, not_attacked="not run: the model is not what it claims to be")
    if original is not None and gates.max_latency_ratio is not None:
        x, device = subject.examples.x, subject.evaluation.device
        latency = compare_latency(original, subject.model, x, device=device)
        known = replace(known, latency=latency)
    return known


def attack(known: Measured, *, progress: Progress = lambda role, trial, done: None) -> Measured:
    """Adds the evaluation, of a model that is to be attacked.

    Args:
        known: what `examine` found.
        progress: told role, trial, and the number of examples just finished.

    Raises:
        ModelError: the model is no classifier, or has no gradient.
        SessionError: onnxruntime refuses the model or the device.
        EvaluationInterrupted: Ctrl-C.
    """
    if known.not_attacked:
        return known
    evaluation = _evaluated(known.subject, progress)
    return replace(known, evaluation=evaluation, disputed=_disputed(known.subject, evaluation))


def size_of(model: Model) -> int:
    """Returns the bytes of a model and of its external data."""
    outside = sum(path.stat().st_size for path in data_files(model) if path.is_file())
    return len(model.content) + outside + sum(map(len, model.attachments.values()))


def _evaluated(subject: Subject, progress: Progress) -> Evaluation:
    table = subject.evaluation
    return evaluate(
        subject.model,
        subject.examples.x,
        subject.examples.y,
        threat=subject.threat,
        suite=table.suite,
        baseline=subject.original,
        preprocessing=subject.steps,
        device=table.device,
        seed=table.seed,
        batch_size=table.batch_size,
        output=table.output,
        progress=progress,
    )


def _without_jump(original: Model, hardened: Model) -> tuple[str, ...]:
    sites, skipped = rewrite.find_sites(original)
    try:
        jumps = rewrite.jumps_of(hardened)
    except NotRetrofittedError:  # its manifest cannot be read
        jumps = {}
    hidden = (each.path for each in skipped if each.hidden)
    return (*(site.path for site in sites if site.path not in jumps), *hidden)


def _disputed(subject: Subject, evaluation: Evaluation) -> int:
    """Runs what counts as broken once more, in a session that took no part in the attack."""
    disputed = 0
    for model in evaluation.models:
        target = subject.target(model.model)
        for outcome in model.outcomes.values():
            found = outcome.result
            broken = found.correct & ~found.robust
            if broken.any():
                y = subject.examples.y[outcome.indices[broken]]
                disputed += int((target.logits(found.x_adv[broken]).argmax(axis=1) == y).sum())
    return disputed
