"""The exit codes of the design, and nothing else ever: a 1 is a gate's or a verification's no."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from jr_onnx.cli import Exit, run
from jr_onnx.errors import ConfigError, DataError, OutputError, ParameterError, PostconditionError

REPOSITORY = Path(__file__).resolve().parents[1]
MAIN = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); import jr_onnx_script as script;"


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (typer.Abort(), Exit.INTERRUPTED),
        (KeyboardInterrupt(), Exit.INTERRUPTED),
        (SystemExit(1), Exit.USAGE),
        (MemoryError(), Exit.BUG),
        (RecursionError(), Exit.BUG),
        (ImportError("x"), Exit.BUG),
        (PostconditionError("x"), Exit.BUG),
        (OSError(28, "No space left on device"), Exit.ERROR),
        (DataError("x"), Exit.ERROR),
        (OutputError("x"), Exit.ERROR),
        (ParameterError("x"), Exit.USAGE),
        (ConfigError(["x", "y"]), Exit.USAGE),
    ],
)
def test_whatever_is_raised_has_its_code(
    raised: BaseException,
    code: Exit,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command(arguments: list[str]) -> None:
        raise raised

    monkeypatch.setattr(sys.modules[run.__module__], "_command_line", command)
    assert run([]) == code
    if isinstance(raised, ConfigError):
        assert capsys.readouterr().err == "jr-onnx: error: x\njr-onnx: error: y\n"


def _end(script: str, *, redirected: str = "") -> int:
    command = ["bash", "-c", f'"$0" -c "$1" {redirected}', sys.executable, MAIN + script]
    return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode


@pytest.mark.parametrize(
    ("redirected", "code"),
    [("2>/dev/full", 3), ("2>&-", 3), (">/dev/full", 3), (">&-", 3), ("2>/dev/full >/dev/full", 3)],
)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_streams_that_take_nothing_change_no_code(redirected: str, code: int) -> None:
    assert (
        _end("sys.argv[1:] = ['inspect', 'gone.onnx']; script.main()", redirected=redirected)
        == code
    )


def test_text_that_fits_nowhere_is_an_error() -> None:
    sample = REPOSITORY / "sample_models" / "lenet_mnist.onnx"
    call = f"sys.argv[1:] = ['inspect', {str(sample)!r}]; script.main()"
    assert _end(call, redirected=">/dev/full") == Exit.ERROR
    assert _end(call, redirected=">&-") == Exit.OK


def test_an_installation_that_does_not_start_is_no_verdict() -> None:
    assert _end("sys.modules['numpy'] = None; script.main()") == Exit.BUG


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_build_that_is_cancelled_is_interrupted(number: signal.Signals) -> None:
    call = (
        "import importlib, time; module = importlib.import_module('jr_onnx.cli.app');"
        "module._command_line = lambda _: (print('up', flush=True), time.sleep(60));"
        "script.main()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", MAIN + call], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(number)
        assert process.wait(30) == Exit.INTERRUPTED
