"""Thresholds on models -> a green or red build.

jr-onnx.toml --> models, data, thresholds --> verify, attack, measure --> checks JR001.. --> verdict
"""

from jr_onnx.gate.asserts import assert_retrofit_equivalent, assert_robust
from jr_onnx.gate.config import GateConfig, config_schema
from jr_onnx.gate.file import ConfigFile, named_files
from jr_onnx.gate.rules import RULES, Rule
from jr_onnx.gate.run import gate, judge
from jr_onnx.gate.subject import Subject
from jr_onnx.gate.template import TEMPLATE
from jr_onnx.gate.verdict import Check, GateResult, ModelResult, Status, fingerprint

__all__ = [
    "RULES",
    "TEMPLATE",
    "Check",
    "ConfigFile",
    "GateConfig",
    "GateResult",
    "ModelResult",
    "Rule",
    "Status",
    "Subject",
    "assert_retrofit_equivalent",
    "assert_robust",
    "config_schema",
    "fingerprint",
    "gate",
    "judge",
    "named_files",
]
