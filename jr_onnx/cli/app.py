"""The application, its exit codes, and how errors are told: one line on stderr."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from contextvars import copy_context
from enum import IntEnum
from typing import Any, NoReturn

import typer

from jr_onnx.cli.attacking import attack, evaluate
from jr_onnx.cli.commands import inspect, restore, verify
from jr_onnx.cli.console import complain
from jr_onnx.cli.options import show_version
from jr_onnx.cli.retrofitting import retrofit
from jr_onnx.cli.tuning import tune
from jr_onnx.errors import JrOnnxError, ParameterError, PostconditionError


class Exit(IntEnum):
    """Every exit code there is."""

    OK = 0
    REFUSED = 1
    USAGE = 2
    ERROR = 3
    BUG = 4
    INCONCLUSIVE = 5
    INTERRUPTED = 130


app = typer.Typer(name="jr-onnx", no_args_is_help=True, rich_markup_mode="rich")
app.callback()(show_version)
for command in (inspect, retrofit, restore, verify, attack, evaluate, tune):
    app.command()(command)


def main() -> NoReturn:
    """Runs the command line and exits."""
    sys.exit(run(sys.argv[1:]))


def _command_line(arguments: list[str]) -> Any:
    return app(arguments, prog_name="jr-onnx", standalone_mode=False)


def run(arguments: Sequence[str]) -> int:
    """Runs the command line.

    Args:
        arguments: without the program's name.

    Returns:
        A value of `Exit`.
    """
    try:
        # A context of its own: options that say where the text goes hold for this run only.
        code = int(copy_context().run(_command_line, list(arguments)) or Exit.OK)
        sys.stdout.flush()
    except (SystemExit, BrokenPipeError) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            return Exit.USAGE if error.code else Exit.OK  # shell completion ends this way
        # `jr-onnx inspect | head`: the reader has left (typer turns that into SystemExit(1), which
        # would read as a refusal). What is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.INTERRUPTED
    except typer.TyperException as error:
        if error.format_message():  # empty where the help was printed for want of arguments
            complain(f"{error.format_message()} (see jr-onnx --help)")
        return Exit.USAGE
    except ParameterError as error:
        complain(str(error))
        return Exit.USAGE
    except PostconditionError as error:
        complain(str(error))
        return Exit.BUG
    except JrOnnxError as error:
        complain(str(error))
        return Exit.ERROR
    except (KeyboardInterrupt, typer.Abort):
        code = Exit.INTERRUPTED
    except OSError as error:  # a full disk under stdout, say; files have errors of their own
        complain(f"{error.strerror} ({error.filename or 'standard output'})")
        return Exit.ERROR
    except Exception as error:
        traceback.print_exc()
        complain(f"this is a bug of jr-onnx, please report it: {type(error).__name__}: {error}")
        return Exit.BUG
    if code == Exit.INTERRUPTED:  # typer returns it for Ctrl-C
        complain("interrupted")
    return code
