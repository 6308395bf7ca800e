"""The gate's verdict as SARIF 2.1.0, for code scanning: a result for each gate that did not pass.

The location is the model's file, relative to the repository; sites and nodes are logical locations.
A finding is recognised again by rule, file and gate, whatever its figures.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jr_onnx import __version__
from jr_onnx.gate import RULES, Check, GateResult, ModelResult, Rule, Status, fingerprint

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
# Warnings are no reason to fail a build; what is in doubt is none to pass it.
_LEVELS = {Status.FAIL: "error", Status.INCONCLUSIVE: "error", Status.WARNING: "warning"}
# Of a model that is another one altogether, every node is a place.
_MOST_PLACES = 100
_INDEX = {code: index for index, code in enumerate(RULES)}


def sarif(result: GateResult, *, exit_code: int, root: Path | None = None) -> bytes:
    """Returns the document, UTF-8.

    Args:
        result: of the gate.
        exit_code: what the command ends with.
        root: what paths are relative to; the repository around the working directory if None.
    """
    root = root or _repository(Path.cwd())
    invocation: dict[str, Any] = {
        "executionSuccessful": result.error is None,
        "exitCode": exit_code,
    }
    if result.error is not None:
        place = {"physicalLocation": _file(result.config, root)}
        notification = {"level": "error", "message": {"text": result.error}, "locations": [place]}
        invocation["toolExecutionNotifications"] = [notification]
    driver = {
        "name": "jr-onnx",
        "semanticVersion": __version__,
        "rules": [_rule(rule) for rule in RULES.values()],
    }
    run = {
        "tool": {"driver": driver},
        "invocations": [invocation],
        "results": [
            _result(check, model, root)
            for model in result.models
            for check in model.checks
            if check.status in _LEVELS
        ],
    }
    document = {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}
    return (json.dumps(document, indent=2, allow_nan=False) + "\n").encode()


def _rule(rule: Rule) -> dict[str, Any]:
    text = f"{rule.meaning}\n\nWhat to do: {rule.remedy}\n\nMore: {rule.page} of jr-onnx."
    markdown = f"{rule.meaning}\n\n**What to do:** {rule.remedy}\n\nMore: `{rule.page}` of jr-onnx."
    return {
        "id": rule.code,
        "name": "".join(word.capitalize() for word in rule.name.split("-")),
        "shortDescription": {"text": rule.name.replace("-", " ")},
        "fullDescription": {"text": rule.meaning},
        "help": {"text": text, "markdown": markdown},
        "defaultConfiguration": {"level": "warning" if rule.code == "JR008" else "error"},
        "properties": {"tags": ["robustness", "onnx"]},
    }


def _result(check: Check, model: ModelResult, root: Path) -> dict[str, Any]:
    file = _file(model.path or Path(model.name), root)
    location: dict[str, Any] = {"physicalLocation": file}
    if check.places:
        location["logicalLocations"] = [
            {"fullyQualifiedName": place, "kind": "member"} for place in check.places[:_MOST_PLACES]
        ]
    doubt = "inconclusive: " if check.status is Status.INCONCLUSIVE else ""
    return {
        "ruleId": check.code,
        "ruleIndex": _INDEX[check.code],
        "level": _LEVELS[check.status],
        "message": {"text": f"{model.name}: {doubt}{check.message}"},
        "locations": [location],
        "partialFingerprints": {
            "jrOnnxGate/v1": fingerprint(check, file["artifactLocation"]["uri"])
        },
        "properties": {"gate": check.gate, "status": str(check.status)},
    }


def _file(path: Path, root: Path) -> dict[str, Any]:
    # A model has no lines; what shows findings beside the code wants one all the same.
    return {"artifactLocation": _artifact(path, root), "region": {"startLine": 1}}


def _artifact(path: Path, root: Path) -> dict[str, Any]:
    whole = Path(os.path.abspath(path))
    if whole.is_relative_to(root):
        uri = quote(os.fsencode(whole.relative_to(root).as_posix()))
        return {"uri": uri, "uriBaseId": "%SRCROOT%"}
    return {"uri": whole.as_uri()}


def _repository(folder: Path) -> Path:
    parents = (folder, *folder.parents)
    return next((parent for parent in parents if (parent / ".git").exists()), folder)
