"""Finished parts of an evaluation on disk, so that a killed run goes on where it was.

folder/<hash of what was run>.npz      one trial on one model and batch; written when finished
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jr_onnx.attacks import AttackResult
from jr_onnx.attacks.attack import Counts
from jr_onnx.data.npz import UNREADABLE
from jr_onnx.errors import DataError
from jr_onnx.model import write_atomically

_ARRAYS = ("x_adv", "correct", "robust", "distance")


class Checkpoint:
    """A folder of results.

    Args:
        folder: made if it is not there.

    Raises:
        DataError: it is a file, or cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"{folder}: cannot be used as a folder for checkpoints ({error.strerror})"
            ) from error

    def recall(self, key: Any, run: Callable[[], AttackResult]) -> AttackResult:
        """Returns a result that is there already, or runs and keeps it.

        Args:
            key: all that the result depends on, JSON; the version of this package, too.
            run: makes it.
        """
        # The package's __init__ imports this module, so it is asked for its version here only.
        from jr_onnx import __version__

        spelled = json.dumps([__version__, key], sort_keys=True)
        path = self._folder / f"{hashlib.sha256(spelled.encode()).hexdigest()[:32]}.npz"
        if path.exists():
            return _read(path)
        result = run()
        write_atomically(path, _written(result), force=True)
        return result


def _written(result: AttackResult) -> bytes:
    file = io.BytesIO()
    arrays: dict[str, Any] = {name: getattr(result, name) for name in _ARRAYS}
    np.savez_compressed(file, **arrays, counts=result.counts, seconds=result.seconds)
    return file.getvalue()


def _read(path: Path) -> AttackResult:
    try:
        # Opened here: numpy leaves a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in _ARRAYS}
            counts = Counts(*map(int, stored["counts"]))
            return AttackResult(**arrays, counts=counts, seconds=float(stored["seconds"]))
    except (OSError, *UNREADABLE) as error:
        raise DataError(
            f"{path}: this checkpoint cannot be read ({error}). Delete it, and run again"
        ) from error
