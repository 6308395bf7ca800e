"""The console script: Ctrl-C ends it in one line, also while the package is being imported."""

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Runs the command line and exits."""
    try:
        from jr_onnx.cli import main as run_and_exit

        run_and_exit()
    except KeyboardInterrupt:
        print("jr-onnx: error: interrupted", file=sys.stderr)
        sys.exit(130)
