"""What is written where: weights in files of their own, and hardened models edited since."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import jr_onnx as jr
from jr_onnx.cli import Exit, run
from jr_onnx.errors import OutputError

MakeModel = Callable[..., jr.Model]
RETROFIT = ["retrofit", "m.onnx", "--jump", "1"]


@pytest.fixture
def external(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_model: MakeModel) -> Path:
    """A folder with m.onnx, whose weights are in w.bin, made the working directory."""
    graph = "g (float[4] x) => (float[4] y) { a = Add(x, w) y = Relu(a) }"
    proto = text_model(graph).parse()
    tensor = onnx.TensorProto(name="w", dims=[4], data_type=onnx.TensorProto.FLOAT)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")
    proto.graph.initializer.append(tensor)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    (tmp_path / "w.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _files(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    "arguments",
    [
        [*RETROFIT, "-o", "w.bin"],
        [*RETROFIT, "-o", "out/w.bin"],
        [*RETROFIT, "-o", "out/h.onnx", "--json", "out/w.bin"],
        [*RETROFIT, "--json", "./w.bin"],
        ["inspect", "m.onnx", "--json", "w.bin"],
        ["verify", "m.onnx", "m.onnx", "--json", "w.bin"],
        ["restore", "h.onnx", "--json", "w.bin"],
        ["restore", "h.onnx", "-o", "w.bin"],
    ],
)
def test_not_even_force_overwrites_the_weights_of_the_model(
    external: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    jr.save(jr.retrofit(jr.load("m.onnx"), jump=1).model, "h.onnx")
    before = _files(external)
    assert run([*arguments, "--force"]) == Exit.USAGE
    assert "w.bin: would be overwritten" in capsys.readouterr().err
    assert _files(external) == before


@pytest.mark.parametrize("path", ["w.bin", "out/w.bin", "out/../w.bin", "link.onnx"])
def test_save_does_not_overwrite_the_weights_either(external: Path, path: str) -> None:
    (external / "link.onnx").symlink_to("w.bin")
    before = _files(external)
    with pytest.raises(OutputError, match="has weights of the model, and would be overwritten"):
        jr.save(jr.retrofit(jr.load("m.onnx"), jump=1).model, path, force=True)
    assert _files(external) == before


def test_other_weights_are_not_overwritten_even_with_force(
    external: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*RETROFIT, "-o", "out/h.onnx"]) == Exit.OK
    (external / "out" / "w.bin").write_bytes(bytes(16))
    before = _files(external)
    assert run(["restore", "out/h.onnx", "-o", "back.onnx", "--force"]) == Exit.ERROR
    assert "w.bin: is there already with other data, maybe another model's" in (
        capsys.readouterr().err
    )
    assert _files(external) == before


def test_a_model_that_is_up_to_date_still_gets_its_weights(external: Path) -> None:
    hardened = jr.retrofit(jr.load("m.onnx"), jump=1).model
    assert jr.save(hardened, "out/h.onnx")
    (external / "out" / "w.bin").unlink()
    assert not jr.save(hardened, "out/h.onnx")
    assert (external / "out" / "w.bin").read_bytes() == (external / "w.bin").read_bytes()


def test_the_hash_of_a_restored_model_is_not_that_of_its_weights(
    external: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*RETROFIT, "-o", "h.onnx"]) == Exit.OK
    assert run(["restore", "h.onnx", "-o", "back.onnx"]) == Exit.OK
    assert "(of the .onnx file, not of its weights)" in capsys.readouterr().out


def _edit(path: Path) -> None:
    proto = onnx.load(path)
    proto.producer_name = "somebody else"
    onnx.save(proto, path)


@pytest.fixture
def edited(here: Path) -> Path:
    """A folder with net.onnx, and net.jr.onnx with another producer."""
    assert run(["retrofit", "net.onnx", "--jump", "1"]) == Exit.OK
    _edit(here / "net.jr.onnx")
    return here


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize("command", [("restore",), ("retrofit", "--jump", "2")])
def test_force_does_not_accept_edits(
    edited: Path,
    capsys: pytest.CaptureFixture[str],
    command: tuple[str, ...],
    force: tuple[str, ...],
) -> None:
    before = _files(edited)
    assert run([command[0], "net.jr.onnx", *command[1:], *force]) == Exit.ERROR
    err = capsys.readouterr().err
    assert "net.jr.onnx was edited after it was hardened, in model.producer_name." in err
    assert "--accept-edits" in err
    assert _files(edited) == before


def test_restore_with_edits_says_that_it_is_not_the_original(
    edited: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = (edited / "net.onnx").read_bytes()
    capsys.readouterr()
    assert run(["restore", "net.jr.onnx", "--accept-edits", "--force", "--json", "-"]) == Exit.OK
    out, err = capsys.readouterr()
    assert "written, NOT the original, SHA-256" in err
    assert "warning: net.jr.restored.onnx is NOT the original: net.jr.onnx was edited" in err
    document = json.loads(out)
    assert document["schema"] == "jr-onnx/restoration/1"
    assert (document["exact"], document["edits"]) == (False, ["model.producer_name"])
    assert (edited / "net.onnx").read_bytes() == original
    restored = onnx.load(edited / "net.jr.restored.onnx")
    assert restored.producer_name == "somebody else"
    assert [node.op_type for node in restored.graph.node].count("Relu") == 4


def test_restore_says_that_it_is_the_original(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["retrofit", "net.onnx", "--jump", "1"]) == Exit.OK
    assert run(["restore", "net.jr.onnx", "--accept-edits", "--json", "r.json"]) == Exit.OK
    out, err = capsys.readouterr()
    assert f"net.onnx: is up to date, the original, SHA-256 {jr.load('net.onnx').sha256}" in out
    assert err == ""
    document = json.loads((here / "r.json").read_text())
    assert (document["exact"], document["edits"]) == (True, [])


def test_retrofit_with_edits_says_that_they_are_kept(
    edited: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ["retrofit", "net.jr.onnx", "--jump", "2", "--accept-edits", "-o", "two.onnx"]
    assert run([*again, "--json", "r.json"]) == Exit.OK
    assert "restore` of the result will NOT give the original" in capsys.readouterr().err
    assert json.loads((edited / "r.json").read_text())["edits"] == ["model.producer_name"]
    assert jr.restore(jr.load("two.onnx")).proto.producer_name == "somebody else"


def test_inspect_lists_an_edited_model_and_says_what_is_edited(
    edited: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(["inspect", "net.jr.onnx", "--json", "i.json"]) == Exit.OK
    out, err = capsys.readouterr()
    assert "was edited after it was hardened, in model.producer_name. Listed is its" in err
    assert "4 sites (4 of them hardened)" in out
    assert json.loads((edited / "i.json").read_text())["edits"] == ["model.producer_name"]


@pytest.fixture
def moved(edited: Path) -> Path:
    """The same, with a node in front of all others: the sites are no longer where they were."""
    proto = onnx.load(edited / "net.jr.onnx")
    proto.graph.node.insert(0, onnx.helper.make_node("Identity", ["input"], ["unused"]))
    onnx.save(proto, edited / "net.jr.onnx")
    return edited


def test_inspect_lists_a_model_whose_edits_cannot_be_undone_as_it_stands(
    moved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", "net.jr.onnx"]) == Exit.OK
    out, err = capsys.readouterr()
    assert "in graph.node, model.producer_name, and what it was before cannot be put back" in err
    assert "Here it is listed as it stands" in err
    assert "Its manifest has relu: jump 1.0; relu_1: jump 1.0;" in out


@pytest.mark.parametrize("command", [("restore",), ("retrofit", "--jump", "2")])
def test_edits_that_moved_the_sites_cannot_be_accepted(
    moved: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    before = _files(moved)
    accept = ["--accept-edits", "-o", "out.onnx"]
    assert run([command[0], "net.jr.onnx", *command[1:], *accept]) == Exit.ERROR
    assert "Go back to the original model" in capsys.readouterr().err
    assert _files(moved) == before
