"""`.npz`: a zip of arrays, read row by row, compressed or not."""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from jr_onnx.data.dataset import Array, check_labels
from jr_onnx.errors import DataError

_ARRAY_MAGIC, _ZIP_MAGICS = b"\x93NUMPY", (b"PK\x03\x04", b"PK\x05\x06")
# What zipfile and numpy raise on a damaged file, other than OSError.
UNREADABLE = (
    ValueError,
    EOFError,
    KeyError,
    RuntimeError,  # encrypted
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
    tokenize.TokenError,  # numpy, of a damaged header
)


class _Header(NamedTuple):
    """What an array says of itself: shape, whether columns come first, type."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[np.generic]


class NpzSource:
    """The arrays `x` and `y` of an `.npz` file.

    Args:
        path: the file.
        unused: names of preprocessing steps that are not applied to arrays, for a note.

    Raises:
        DataError: it cannot be read, or an array is missing or does not fit.
    """

    def __init__(self, path: Path, unused: tuple[str, ...] = ()) -> None:
        self._path, self.name = path, str(path)
        with _reading(path) as archive:
            missing = {"x.npy", "y.npy"}.difference(archive.namelist())
            if missing:
                there = sorted(name.removesuffix(".npy") for name in archive.namelist())
                raise DataError(
                    f"{path}: has no array {min(missing)[0]!r}, only {there}. Expected x "
                    "(examples) and y (labels)"
                )
            for name in ("x", "y"):
                with archive.open(f"{name}.npy") as file:
                    header = _header(file)
                if header.dtype.hasobject:
                    raise DataError(
                        f"{path}: {name} holds Python objects, which are refused, as unpickling "
                        "runs code. Save plain arrays: numpy.savez(path, x=..., y=...)"
                    )
            with archive.open("x.npy") as file:
                self._header = _header(file)
            self._check_x()
            with archive.open("y.npy") as file:
                labels = np.lib.format.read_array(file, allow_pickle=False)
        self.labels = check_labels(labels, self.name)
        count = self._header.shape[0]
        if count != len(self.labels):
            raise DataError(
                f"{path}: x has {count} examples and y {len(self.labels)} labels; they must match"
            )
        self.notes: tuple[str, ...] = (
            (f"the arrays of an .npz are taken as they are, without {' and '.join(unused)}",)
            if unused
            else ()
        )

    def _check_x(self) -> None:
        shape, _, dtype = self._header
        if len(shape) < 2:
            raise DataError(f"{self._path}: x has shape {shape}; expected (samples, ...)")
        if dtype != np.uint8 and not np.issubdtype(dtype, np.floating):
            raise DataError(
                f"{self._path}: x is {dtype}; expected uint8 (0..255) or floats. Of whole numbers "
                "0..255 save x.astype('uint8')"
            )

    def read(self, rows: Array) -> Iterator[Array]:
        """Yields the rows of x in one pass; what lies between is skipped."""
        shape, fortran, dtype = self._header
        size = dtype.itemsize * math.prod(shape[1:])
        with _reading(self._path) as archive, archive.open("x.npy") as file:
            if fortran:  # its rows are spread over the whole file
                yield from np.lib.format.read_array(file, allow_pickle=False)[rows]
                return
            _header(file)
            start = file.tell()
            for row in rows:
                file.seek(start + int(row) * size)
                content = file.read(size)
                if len(content) < size:
                    raise EOFError(f"x ends in row {row}")
                yield np.frombuffer(content, dtype).reshape(shape[1:])

    def place(self, row: int) -> str:
        """Returns the index."""
        return f"index {row}"


@contextmanager
def _reading(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with path.open("rb") as file:
            magic = file.read(6)
            if magic == _ARRAY_MAGIC:
                raise DataError(f"{path}: a single array; expected x and y in an .npz")
            if magic[:4] not in _ZIP_MAGICS:
                raise DataError(
                    f"{path}: is no .npz file. Data is an .npz, a .parquet, a .csv of files and "
                    "labels, or a folder with one folder for each class"
                )
            with zipfile.ZipFile(file) as archive:
                yield archive
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{path}: cannot be read ({reason}). Check the path of the data") from error
    except UNREADABLE as error:
        raise DataError(f"{path}: not a readable .npz file ({error}). Save it again") from error


def _header(file: IO[bytes]) -> _Header:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0
    return _Header(*(read if version == (1, 0) else np.lib.format.read_array_header_2_0)(file))
