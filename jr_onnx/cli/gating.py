"""The command for CI: thresholds in a file, a green or red build, reports where they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jr_onnx.cli.console import bars, say
from jr_onnx.cli.exits import Exit
from jr_onnx.cli.gate_outputs import SUMMARY, Outputs
from jr_onnx.cli.options import Force, Json, Quiet
from jr_onnx.gate import TEMPLATE, ModelResult, Status
from jr_onnx.gate import gate as run_gate
from jr_onnx.model import write_atomically
from jr_onnx.report.gate import gate_table, gate_verdict

_CODES = {
    Status.PASS: Exit.OK,
    Status.FAIL: Exit.REFUSED,
    Status.INCONCLUSIVE: Exit.INCONCLUSIVE,
}


def gate(
    config: Annotated[
        Path, typer.Option("--config", "-c", help="The thresholds; paths are relative to it.")
    ] = Path("jr-onnx.toml"),
    init: Annotated[
        bool, typer.Option("--init", help="Write a commented configuration instead.")
    ] = False,
    junit: Annotated[
        Path | None, typer.Option(help="Also write JUnit XML.", show_default=False)
    ] = None,
    sarif: Annotated[
        Path | None, typer.Option(help="Also write SARIF 2.1.0.", show_default=False)
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(
            help=f"Also write Markdown. Where {SUMMARY} is set, it is appended there in any case.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu or cuda, not the file's.", show_default=False)
    ] = None,
    json: Json = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Hold models to thresholds: green is 0, red 1, and 5 is inconclusive, neither of the two.

    Example: jr-onnx gate --init; then edit jr-onnx.toml; then jr-onnx gate --junit gate.xml
    """
    if init:
        write_atomically(config, TEMPLATE.encode(), force=force)
        say(f"{config}: written. Set its paths and thresholds, then run jr-onnx gate")
        return
    outputs = Outputs(json=json, junit=junit, sarif=sarif, markdown=markdown, force=force)
    outputs.require(config)
    finished: list[ModelResult] = []
    with outputs.also_of_errors(config, finished):
        result = run_gate(
            config,
            device=device,
            watch=lambda name, samples: bars(samples, quiet=quiet),
            finished=finished.append,
        )
    code = _CODES[result.status]
    try:
        outputs.write(result, code)  # first: the reader of stdout may have left
    finally:
        for model in result.models:
            say(f"{model.name}: {model.data['samples']:,} examples of {model.data['path']}")
            say(gate_table(model))
        say(gate_verdict(result))
    raise typer.Exit(code)
