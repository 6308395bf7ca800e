"""What came out: a check a gate, a result a model, a verdict on the whole.

fail > inconclusive > pass: one gate that says no makes the build red, whatever else is in doubt.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from jr_onnx.evaluate import Evaluation
from jr_onnx.gate.latency import Latency
from jr_onnx.gate.rules import RULES, Rule

NO_ORIGINAL = "there is no original to compare with"


class Status(StrEnum):
    """What a check, a model or the whole came to."""

    PASS = "pass"
    WARNING = "warning"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    SKIPPED = "skipped"
    ERROR = "error"

    @classmethod
    def of(cls, fine: bool) -> Status:
        """Returns `pass` or `fail`."""
        return cls.PASS if fine else cls.FAIL


@dataclass(frozen=True, kw_only=True)
class Check:
    """One gate on one model.

    Attributes:
        code: of its rule.
        gate: the key of the configuration that it belongs to.
        status: what came out.
        message: what was measured and what was asked for, in words.
        measured: the figure that was compared, None where it is none.
        threshold: what it was compared with.
        places: names of sites or nodes that it is about.
    """

    code: str
    gate: str
    status: Status
    message: str
    measured: float | None = None
    threshold: float | None = None
    places: tuple[str, ...] = ()

    @classmethod
    def skipped(cls, code: str, gate: str, why: str) -> Check:
        """Returns that a gate asked nothing, or could not be asked."""
        return cls(code=code, gate=gate, status=Status.SKIPPED, message=why)

    @property
    def rule(self) -> Rule:
        """The rule behind it."""
        return RULES[self.code]

    def to_json(self) -> dict[str, Any]:
        """Returns the entry of `gates` in the result."""
        return {
            "rule": self.code,
            "name": self.rule.name,
            "gate": self.gate,
            "status": str(self.status),
            "message": self.message,
            "measured": self.measured,
            "threshold": self.threshold,
            "places": list(self.places),
        }


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """All gates on one model.

    Attributes:
        name: as the configuration has it.
        path: of the model that was judged, None where it is no file.
        sha256: of that file.
        original_sha256: of its original, None where there is none.
        data: name and hash of the examples, how many, how they were drawn, and the output judged.
        checks: in the order of their rules.
        evaluation: the attacks, None where the model was not attacked.
        latency: None where it was not measured.
    """

    name: str
    path: Path | None
    sha256: str
    original_sha256: str | None
    data: dict[str, Any]
    checks: tuple[Check, ...]
    evaluation: Evaluation | None = field(default=None, repr=False)
    latency: Latency | None = None

    @property
    def status(self) -> Status:
        """`fail` before `inconclusive` before `pass`."""
        return _worst([check.status for check in self.checks])

    def to_json(self) -> dict[str, Any]:
        """Returns the entry of `models` in the result."""
        return {
            "name": self.name,
            "path": str(self.path) if self.path else None,
            "sha256": self.sha256,
            "original_sha256": self.original_sha256,
            "status": str(self.status),
            "data": self.data,
            "gates": [check.to_json() for check in self.checks],
            "latency": self.latency.to_json() if self.latency else None,
            "evaluation": self.evaluation.to_json() if self.evaluation else None,
        }


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """All models of a configuration.

    Attributes:
        config: the file.
        config_sha256: of its bytes.
        models: those that were finished.
        error: why the others were not, None where all were.
    """

    config: Path
    config_sha256: str | None
    models: tuple[ModelResult, ...]
    error: str | None = None

    @property
    def status(self) -> Status:
        """`error`, else `fail` before `inconclusive` before `pass`."""
        if self.error is not None:
            return Status.ERROR
        return _worst([model.status for model in self.models])

    @property
    def passed(self) -> bool:
        """Whether no gate says no, and none is in doubt."""
        return self.status is Status.PASS

    def to_json(self) -> dict[str, Any]:
        """Returns the result, schema `jr-onnx/gate/1`."""
        return {
            "schema": "jr-onnx/gate/1",
            "status": str(self.status),
            "error": self.error,
            "config": {"path": str(self.config), "sha256": self.config_sha256},
            "models": [model.to_json() for model in self.models],
        }


def fingerprint(check: Check, path: str) -> str:
    """Returns what a finding is recognised by from run to run: rule, model and gate, no figure."""
    return hashlib.sha256("\n".join((check.code, path, check.gate)).encode()).hexdigest()


def _worst(found: list[Status]) -> Status:
    for status in (Status.FAIL, Status.INCONCLUSIVE):
        if status in found:
            return status
    return Status.PASS
