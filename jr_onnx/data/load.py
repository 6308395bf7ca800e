"""From a path to a dataset: which kind of data it is, and which of its examples are used."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jr_onnx.data.dataset import Array, Dataset, Source
from jr_onnx.data.folder import class_folders, listed_files
from jr_onnx.data.npz import NpzSource
from jr_onnx.data.parquet import ParquetSource
from jr_onnx.errors import DataError, ParameterError
from jr_onnx.preprocess import Preprocessing

_LABELS, _CLASSES = "labels.csv", "classes.txt"


def load_data(
    path: str | os.PathLike[str],
    *,
    preprocessing: Preprocessing | None = None,
    limit: int | None = None,
    seed: int | None = 0,
    columns: tuple[str, str] | None = None,
) -> Dataset:
    """Opens data; examples are read later, part by part.

    | path | what |
    |---|---|
    | `*.npz` | arrays `x` and `y`; uint8 is scaled to the bounds, floats lie inside |
    | folder | a folder for each class, labels by the order of their names or of `classes.txt` |
    | `*.csv`, folder with `labels.csv` | columns `file` and `label` (a number or a class name) |
    | `*.parquet`, folder of them | a column with the bytes of image files, and integer labels |

    Args:
        path: the file or folder.
        preprocessing: what is done to image files, and the bounds; defaults if None.
        limit: use so many examples, in the order of the data.
        seed: draws them; None takes the first ones.
        columns: names of the parquet columns with images and labels, where they are not plain.

    Raises:
        DataError: there is no data, or not of such a kind; with labels that do not fit.
        ParameterError: limit or columns make no sense.
    """
    path = Path(path)
    steps = preprocessing or Preprocessing()
    source = _source(path, steps, columns)
    if not len(source.labels):
        raise DataError(f"{path}: holds no examples")
    rows = _rows(len(source.labels), limit, seed)
    return Dataset(source, rows, (steps.bounds[0], steps.bounds[1]))


def load_npz(path: str | os.PathLike[str], *, bounds: tuple[float, float] = (0.0, 1.0)) -> Dataset:
    """Reads all of `x` and `y` of an `.npz` file.

    uint8 images are scaled from 0..255 to the bounds; floats must lie inside them already. Arrays
    of Python objects are refused: unpickling runs code.

    Raises:
        DataError: the file is missing or no npz, an array is missing or has a type, length, range
            or label that does not fit.
    """
    source = NpzSource(Path(path))
    if not len(source.labels):
        raise DataError(f"{path}: holds no examples")
    data = Dataset(source, np.arange(len(source.labels)), bounds)
    _ = data.x  # every value is checked
    return data


def _source(path: Path, steps: Preprocessing, columns: tuple[str, str] | None) -> Source:
    shards = _shards(path)
    if columns is not None and not shards:
        raise ParameterError(f"columns are those of parquet files; {path} is none")
    if shards:
        return ParquetSource(path, shards, steps, columns)
    if path.is_dir():
        classes = path / _CLASSES
        names = classes if classes.is_file() else None
        labels = path / _LABELS
        return (
            listed_files(labels, steps, names)
            if labels.is_file()
            else class_folders(path, steps, names)
        )
    if path.suffix.lower() == ".csv":
        classes = path.parent / _CLASSES
        return listed_files(path, steps, classes if classes.is_file() else None)
    return NpzSource(path, unused=_unused(steps))


def _shards(path: Path) -> Sequence[Path]:
    if path.is_dir():
        return sorted(each for each in path.glob("*.parquet") if not each.name.startswith("."))
    return [path] if path.suffix.lower() == ".parquet" else []


def _unused(steps: Preprocessing) -> tuple[str, ...]:
    """Returns the steps asked for that arrays are not given."""
    return tuple(name for name in ("resize", "crop") if getattr(steps, name) is not None)


def _rows(count: int, limit: int | None, seed: int | None) -> Array:
    if limit is not None and limit < 1:
        raise ParameterError(f"at least one example is needed, got a limit of {limit}")
    if limit is None or limit >= count:
        return np.arange(count)
    if seed is None:
        return np.arange(limit)
    return np.sort(np.random.default_rng(seed).choice(count, limit, replace=False))
