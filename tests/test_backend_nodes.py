"""The gradients of onnx's backend node tests and light models, and the table of operators."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from jr_onnx.autodiff import registry
from jr_onnx.autodiff.expand import _expansions

REPOSITORY = Path(__file__).resolve().parents[1]
LIGHT_MODELS = (
    "bvlc_alexnet", "densenet121", "inception_v1", "inception_v2", "resnet50", "shufflenet",
    "squeezenet", "vgg19", "zfnet512",
)  # fmt: skip


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))


@pytest.fixture
def check_gradients(tools: None) -> Any:
    return importlib.import_module("check_gradients")


@pytest.fixture
def list_operators(tools: None) -> Any:
    return importlib.import_module("list_operators")


def _smallest(check_gradients: Any) -> list[Any]:
    """Returns the smallest node test of every operator that has a rule."""
    ruled = {op_type for domain, op_type, _ in registry.registered() if not domain}
    chosen: dict[str, Any] = {}

    def size(case: Any) -> int:
        return sum(np.size(value) for value in case.inputs.values())

    for case in check_gradients.node_cases():
        kinds = (case.inputs.values(), case.outputs.values())
        floats = all(any(map(check_gradients._is_float, values)) for values in kinds)
        arrays = all(isinstance(value, np.ndarray) for value in case.inputs.values())
        if case.op_type in ruled and floats and arrays and size(case) > 1:
            known = chosen.setdefault(case.op_type, case)
            chosen[case.op_type] = min(known, case, key=size)
    return list(chosen.values())


def _wrong(results: Any, check_gradients: Any) -> list[Any]:
    return [one for one in results if one.outcome.kind == check_gradients.WRONG]


def test_the_smallest_node_test_of_every_rule_has_no_wrong_gradient(check_gradients: Any) -> None:
    cases = _smallest(check_gradients)
    results = list(check_gradients.run(cases, all_versions=False))
    assert not _wrong(results, check_gradients)
    kinds = {one.op_type: one.outcome.kind for one in results}
    right = (check_gradients.CHECKED, check_gradients.ZERO, check_gradients.REFUSED)
    assert sum(kind in right for kind in kinds.values()) > 90


def test_the_smallest_node_test_of_every_rule_agrees_in_float16(check_gradients: Any) -> None:
    results = list(check_gradients.run_half(_smallest(check_gradients)))
    assert not _wrong(results, check_gradients)
    checked = [one for one in results if one.outcome.kind == check_gradients.CHECKED]
    assert len({one.op_type for one in checked}) > 80


@pytest.mark.parametrize("name", ["test_sin", "test_matmul_2d", "test_softmax_axis_1"])
def test_a_wrong_rule_is_found(
    name: str, check_gradients: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case,) = (case for case in check_gradients.node_cases() if case.name == name)

    def doubled(rule: Any) -> Any:
        return lambda call: call.emit.op("Add", *[rule(call)] * 2)

    for key, found in list(registry._rules.items()):
        if key[1] == case.op_type:
            wrong = found._replace(rule=doubled(found.rule))
            monkeypatch.setitem(registry._rules, key, wrong)
    results = list(check_gradients.run([case], all_versions=False))
    assert results
    assert _wrong(results, check_gradients) == results


def test_a_gradient_that_is_lost_is_found(
    check_gradients: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case,) = (case for case in check_gradients.node_cases() if case.name == "test_sin")
    monkeypatch.setattr(registry, "ZERO_GRADIENT", registry.ZERO_GRADIENT | {"Sin"})
    results = list(check_gradients.run([case], all_versions=False))
    assert _wrong(results, check_gradients) == results


@pytest.mark.slow
def test_no_node_test_has_a_wrong_gradient(
    check_gradients: Any, list_operators: Any, tmp_path: Path
) -> None:
    results = list(check_gradients.run(check_gradients.node_cases()))
    assert not _wrong(results, check_gradients)
    found = tmp_path / "results.json"
    found.write_text(json.dumps([[*one[:4], *one.outcome] for one in results]))
    page = list_operators.PAGE.read_text()
    assert list_operators.render(list_operators.counted(found)) == page


@pytest.mark.slow
def test_no_node_test_has_a_wrong_gradient_in_float16(check_gradients: Any) -> None:
    results = check_gradients.run_half(check_gradients.node_cases())
    assert not _wrong(results, check_gradients)


@pytest.mark.slow
@pytest.mark.parametrize("name", LIGHT_MODELS)
def test_a_light_model_agrees_with_finite_differences(name: str, tools: None) -> None:
    pytest.importorskip("torch")
    module = importlib.import_module("check_light_models")
    result = module.check(name)
    assert result.error <= module.TOLERANCE
    assert result.single <= module.SINGLE_TOLERANCE


def test_the_table_of_operators_is_up_to_date(list_operators: Any) -> None:
    """But for the counts of node tests, which the slow test above compares."""
    page = list_operators.PAGE.read_text()
    again = "run tools/list_operators.py again"
    assert list_operators.render(list_operators.recorded(page)) == page, again


def test_no_rule_is_for_a_version_that_no_model_can_have(list_operators: Any) -> None:
    """Opsets 7 and 8 are read as 9. onnxruntime has operators of its own in the standard domain."""
    written = {key for key in (*registry.registered(), *_expansions) if not key[0]}
    dead = [
        (op_type, since)
        for _, op_type, since in written
        if op_type not in ("LayerNormalization", "SimplifiedLayerNormalization")
        and since not in {schema.since_version for schema in list_operators.in_force(op_type)}
        and not onnx.defs.get_schema(op_type, since).deprecated
    ]
    assert dead == []


def test_every_operator_is_in_the_table_once(list_operators: Any) -> None:
    operators = [row.operator for row in list_operators.rows()]
    operators += [*registry.ZERO_GRADIENT, *list_operators.without()]
    assert len(set(operators)) == len(operators)
