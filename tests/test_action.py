"""The GitHub action: of the shape that GitHub takes, and its script runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gates import CONFIG
from ruamel.yaml import YAML

REPOSITORY = Path(__file__).resolve().parents[1]
FILE = REPOSITORY / "action.yml"


@pytest.fixture(scope="module")
def action() -> dict[str, Any]:
    loaded: dict[str, Any] = YAML(typ="safe").load(FILE)
    return loaded


def test_it_has_the_shape_of_an_action() -> None:
    check = ["check_jsonschema", "--builtin-schema", "vendor.github-actions", str(FILE)]
    done = subprocess.run([sys.executable, "-m", *check], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_inputs_reach_scripts_by_the_environment_only(action: dict[str, Any]) -> None:
    used = set(re.findall(r"inputs\.([a-z-]+)", FILE.read_text()))
    assert used == set(action["inputs"])
    for step in action["runs"]["steps"]:
        assert "${{" not in step.get("run", ""), "an input could be code"


@pytest.mark.skipif(sys.platform == "win32", reason="a script for bash")
def test_its_script_keeps_the_code_and_the_reports(action: dict[str, Any], here: Path) -> None:
    (here / "jr-onnx.toml").write_text(CONFIG)  # net.jr.onnx is missing
    tools = here / "bin"
    tools.mkdir()
    (tools / "jr-onnx").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m jr_onnx "$@"\n')
    (tools / "jr-onnx").chmod(0o755)
    step = next(step for step in action["runs"]["steps"] if step.get("id") == "gate")
    given = {
        "CONFIG": "jr-onnx.toml",
        "ARGS": "--device cpu",
        "REPORTS": "reports of the gate",
        "BIN": str(tools),
        "GITHUB_OUTPUT": str(here / "output"),
        "GITHUB_STEP_SUMMARY": str(here / "summary"),
        "PYTHONPATH": str(REPOSITORY),
    }
    script = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    subprocess.run(script, env=os.environ | given, check=True, cwd=here)
    assert (here / "output").read_text() == "exit-code=3\n"
    assert "net.jr.onnx" in (here / "summary").read_text()
    reports = here / "reports of the gate"
    assert {path.name for path in reports.iterdir()} == {"gate.json", "gate.xml", "gate.sarif"}
