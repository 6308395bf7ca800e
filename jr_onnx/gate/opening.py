"""A configuration -> subjects: everything it names is opened, and problems are told together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from jr_onnx import rewrite
from jr_onnx.attacks import ThreatModel
from jr_onnx.data import Dataset, load_data
from jr_onnx.errors import (
    ConfigError,
    DataError,
    JrOnnxError,
    ModelError,
    ParameterError,
    RewriteError,
)
from jr_onnx.gate.baseline import Earlier, conditions_of, read_baseline
from jr_onnx.gate.config import ModelTable
from jr_onnx.gate.file import ConfigFile
from jr_onnx.gate.locate import Path as Key
from jr_onnx.gate.subject import Subject, alone
from jr_onnx.model import Model, load
from jr_onnx.preprocess import Preprocessing, preprocessing_for

T = TypeVar("T")


def subjects_of(file: ConfigFile, *, device: str | None = None) -> tuple[Subject, ...]:
    """Opens all that a configuration names.

    Args:
        file: the configuration.
        device: takes the place of the one in the file.

    Raises:
        ConfigError: values do not fit together; all problems at once.
        ModelError: models are missing, or are none; all of them.
        DataError: data is missing, or is none; all of it.
    """
    opening = _Opening(file, device)
    earlier = opening.baseline()
    found = [opening.subject(index, each) for index, each in enumerate(file.config.entries)]
    opening.raise_problems()
    return tuple(_compared(each, file, earlier) for each in found if each is not None)


class _Opening:
    """Opens one thing after the other, and remembers what went wrong with which."""

    def __init__(self, file: ConfigFile, device: str | None) -> None:
        self._file, self._device = file, device
        self._problems: dict[str, JrOnnxError] = {}
        self._datasets: dict[Any, Dataset] = {}

    @contextmanager
    def _noting(self, key: Key) -> Iterator[None]:
        try:
            yield
        except JrOnnxError as error:
            self._problems[self._file.problem(key, str(error))] = error

    def _opened(self, key: Key, path: str | None, read: Callable[[Any], T]) -> T | None:
        if path is not None:
            with self._noting(key):
                return read(self._file.resolve(path))
        return None

    def raise_problems(self) -> None:
        if not self._problems:
            return
        told, errors = list(self._problems), list(self._problems.values())
        if any(isinstance(error, ParameterError) for error in errors):
            raise ConfigError(told)
        kinds = (ModelError, RewriteError, DataError, JrOnnxError)
        kind = next(kind for kind in kinds if isinstance(errors[0], kind))
        raise kind("; ".join(told)) from errors[0]

    def baseline(self) -> dict[str, Earlier]:
        table = self._file.config.baseline
        path = table.file if table else None
        return self._opened(("baseline", "file"), path, read_baseline) or {}

    def subject(self, index: int, entry: ModelTable) -> Subject | None:
        here: Key = ("models", index)
        what = "hardened" if entry.hardened else "model"
        model = self._opened((*here, what), entry.under_test, load)
        original = self._opened((*here, "original"), entry.original, load)
        if model is None or (entry.original and original is None):
            self._data(index, entry, None)
            return None
        edits: tuple[str, ...] = ()
        if original is None:
            original, edits = alone(model)
        with self._noting((*here, "original")):
            _require_no_jumps(original)
        steps = None
        with self._noting(self._file.key(index, "data")):
            steps = self._steps(entry, model)
        data = self._data(index, entry, steps)
        if data is None or steps is None:
            return None
        evaluation = entry.evaluation
        if self._device is not None:
            evaluation = evaluation.model_copy(update={"device": self._device})
        return Subject(
            name=entry.name or entry.under_test,
            model=model,
            original=original,
            edits=edits,
            examples=data,
            steps=steps,
            threat=ThreatModel(**dict(entry.threat)),
            evaluation=evaluation,
            gates=entry.gates,
            baseline=self._file.config.baseline,
        )

    def _steps(self, entry: ModelTable, model: Model) -> Preprocessing:
        file = entry.data.preprocess
        bounds = entry.threat.bounds
        steps = preprocessing_for(
            model,
            self._file.resolve(file) if file else None,
            mean=entry.data.mean,
            std=entry.data.std,
            bounds=bounds if "bounds" in entry.threat.model_fields_set else None,
        )
        if steps.bounds != bounds:
            raise ParameterError(
                f"the preprocessing of {model.name} has the bounds {list(steps.bounds)}: set "
                "threat.bounds to them"
            )
        return steps

    def _data(self, index: int, entry: ModelTable, steps: Preprocessing | None) -> Dataset | None:
        table, seed = entry.data, entry.evaluation.seed
        key = (table.path, table.samples, steps, seed)
        if key not in self._datasets:
            found = self._opened(
                self._file.key(index, "data", "path"),
                table.path,
                lambda path: load_data(path, preprocessing=steps, limit=table.samples, seed=seed),
            )
            if found is None:
                return None
            self._datasets[key] = found
        return self._datasets[key]


def _require_no_jumps(original: Model | None) -> None:
    if original is not None and rewrite.jumps_of(original):
        raise ParameterError(
            f"{original.name}: is hardened itself; expected the model from before the retrofit "
            "(`jr-onnx restore` gives it back)"
        )


def _compared(subject: Subject, file: ConfigFile, earlier: dict[str, Earlier]) -> Subject:
    """Returns the subject with its figures in the baseline, where they are comparable."""
    found = earlier.get(subject.name)
    if found is None or subject.baseline is None:
        return subject
    conditions = conditions_of(
        {
            "threat": subject.threat.to_json(),
            "suite": subject.evaluation.suite,
            "seed": subject.evaluation.seed,
            "samples": len(subject.examples),
            "mean": subject.steps.mean,
            "std": subject.steps.std,
        },
        subject.digest,
        subject.evaluation.output,
    )
    found.require_same(conditions, f"{file.resolve(subject.baseline.file)}: {subject.name}")
    return replace(subject, earlier=found)
