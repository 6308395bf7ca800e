"""Parquet files with image files in a column, as Hugging Face writes them.

image   struct<bytes: binary, path: string>, or binary
label   integers
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jr_onnx.data.dataset import Array, check_labels
from jr_onnx.data.images import decode, require_pillow
from jr_onnx.errors import DataError, ParameterError
from jr_onnx.preprocess import Preprocessing

_IMAGE_NAMES, _LABEL_NAMES = ("image", "img"), ("label", "labels", "y")
_PART = 16
_BUFFER = 1 << 20


class ParquetSource:
    """The rows of parquet files, one after the other.

    Args:
        root: the file or the folder of files.
        shards: the files.
        steps: what is done to each image.
        columns: the names of the columns with images and labels; None finds them.

    Raises:
        DataError: a file cannot be read, or has no such columns.
        ParameterError: there is no such column.
    """

    def __init__(
        self,
        root: Path,
        shards: Sequence[Path],
        steps: Preprocessing,
        columns: tuple[str, str] | None = None,
    ) -> None:
        require_pillow()
        self.name, self._steps, self._shards = str(root), steps, shards
        self.notes: tuple[str, ...] = ()
        labels = []
        for shard in shards:
            with _opened(shard) as file:
                self._image, self._label = _columns(file.schema_arrow, shard, columns)
                column = file.read(columns=[self._label]).column(0)
                if column.null_count:
                    raise DataError(f"{shard}: {column.null_count} rows have no {self._label!r}")
                labels.append(column.to_numpy())
        self._starts = np.cumsum([0, *map(len, labels)])
        self.labels = check_labels(np.concatenate(labels), self.name)

    def read(self, rows: Array) -> Iterator[Array]:
        """Yields the images, decoded; row groups without a wanted row are skipped."""
        for shard, start, end in zip(self._shards, self._starts, self._starts[1:], strict=False):
            wanted = rows[(rows >= start) & (rows < end)] - start
            if len(wanted):
                yield from self._of_shard(shard, wanted)

    def place(self, row: int) -> str:
        """Returns file and row."""
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        return f"{self._shards[shard].name}, row {row - int(self._starts[shard])}"

    def _of_shard(self, shard: Path, rows: Array) -> Iterator[Array]:
        with _opened(shard) as file:
            start = 0
            for group in range(file.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                wanted = set(rows[(rows >= start) & (rows < end)].tolist())
                if wanted:
                    parts = file.iter_batches(_PART, row_groups=[group], columns=[self._image])
                    for row, content in enumerate(_contents(parts), start):
                        if row in wanted:
                            where = f"{shard}, row {row}"
                            if content is None:
                                raise DataError(
                                    f"{where}: holds no image bytes, only a path or "
                                    "nothing. Store the files inside"
                                )
                            yield decode(io.BytesIO(content), self._steps, where)
                start = end


def _contents(parts: Any) -> Iterator[bytes | None]:
    for part in parts:
        column = part.column(0)
        if hasattr(column, "field"):  # a struct, of which only the bytes are read
            column = column.field(0)
        for value in column:
            yield value.as_py()


def _columns(schema: Any, where: Path, asked: tuple[str, str] | None) -> tuple[str, str]:
    """Returns the path of the column with the bytes of images, and the one with labels."""
    import pyarrow.types as kinds

    images = {}
    for field in schema:
        inner = {each.name: each.type for each in field.type} if kinds.is_struct(field.type) else {}
        if "bytes" in inner:
            images[field.name] = f"{field.name}.bytes"
        elif kinds.is_binary(field.type) or kinds.is_large_binary(field.type):
            images[field.name] = field.name
    labels = {field.name: field.name for field in schema if kinds.is_integer(field.type)}
    if asked is not None:
        unknown = [name for name in asked if name not in schema.names]
        if unknown:
            raise ParameterError(f"{where}: no column {unknown[0]!r}, only {schema.names}")
    image, label = asked or (None, None)
    found = _chosen(images, _IMAGE_NAMES, image), _chosen(labels, _LABEL_NAMES, label)
    for path, what in zip(found, ("image bytes", "integer labels"), strict=True):
        if path is None:
            spelled = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise DataError(
                f"{where}: which column has the {what}? It has {spelled}. Name both columns "
                "(--columns IMAGE,LABEL); labels that are text must be numbered first"
            )
    return str(found[0]), str(found[1])


def _chosen(found: dict[str, str], usual: Sequence[str], asked: str | None) -> str | None:
    if asked is not None:
        return found.get(asked)
    named = [path for name, path in found.items() if name.lower() in usual]
    fitting = named or list(found.values())
    return fitting[0] if len(fitting) == 1 else None


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(
            f"parquet files need pyarrow. Install it with pip install 'jr-onnx[parquet]' ({error})"
        ) from error
    try:
        with pq.ParquetFile(path, buffer_size=_BUFFER) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: not a readable parquet file ({reason})") from error
