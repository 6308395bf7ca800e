"""The configuration: every problem at once, each with its line, before any attack runs."""

from __future__ import annotations

import json
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from gates import CONFIG, SCHEMAS, harden
from hypothesis import given
from hypothesis import strategies as st

import jr_onnx as jr
from jr_onnx.errors import ConfigError, DataError, JrOnnxError, ModelError
from jr_onnx.gate import TEMPLATE, ConfigFile, config_schema
from jr_onnx.gate.locate import line_of, lines_of
from jr_onnx.gate.opening import subjects_of


@pytest.fixture
def project(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that CONFIG names, in which no attack can run."""
    measure = import_module("jr_onnx.gate.measure")  # jr_onnx.gate is the function
    monkeypatch.setattr(measure, "evaluate", _never)
    harden(here, jump=0.05)
    return here


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("an attack ran")


def _refused(project: Path, text: str, kind: type[JrOnnxError] = ConfigError) -> list[str]:
    (project / "jr-onnx.toml").write_text(text)
    with pytest.raises(kind) as caught:
        jr.gate("jr-onnx.toml")
    assert type(caught.value) is kind
    return list(getattr(caught.value, "problems", [str(caught.value)]))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("min_opset", "min_opsets", ":21: gates.min_opsets: there is no such key: did you mean"),
        ("[gates]", "[gate]", ":15: gate: there is no such key: did you mean gates?"),
        ('"1 MB"', "true", ":19: gates.max_size: input should be a valid integer, got true"),
        ('"1 MB"', '"1 pound"', ":19: gates.max_size: "),
        ("0.1\n\n", '"0.1 px"\n\n', ":10: threat.epsilon: epsilon must be a number or a frac"),
        ("0.1\n\n", "8\n\n", ":10: threat.epsilon: epsilon 8 is wider than the bounds [0, 1]"),
        ("0.1\n\n", "0\n\n", ":10: threat.epsilon: epsilon must be a number > 0"),
        ("epsilon", 'norm = "l3"\nepsilon', ":10: threat.norm: norm must be one of linf, l2, l1"),
        ("epsilon", "bounds = [1, 0]\nepsilon", ":10: threat.bounds: bounds must be finite and"),
        ('device = "cpu"', 'device = "gpu"', ":13: evaluation.device: input should be 'auto'"),
        ('device = "cpu"', 'suite = "hard"', ":13: evaluation.suite: suite must be one of naive"),
        ('device = "cpu"', "seed = -1", ":13: evaluation.seed: input should be greater than or"),
        ("= 0.1\nmin", "= 1.1\nmin", ":17: gates.min_robust_accuracy: input should be less than"),
        ("= 1.1", "= inf", ":20: gates.max_size_ratio: input should be a finite number"),
        ("= 30", "= 12", ":21: gates.min_opset: 13 is above max_opset 12"),
        ('hardened = "net.jr.onnx"\n', "", ":1: models[0]: give either model, or both original"),
        ("original", 'model = "net.onnx"\noriginal', ":1: models[0]: give either model, or both"),
        ('path = "test.npz"', "", ":1: models[0]: has no examples: set data.path"),
        ("epsilon = 0.1", "", ":1: models[0]: has no epsilon: set threat.epsilon"),
        ("[gates]", "[baseline]\n[gates]", ":15: baseline.file: is missing"),
        ("[[models]]", "[models]", ". Head each model with [[models]]"),
        ("[data]", '[[models]]\nmodel = "net.onnx"\nname = "digits"\n\n[data]', "is there twice"),
        ('"test.npz"', r'"a\u0000"', ":7: data.path: a path holds no NUL"),
        ("[data]", "[data\n", "not valid TOML: Expected"),
    ],
)
def test_a_bad_value_is_refused_with_its_line(
    project: Path, old: str, new: str, message: str
) -> None:
    assert old in CONFIG
    text = CONFIG.replace(old, new, 1)
    (problem,) = _refused(project, text)
    assert problem.startswith("jr-onnx.toml:")
    assert message in problem


def test_all_problems_are_told_at_once_in_the_order_of_the_file(project: Path) -> None:
    text = CONFIG.replace("0.1\n\n", "8\n\n").replace('"1 MB"', '"x"').replace("name", "nam")
    (project / "test.npz").unlink()
    problems = _refused(project, text)
    assert [problem.split(":")[1] for problem in problems] == ["2", "7", "10", "19"]
    assert "test.npz: there is no such file" in problems[1]


@pytest.mark.parametrize(
    ("file", "kind", "line"),
    [("net.onnx", ModelError, 3), ("net.jr.onnx", ModelError, 4), ("test.npz", DataError, 7)],
)
def test_a_missing_file_is_a_named_error(
    project: Path, file: str, kind: type[JrOnnxError], line: int
) -> None:
    (project / file).unlink()
    (problem,) = _refused(project, CONFIG, kind)
    assert problem.startswith(f"jr-onnx.toml:{line}: ")
    assert file in problem


def test_missing_files_are_told_at_once(project: Path) -> None:
    for file in ("net.onnx", "net.jr.onnx", "test.npz"):
        (project / file).unlink()
    (problem,) = _refused(project, CONFIG, ModelError)
    assert all(f"jr-onnx.toml:{line}: " in problem for line in (3, 4, 7))


def test_labels_shifted_by_one_are_refused(project: Path, mnist: jr.Dataset) -> None:
    inside = mnist.y < 9
    np.savez(project / "test.npz", x=mnist.x[inside][:50], y=mnist.y[inside][:50] + 1)
    (problem,) = _refused(project, CONFIG, DataError)
    assert "test.npz: JR006 input-contract" in problem
    assert "the labels are shifted by one" in problem


def test_data_in_other_units_is_refused(project: Path, mnist: jr.Dataset) -> None:
    np.savez(project / "test.npz", x=mnist.x[:50] * 255, y=mnist.y[:50])
    (problem,) = _refused(project, CONFIG, DataError)
    assert "outside the bounds [0, 1]" in problem


def test_an_original_that_is_hardened_is_refused(project: Path) -> None:
    (problem,) = _refused(project, CONFIG.replace('"net.onnx"', '"net.jr.onnx"'))
    assert problem.startswith("jr-onnx.toml:3: models[0].original: ")
    assert "is hardened itself" in problem


def test_paths_are_relative_to_the_configuration(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.parent)
    (project / "jr-onnx.toml").write_text(CONFIG)
    (subject,) = subjects_of(ConfigFile(project / "jr-onnx.toml"))
    assert subject.model.path == project / "net.jr.onnx"
    subject.require_contract()


def test_a_file_that_is_not_there_says_how_to_make_one(project: Path) -> None:
    with pytest.raises(ConfigError, match="jr-onnx gate --init"):
        jr.gate("nowhere.toml")


def test_a_table_of_a_model_goes_before_the_one_at_the_top(project: Path) -> None:
    own = '[[models]]\nname = "other"\nmodel = "net.onnx"\nthreat.epsilon = "8/255"\n'
    (project / "jr-onnx.toml").write_text(f"{own}gates.max_size = 10\n\n{CONFIG}")
    other, digits = ConfigFile("jr-onnx.toml").config.entries
    assert (other.threat.epsilon, digits.threat.epsilon) == (8 / 255, 0.1)
    assert (other.gates.max_size, digits.gates.max_size) == (10, 1_000_000)
    assert other.gates.min_opset == 13


@pytest.mark.parametrize(
    ("general", "own", "refused"),
    [
        ("bounds = [0, 255]\nepsilon = 4", "epsilon = 8", False),
        ('norm = "l2"\nepsilon = 1', "epsilon = 3", False),
        ("epsilon = 8", "bounds = [0, 255]", True),  # not of the other model
        ("epsilon = 0.1", "epsilon = 8", True),
        ("epsilon = 0.1", 'norm = "l2"\nthreat.epsilon = 8', False),
    ],
)
def test_an_epsilon_is_compared_with_the_bounds_of_its_own_model(
    project: Path, general: str, own: str, refused: bool
) -> None:
    other = f'[[models]]\nname = "other"\nmodel = "net.onnx"\nthreat.{own}\n\n[data]'
    text = CONFIG.replace("epsilon = 0.1", general).replace("[data]", other, 1)
    if refused:
        (problem,) = _refused(project, text)
        assert "epsilon: epsilon 8 is wider than the bounds [0, 1]" in problem
    else:
        (project / "jr-onnx.toml").write_text(text)
        assert len(ConfigFile("jr-onnx.toml").config.entries) == 2


def test_the_bounds_must_be_those_of_the_preprocessing(project: Path) -> None:
    (project / "steps.toml").write_text("bounds = [0, 255]\n")
    text = CONFIG.replace("[threat]", 'preprocess = "steps.toml"\n\n[threat]')
    (problem,) = _refused(project, text)
    assert "set threat.bounds" in problem


def test_the_template_is_valid_and_says_what_holds_anyway(tmp_path: Path) -> None:
    path = tmp_path / "jr-onnx.toml"
    path.write_text(TEMPLATE)
    gates = ConfigFile(path).config.gates
    jsonschema.Draft202012Validator(config_schema()).validate(tomllib.loads(TEMPLATE))
    uncommented = "\n".join(
        line.removeprefix("# ") if "=" in line or line.startswith("# [") else line
        for line in TEMPLATE.splitlines()
    )
    everything = tomllib.loads(uncommented)
    jsonschema.Draft202012Validator(config_schema()).validate(everything)
    assert set(everything["gates"]) == set(type(gates).model_fields)


def test_the_published_schema_is_that_of_the_code() -> None:
    assert json.loads((SCHEMAS / "gate-config-1.json").read_bytes()) == config_schema()


def test_lines_are_found_in_any_toml() -> None:
    text = '''\
# a comment
"a b".c = """
[not.a.table]
"""
list = [
  1,
  2,
]
[t.u] # [x]
k = 'v'
[[m]]
x = 1
[m.y]
z = {w = 1, v = 2}
[[m]]
[[m.n]]
[[m.n]]
q.r = 1
'''
    lines = lines_of(text)
    expected: dict[tuple[str | int, ...], int] = {
        ("a b", "c"): 2,
        ("list",): 5,
        ("t", "u"): 9,
        ("t", "u", "k"): 10,
        ("m", 0): 11,
        ("m", 0, "x"): 12,
        ("m", 0, "y", "z", "v"): 14,
        ("m", 1): 15,
        ("m", 1, "n", 1): 17,
        ("m", 1, "n", 1, "q", "r"): 18,
    }
    assert {path: lines[path] for path in expected} == expected
    assert line_of(("m", 0, "y", "missing"), lines) == 13


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.text()), max_size=4))
def test_a_key_is_found_on_the_line_it_was_written_on(table: dict[str, Any]) -> None:
    rows = [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in table.items()]
    text = "[t]\n" + "\n".join(rows)
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:  # JSON escapes that TOML does not have
        return
    lines = lines_of(text)
    assert {key: lines["t", key] for key in table} == {
        key: at for at, key in enumerate(table, start=2)
    }
