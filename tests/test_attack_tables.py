"""The tables of attacks in docs/, and the tools that make them."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from classifiers import Linear

from jr_onnx.attacks import ATTACKS, ThreatModel

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
Array = np.ndarray[Any, Any]


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of tools/."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    return importlib.import_module


def _between(page: Path, name: str) -> str:
    found = re.search(f"<!-- {name} -->\n(.*?)<!-- /{name} -->\n", page.read_text(), re.S)
    assert found
    return found[1]


@pytest.mark.parametrize("name", ["attacks", "suites"])
def test_the_page_of_attacks_is_up_to_date(tools: Any, name: str) -> None:
    made = getattr(tools("list_attacks"), name)()
    assert _between(DOCS / "attacks.md", name) == made, "run tools/list_attacks.py"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_runs_the_model_more_often_than_the_page_says(tools: Any, name: str) -> None:
    """A model that never gives in costs an attack all that it may spend."""
    rng = np.random.default_rng(0)
    model = Linear(rng.normal(size=(27, 10)).astype(np.float32), np.zeros(10, np.float32))
    model.b[0] = 1e4
    x, y = np.full((1, 3, 3, 3), 0.5, np.float32), np.zeros(1, int)
    attack = ATTACKS[name]()
    norm = attack.norms[0]
    threat = ThreatModel(norm=norm, epsilon=np.inf if name == "corruptions" else 0.1)
    counts = attack.run(model, x, y, threat).counts
    forward, gradient = tools("list_attacks").RUNS[name]
    assert counts.gradient <= gradient + 2
    assert counts.forward <= forward + 20 + 0.02 * forward


def test_a_table_is_put_between_its_marks(tools: Any, tmp_path: Path) -> None:
    tables, page = tools("tables"), tmp_path / "page.md"
    page.write_text("above\n\n<!-- it -->\nold\n<!-- /it -->\n\nbelow\n")
    content = tables.markdown(["name", "share"], [["one", "1"]])
    tables.put(page, "it", content)
    tables.put(page, "it", content)
    assert page.read_text() == (
        "above\n\n<!-- it -->\n"
        "| name | share |\n| --- | --: |\n| one | 1 |\n"
        "<!-- /it -->\n\nbelow\n"
    )
    tables.put(page, "other", "new\n")
    assert page.read_text().endswith("below\n\n<!-- other -->\nnew\n<!-- /other -->\n")
    page.write_text("<!-- it -->\n")
    with pytest.raises(ValueError, match="one is missing"):
        tables.put(page, "it", content)


@pytest.fixture(scope="module")
def compare_attacks() -> Any:
    pytest.importorskip("torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "tools"))
        yield importlib.import_module("compare_attacks")


@pytest.fixture(scope="module")
def contest(compare_attacks: Any) -> Any:
    return compare_attacks.Contest()


def _case(compare_attacks: Any, **changes: Any) -> Any:
    given = {
        "name": "step",
        "norm": "linf",
        "epsilon": 0.1,
        "budget": "one step",
        "ours": ATTACKS["fgsm"](),
        "others": {"foolbox": ("step", {})},
        "examples": 40,
    }
    return compare_attacks.Case(**{**given, **changes})


@pytest.mark.parametrize(
    ("library", "factor", "counts"),
    [
        ("foolbox", 1.0, True),
        ("foolbox", 1 + 1e-6, True),  # what float32 costs
        ("foolbox", 1.01, False),
        ("foolbox", np.nan, False),
    ],
)
def test_a_point_outside_the_ball_does_not_count(
    compare_attacks: Any,
    contest: Any,
    monkeypatch: pytest.MonkeyPatch,
    library: str,
    factor: float,
    counts: bool,
) -> None:
    """The stranger here takes our step, and stretches it."""
    case = _case(compare_attacks)

    def stranger(world: Any, name: str, options: Any, case: Any, seed: int) -> Array:
        ours = contest._points(case, compare_attacks.OURS, world.x, world.y, seed)
        away = ours.astype(np.float64) - world.x
        stretched: Array = np.clip(world.x + factor * away, 0, 1)
        return stretched

    monkeypatch.setitem(compare_attacks.LIBRARIES, library, ("numpy", stranger))
    ours, _ = contest.run(case, compare_attacks.OURS, 0)
    theirs, _ = contest.run(case, library, 0)
    correct = contest.target.logits(contest.data.x[:40]).argmax(1) == contest.data.y[:40]
    assert ours.sum() < correct.sum(), "the step breaks some"
    assert np.array_equal(theirs, ours if counts else correct)


def test_what_is_finished_is_not_run_again(
    compare_attacks: Any, contest: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[int] = []

    def stranger(world: Any, name: str, options: Any, case: Any, seed: int) -> Array:
        seen.append(seed)
        if seed == 2 and seen.count(2) == 1:
            raise KeyboardInterrupt
        there: Array = world.x
        return there

    case = _case(compare_attacks, examples=10, seeds=3)
    monkeypatch.setitem(compare_attacks.LIBRARIES, "foolbox", ("numpy", stranger))
    monkeypatch.setattr(compare_attacks, "cases", lambda: [case])
    monkeypatch.setattr(compare_attacks, "Contest", lambda: contest)
    with pytest.raises(KeyboardInterrupt):
        compare_attacks.compare(tmp_path, [case])
    results = compare_attacks.compare(tmp_path, [case])
    assert seen == [0, 1, 2, 2]
    assert compare_attacks.compare(tmp_path, [case]) == results
    assert seen == [0, 1, 2, 2]
    assert len(results[case.key]["foolbox"].robust) == 3
    assert "| 10 x 3 |" in compare_attacks.table(results)
    # Results of another number of examples do not fit.
    fewer = _case(compare_attacks, examples=9, seeds=3)
    assert not compare_attacks.stored(tmp_path, fewer, "foolbox").robust


def test_rows_without_a_newer_result_stay(compare_attacks: Any) -> None:
    known = [case for case in compare_attacks.cases() if case.norm == "linf"][:2]
    found = compare_attacks.Found().more(np.array([True, False]), 0.1, 1.0)
    results = [{case.key: {compare_attacks.OURS: found, "ART": found}} for case in known]
    first = compare_attacks.table(results[0])
    both = compare_attacks.table(results[1], first)
    assert both == compare_attacks.table({**results[0], **results[1]})
    assert compare_attacks.table(results[1], both) == both


def test_only_as_many_seeds_are_compared(compare_attacks: Any) -> None:
    one = compare_attacks.Found().more(np.array([False, False]), 0.1, 1.0)
    two = compare_attacks.Found().more(np.array([True, False]), 0.1, 1.0)
    two = two.more(np.array([True, True]), 0.1, 1.0)
    case = next(case for case in compare_attacks.cases() if case.seeds > 1)
    results = {case.key: {compare_attacks.OURS: two, "ART": one, "foolbox": two}}
    (row,) = compare_attacks.table(results).splitlines()[2:]
    assert "75.0% [50.0..100.0]" in row
    assert f"0.0% (1 of {case.seeds} seeds)" in row
    assert "| +0.0 |" in row


def test_a_library_that_is_absent_or_fails_is_a_cell_and_is_tried_again(
    compare_attacks: Any, contest: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: Any) -> Array:
        raise TypeError("no such option")

    others: dict[str, Any] = {"absent": ("step", {}), "foolbox": ("step", {})}
    case = _case(compare_attacks, examples=10, others=others)
    monkeypatch.setitem(compare_attacks.LIBRARIES, "absent", ("no_such_module", None))
    monkeypatch.setitem(compare_attacks.LIBRARIES, "foolbox", ("numpy", broken))
    monkeypatch.setattr(compare_attacks, "cases", lambda: [case])
    monkeypatch.setattr(compare_attacks, "Contest", lambda: contest)
    found = compare_attacks.compare(tmp_path, [case])
    assert found[case.key]["absent"].failed == "not installed"
    assert found[case.key]["foolbox"].failed == "TypeError: no such option"
    row = compare_attacks.table(found)
    assert "not installed" in row
    assert "failed" in row
    monkeypatch.setitem(compare_attacks.LIBRARIES, "foolbox", ("numpy", lambda world, *_: world.x))
    assert compare_attacks.compare(tmp_path, [case])[case.key]["foolbox"].robust


def test_every_comparison_has_a_key_of_its_own(compare_attacks: Any) -> None:
    keys = [case.key for case in compare_attacks.cases()]
    assert len(set(keys)) == len(keys)
    for case in compare_attacks.cases():
        assert set(case.others) <= set(compare_attacks.LIBRARIES)


def test_the_share_of_the_best_point_of_a_linear_model(
    tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    module = tools("compare_linear")
    model = module.Linear(module.weights("smooth", 8))
    x = np.full((2, 1, 8, 8), 0.5, np.float32)
    best = x + module.EPSILON * model.w / np.linalg.norm(model.w)
    np.testing.assert_allclose(model.share(best, x), 1, rtol=1e-6)
    np.testing.assert_allclose(model.share(x, x), 0)
    rise = np.diff(model.logits(best) - model.logits(x), axis=1)
    np.testing.assert_allclose(rise, 2 * module.EPSILON * np.linalg.norm(model.w), rtol=1e-3)
    monkeypatch.setattr(module, "QUERIES", 20)
    monkeypatch.setattr(module, "theirs", lambda model, x: x)
    rows = module.table().splitlines()[2:]
    assert len(rows) == 4
    assert all(row.endswith("| 0.0% |") for row in rows)
