"""The command line: the only place that prints and exits."""

from jr_onnx.cli.app import Exit, main, run

__all__ = ["Exit", "main", "run"]
