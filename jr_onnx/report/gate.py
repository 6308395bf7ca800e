"""The gate's verdict, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.table import Table
from rich.text import Text

from jr_onnx.gate import GateResult, ModelResult, Status

_STYLES = {
    Status.PASS: "green",
    Status.WARNING: "yellow",
    Status.FAIL: "bold red",
    Status.INCONCLUSIVE: "bold yellow",
    Status.SKIPPED: "dim",
    Status.ERROR: "bold red",
}


def gate_table(model: ModelResult) -> Table:
    """Returns one row a gate: its rule, what came out, and why."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("rule", no_wrap=True)
    table.add_column("gate", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    for check in model.checks:
        if check.status is Status.SKIPPED and check.message == "not configured":
            continue
        status = Text(str(check.status), style=_STYLES[check.status])
        # Text: rich must not read markup in names and messages.
        table.add_row(Text(check.code), Text(check.rule.name), status, Text(check.message))
    return table


def gate_verdict(result: GateResult) -> str:
    """Returns the whole in a line, and one for each gate that says no or is in doubt."""
    return "\n".join(
        [f"{result.config}: {_HEADS[result.status]}", *(f"  {line}" for line in _lines(result))]
    )


_HEADS = {
    Status.PASS: "green: every gate that applies passed",
    Status.FAIL: "red: a gate says no",
    Status.INCONCLUSIVE: "inconclusive: a gate is in doubt, which is neither pass nor fail",
    Status.ERROR: "not finished",
}


def _lines(result: GateResult) -> Iterator[str]:
    for model in result.models:
        for check in model.checks:
            if check.status in (Status.FAIL, Status.INCONCLUSIVE):
                yield f"{model.name}: {check.code} {check.rule.name}: see {check.rule.page}"
