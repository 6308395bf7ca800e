"""The gate's verdict as JUnit XML (xunit2, as Jenkins reads it).

One testsuite a model, one testcase a gate, and one for each attack and epsilon:

    failure   a gate says no            error     in doubt, or the run broke off
    skipped   not configured, or an attack that does not know the norm
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np

from jr_onnx.evaluate import Evaluation, ModelEvaluation
from jr_onnx.gate import GateResult, ModelResult, Status

# What XML 1.0 cannot hold, not even escaped.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_TAGS = {
    Status.FAIL: "failure",
    Status.INCONCLUSIVE: "error",
    Status.ERROR: "error",
    Status.SKIPPED: "skipped",
    Status.WARNING: "system-out",
}


def junit(result: GateResult) -> bytes:
    """Returns the document, UTF-8."""
    suites = [_suite(model) for model in result.models]
    if result.error is not None:
        suites.append(_broken_off(result))
    root = ET.Element("testsuites", name="jr-onnx gate")
    root.extend(suites)
    for name in ("tests", "failures", "errors"):
        root.set(name, str(sum(int(suite.get(name, "0")) for suite in suites)))
    ET.indent(root)
    content: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return content + b"\n"


def _suite(model: ModelResult) -> ET.Element:
    suite = ET.Element("testsuite", name=_text(model.name))
    _add_properties(suite, _properties(model))
    seconds = 0.0
    for check in model.checks:
        name = f"{check.code} {check.rule.name} ({check.gate})"
        _add_case(suite, f"{model.name}.gates", name, check.status, check.message, check.code)
    if model.evaluation is not None:
        for judged in model.evaluation.models:
            seconds += _add_attacks(suite, model, judged, model.evaluation)
    return _counted(suite, seconds)


def _add_attacks(
    suite: ET.Element, model: ModelResult, judged: ModelEvaluation, evaluation: Evaluation
) -> float:
    """Adds a testcase for each trial; returns how long they took."""
    where, seconds = f"{model.name}.attacks.{judged.role}", 0.0
    doubts = [
        each.message for each in judged.findings if (each.rule, each.level) == ("JR005", "error")
    ]
    for trial in evaluation.suite.trials:
        threat = trial.threat_model(evaluation.threat)
        ball = f"{threat.norm} {threat.epsilon:g}" if np.isfinite(threat.epsilon) else threat.norm
        name, outcome = f"{trial.name} {ball}", judged.outcomes.get(trial.name)
        if outcome is None:
            _add_case(
                suite,
                where,
                name,
                Status.SKIPPED,
                "did not run: no example was left, or the model has no gradient",
            )
            continue
        took, share = outcome.result.seconds, outcome.robust.mean()
        seconds += took
        status = Status.INCONCLUSIVE if doubts else Status.PASS
        message = f"{'; '.join(doubts)} ({share:.1%} were left)"
        _add_case(suite, where, name, status, message, "JR005", seconds=took)
    for name in evaluation.suite.left_out:
        message = f"does not know the norm {evaluation.threat.norm}"
        _add_case(suite, where, name, Status.SKIPPED, message)
    return seconds


def _add_case(
    suite: ET.Element,
    where: str,
    name: str,
    status: Status,
    message: str,
    kind: str | None = None,
    *,
    seconds: float = 0.0,
) -> None:
    attributes = {"classname": _text(where), "name": _text(name), "time": f"{seconds:.3f}"}
    case = ET.SubElement(suite, "testcase", attributes)
    if status is Status.PASS:
        return
    outcome = ET.SubElement(case, _TAGS[status])
    if status is Status.WARNING:
        outcome.text = _text(message)
        return
    outcome.set("message", _text(message))
    if kind is not None:
        outcome.set("type", kind)


def _broken_off(result: GateResult) -> ET.Element:
    suite = ET.Element("testsuite", name="jr-onnx gate")
    config, message = str(result.config), result.error or ""
    _add_case(suite, "jr_onnx.gate", config, Status.ERROR, message, "error")
    return _counted(suite, 0.0)


def _counted(suite: ET.Element, seconds: float) -> ET.Element:
    for name, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(name, str(len(suite.findall(f"testcase/{tag}"))))
    suite.set("tests", str(len(suite.findall("testcase"))))
    suite.set("time", f"{seconds:.3f}")
    return suite


def _add_properties(suite: ET.Element, properties: Mapping[str, Any]) -> None:
    listed = ET.SubElement(suite, "properties")
    for name, value in properties.items():
        ET.SubElement(listed, "property", name=name, value=_text(str(value)))


def _properties(model: ModelResult) -> dict[str, Any]:
    found = {
        "path": model.path,
        "sha256": model.sha256,
        "original_sha256": model.original_sha256,
        **{f"data.{name}": value for name, value in model.data.items()},
        **dict(_figures(model)),
    }
    return {name: value for name, value in found.items() if value is not None}


def _figures(model: ModelResult) -> Iterator[tuple[str, Any]]:
    if model.latency is not None:
        yield "latency_ratio", model.latency.ratio
    if model.evaluation is None:
        return
    evaluation = model.evaluation
    for name, value in evaluation.threat.to_json().items():
        yield f"threat.{name}", value
    yield "suite", evaluation.suite.name
    for judged in evaluation.models:
        yield f"{judged.role}.clean_accuracy", judged.clean_accuracy
        yield f"{judged.role}.robust_accuracy", judged.robust_accuracy
    for name, gain in (("naive", evaluation.naive_gain), ("adaptive", evaluation.adaptive_gain)):
        if gain is not None:
            yield f"{name}_gain", gain.change


def _text(value: str) -> str:
    return _FORBIDDEN.sub("\ufffd", value)
