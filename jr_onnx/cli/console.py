"""What the commands say: results on stdout, progress and complaints on stderr."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jr_onnx.errors import OutputError, ParameterError
from jr_onnx.evaluate import Progress as Told
from jr_onnx.model import require_writable, write_atomically

_STDOUT = Path("-")
_json_has_stdout: ContextVar[bool] = ContextVar("_json_has_stdout", default=False)


def say(content: Any = "") -> None:
    """Prints text as it is, or a rich table; on stderr where the JSON has stdout for itself."""
    stream = sys.stderr if _json_has_stdout.get() else sys.stdout
    width = None if stream.isatty() else 100  # the same in every log, whatever its terminal
    console = Console(file=stream, markup=False, highlight=False, emoji=False, width=width)
    console.print(content, soft_wrap=isinstance(content, str))


def complain(message: str) -> None:
    """Prints one line on stderr, if it can be written to: the exit code says it, too."""
    with suppress(OSError):
        print(f"jr-onnx: error: {' '.join(message.split())}", file=sys.stderr)


def warn(message: str, *, kind: str = "warning") -> None:
    """Prints one line on stderr: what was done is not all that was wished.

    Args:
        message: the line.
        kind: what it begins with; of a finding its rule and level.
    """
    print(f"jr-onnx: {kind}: {' '.join(message.split())}", file=sys.stderr)


@contextmanager
def bars(samples: int, *, quiet: bool) -> Iterator[Told]:
    """Yields a progress callback; bars appear on a terminal only."""
    with _progress(quiet=quiet) as progress:
        tasks: dict[tuple[str, str], Any] = {}

        def told(role: str, attack: str, done: int) -> None:
            key = (role, attack)
            if key not in tasks:
                tasks[key] = progress.add_task(f"{attack} on the {role} model", total=samples)
            progress.advance(tasks[key], done)
            if progress.tasks[tasks[key]].finished:  # thirty bars would fill the screen
                progress.update(tasks[key], visible=False)

        yield told


@contextmanager
def stages(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Yields a callback that takes what is going on, how much of it is done, and of how much."""
    with _progress(quiet=quiet) as progress:
        tasks: dict[str, Any] = {}

        def told(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        yield told


def _progress(*, quiet: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )


def require_distinct(*, inputs: Sequence[Path | None], outputs: Sequence[Path | None]) -> None:
    """Refuses an output that is an input or another output: not even --force may mean that.

    Raises:
        ParameterError: two of the paths are the same file.
    """
    seen = {path.resolve(): path for path in inputs if path}
    for path in filter(None, outputs):
        if path.resolve() in seen:
            raise ParameterError(f"{path}: would be overwritten. Give each file a path of its own")
        seen[path.resolve()] = path


def require_folder(folder: Path, *, force: bool) -> None:
    """Refuses a folder for many files that cannot work, before any work is done.

    Raises:
        OutputError: it has files already and `force` is not given, it is a file, or it cannot be
            made or written to.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder}: is a file; expected a folder, or none yet")
        if not force and folder.is_dir() and any(folder.iterdir()):
            raise OutputError(
                f"{folder}: has files already. Pass --force to add to them, or give another path"
            )
        there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        # Whether something can be made there, only making it tells.
        with tempfile.TemporaryDirectory(dir=there, prefix=".jr-onnx."):
            pass
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be made a folder with files in it ({error.strerror}). Check the "
            "path and its permissions"
        ) from error


def json_path(path: Path | None) -> Path | None:
    """The callback of --json: `-` is stdout, which then is the JSON's alone."""
    _json_has_stdout.set(path == _STDOUT)
    return path


def file_path(path: Path | None) -> Path | None:
    """The callback of --output: a file, never `-`.

    Raises:
        ParameterError: it is `-`.
    """
    if path == _STDOUT:
        raise ParameterError("--output takes the path of a file: nothing binary goes to stdout")
    return path


def require_json(path: Path | None, *, force: bool) -> None:
    """Refuses a path of --json that cannot work, before any work is done.

    Raises:
        OutputError: the file is there and `force` is not given, or it cannot be written.
    """
    require_writable(None if path == _STDOUT else path, force=force)


def write_json(path: Path | None, content: bytes, *, force: bool) -> None:
    """Writes a result, where one is asked for."""
    if path == _STDOUT:
        sys.stdout.write(content.decode())
    elif path is not None:
        write_atomically(path, content, force=force)
