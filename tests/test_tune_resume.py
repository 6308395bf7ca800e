"""A search that was killed, at any moment, goes on and ends with the same result."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_data, tiny_model

import jr_onnx as jr
from jr_onnx.errors import TuningError
from jr_onnx.tune import Tuning
from jr_onnx.tune.judge import Judge
from jr_onnx.tune.ledger import Ledger, StoredLedger

TINY = tiny_model()
X, Y = tiny_data(TINY, 60)
OPTIONS: dict[str, Any] = {
    "threat": jr.ThreatModel(epsilon=0.05),
    "objective": "naive",
    "max_accuracy_drop": 0.1,
    "jump_scope": "per-site",
    "trials": 5,
    "steps": 3,
    "suite": "naive",
    "device": "cpu",
}


def _tune(**options: Any) -> Tuning:
    return jr.tune(TINY, X, Y, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """What an uninterrupted run finds, in memory."""
    return _figures(_tune())


def _figures(found: Tuning) -> dict[str, Any]:
    document = found.to_json()
    for model in document["report"]["evaluation"]["models"]:
        for attack in model["attacks"]:
            del attack["seconds"]
    return {**document, "scores": [point.score.tolist() for point in found.points]}


@pytest.mark.parametrize("killed_at", [1, 2, 14, 26, 30])
def test_interrupted_anywhere_it_goes_on(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    attacked: list[str] = []
    point = Judge.point

    def interrupted(self: Judge, *arguments: Any, **options: Any) -> Any:
        attacked.append(arguments[1])
        if len(attacked) == killed_at:
            raise KeyboardInterrupt
        return point(self, *arguments, **options)

    monkeypatch.setattr(Judge, "point", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _tune(resume=tmp_path)
    assert _figures(_tune(resume=tmp_path)) == whole
    assert len(attacked) == len(whole["points"]) + 1, "what was finished is not attacked again"


def test_a_finished_run_is_read(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _figures(_tune(resume=tmp_path)) == whole
    monkeypatch.setattr(Judge, "point", None)
    assert _figures(_tune(resume=tmp_path)) == whole


def test_more_trials_go_on_from_the_first_ones(whole: dict[str, Any], tmp_path: Path) -> None:
    _tune(resume=tmp_path, trials=2)
    assert _figures(_tune(resume=tmp_path)) == whole


_CHILD = """
import sys
sys.path[:0] = [{tests!r}]
import test_tune_resume
test_tune_resume._tune(resume={folder!r}, trials=1000)
"""


def test_killed_by_the_system_it_goes_on(whole: dict[str, Any], tmp_path: Path) -> None:
    """SIGKILL somewhere in the third proposal; while it runs, it has its place."""
    script = _CHILD.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", script]) as child:
        try:
            while _finished(tmp_path) < 27:
                assert child.poll() is None
                time.sleep(0.02)
            place = subprocess.run(
                [sys.executable, "-c", _PLACE.format(path=str(tmp_path / "workers"))],
                capture_output=True,
                text=True,
                check=True,
            )
            assert place.stdout == "1\n"
        finally:
            child.send_signal(signal.SIGKILL)
    done = _finished(tmp_path)
    trials = max(5, done - 25)
    found = _figures(_tune(resume=tmp_path, trials=trials))
    assert len(found["points"]) == 25 + trials
    assert found["points"][:30] == whole["points"]
    assert found["scores"][:30] == whole["scores"]


_PLACE = """
from pathlib import Path
from jr_onnx.tune.ledger import _take_place
print(_take_place(Path({path!r}))[0])
"""


def _finished(folder: Path) -> int:
    """How many trials the study holds; opened to write, for SIGKILL may leave a journal to undo."""
    path = folder / "study.db"
    if not path.exists():
        return 0
    with closing(sqlite3.connect(path, timeout=30)) as base:
        try:
            (count,) = base.execute("select count(*) from trials").fetchone()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return 0
            raise
    return int(count)


def test_two_processes_propose_different_candidates() -> None:
    from jr_onnx.activations import observe
    from jr_onnx.tune.trials import Space, propose

    sites = jr.find_sites(TINY)[0]
    space = Space(sites, {"relu0": 2.0, "relu1": 1.0}, observe(TINY, sites, X, device="cpu"), True)
    asked = [propose(space, [], seed=0, worker=worker) for worker in (0, 0, 1)]
    assert asked[0] == asked[1] != asked[2]
    assert all(0 <= each["relu0"] <= 2 and 0 <= each["relu1"] <= 1 for each in asked)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "data, objective, seed|data, seed"),
        ({"max_accuracy_drop": 0.2}, "max_accuracy_drop"),
        ({"steps": 4}, "objective"),
        ({"jump_scope": "per-channel"}, "jump_scope"),
        ({"threat": jr.ThreatModel(epsilon=0.06)}, "threat"),
    ],
)
def test_another_run_is_refused(
    change: dict[str, Any], named: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "another"
    _tune(resume=folder, jump_scope="global", trials=1) if not folder.exists() else None
    options = {"jump_scope": "global", "trials": 1, **change}
    with pytest.raises(TuningError, match=f"was made by another run, of other ({named})"):
        _tune(resume=folder, **options)


def test_a_damaged_study_is_named(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(TuningError, match=r"study.db: cannot be used as an Optuna study"):
        StoredLedger(tmp_path, {})


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(TuningError, match="cannot be used as a folder to resume from"):
        StoredLedger(file, {})


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    found = _tune(jump_scope="per-channel", trials=2)
    memory = Ledger()
    with closing(StoredLedger(tmp_path, {})) as stored:
        for point in found.points:
            memory.add(point)
            stored.add(point)
    with closing(StoredLedger(tmp_path, {})) as again:
        assert again.worker == 0
    for ledger in (stored, again):
        assert [repr(point) for point in ledger.points] == [repr(p) for p in memory.points]
        for one, two in zip(ledger.points, memory.points, strict=True):
            assert one.score.tobytes() == two.score.tobytes()
            assert one.correct.tobytes() == two.correct.tobytes()
