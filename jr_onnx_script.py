"""The console script, whose exit codes hold while the package is being imported, too."""

import sys
import traceback
from typing import NoReturn


def main() -> NoReturn:
    """Runs the command line and exits."""
    try:
        from jr_onnx.cli import main as run_and_exit

        run_and_exit()
    except KeyboardInterrupt:
        print("jr-onnx: error: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:  # a broken installation: Python's own code, 1, is a gate's no
        traceback.print_exc()
        print(f"jr-onnx: error: cannot start ({error}). Install it again", file=sys.stderr)
        sys.exit(4)
