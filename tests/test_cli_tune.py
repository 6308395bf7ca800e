"""The command tune, as a user calls it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tiny import tiny_data, tiny_model

import jr_onnx as jr
from jr_onnx.cli import Exit, run
from jr_onnx.evaluate import Evaluation
from jr_onnx.findings import Finding
from jr_onnx.report.plots import save_plots

# Of so small a model, the figures of a short attack may be in doubt.
DONE = (Exit.OK, Exit.INCONCLUSIVE)
FAST = ("--steps", 2, "--suite", "naive", "--epsilon", "0.05", "--max-accuracy-drop", "0.05")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Holds a small model and its data, and is the working directory."""
    model = tiny_model()
    jr.save(model, tmp_path / "net.onnx")
    x, y = tiny_data(model, 60)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    x, y = tiny_data(model, 30, seed=2)
    np.savez(tmp_path / "other.npz", x=x, y=y)
    monkeypatch.chdir(tmp_path)
    # That PGD stands still on a network this small is another test's business.
    monkeypatch.setattr("jr_onnx.runs.diagnose", lambda *_: ())
    return tmp_path


def _run(*arguments: Any) -> int:
    return run(["tune", "net.onnx", *map(str, (*arguments, *FAST)), "--device", "cpu", "--quiet"])


def test_from_a_model_and_a_budget_to_a_hardened_model(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--objective", "naive", "--trials", 4, "-o", "jumps.toml", "--json", "out.json")
    assert _run("--data", "data.npz", *options) in DONE
    said = capsys.readouterr().out
    assert "4 candidates attacked on 30 examples, global jumps" in said
    assert "reported on 30 other examples" in said
    assert "The objective is naive" in said
    assert "within the budget of 5 points." in said
    found = json.loads((folder / "out.json").read_bytes())
    jumps = jr.load_jumps("jumps.toml")
    assert jumps == (found["jumps"] or dict.fromkeys(["relu0", "relu1"], 0.0))
    assert (folder / "jumps.toml").read_text().startswith("# Made by jr-onnx tune net.onnx")
    assert run(["retrofit", "net.onnx", "--jumps", "jumps.toml", "-o", "hard.onnx"]) == Exit.OK
    written = jr.verify(jr.load("net.onnx"), jr.load("hard.onnx")).jumps
    assert written == pytest.approx(jumps, rel=1e-6), "as float32"
    if found["best"] and found["helps"]:
        digest = found["report"]["evaluation"]["models"][1]["sha256"]
        assert digest == jr.load("hard.onnx").sha256, "it was this very file that was evaluated"


def test_two_files(folder: Path) -> None:
    options = ("--report-data", "other.npz", "--trials", 1, "--json", "out.json")
    assert _run("--data", "data.npz", *options) in DONE
    found = json.loads((folder / "out.json").read_bytes())
    assert found["samples"] == {"tune": 60, "report": 30}


def test_the_same_file_twice_is_no_held_out_data(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "copy.npz").write_bytes((folder / "data.npz").read_bytes())
    assert _run("--data", "data.npz", "--report-data", "copy.npz") == Exit.ERROR
    assert "60 of the 60 examples to report on are among those" in capsys.readouterr().err


def test_plots(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    scope = ("--jump-scope", "per-channel", "--objective", "naive", "--trials", 1)
    assert _run("--data", "data.npz", *scope, "--plot", "plots") in DONE
    names = sorted(path.name for path in (folder / "plots").iterdir())
    kinds = ("jumps", "pre-activations", "trade-off")
    assert names == [f"{name}.{kind}" for name in kinds for kind in ("png", "svg")]
    for path in (folder / "plots").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    written = (folder / "plots" / "trade-off.svg").read_text()
    for text in ("clean accuracy", "naive accuracy", "budget"):
        assert text in written
    assert "relu1" in (folder / "plots" / "jumps.svg").read_text()
    assert _run("--data", "data.npz", "--plot", "plots") == Exit.ERROR, "before any work"
    assert "is there already" in capsys.readouterr().err


def test_two_axes_have_one_legend() -> None:
    figures = pytest.importorskip("matplotlib.figure")
    from jr_onnx.report.plots import _trade_off

    model = tiny_model()
    found = jr.tune(
        model, *tiny_data(model, 40), threat=jr.ThreatModel(epsilon=0.05), trials=1,
        objective="distance", max_accuracy_drop=0.05, steps=2, suite="naive", device="cpu",
    )  # fmt: skip
    figure = figures.Figure(layout="constrained")
    _trade_off(figure, found)
    assert [axes.get_legend() for axes in figure.axes] == [None, None]
    (legend,) = figure.legends
    said = [text.get_text() for text in legend.get_texts()]
    assert said[:2] == ["clean accuracy", "budget"]
    assert "mean smallest epsilon (95%)" in said


def test_pictures_that_are_there_are_no_surprise_at_the_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("jr_onnx.cli.tuning.search", lambda *_, **__: pytest.fail("worked first"))
    (folder / "plots").mkdir()
    (folder / "plots" / "jumps.svg").write_text("mine")
    assert _run("--data", "data.npz", "--plot", "plots") == Exit.ERROR
    assert "jumps.svg: is there already" in capsys.readouterr().err
    assert _run("--data", "data.npz", "--plot", "net.onnx", "--force") == Exit.ERROR
    assert "net.onnx: is a file" in capsys.readouterr().err
    assert _run("--data", "data.npz", "--plot", "/dev/null/deep/plots") == Exit.ERROR
    assert "/dev/null/deep: cannot be written" in capsys.readouterr().err


def test_of_several_outputs_one_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proto = tiny_model().parse()
    relu = onnx.helper.make_tensor_value_info("relu1", onnx.TensorProto.FLOAT, ["n", 16])
    proto.graph.output.append(relu)
    onnx.save(proto, folder / "net.onnx")
    assert _run("--data", "data.npz", "--trials", 1) == Exit.ERROR
    assert "--output-name" in capsys.readouterr().err
    named = ("--output-name", "z2", "--trials", 1, "--json", "out.json")
    assert _run("--data", "data.npz", *named) == Exit.OK
    assert json.loads((folder / "out.json").read_bytes())["original"]["clean_accuracy"] == 1.0


def test_figures_that_mean_nothing_are_inconclusive(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = np.load("data.npz")
    kept = data["y"] < 2
    np.savez("shifted.npz", x=data["x"][kept], y=data["y"][kept] + 1)
    found = _run("--data", "shifted.npz", "--trials", 1, "-o", "jumps.toml")
    assert found == Exit.INCONCLUSIVE
    assert "JR006 error" in capsys.readouterr().out
    assert (folder / "jumps.toml").exists()


def test_figures_that_mean_nothing_end_with_the_code_for_inconclusive(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Finding("JR005", "error", "it is the attack that fails")
    monkeypatch.setattr(Evaluation, "findings", (found,))
    assert _run("--data", "data.npz", "--trials", 1, "-o", "jumps.toml") == Exit.INCONCLUSIVE
    assert "Inconclusive: by JR005 these figures" in capsys.readouterr().out
    assert "Inconclusive: by JR005" in (folder / "jumps.toml").read_text(), "written all the same"


def test_the_same_result_makes_the_same_picture(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    data = jr.load_npz("data.npz")
    found = jr.tune(
        jr.load("net.onnx"), data.x, data.y, threat=jr.ThreatModel(epsilon=0.05), trials=2,
        steps=2, suite="naive", objective="distance", device="cpu",
    )  # fmt: skip
    one, other = (save_plots(found, folder / name) for name in ("a", "b"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]
    assert "mean smallest epsilon" in (folder / "a" / "trade-off.svg").read_text()


def test_without_matplotlib_nothing_is_tried(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert _run("--data", "data.npz", "--plot", "plots") == Exit.USAGE
    assert "pip install 'jr-onnx[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), Exit.USAGE, "give the examples to tune on with --data"),
        (("--data", "data.npz", "-o", "data.npz", "--force"), Exit.USAGE, "would be overwritten"),
        (("--data", "data.npz", "--jump-scope", "layer"), Exit.USAGE, "jump_scope must be one of"),
        (("--data", "data.npz", "-o", "net.onnx"), Exit.USAGE, "would be overwritten"),
        (("--data", "data.npz", "-o", "other.npz"), Exit.ERROR, "is there already"),
        (("--data", "data.npz", "--report-share", "1"), Exit.USAGE, "report_share must be above"),
    ],
)
def test_what_is_refused_before_any_work(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: Exit,
    message: str,
) -> None:
    assert _run(*arguments) == code
    assert message in capsys.readouterr().err


def test_an_interruption_keeps_what_was_done(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from jr_onnx.tune.judge import Judge

    point = Judge.point

    def once(self: Judge, *arguments: Any, **options: Any) -> Any:
        if arguments[1] == "global":
            raise KeyboardInterrupt
        return point(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Judge, "point", once)
        assert _run("--data", "data.npz", "--resume", "kept") == Exit.INTERRUPTED
    assert "kept in kept: the same command goes on" in capsys.readouterr().err
    assert _run("--data", "data.npz", "--resume", "kept", "--trials", 2) in DONE
    assert _run("--data", "data.npz", "--resume", "kept", "--seed", 1) == Exit.ERROR
    assert "was made by another run, of other data, seed" in capsys.readouterr().err
