"""Evaluation data: a file -> examples in raw input units, labels, bounds."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jr_onnx.errors import DataError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Dataset:
    """Labelled examples.

    Attributes:
        x: `(samples, ...)`, float32 or float64, inside the bounds.
        y: int64 `(samples,)`, from 0.
        bounds: smallest and largest value an input element may take.
        name: the file, for messages.
    """

    x: Array = field(repr=False)
    y: Array = field(repr=False)
    bounds: tuple[float, float]
    name: str

    def __len__(self) -> int:
        return len(self.x)


def load_npz(path: str | os.PathLike[str], *, bounds: tuple[float, float] = (0.0, 1.0)) -> Dataset:
    """Reads `x` and `y` of an `.npz` file.

    uint8 images are scaled from 0..255 to the bounds; floats must lie inside them already. Arrays
    of Python objects are refused: unpickling runs code.

    Raises:
        DataError: the file is missing or no npz, an array is missing or has a type, length, range
            or label that does not fit.
    """
    path = Path(path)
    raw_x, raw_y = _read(path)
    x, y = _examples(raw_x, bounds, path), _labels(raw_y, path)
    if len(x) != len(y):
        raise DataError(f"{path}: x has {len(x)} examples and y {len(y)} labels; they must match")
    if not len(x):
        raise DataError(f"{path}: holds no examples")
    return Dataset(x, y, bounds, str(path))


def _read(path: Path) -> tuple[Array, Array]:
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path}: a single array; expected x and y in an .npz")
            missing = {"x", "y"}.difference(archive)
            if missing:
                raise DataError(
                    f"{path}: has no array {min(missing)!r}, only {sorted(archive)}. Expected x "
                    "(examples) and y (labels)"
                )
            return archive["x"], archive["y"]
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{path}: cannot be read ({reason}). Check the path of the data") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        if "allow_pickle" in str(error):
            raise DataError(
                f"{path}: holds Python objects or is no .npz file; both are refused, as unpickling "
                "runs code. Save plain arrays: numpy.savez(path, x=..., y=...)"
            ) from error
        raise DataError(f"{path}: not a readable .npz file ({error}). Save it again") from error


def _examples(x: Array, bounds: tuple[float, float], path: Path) -> Array:
    low, high = bounds
    if x.ndim < 2:
        raise DataError(f"{path}: x has shape {x.shape}; expected (samples, ...)")
    if x.dtype == np.uint8:
        return (low + x * ((high - low) / 255)).astype(np.float32)
    if not np.issubdtype(x.dtype, np.floating):
        raise DataError(f"{path}: x is {x.dtype}; expected uint8 (0..255) or floats")
    x = x.astype(np.float64 if x.dtype == np.float64 else np.float32, copy=False)
    if not np.isfinite(x).all():
        raise DataError(f"{path}: x holds NaN or infinite values")
    if x.size and (x.min() < low or x.max() > high):
        raise DataError(
            f"{path}: x ranges over [{x.min():g}, {x.max():g}], outside the bounds "
            f"[{low:g}, {high:g}]. Scale it, or save 0..255 images as uint8"
        )
    return x


def _labels(y: Array, path: Path) -> Array:
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise DataError(
            f"{path}: y is {y.dtype} of shape {y.shape}; expected one integer label an example"
        )
    if len(y) and y.min() < 0:
        at = int(y.argmin())
        raise DataError(f"{path}: label {y[at]} at index {at} is negative; labels start at 0")
    return y.astype(np.int64)
