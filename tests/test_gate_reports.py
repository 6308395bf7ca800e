"""What the reports make of a verdict, and of a run that breaks off; no model is run here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import jsonschema
import pytest
import xmlschema
from gates import CONFIG, HERE, harden, run_gate

from jr_onnx.cli import gating
from jr_onnx.errors import SessionError
from jr_onnx.gate import RULES, Check, GateResult, ModelResult, Status, fingerprint
from jr_onnx.report.junit import junit
from jr_onnx.report.markdown import markdown
from jr_onnx.report.sarif import sarif

HASH = "0" * 64


def _result(*checks: Check, name: str = "digits", path: str = "net.jr.onnx") -> GateResult:
    data: dict[str, Any] = {"path": "test.npz", "sha256": HASH, "samples": 3, "seed": 0}
    model = ModelResult(
        name=name,
        path=Path(path),
        sha256=HASH,
        original_sha256=None,
        data=data,
        checks=checks,
    )
    return GateResult(config=Path("jr-onnx.toml"), config_sha256=HASH, models=(model,))


def _check(status: Status, code: str = "JR002", message: str = "told", **more: Any) -> Check:
    return Check(code=code, gate="gates.some", status=status, message=message, **more)


@pytest.mark.parametrize(
    ("statuses", "verdict"),
    [
        ((), "pass"),
        (("pass", "skipped", "warning"), "pass"),
        (("pass", "inconclusive"), "inconclusive"),
        (("inconclusive", "fail", "pass"), "fail"),
    ],
)
def test_no_beats_doubt_beats_yes(statuses: tuple[str, ...], verdict: str) -> None:
    result = _result(*(_check(Status(each)) for each in statuses))
    assert (result.status, result.passed) == (verdict, verdict == "pass")


def test_names_and_messages_cannot_break_a_report() -> None:
    wild = 'a\x00b\x1b[31m <b>|`*_"&\ud800 ]]> \n#1 @all'
    result = _result(_check(Status.FAIL, message=wild), name=wild, path="a <b>|.onnx")
    case = ET.fromstring(junit(result)).find(".//testcase/failure")
    assert case is not None
    assert "<b>|`*_" in case.get("message", "")
    xml = HERE / "data" / "junit-10.xsd"
    xmlschema.XMLSchema(xml).validate(junit(result).decode())
    document = json.loads(sarif(result, exit_code=1, root=Path("/r")))
    assert "\\x1b" not in json.dumps(document["runs"][0]["results"][0]["locations"])
    rows = [line for line in markdown(result).splitlines() if "JR002" in line]
    assert all(len(row.replace("\\|", "").split("|")) == 5 for row in rows)
    assert "<b>" not in markdown(result).replace("\\<b\\>", "")


def test_a_finding_is_recognised_whatever_its_figures() -> None:
    root = Path.cwd()
    prints = [
        json.loads(sarif(_result(_check(Status.FAIL, message=text)), exit_code=1, root=root))
        for text in ("12.5%", "13.7%")
    ]
    first, second = (
        document["runs"][0]["results"][0]["partialFingerprints"] for document in prints
    )
    assert first == second
    other = fingerprint(_check(Status.FAIL, code="JR003"), "net.jr.onnx")
    assert other not in first.values()


def test_paths_are_relative_to_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / "nets").mkdir()
    monkeypatch.chdir(tmp_path / "nets")
    result = _result(_check(Status.FAIL), path="a b.onnx")
    location = json.loads(sarif(result, exit_code=1))["runs"][0]["results"][0]["locations"][0]
    expected = {"uri": "nets/a%20b.onnx", "uriBaseId": "%SRCROOT%"}
    assert location["physicalLocation"]["artifactLocation"] == expected
    # A name that is no UTF-8, as the system gives it.
    assert b"a%FF.onnx" in sarif(_result(_check(Status.FAIL), path="a\udcff.onnx"), exit_code=1)


def test_each_status_has_its_place_in_every_report() -> None:
    checks = [_check(status, code=code) for code, status in zip(RULES, Status, strict=False)]
    checks = [check for check in checks if check.status is not Status.ERROR]
    result = _result(*checks)
    suite = ET.fromstring(junit(result)).find("testsuite")
    assert suite is not None
    counts = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "5", "failures": "1", "errors": "1", "skipped": "1"}
    document = json.loads(sarif(result, exit_code=1))
    levels = {
        each["properties"]["status"]: each["level"] for each in document["runs"][0]["results"]
    }
    assert levels == {"warning": "warning", "fail": "error", "inconclusive": "error"}


def test_rules_say_what_to_do_and_have_a_page() -> None:
    document = json.loads(sarif(_result(), exit_code=0))
    published = json.loads((HERE / "data" / "sarif-2.1.0-rtm.5.json").read_bytes())
    jsonschema.Draft4Validator(published).validate(document)
    rules = document["runs"][0]["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == list(RULES)
    pages = HERE.parent / "docs" / "rules"
    assert {page.stem for page in pages.glob("JR*.md")} == set(RULES)
    for code, rule in RULES.items():
        page = (pages / f"{code}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {code} {rule.name}\n")
        for title in ("What it means", "How it is measured", "What to do", "The threshold"):
            assert f"\n## {title}\n" in page, (code, title)


@pytest.mark.parametrize(
    ("broken", "code"), [('hardened = "gone.onnx"', 3), ("hardenedd = 1", 2), ("[", 2)]
)
def test_a_run_that_breaks_off_says_so_in_every_report(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
    code: int,
) -> None:
    summary = here / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    (here / "jr-onnx.toml").write_text(CONFIG.replace('hardened = "net.jr.onnx"', broken))
    reports = run_gate(here, lambda: capsys.readouterr().err)
    assert reports.code == code
    assert "jr-onnx: error: jr-onnx.toml:" in reports.text
    assert reports.cases == {"jr-onnx.toml": "error"}
    (invocation,) = reports.sarif["runs"][0]["invocations"]
    assert (invocation["executionSuccessful"], invocation["exitCode"]) == (False, code)
    (notification,) = invocation["toolExecutionNotifications"]
    assert "jr-onnx.toml:" in notification["message"]["text"]
    assert reports.json["error"] == notification["message"]["text"]
    assert summary.read_text() == f"before\n{reports.markdown}"


@pytest.mark.parametrize(
    ("error", "code"), [(RuntimeError("oh"), 4), (OSError(28, "No space left", "x"), 3)]
)
def test_a_bug_of_ours_is_no_verdict(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    code: int,
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    monkeypatch.setattr("jr_onnx.cli.gating.run_gate", broken)
    reports = run_gate(here, lambda: capsys.readouterr().err)
    assert reports.code == code
    assert reports.json["error"] == str(error)
    assert reports.sarif["runs"][0]["invocations"][0]["exitCode"] == code


def test_reports_are_written_although_nobody_reads_the_output(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any) -> None:
        raise BrokenPipeError

    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    monkeypatch.setattr("jr_onnx.cli.gating.run_gate", lambda *_, **__: _result())
    monkeypatch.setattr("jr_onnx.cli.gating.say", gone)
    with pytest.raises(BrokenPipeError):
        gating.gate(Path("jr-onnx.toml"), junit=Path("gate.xml"))
    assert (here / "gate.xml").exists()


def test_what_was_finished_before_an_error_is_kept(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import import_module

    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    judged = iter(_result(_check(Status.FAIL)).models)

    def one(*_: Any) -> ModelResult:
        for model in judged:
            return model
        raise SessionError("no memory left")

    monkeypatch.setattr(import_module("jr_onnx.gate.run"), "_judged", one)
    harden(here, jump=0.05)
    second = '[[models]]\nname = "second"\nmodel = "net.onnx"\n\n[data]'
    (here / "jr-onnx.toml").write_text(CONFIG.replace("[data]", second))
    reports = run_gate(here, lambda: capsys.readouterr().err)
    assert reports.code == 3
    assert [model["name"] for model in reports.json["models"]] == ["digits"]
    assert (reports.json["status"], reports.json["error"]) == ("error", "no memory left")
    assert reports.shown("JR002") == ("failure", True, True)
    assert reports.cases["jr-onnx.toml"] == "error"


def test_nothing_is_overwritten_unasked(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from jr_onnx.cli import run

    harden(here, jump=0.05)
    (here / "jr-onnx.toml").write_text(CONFIG)
    (here / "gate.xml").write_text("mine")
    assert run(["gate", "--junit", "gate.xml"]) == 3
    assert run(["gate", "--junit", "jr-onnx.toml", "--force"]) == 2
    assert run(["gate", "--junit", "x.xml", "--sarif", "x.xml"]) == 2
    before = (here / "net.onnx").read_bytes()
    for name in ("net.onnx", "net.jr.onnx", "test.npz"):
        assert run(["gate", "--json", name, "--force"]) == 2, name
    assert (here / "net.onnx").read_bytes() == before
    assert run(["gate", "--init"]) == 3
    assert (here / "gate.xml").read_text() == "mine"
    assert (here / "jr-onnx.toml").read_text() == CONFIG
    assert "is there already" in capsys.readouterr().err
