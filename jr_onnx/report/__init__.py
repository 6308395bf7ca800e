"""Results for people and programs, one file a format."""

from jr_onnx.report.json import to_json
from jr_onnx.report.terminal import (
    activations_json,
    activations_table,
    distances_table,
    end_to_end,
    evaluation_table,
    faster_form,
    retrofit_summary,
    sites_table,
    verdict,
)

__all__ = [
    "activations_json",
    "activations_table",
    "distances_table",
    "end_to_end",
    "evaluation_table",
    "faster_form",
    "retrofit_summary",
    "sites_table",
    "to_json",
    "verdict",
]
