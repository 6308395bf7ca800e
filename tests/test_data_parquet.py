"""Parquet files with images, as Hugging Face writes them."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jr_onnx.data import load_data
from jr_onnx.errors import DataError, ParameterError
from jr_onnx.preprocess import Preprocessing

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), np.uint8)
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def encoded(pixels: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


FILES = [encoded(pixels) for pixels in PIXELS]
IMAGES = pa.array([{"bytes": file, "path": "x.png"} for file in FILES], STRUCT)
LABELS = pa.array(range(6), pa.int64())


def write(path: Path, row_group_size: int = 2, **columns: Any) -> None:
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)


def expected(rows: Any) -> np.ndarray[Any, Any]:
    scaled: np.ndarray[Any, Any] = PIXELS[rows].transpose(0, 3, 1, 2) / 255
    return scaled.astype(np.float32)


@pytest.mark.parametrize(
    "images", [IMAGES, pa.array(FILES, pa.binary()), pa.array(FILES, pa.large_binary())]
)
def test_a_file_is_read(tmp_path: Path, images: Any) -> None:
    write(tmp_path / "d.parquet", image=images, label=LABELS)
    data = load_data(tmp_path / "d.parquet")
    assert (len(data), data.y.dtype, data.shape) == (6, np.int64, (3, 5, 4))
    np.testing.assert_array_equal(data.x, expected(slice(None)))
    np.testing.assert_array_equal(data.y, range(6))


def test_shards_follow_one_another(tmp_path: Path) -> None:
    write(tmp_path / "test-1.parquet", img=IMAGES[3:], label=LABELS[3:])
    write(tmp_path / "test-0.parquet", img=IMAGES[:3], label=LABELS[:3])
    data = load_data(tmp_path)
    np.testing.assert_array_equal(data.y, range(6))
    np.testing.assert_array_equal(data.x, expected(slice(None)))


@pytest.mark.parametrize("seed", range(5))
def test_a_limit_reads_only_its_rows(tmp_path: Path, seed: int) -> None:
    write(tmp_path / "1.parquet", image=IMAGES[:5], label=LABELS[:5])
    write(tmp_path / "2.parquet", image=IMAGES[5:], label=LABELS[5:])
    data = load_data(tmp_path, limit=3, seed=seed)
    np.testing.assert_array_equal(data.x, expected(data.rows))
    np.testing.assert_array_equal(data.y, data.rows)


def test_preprocessing_is_applied(tmp_path: Path) -> None:
    write(tmp_path / "d.parquet", image=IMAGES, label=LABELS)
    steps = Preprocessing(crop=(3, 2), channels="bgr", layout="nhwc", bounds=(0, 255))
    data = load_data(tmp_path / "d.parquet", preprocessing=steps)
    np.testing.assert_array_equal(data.x, PIXELS[:, 1:4, 1:3, ::-1])


def test_columns_can_be_named(tmp_path: Path) -> None:
    write(tmp_path / "d.parquet", img=IMAGES, fine=LABELS, coarse=LABELS)
    message = r"which column has the integer labels\? It has .*fine \(int64\), coarse \(int64\)"
    with pytest.raises(DataError, match=message):
        load_data(tmp_path / "d.parquet")
    data = load_data(tmp_path / "d.parquet", columns=("img", "fine"))
    np.testing.assert_array_equal(data.y, range(6))
    with pytest.raises(ParameterError, match=r"no column 'x', only \['img', 'fine', 'coarse'\]"):
        load_data(tmp_path / "d.parquet", columns=("x", "fine"))
    with pytest.raises(DataError, match="which column has the image bytes"):
        load_data(tmp_path / "d.parquet", columns=("coarse", "fine"))


NULL = pa.array([{"bytes": FILES[0], "path": ""}, {"bytes": None, "path": "x.png"}], STRUCT)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "text": ({"image": IMAGES, "label": pa.array(list("abcdef"))}, "labels that are text must be"),
    "no images": ({"label": LABELS}, "which column has the image bytes"),
    "null label": ({"image": IMAGES[:2], "label": pa.array([1, None])}, "1 rows have no 'label'"),
    "negative": ({"image": IMAGES[:2], "label": pa.array([1, -1])}, "label -1 at index 1 is neg"),
    "nothing": ({"image": IMAGES[:0], "label": LABELS[:0]}, "holds no examples"),
    "no bytes": ({"image": NULL, "label": LABELS[:2]}, "d.parquet, row 1: holds no image bytes"),
    "broken": (
        {"image": pa.array([*FILES[:3], b"?"]), "label": LABELS[:4]},
        "d.parquet, row 3: cannot be decoded",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    columns, message = REFUSED[case]
    write(tmp_path / "d.parquet", **columns)
    with pytest.raises(DataError, match=message):
        _ = load_data(tmp_path / "d.parquet").x


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "d.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"d.parquet: not a readable parquet file \("):
        load_data(tmp_path / "d.parquet")


def test_sizes_that_differ_are_placed(tmp_path: Path) -> None:
    images = pa.array([*FILES[:3], encoded(PIXELS[3, :3])], pa.binary())
    write(tmp_path / "d.parquet", image=images, label=LABELS[:4])
    with pytest.raises(DataError, match=r"d.parquet, row 3 has shape \(3, 3, 4\), those before"):
        _ = load_data(tmp_path / "d.parquet").x


@pytest.mark.parametrize("row_group_size", [100, 2000])
def test_2000_rows_are_read_in_batches(tmp_path: Path, row_group_size: int) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    files = [encoded(noise ^ np.uint8(number % 256)) for number in range(2000)]
    write(
        tmp_path / "d.parquet",
        row_group_size,
        image=pa.array(files, pa.binary()),
        label=pa.array([0, 1] * 1000),
    )
    before, peak = pa.total_allocated_bytes(), 0
    for x, _ in load_data(tmp_path / "d.parquet").batches(32):
        peak = max(peak, pa.total_allocated_bytes() - before)
        assert x.shape[1:] == (3, 32, 32)
    assert peak < sum(map(len, files)) / 2


def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"need pyarrow. Install it with .*'jr-onnx\[parquet\]'"):
        load_data(tmp_path / "d.parquet")
