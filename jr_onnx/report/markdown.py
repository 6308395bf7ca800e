"""The gate's verdict as GitHub-flavoured Markdown: what says no first, all gates folded away."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from jr_onnx.gate import Check, GateResult, ModelResult, Status

_MARKS = {
    Status.PASS: "✅ pass",
    Status.WARNING: "⚠️ warning",
    Status.FAIL: "❌ fail",
    Status.INCONCLUSIVE: "❔ inconclusive",
    Status.SKIPPED: "⚪ skipped",
    Status.ERROR: "💥 error",
}
# What Markdown or HTML take for markup inside a line, and what would end a cell of a table.
_MARKUP = re.compile(r"([\\`*_\[\]<>#|~&@$])")


def markdown(result: GateResult) -> str:
    """Returns the summary: a heading, and for each model its figures and gates."""
    parts = [f"## jr-onnx gate: {_MARKS[result.status]}", ""]
    if result.error is not None:
        parts += [f"> {_plain(result.error)}", ""]
    for model in result.models:
        parts += _model(model)
    return "\n".join(parts) + "\n"


def _model(model: ModelResult) -> Iterator[str]:
    yield f"### {_plain(model.name)}: {_MARKS[model.status]}"
    yield ""
    yield from _figures(model)
    loud = [check for check in model.checks if check.status not in (Status.PASS, Status.SKIPPED)]
    if loud:
        yield from _table(loud)
    yield "<details><summary>All gates</summary>"
    yield ""
    yield from _table(model.checks)
    yield "</details>"
    yield ""


def _figures(model: ModelResult) -> Iterator[str]:
    evaluation = model.evaluation
    if evaluation is None:
        return
    threat = evaluation.threat
    yield (
        f"{len(evaluation.x):,} examples, suite {_plain(evaluation.suite.name)}, {threat.norm} "
        f"{threat.epsilon:g}, seed {evaluation.seed}"
    )
    yield ""
    yield "| model | clean accuracy | own gradient | worst case |"
    yield "| --- | --: | --: | --: |"
    for judged in evaluation.models:
        shares = (judged.clean_accuracy, judged.naive_accuracy, judged.robust_accuracy)
        yield f"| {judged.role} | {' | '.join(f'{share:.1%}' for share in shares)} |"
    yield ""


def _table(checks: Iterable[Check]) -> Iterator[str]:
    yield "| rule | | |"
    yield "| --- | --- | --- |"
    for check in checks:
        rule, mark = f"{check.code} {check.rule.name}", _MARKS[check.status]
        yield f"| {rule} | {mark} | {_plain(check.message)} |"
    yield ""


def _plain(text: str) -> str:
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))
