"""Evaluation data: what is read, what is refused and how; here `.npz`, and what all kinds share."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jr_onnx as jr
from jr_onnx.data import load_data
from jr_onnx.errors import DataError, ParameterError
from jr_onnx.preprocess import Preprocessing

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
        (b"", "is no .npz file"),
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


IMAGES = np.random.default_rng(0).integers(0, 256, (2000, 3, 32, 32), np.uint8)
LABELS = np.arange(2000) % 10
WRITERS: dict[str, Callable[..., None]] = {"stored": np.savez, "deflated": np.savez_compressed}


@pytest.mark.parametrize("kind", WRITERS)
def test_an_npz_is_read_in_batches(tmp_path: Path, kind: str) -> None:
    WRITERS[kind](tmp_path / "d.npz", x=IMAGES, y=LABELS)
    tracemalloc.start()
    data = load_data(tmp_path / "d.npz")
    sizes = []
    for number, (x, y) in enumerate(data.batches(64)):
        part = slice(64 * number, 64 * number + len(x))
        np.testing.assert_array_equal(x, (IMAGES[part] / 255).astype(np.float32))
        np.testing.assert_array_equal(y, LABELS[part])
        sizes.append(len(x))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sizes == [64] * 31 + [16]
    assert peak < IMAGES.nbytes, "less than the bytes alone; as float32 they would be four times it"


def test_batches_and_x_are_the_same(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "d.npz", x=IMAGES[:50], y=LABELS[:50])
    data = load_data(tmp_path / "d.npz")
    assert (len(data), data.shape, data.name) == (50, (3, 32, 32), str(tmp_path / "d.npz"))
    streamed = [x for x, _ in data.batches(7)]
    np.testing.assert_array_equal(np.concatenate(streamed), data.x)
    cached = [x for x, _ in data.batches(7)]
    assert [len(x) for x in cached] == [7] * 7 + [1]
    np.testing.assert_array_equal(np.concatenate(cached), data.x)
    assert data.x is data.x


def test_a_limit_draws_by_the_seed_and_keeps_the_order(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "d.npz", x=IMAGES, y=LABELS)
    data = load_data(tmp_path / "d.npz", limit=100)
    assert len(data) == len(data.x) == 100
    assert (np.diff(data.rows) > 0).all()
    assert len(np.unique(data.y)) == 10
    np.testing.assert_array_equal(data.x, (IMAGES[data.rows] / 255).astype(np.float32))
    np.testing.assert_array_equal(data.y, LABELS[data.rows])
    again, other = (load_data(tmp_path / "d.npz", limit=100, seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(data.rows, again.rows)
    assert (data.rows != other.rows).any()
    first = load_data(tmp_path / "d.npz", limit=3, seed=None)
    np.testing.assert_array_equal(first.rows, [0, 1, 2])
    assert len(load_data(tmp_path / "d.npz", limit=9999)) == 2000


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_floats_of_any_kind(tmp_path: Path, dtype: str, order: Any) -> None:
    x = np.asarray(np.linspace(0, 1, 24).reshape(4, 2, 3), dtype, order=order)
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(4, dtype=np.uint8))
    data = load_data(tmp_path / "d.npz", limit=2)
    assert data.x.dtype == (np.float64 if dtype == "<f8" else np.float32)
    np.testing.assert_array_equal(data.x, x[data.rows])
    assert data.y.dtype == np.int64


def test_bounds_are_the_units_of_x(tmp_path: Path) -> None:
    x = np.array([[0, 255]], np.uint8)
    np.savez(tmp_path / "d.npz", x=x, y=Y[:1])
    for bounds in ((0.0, 255.0), (-1.0, 1.0)):
        data = load_data(tmp_path / "d.npz", preprocessing=Preprocessing(bounds=bounds))
        assert (data.bounds, tuple(data.x[0])) == (bounds, bounds)


def test_a_value_far_into_the_file_is_placed(tmp_path: Path) -> None:
    x = np.zeros((300, 4), np.float32)
    x[217] = 2
    np.savez(tmp_path / "d.npz", x=x, y=np.zeros(300, int))
    data = load_data(tmp_path / "d.npz")
    assert data.shape == (4,)
    with pytest.raises(DataError, match=r"outside the bounds \[0, 1\] \(first at index 217\)"):
        _ = data.x


def test_a_member_that_is_cut_off(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "d.npz", x=IMAGES[:9], y=LABELS[:9])
    content = bytearray((tmp_path / "d.npz").read_bytes())
    content[5000:6000] = bytes(1000)
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"d.npz: not a readable .npz file \(.+\). Save it again"):
        _ = load_data(tmp_path / "d.npz").x


NOTED: dict[str, tuple[dict[str, Any], str]] = {
    "one class": ({"x": X, "y": Y * 0 + 3}, "all 2 labels are 3"),
    "from 1": ({"x": X, "y": Y + 1}, "labels are 1 to 2, none is 0: do they start at 1"),
    "grey": ({"x": X * 0, "y": Y}, "2 of the first 2 examples have the same value everywhere"),
    "scaled twice": ({"x": X / 255 / 255, "y": Y}, "scaled twice, or bounds in other units"),
}


@pytest.mark.parametrize("case", NOTED)
def test_what_looks_odd_is_noted(tmp_path: Path, case: str) -> None:
    arrays, note = NOTED[case]
    np.savez(tmp_path / "d.npz", **arrays)
    assert [each for each in load_data(tmp_path / "d.npz").notes if note in each]


def test_nothing_is_noted_of_the_sample(mnist: jr.Dataset) -> None:
    assert mnist.notes == ()


def test_steps_that_arrays_are_not_given_are_noted(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=X * 50, y=Y)
    data = load_data(tmp_path / "d.npz", preprocessing=Preprocessing(resize=256, crop=224))
    assert data.notes == ("the arrays of an .npz are taken as they are, without resize and crop",)


def test_parameters_that_make_no_sense(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=X, y=Y)
    with pytest.raises(ParameterError, match="at least one example is needed, got a limit of 0"):
        load_data(tmp_path / "d.npz", limit=0)
    with pytest.raises(ParameterError, match="columns are those of parquet files"):
        load_data(tmp_path / "d.npz", columns=("a", "b"))
    with pytest.raises(ParameterError, match="a batch has at least one example, got 0"):
        next(load_data(tmp_path / "d.npz").batches(0))


@pytest.mark.parametrize("name", ["nothing.npz", "nothing.parquet", "nothing.csv", "nothing"])
def test_what_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"{name}: .*No such file"):
        load_data(tmp_path / name)


def test_another_kind_of_file_is_told_the_kinds(tmp_path: Path) -> None:
    (tmp_path / "d.mat").write_bytes(b"MATLAB 5.0")
    with pytest.raises(DataError, match=r"is no .npz file. Data is an .npz, a .parquet, a .csv"):
        load_data(tmp_path / "d.mat")
