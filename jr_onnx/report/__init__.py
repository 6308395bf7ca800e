"""Results for people and programs, one file a format."""

from jr_onnx.report.json import to_json
from jr_onnx.report.terminal import evaluation_table, sites_table, verdict

__all__ = ["evaluation_table", "sites_table", "to_json", "verdict"]
