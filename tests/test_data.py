"""Evaluation data: what is read, what is refused and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jr_onnx as jr
from jr_onnx.errors import DataError

X = np.arange(2 * 3, dtype=np.uint8).reshape(2, 3)
Y = np.array([0, 1])


def test_the_sample_is_scaled_to_the_bounds(mnist: jr.Dataset) -> None:
    assert mnist.x.shape == (1000, 1, 28, 28)
    assert mnist.x.dtype == np.float32
    assert (mnist.x.min(), mnist.x.max()) == (0, 1)
    assert mnist.y.dtype == np.int64
    assert len(mnist) == 1000


def test_bytes_become_exact_multiples_of_1_over_255(tmp_path: Path) -> None:
    x = np.arange(256, dtype=np.uint8).reshape(1, 256)
    np.savez(tmp_path / "d.npz", x=x, y=Y[:1])
    data = jr.load_npz(tmp_path / "d.npz")
    np.testing.assert_array_equal(data.x[0], (np.arange(256) / 255).astype(np.float32))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no labels": ({"x": X}, r"has no array 'y', only \['x'\]"),
    "other names": ({"images": X, "labels": Y}, r"has no array 'x', only \['images', 'labels'\]"),
    "lengths": ({"x": X, "y": Y[:1]}, "x has 2 examples and y 1 labels"),
    "nothing": ({"x": X[:0], "y": Y[:0]}, "holds no examples"),
    "integers": ({"x": X.astype(np.int64), "y": Y}, "x is int64; expected uint8"),
    "one axis": ({"x": X[:, 0], "y": Y}, r"x has shape \(2,\); expected \(samples, ...\)"),
    "NaN": ({"x": X * np.nan, "y": Y}, "x holds NaN or infinite values"),
    "scale": ({"x": X * 50.0, "y": Y}, r"x ranges over \[0, 250\], outside the bounds \[0, 1\]"),
    "float labels": ({"x": X, "y": Y * 1.0}, "y is float64 of shape"),
    "one-hot labels": ({"x": X, "y": np.eye(2, dtype=int)}, "expected one integer label"),
    "negative label": ({"x": X, "y": Y - 1}, "label -1 at index 0 is negative"),
    "pickled": ({"x": np.array([{}, {}], object), "y": Y}, "holds Python objects"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    arrays, message = REFUSED[case]
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=message):
        jr.load_npz(tmp_path / "d.npz")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"(No data left|not a readable .npz)"),
        (b"text, not an archive", "is no .npz file"),
        (b"PK\x03\x04 cut off", "not a readable .npz file"),
    ],
)
def test_files_that_are_no_npz(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "d.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        jr.load_npz(path)


def test_a_single_array_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", X)
    with pytest.raises(DataError, match="a single array"):
        jr.load_npz(tmp_path / "d.npy")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.npz: cannot be read \(No such file"):
        jr.load_npz(tmp_path / "nowhere.npz")
