"""The application, its exit codes, and how errors are told: one line on stderr."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextvars import copy_context
from typing import Any, NoReturn

import typer

from jr_onnx.cli.attacking import attack, evaluate
from jr_onnx.cli.commands import inspect, restore, verify
from jr_onnx.cli.console import complain
from jr_onnx.cli.exits import Exit
from jr_onnx.cli.gating import gate
from jr_onnx.cli.options import show_version
from jr_onnx.cli.retrofitting import retrofit
from jr_onnx.cli.tuning import tune
from jr_onnx.errors import ConfigError, JrOnnxError, ParameterError, PostconditionError

app = typer.Typer(name="jr-onnx", no_args_is_help=True, rich_markup_mode="rich")
app.callback()(show_version)
for command in (inspect, retrofit, restore, verify, attack, evaluate, tune, gate):
    app.command()(command)


def main() -> NoReturn:
    """Runs the command line and exits, with a value of `Exit` whatever happens."""
    _stand_in_for_closed_streams()
    for name in ("SIGTERM", "SIGHUP"):  # a build that is cancelled; nohup's SIG_IGN stays
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _interrupt)
    code = run(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # else Python would end with 120
            _discard(stream)
    sys.exit(code)


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _stand_in_for_closed_streams() -> None:
    """Opens what the caller has closed (`>&-`), so that whatever writes need not ask."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def _discard(stream: Any) -> None:
    """Lets go nowhere what is still buffered."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _help_of(error: Any) -> str:
    """Returns what prints the help of the command that was called, if it came to that."""
    context = getattr(error, "ctx", None)
    return f"{context.command_path if context else 'jr-onnx'} --help"


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
        _discard(sys.stdout)
        return Exit.INTERRUPTED
    except typer.TyperException as error:
        if error.format_message():  # empty where the help was printed for want of arguments
            complain(f"{error.format_message()} (see {_help_of(error)})")
        return Exit.USAGE
    except ConfigError as error:
        for problem in error.problems:
            complain(problem)
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
        with contextlib.suppress(OSError):
            traceback.print_exc()
        complain(f"this is a bug of jr-onnx, please report it: {type(error).__name__}: {error}")
        return Exit.BUG
    if code == Exit.INTERRUPTED:  # typer returns it for Ctrl-C
        complain("interrupted")
    return code
