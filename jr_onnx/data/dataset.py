"""Labelled examples that are read when they are asked for."""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, Protocol

import numpy as np

from jr_onnx.errors import DataError, ParameterError

Array = np.ndarray[Any, Any]
# Examples in memory at once where the caller does not say.
_PART = 64
# Examples whose pixels the notes look at.
_LOOKED_AT = 256
# Bytes of examples that are kept in memory; more are kept in a temporary file.
_IN_MEMORY = 1 << 30


class Source(Protocol):
    """Where examples come from; one kind of file each.

    Attributes:
        name: the file or folder, for messages.
        labels: int64 `(samples,)`, from 0.
        notes: what is odd, in words.
    """

    name: str
    labels: Array
    notes: tuple[str, ...]

    def read(self, rows: Array) -> Iterator[Array]:
        """Yields examples, uint8 or floats, in a pass over the file.

        Args:
            rows: which ones, ascending.
        """

    def place(self, row: int) -> str:
        """Returns where an example is, for messages."""


@dataclass(frozen=True)
class Dataset:
    """Labelled examples: `batches` reads them part by part, `x` all of them.

    Attributes:
        source: where they come from.
        rows: which of the source's examples, ascending.
        bounds: smallest and largest value an input element may take.
    """

    source: Source = field(repr=False)
    rows: Array = field(repr=False)
    bounds: tuple[float, float]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def name(self) -> str:
        """The file or folder."""
        return self.source.name

    @cached_property
    def y(self) -> Array:
        """The labels, int64 `(samples,)`, from 0."""
        labels: Array = self.source.labels[self.rows]
        return labels

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return tuple(next(self.batches(1))[0].shape[1:])

    @cached_property
    def x(self) -> Array:
        """All examples, float32 or float64 `(samples, *shape)`, inside the bounds.

        More than 1 GiB of them are in a temporary file (`TMPDIR` says where), which the system
        reads as it is looked at: evaluating needs memory for a part of them only.

        Raises:
            DataError: as of `batches`; or there is no room for the temporary file.
        """
        whole: Array | None = None
        at = 0
        for part, _ in self.batches(_PART):
            if whole is None:
                whole = self._room((len(self), *part.shape[1:]), part.dtype)
            whole[at : at + len(part)] = part
            at += len(part)
        assert whole is not None, "no dataset is empty"
        return whole

    def _room(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        size = math.prod(shape) * dtype.itemsize
        if size <= _IN_MEMORY:
            return np.empty(shape, dtype)
        folder = tempfile.gettempdir()
        if size > shutil.disk_usage(folder).free:
            raise DataError(
                f"{self.name}: {len(self):,} examples take {size / 2**30:.1f} GiB, and {folder} "
                "has no room for them. Set TMPDIR to a folder that has, or use fewer (--samples)"
            )
        # Without a name, so that it goes when the array does, however the program ends.
        with tempfile.TemporaryFile() as file:
            return np.memmap(file, dtype, "r+", shape=shape)

    def batches(self, size: int = _PART) -> Iterator[tuple[Array, Array]]:
        """Reads the examples in order, never more than a batch of them.

        Args:
            size: most examples in a batch.

        Yields:
            x, float32 or float64 `(batch, *shape)` inside the bounds, and y, int64 `(batch,)`.

        Raises:
            DataError: an example cannot be read, is outside the bounds, or differs in shape.
            ParameterError: size is less than 1.
        """
        if size < 1:
            raise ParameterError(f"a batch has at least one example, got {size}")
        at = 0
        for part in self._parts(size):
            yield part, self.y[at : at + len(part)]
            at += len(part)

    def _parts(self, size: int) -> Iterator[Array]:
        if "x" in vars(self):
            yield from (self.x[at : at + size] for at in range(0, len(self), size))
            return
        at = 0
        shape: tuple[int, ...] | None = None
        for examples in _grouped(self.source.read(self.rows), size):
            for row, example in enumerate(examples, at):
                shape = example.shape if shape is None else shape
                if example.shape != shape:
                    raise DataError(
                        f"{self.name}: {self._place(row)} has shape {example.shape}, those before "
                        f"{shape}. Resize and crop all to one size (--preprocess resize=256, "
                        "crop=224)"
                    )
            yield self._scaled(np.stack(examples), at)
            at += len(examples)

    def _scaled(self, x: Array, at: int) -> Array:
        """Returns examples in units of the bounds; uint8 is scaled, floats must lie inside."""
        low, high = self.bounds
        if x.dtype == np.uint8:
            exact = x * ((high - low) / 255)
            exact += low
            return exact.astype(np.float32)
        x = x.astype(np.float64 if x.dtype == np.float64 else np.float32, copy=False)
        axes = tuple(range(1, x.ndim))
        broken = np.flatnonzero(~np.isfinite(x).all(axis=axes))
        if len(broken):
            where = self._place(at + int(broken[0]))
            raise DataError(f"{self.name}: x holds NaN or infinite values (first at {where})")
        outside = np.flatnonzero(((x < low) | (x > high)).any(axis=axes))
        if len(outside):
            where = self._place(at + int(outside[0]))
            raise DataError(
                f"{self.name}: x ranges over [{x.min():g}, {x.max():g}], outside the bounds "
                f"[{low:g}, {high:g}] (first at {where}). Scale it, save 0..255 images as uint8, "
                "or give its bounds, in units of which epsilon then is (--preprocess bounds=0,255)"
            )
        return x

    def _place(self, index: int) -> str:
        return self.source.place(int(self.rows[index]))

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What looks wrong in the data alone, in words; reads the first examples.

        Raises:
            DataError: as of `batches`.
        """
        first = next(self.batches(min(_LOOKED_AT, len(self))))[0]
        found = [*_of_labels(self.source.labels), *_of_pixels(first, self.bounds)]
        return (*self.source.notes, *found)


def digest(*arrays: Array) -> str:
    """Returns a hash of arrays: their dtypes, shapes and elements."""
    whole = hashlib.sha256()
    for array in arrays:
        whole.update(f"{array.dtype} {array.shape}".encode())
        whole.update(np.ascontiguousarray(array).data)
    return whole.hexdigest()


def check_labels(y: Array, name: str) -> Array:
    """Returns labels as int64.

    Raises:
        DataError: they are no whole numbers from 0, one an example.
    """
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise DataError(
            f"{name}: y is {y.dtype} of shape {y.shape}; expected one integer label an example"
            f"{_advice(y)}"
        )
    if len(y) and y.min() < 0:
        at = int(y.argmin())
        raise DataError(f"{name}: label {y[at]} at index {at} is negative; labels start at 0")
    if len(y) and y.max() > np.iinfo(np.int64).max:
        raise DataError(f"{name}: label {y.max()} is larger than any class")
    return y.astype(np.int64)


def _advice(y: Array) -> str:
    """Returns how to make labels of what is none."""
    if y.ndim == 2 and y.shape[1] > 1:
        return ". Of one-hot labels or scores save y.argmax(axis=1)"
    if y.ndim == 2:
        return ". Save y[:, 0]"
    return ". Save y.astype('int64')" if np.issubdtype(y.dtype, np.floating) else ""


def _grouped(examples: Iterable[Array], size: int) -> Iterator[list[Array]]:
    left = iter(examples)
    while group := list(islice(left, size)):
        yield group


def _of_labels(labels: Array) -> Iterator[str]:
    known = np.unique(labels)
    if len(known) == 1 and len(labels) > 1:
        yield f"all {len(labels):,} labels are {known[0]}"
    elif known[0] == 1 and known[-1] == len(known):
        yield f"labels are 1 to {known[-1]}, none is 0: do they start at 1 instead of 0?"


def _of_pixels(x: Array, bounds: tuple[float, float]) -> Iterator[str]:
    low, high = bounds
    flat = x.reshape(len(x), -1)
    if flat.shape[1] < 2:
        return
    same = int((flat == flat[:, :1]).all(axis=1).sum())
    if same:
        yield f"{same} of the first {len(x)} examples have the same value everywhere"
    elif x.max() - x.min() <= (high - low) / 200:
        yield (
            f"the first {len(x)} examples range over [{x.min():g}, {x.max():g}], a sliver of the "
            f"bounds [{low:g}, {high:g}]: scaled twice, or bounds in other units?"
        )
