"""Weights that are in files of their own, or go there near 2 GiB."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper

import jr_onnx as jr
from jr_onnx.cli import Exit, run
from jr_onnx.errors import SessionError
from jr_onnx.session import Session

MakeModel = Callable[..., jr.Model]


def test_the_size_with_the_manifest_decides_on_moving_weights_out(
    text_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashes and jumps per channel are in the manifest, and it counts."""
    body = "y = Relu(x)"
    proto = text_model(f"g (float[n, 500] x) => (float[n, 500] y) {{ {body} }}").parse()
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(50_000, np.float32), "w"))
    model = jr.Model(proto.SerializeToString())
    jump = [0.1 + channel / 3 for channel in range(500)]
    size = len(jr.retrofit(model, jump=jump).model.content)
    for room, moved in ((1, 0), (0, 1)):
        monkeypatch.setattr("jr_onnx.model.model.LARGEST", size + room)
        hardened = jr.retrofit(model, jump=jump).model
        assert len(hardened.attachments) == moved
        assert jr.verify(model, hardened).equivalent
        assert jr.restore(hardened).content == model.content


SPILLED = (
    TensorProto.BFLOAT16,
    TensorProto.FLOAT8E4M3FN,
    TensorProto.INT4,
    TensorProto.FLOAT16,
    TensorProto.BOOL,
)


def _spilled(element: int, monkeypatch: pytest.MonkeyPatch, *, fill: int = 1) -> jr.Model:
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 21]> g (float[4] x) => (float[4] y) {
            c = Cast<to = 1>(w) s = ReduceSum<keepdims = 0>(c) a = Add(x, s) y = Relu(a)
        }"""
    )
    weights = np.full(60_000, fill).astype(onnx.helper.tensor_dtype_to_np_dtype(element))
    proto.graph.initializer.append(numpy_helper.from_array(weights, "w"))
    model = jr.Model(proto.SerializeToString())
    monkeypatch.setattr("jr_onnx.model.model.LARGEST", len(model.content) + 100)
    return jr.retrofit(model, jump=0.5).model


@pytest.mark.parametrize("element", SPILLED)
def test_weights_of_every_type_can_be_moved_out_and_run(
    element: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hardened = _spilled(element, monkeypatch)
    assert len(hardened.attachments) == 1
    y = Session(hardened, device="cpu").run({"x": np.zeros(4, np.float32)})[0]
    assert y.tolist() == 4 * [60_000.0]


def test_an_onnxruntime_that_cannot_take_weights_from_memory_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hardened = _spilled(TensorProto.FLOAT16, monkeypatch)
    monkeypatch.setattr(ort, "SessionOptions", type("SessionOptions", (), {}))
    with pytest.raises(SessionError, match="Save the model, and load it from its file"):
        Session(hardened, device="cpu")


def test_moved_weights_are_in_a_file_named_by_its_content(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [
        dict(_spilled(TensorProto.FLOAT16, monkeypatch, fill=fill).attachments)
        for fill in (1, 1, 2)
    ]
    assert files[0] == files[1]
    assert files[0].keys().isdisjoint(files[2])
    ((name, content),) = files[0].items()
    assert name == f"jr_onnx_{hashlib.sha256(content).hexdigest()[:12]}.weights"


def _outside(name: str, size: int) -> TensorProto:
    tensor = TensorProto(name=name, data_type=1, dims=[size], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "w.bin"), ("offset", 0), ("length", 4 * size)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def test_external_data_of_sparse_tensors_and_attributes_is_found_from_any_folder(
    text_model: MakeModel, tmp_path: Path
) -> None:
    proto = text_model("g (float[4] x) => (float[4] y) { s = Add(x, v) y = Relu(s) }").parse()
    proto.opset_import.add(domain="acme", version=1)
    sparse = proto.graph.sparse_initializer.add(dims=[4])
    sparse.values.CopyFrom(_outside("v", 2))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.array([0, 2])))
    attributes = onnx.AttributeProto
    node = proto.graph.node.add(op_type="Constant", output=["c"])
    node.attribute.add(name="sparse_value", type=attributes.SPARSE_TENSOR).sparse_tensor.CopyFrom(
        sparse
    )
    node = proto.graph.node.add(op_type="Acme", domain="acme", output=["d"])
    node.attribute.add(name="parts", type=attributes.TENSORS).tensors.append(_outside("", 2))
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    path.with_name("w.bin").write_bytes(bytes(8))
    onnx.checker.check_model(str(path))
    model = jr.load(path)
    hardened = jr.retrofit(model, jump=0.5).model
    assert jr.verify(model, hardened).equivalent
    (tmp_path / "other").mkdir()
    jr.save(hardened, tmp_path / "other" / "h.onnx")
    assert (tmp_path / "other" / "w.bin").read_bytes() == bytes(8)


@pytest.fixture
def external(tmp_path: Path, text_model: MakeModel) -> tuple[jr.Model, Path]:
    """A model with its weights in a file, and the path of its hardened copy elsewhere."""
    proto = text_model("g (float[4] x) => (float[4] y) { a = Add(x, w) y = Relu(a) }").parse()
    tensor = TensorProto(name="w", dims=[4], data_type=1, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="w.bin")
    proto.graph.initializer.append(tensor)
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    (tmp_path / "here" / "w.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    (tmp_path / "here" / "m.onnx").write_bytes(proto.SerializeToString())
    model = jr.load(tmp_path / "here" / "m.onnx")
    jr.save(jr.retrofit(model, jump=0.5).model, tmp_path / "there" / "h.onnx")
    return model, tmp_path / "there" / "h.onnx"


def test_weights_in_a_file_are_compared(external: tuple[jr.Model, Path]) -> None:
    model, path = external
    found = jr.verify(model, jr.load(path))
    assert (found.differences, found.not_compared) == ((), ())
    data = path.with_name("w.bin")
    content = data.read_bytes()
    for other, at in ((content[:9] + b"x" + content[10:], 9), (content + b"more", 16)):
        data.write_bytes(other)
        (difference,) = jr.verify(model, jr.load(path)).differences
        assert difference.where == "external data w.bin"
        assert difference.what == f"the weights differ from byte {at} of the file on"
    data.unlink()
    (difference,) = jr.verify(model, jr.load(path)).differences
    assert "its data file 'w.bin' is missing" in difference.what


def test_weights_in_the_same_file_are_not_read(external: tuple[jr.Model, Path]) -> None:
    model, _ = external
    assert model.folder is not None
    (model.folder / "w.bin").unlink()
    found = jr.verify(model, jr.retrofit(model, jump=0.5).model)
    assert (found.differences, found.not_compared) == ((), ())


def test_weights_that_cannot_be_compared_are_told(external: tuple[jr.Model, Path]) -> None:
    model, path = external
    found = jr.verify(model, jr.Model(path.read_bytes()))
    assert found.equivalent
    assert found.not_compared == ("w.bin: the folder of the hardened model is unknown",)
    assert found.to_json()["not_compared"] == list(found.not_compared)
    assert model.folder is not None
    (model.folder / "w.bin").unlink()
    (reason,) = jr.verify(model, jr.load(path)).not_compared
    assert "w.bin: " in reason
    assert "is missing" in reason


def test_the_command_says_what_was_left_and_not_compared(
    external: tuple[jr.Model, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, path = external
    assert model.path is not None
    model.path.with_name("w.bin").unlink()
    assert run(["verify", str(model.path), str(path)]) == Exit.OK
    out, err = capsys.readouterr()
    assert "equivalent to" in out
    assert "warning: weights not compared: w.bin: " in err
