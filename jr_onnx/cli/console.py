"""What the commands say: results on stdout, progress and complaints on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jr_onnx.errors import ParameterError
from jr_onnx.evaluate import Progress as Told
from jr_onnx.model import write_atomically


def say(content: Any = "") -> None:
    """Prints text as it is, or a rich table."""
    width = None if sys.stdout.isatty() else 100  # the same in every log, whatever its terminal
    console = Console(markup=False, highlight=False, emoji=False, width=width)
    console.print(content, soft_wrap=isinstance(content, str))


def complain(message: str) -> None:
    """Prints one line on stderr."""
    print(f"jr-onnx: error: {' '.join(message.split())}", file=sys.stderr)


@contextmanager
def bars(samples: int, *, quiet: bool) -> Iterator[Told]:
    """Yields a progress callback; bars appear on a terminal only."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    ) as progress:
        tasks: dict[tuple[str, str], Any] = {}

        def told(role: str, attack: str, done: int) -> None:
            key = (role, attack)
            if key not in tasks:
                tasks[key] = progress.add_task(f"{attack} on the {role} model", total=samples)
            progress.advance(tasks[key], done)

        yield told


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


def write_json(path: Path | None, content: bytes, *, force: bool) -> None:
    """Writes a result, where one is asked for."""
    if path is not None:
        write_atomically(path, content, force=force)
