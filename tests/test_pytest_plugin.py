"""The pytest plugin: two fixtures, and nothing at all for those who do not use them."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gates import edit, harden, short_adaptive

import jr_onnx as jr
from jr_onnx.errors import ParameterError
from jr_onnx.gate import assert_robust
from jr_onnx.suites import SUITES

pytest_plugins = ["pytester"]


@pytest.fixture
def project(
    pytester: pytest.Pytester, lenet: jr.Model, mnist: jr.Dataset, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with models and data for the tests inside."""
    monkeypatch.setitem(SUITES, "adaptive", short_adaptive)
    jr.save(lenet, pytester.path / "net.onnx")
    np.savez(pytester.path / "test.npz", x=mnist.x[:20], y=mnist.y[:20])
    harden(pytester.path, jump=0.05)
    return pytester.path


def test_the_fixtures_say_what_the_gate_says(pytester: pytest.Pytester, project: Path) -> None:
    changed = edit(project / "net.onnx", where="weights", change=1e-3)
    (project / "net.onnx").rename(project / "other.onnx")
    jr.save(jr.restore(jr.load(project / "net.jr.onnx")), project / "net.onnx")
    pytester.makepyfile(
        """
        def test_same(assert_retrofit_equivalent):
            assert len(assert_retrofit_equivalent("net.onnx", "net.jr.onnx").jumps) == 4

        def test_other(assert_retrofit_equivalent):
            assert_retrofit_equivalent("other.onnx", "net.jr.onnx")

        def test_robust(assert_robust):
            given = {"epsilon": 0.1, "device": "cpu"}
            result = assert_robust("net.jr.onnx", "test.npz", at_least=0.05, **given)
            assert result.evaluation.models[-1].robust_accuracy > 0.05

        def test_too_much(assert_robust):
            assert_robust("net.jr.onnx", "test.npz", epsilon="8/255", at_least=1, device="cpu")
        """
    )
    done = pytester.runpytest_inprocess()
    done.assert_outcomes(passed=2, failed=2)
    done.stdout.fnmatch_lines_random(
        [
            f"E*JR009 *{changed}*",
            "E*not shown to be robust:",
            "E*JR002 robust-floor, fail: *at least 100.0 is asked for*",
        ]
    )


def test_it_is_installed() -> None:
    (plugin,) = (each for each in entry_points(group="pytest11") if "jr_onnx" in each.value)
    assert plugin.value == "jr_onnx_pytest"


def test_it_costs_nothing_at_start_up() -> None:
    asked = "import sys, jr_onnx_pytest; print(sorted(sys.modules))"
    repository = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", asked], cwd=repository, capture_output=True, text=True, check=True
    )
    for heavy in ("'jr_onnx'", "'numpy'", "'onnx'", "'onnxruntime'", "'pydantic'"):
        assert heavy not in done.stdout


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"at_least": 30}, "at_least: input should be less than or equal to 1, got 30"),
        ({"device": "gpu"}, "device: input should be 'auto', 'cpu' or 'cuda', got 'gpu'"),
        ({"suite": "hard"}, "suite must be one of naive, paper, standard, adaptive, got 'hard'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    lenet: jr.Model, mnist: jr.Dataset, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ParameterError, match=f"^{re.escape(message)}"):
        assert_robust(lenet, mnist, **{"epsilon": 0.1, "at_least": 0.1} | given)
