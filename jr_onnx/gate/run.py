"""jr-onnx.toml -> verdict: everything is opened and checked, then one model after the other."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from jr_onnx.evaluate import Progress
from jr_onnx.gate.checks import checks_of
from jr_onnx.gate.file import ConfigFile
from jr_onnx.gate.measure import Measured, attack, examine
from jr_onnx.gate.opening import subjects_of
from jr_onnx.gate.subject import Subject
from jr_onnx.gate.verdict import GateResult, ModelResult

# Told the name of a model and how many examples it has; its progress is reported inside.
Watch = Callable[[str, int], AbstractContextManager[Progress]]


def _unwatched(name: str, samples: int) -> AbstractContextManager[Progress]:
    return nullcontext(lambda role, trial, done: None)


def gate(
    config: str | os.PathLike[str] = "jr-onnx.toml",
    *,
    device: str | None = None,
    watch: Watch = _unwatched,
    finished: Callable[[ModelResult], None] = lambda result: None,
) -> GateResult:
    """Holds models to the thresholds of a configuration.

    A gate that says no is a result, never an exception.

    Args:
        config: the TOML file; paths in it are relative to its folder.
        device: takes the place of the one in the file.
        watch: told of each model before it is measured; gives the progress callback.
        finished: told of each model when it is done, for what is left of a run that fails.

    Raises:
        ConfigError: the configuration makes no sense; all problems at once.
        ModelError: a model is missing, is none, or cannot be attacked.
        DataError: the data is missing, or does not fit the models: labels shifted, another scale.
        SessionError: onnxruntime is not there, or refuses a model or the device.
    """
    file = ConfigFile(config)
    examined = [_examined(subject) for subject in subjects_of(file, device=device)]
    results = []
    for known in examined:
        with watch(known.subject.name, len(known.subject.examples)) as progress:
            results.append(_judged(known, progress))
        finished(results[-1])
    digest = hashlib.sha256(file.content).hexdigest()
    return GateResult(config=file.path, config_sha256=digest, models=tuple(results))


def judge(subject: Subject) -> ModelResult:
    """Measures one model and holds it to its thresholds.

    Args:
        subject: the model, its examples, and the thresholds.

    Raises:
        ModelError: the model is no classifier, or cannot be attacked.
        DataError: the data does not fit the model.
        SessionError: onnxruntime refuses the model or the device.
        EvaluationInterrupted: Ctrl-C.
    """
    return _judged(_examined(subject), lambda role, trial, done: None)


def _examined(subject: Subject) -> Measured:
    known = examine(subject)
    if not known.not_attacked:
        subject.require_contract()
    return known


def _judged(known: Measured, progress: Progress) -> ModelResult:
    measured = attack(known, progress=progress)
    subject, examples = known.subject, known.subject.examples
    return ModelResult(
        name=subject.name,
        path=subject.model.path,
        sha256=subject.model.sha256,
        original_sha256=subject.original.sha256 if subject.original else None,
        data={
            "path": examples.name,
            "sha256": subject.digest,
            "samples": len(examples),
            "seed": subject.evaluation.seed,
            "output": subject.evaluation.output,
        },
        checks=checks_of(measured),
        evaluation=measured.evaluation,
        latency=measured.latency,
    )
