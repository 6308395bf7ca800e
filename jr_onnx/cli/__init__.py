"""The command line: the only place that prints and exits."""

from jr_onnx.cli.app import main, run
from jr_onnx.cli.exits import Exit

__all__ = ["Exit", "main", "run"]
