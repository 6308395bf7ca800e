"""The public names, and the README's Python."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import jr_onnx as jr

REPOSITORY = Path(__file__).resolve().parents[1]
PUBLIC = """
    Dataset Evaluation GateResult GradientHealth Model Retrofit Selection Target ThreatModel Tuning
    Verification __version__ attacks autodiff compare_on_data errors evaluate find_sites gate
    gradient_health input_gradient jump_relu load load_jumps load_npz observe quantile_jumps restore
    retrofit save tune verify
"""


def test_the_public_names_are_these() -> None:
    assert sorted(jr.__all__) == sorted(PUBLIC.split())
    assert all(hasattr(jr, name) for name in jr.__all__)


def test_the_python_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    blocks = re.findall(
        r"^```python\n(.*?)^```", (REPOSITORY / "README.md").read_text(), re.S | re.M
    )
    assert len(blocks) == 1
    values: dict[str, object] = {}
    exec(compile(blocks[0], "README.md", "exec"), values)
    gradient, data = values["gradient"], values["data"]
    assert isinstance(data, jr.Dataset)
    assert getattr(gradient, "shape", None) == data.x[:8].shape
