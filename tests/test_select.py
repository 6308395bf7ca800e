"""Which sites get a jump, and the file that says which jump."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import jr_onnx as jr
from jr_onnx.errors import ParameterError


def _paths(chosen: tuple[Any, ...]) -> list[str]:
    return [each.path for each in chosen]


@pytest.fixture(scope="module")
def sites(lenet: jr.Model) -> Any:
    return jr.find_sites(lenet)[0]


def test_first_and_last_are_both_ends(sites: Any) -> None:
    chosen, left = jr.Selection(first=1, last=1).split(sites)
    assert _paths(chosen) == ["relu", "relu_3"]
    assert {each.reason for each in left} == {"not among the first 1 or last 1"}


def test_a_path_is_itself_before_it_is_a_glob(text_model: Callable[..., jr.Model]) -> None:
    proto = text_model(
        "g (float[2] x) => (float[2] a, float[2] b) {a = Relu(x) b = Relu(x)}"
    ).parse()
    proto.graph.node[0].output[0] = proto.graph.output[0].name = "a[0]"
    sites, _ = jr.find_sites(jr.Model(proto.SerializeToString()))
    for pattern in ("a[0]", "a[[]0]"):
        assert _paths(jr.Selection(include=[pattern]).split(sites)[0]) == ["a[0]"]
        assert _paths(jr.Selection(exclude=[pattern]).split(sites)[0]) == ["b"]
    with pytest.raises(
        ParameterError, match=r"matches no site \(in a glob, \[ is written \[\[\]\)"
    ):
        jr.Selection(include=["c[0]"]).split(sites)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": "r0"}, "include must be a list of globs, got 'r0'"),
        ({"include": 5}, "include must be a list of globs, got 5"),
        ({"exclude": [1]}, r"exclude must be a list of globs, got \[1\]"),
        ({"last": 1.5}, "last must be a whole number, at least 1, got 1.5"),
        ({"first": True}, "first must be a whole number, at least 1, got True"),
        ({"first": 0}, "first must be a whole number, at least 1, got 0"),
    ],
)
def test_a_selection_that_makes_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        jr.Selection(**options)


@pytest.mark.parametrize(
    ("name", "content", "jumps"),
    [
        ("j.toml", b"relu = 1\n'layer1.relu' = [0.5, -0.0]", {"relu": 1, "layer1.relu": [0.5, 0]}),
        ("j.toml", b"[jumps]\nrelu = 1", {"relu": 1}),
        ("j.json", b'\xef\xbb\xbf{"relu": 1}', {"relu": 1}),
        ("j.txt", b' {"jumps": {"relu": 1}}', {"relu": 1}),
        ("j.JSON", b'{"jumps": 2}', {"jumps": 2}),
    ],
)
def test_jumps_files(
    tmp_path: Path, name: str, content: bytes, jumps: dict[str, float | list[float]]
) -> None:
    (tmp_path / name).write_bytes(content)
    found = jr.load_jumps(tmp_path / name)
    assert found == jumps
    assert "-0.0" not in repr(found)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("j.json", "{", "j.json: not valid JSON"),
        ("j.txt", "relu: 1", "j.txt: not valid TOML"),
        ("j.json", "[" * 100_000, "j.json: not valid JSON"),
        ("j.json", '{"relu": 1, "relu": 2}', "not valid JSON \\('relu' is given twice\\)"),
        ("j.json", "[1]", "expected site paths with their jumps, got \\[1\\]"),
        ("j.toml", "", "expected site paths with their jumps, got {}"),
        ("j.toml", "layer1.relu = 1", "the jump of 'layer1' is a table. In TOML a dot makes one"),
        ("j.toml", "relu = true", "the jump of 'relu' must be a number or a list of numbers"),
        ("j.toml", "relu = [1, -1]", "'relu' must be a finite number >= 0, got \\[1, -1\\]"),
        (
            "j.toml",
            "relu = nan",
            "j.toml: the jump of 'relu' must be a finite number >= 0, got nan",
        ),
        ("j.json", '{"relu": 1' + "0" * 400 + "}", "'relu' must be a finite number >= 0"),
    ],
)
def test_a_jumps_file_that_makes_no_sense(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ParameterError, match=message):
        jr.load_jumps(tmp_path / name)


def test_a_missing_jumps_file(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"j.toml: cannot be read \(No such file"):
        jr.load_jumps(tmp_path / "j.toml")
