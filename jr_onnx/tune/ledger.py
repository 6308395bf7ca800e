"""Where points are kept: in memory, or in an Optuna study on disk, so that a killed run goes on.

folder/study.db     the finished points, one transaction each; Optuna's dashboard reads it
folder/workers      locks, one byte for each process at work
folder/*.npz        finished attacks of the final evaluation

Only finished points are written. So a run that is killed at any moment and started again sees what
it saw before, proposes the same next candidate, and ends with the same result.
"""

from __future__ import annotations

import base64
import contextlib
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jr_onnx.errors import ParameterError, TuningError
from jr_onnx.rewrite import Jump
from jr_onnx.tune.points import Point, key_of

Array = np.ndarray[Any, Any]
_STUDY = "jr-onnx/tuning/1"
_MOST_WORKERS = 64


@dataclass
class Ledger:
    """Finished points in the order they were found, for this run only.

    Attributes:
        points: the points.
        worker: which of the processes on the same points this is.
    """

    points: list[Point] = field(default_factory=list)
    worker: int = 0

    def find(self, jumps: Mapping[str, Jump]) -> Point | None:
        """Returns the point of these jumps, None if there is none yet."""
        key = key_of(jumps)
        return next((point for point in self.points if point.key == key), None)

    def add(self, point: Point) -> None:
        """Keeps a finished point."""
        self.points.append(point)

    def refresh(self) -> None:
        """Reads what other processes found."""

    def close(self) -> None:
        """Lets go of what is open."""


class StoredLedger(Ledger):
    """The same in a folder.

    Args:
        folder: made if it is not there.
        about: all that the points depend on, JSON.

    Raises:
        TuningError: the folder is of another run, or cannot be used.
        ParameterError: Optuna is not installed.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        super().__init__()
        self._optuna = optuna()
        self._storage: Any = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.worker, self._lock = _take_place(folder / "workers")
        except OSError as error:
            raise TuningError(
                f"{folder}: cannot be used as a folder to resume from ({error.strerror})"
            ) from error
        try:
            self._study = self._open(folder, json.loads(json.dumps(about)))
            self.refresh()
        except BaseException:
            self.close()
            raise

    def _open(self, folder: Path, about: Any) -> Any:
        path = folder / "study.db"
        try:
            with quiet(self._optuna):
                self._storage = self._optuna.storages.RDBStorage(f"sqlite:///{path}")
                study = self._optuna.create_study(
                    storage=self._storage,
                    study_name=_STUDY,
                    directions=["maximize", "maximize"],
                    load_if_exists=True,
                )
            known = study.user_attrs.get("about")
            if known is None:
                study.set_user_attr("about", about)
        except Exception as error:  # what SQLAlchemy and SQLite say of a damaged file
            raise TuningError(
                f"{path}: cannot be used as an Optuna study ({_one_line(error)}). Delete it, or "
                "give another folder"
            ) from error
        if known is not None and known != about:
            differing = [
                key for key in sorted({*known, *about}) if known.get(key) != about.get(key)
            ]
            raise TuningError(
                f"{folder}: was made by another run, of other {', '.join(differing)}. Give the "
                "same model, data and options, or another folder"
            )
        return study

    def add(self, point: Point) -> None:
        """Keeps a finished point, in one transaction."""
        state = self._optuna.trial.TrialState
        pruned = point.pruned is not None
        self._study.add_trial(
            self._optuna.trial.create_trial(
                state=state.PRUNED if pruned else state.COMPLETE,
                values=None if pruned else [point.clean_accuracy, point.robustness],
                user_attrs={
                    "origin": point.origin,
                    "parameters": point.parameters,
                    "jumps": point.jumps,
                    "pruned": point.pruned,
                    "correct": _packed(point.correct),
                    "score": _packed(point.score),
                },
            )
        )
        self.refresh()

    def refresh(self) -> None:
        """Reads all points."""
        states = self._optuna.trial.TrialState
        trials = self._study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED))
        self.points = [_point(trial.user_attrs) for trial in trials]

    def close(self) -> None:
        """Gives the place back, and closes the database."""
        self._lock.close()
        if self._storage is not None:
            self._storage.remove_session()
            self._storage.engine.dispose()


def optuna() -> Any:
    """Imports Optuna.

    Raises:
        ParameterError: it is not installed.
    """
    try:
        import optuna as module
    except ImportError as error:
        raise ParameterError(
            "this search needs Optuna: pip install 'jr-onnx[tune]'. The jump scopes global and "
            f"quantile, without resume, do without ({error})"
        ) from error
    return module


@contextlib.contextmanager
def quiet(module: Any) -> Iterator[None]:
    """Keeps Optuna from writing to stderr."""
    before = module.logging.get_verbosity()
    module.logging.set_verbosity(module.logging.ERROR)
    try:
        yield
    finally:
        module.logging.set_verbosity(before)


def _take_place(path: Path) -> tuple[int, Any]:
    """Returns the first number that no living process has, and what holds it until the end.

    The system drops the lock of a process that is killed: it gets its number again.
    """
    file = path.open("ab")
    try:
        import fcntl
    except ImportError:  # Windows: one process at a time
        return 0, file
    for number in range(_MOST_WORKERS):
        with contextlib.suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            return number, file
    file.close()
    raise OSError(0, f"{_MOST_WORKERS} processes are at work on it already")


def _packed(array: Array) -> str:
    return base64.b64encode(zlib.compress(array.tobytes())).decode()


def _unpacked(text: str, dtype: str) -> Array:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)


def _point(found: Mapping[str, Any]) -> Point:
    jumps = {
        path: tuple(jump) if isinstance(jump, list) else jump
        for path, jump in found["jumps"].items()
    }
    return Point(
        jumps,
        found["origin"],
        found["parameters"],
        _unpacked(found["correct"], "?"),
        _unpacked(found["score"], "<f4"),
        found["pruned"],
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
