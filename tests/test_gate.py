"""A pipeline, step by step as a user would run it: green, then red for one reason after another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from gates import CONFIG, Reports, edit, harden, run_gate, saturate, short_adaptive
from onnx import TensorProto, helper

import jr_onnx as jr
from jr_onnx.cli import run
from jr_onnx.suites import SUITES

Run = Callable[..., Reports]


@pytest.fixture
def project(here: Path, monkeypatch: pytest.MonkeyPatch, mnist: jr.Dataset) -> Path:
    """A folder with net.onnx, net.jr.onnx, test.npz (20 digits), jr-onnx.toml."""
    monkeypatch.setitem(SUITES, "adaptive", short_adaptive)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    np.savez(here / "test.npz", x=mnist.x[:20], y=mnist.y[:20])
    (here / "jr-onnx.toml").write_text(CONFIG)
    harden(here, jump=0.05)
    return here


@pytest.fixture
def gate(project: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *arguments: run_gate(project, lambda: capsys.readouterr().out, *arguments)


def test_an_honest_model_is_green_and_its_result_is_a_baseline(gate: Run, project: Path) -> None:
    reports = gate()
    assert reports.code == 0
    assert reports.json["status"] == "pass"
    assert reports.results == []
    assert set(reports.cases.values()) <= {"pass", "skipped"}
    assert "green" in reports.text
    assert "✅ pass" in reports.markdown.splitlines()[0]
    (project / "gate.json").rename(project / "earlier.json")
    with (project / "jr-onnx.toml").open("a") as file:
        file.write('[baseline]\nfile = "earlier.json"\nmax_robust_accuracy_drop = 0\n')
    again = gate()
    assert again.code == 0
    assert again.shown("JR014")[0] == "pass"


def test_what_init_writes_runs(gate: Run, project: Path) -> None:
    for old, new in (("net.onnx", "model.onnx"), ("net.jr.onnx", "model.jr.onnx")):
        (project / old).rename(project / new)
    (project / "jr-onnx.toml").unlink()
    assert run(["gate", "--init"]) == 0
    reports = gate("--device", "cpu")
    # No gain is shown by a jump of 0.05 on twenty digits.
    assert reports.code == 1
    assert reports.json["error"] is None
    assert reports.shown("JR003") == ("failure", True, True)


def test_a_jump_changed_behind_its_back_is_red(gate: Run, project: Path) -> None:
    edit(project / "net.jr.onnx", where="jump", change=0.5)
    reports = gate()
    assert reports.code == 1
    assert reports.shown("JR009") == ("failure", True, True)
    # What is not what it claims to be is not attacked, and nothing passes for want of an attack.
    assert reports.shown("JR002")[0] == "skipped"
    assert reports.json["models"][0]["evaluation"] is None


def test_weights_touched_are_red(gate: Run, project: Path) -> None:
    name = edit(project / "net.jr.onnx", where="weights", change=1e-3)
    reports = gate()
    assert reports.code == 1
    assert reports.shown("JR009") == ("failure", True, True)
    (result,) = reports.results
    assert name in result["message"]["text"]


def test_masking_is_red_whatever_the_score(gate: Run, project: Path) -> None:
    harden(project, jump=1.0)
    reports = gate()
    assert reports.code == 1
    assert reports.shown("JR004") == ("failure", True, True)
    assert reports.shown("JR002")[0] == "pass"


def test_a_drop_of_clean_accuracy_is_red(gate: Run, project: Path) -> None:
    harden(project, jump=4.0)
    reports = gate()
    assert reports.code == 1
    assert reports.shown("JR001") == ("failure", True, True)


def test_a_model_that_is_too_slow_is_red(gate: Run, project: Path) -> None:
    # No model is a hundred times as fast as its original.
    _configure(project, gates="max_latency_ratio = 0.01")
    reports = gate()
    assert reports.code == 1
    assert reports.shown("JR011") == ("failure", True, True)
    assert reports.json["models"][0]["latency"]["ratio"] > 0.01


def test_a_site_left_out_is_red(gate: Run, project: Path) -> None:
    selection = jr.Selection(exclude=("relu_2",))
    harden(project, jump=0.05, selection=selection)
    reports = gate()
    assert reports.code == 1
    assert reports.shown("JR010") == ("failure", True, True)
    assert reports.shown("JR009")[0] == "pass"
    (result,) = reports.results
    places = result["locations"][0]["logicalLocations"]
    assert [place["fullyQualifiedName"] for place in places] == ["relu_2"]


def test_an_invalid_attack_is_inconclusive(gate: Run, project: Path) -> None:
    saturate(project / "net.onnx")
    harden(project, jump=0.05)
    reports = gate()
    assert reports.code == 5
    assert reports.json["status"] == "inconclusive"
    assert reports.shown("JR005") == ("error", True, True)
    # A floor that is held under an attack that does not work is not shown to be held.
    assert reports.shown("JR002") == ("error", True, True)
    assert reports.cases["pgd linf 0.1"] == "error"


def test_of_several_outputs_one_is_named(gate: Run, project: Path) -> None:
    proto = onnx.load(project / "net.onnx")
    logits = proto.graph.output[0].name
    proto.graph.output.append(
        helper.make_tensor_value_info("relu_3", TensorProto.FLOAT, ["n", None])
    )
    onnx.save(proto, project / "net.onnx")
    harden(project, jump=0.05)
    assert gate().code == 3
    _configure(project, evaluation=f'output = "{logits}"')
    assert gate().code == 0


def _configure(project: Path, **lines: str) -> None:
    """Puts lines into tables of the configuration."""
    path = project / "jr-onnx.toml"
    text = path.read_text()
    for table, line in lines.items():
        assert f"[{table}]\n" in text
        text = text.replace(f"[{table}]\n", f"[{table}]\n{line}\n")
    path.write_text(text)
