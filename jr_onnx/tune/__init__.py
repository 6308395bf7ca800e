"""Tuning: model, data, budget -> the jumps that buy most robustness."""

from jr_onnx.tune.objective import OBJECTIVES, tuning_suite
from jr_onnx.tune.points import Point
from jr_onnx.tune.result import Tuning
from jr_onnx.tune.search import SCOPES
from jr_onnx.tune.target import JumpTarget
from jr_onnx.tune.tuning import tune

__all__ = ["OBJECTIVES", "SCOPES", "JumpTarget", "Point", "Tuning", "tune", "tuning_suite"]
