"""The command that looks for jumps: model, data, budget -> a jumps file, and what it is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jr_onnx import report
from jr_onnx.attacks import ThreatModel, parse_epsilon
from jr_onnx.cli.attacking import Norm
from jr_onnx.cli.console import require_distinct, require_json, say, stages, warn, write_json
from jr_onnx.cli.exits import Exit
from jr_onnx.cli.options import (
    BatchSize,
    Device,
    Epsilon,
    Force,
    Json,
    ModelPath,
    Output,
    Partial,
    Quiet,
    Seed,
    Steps,
)
from jr_onnx.cli.reading import Data, Mean, Preprocess, Samples, Std, open_data
from jr_onnx.errors import DataError, ParameterError
from jr_onnx.model import load, require_writable, write_atomically
from jr_onnx.model.external import data_files
from jr_onnx.report.plots import require_plots, save_plots
from jr_onnx.report.tuning import tuning_chart, tuning_verdict
from jr_onnx.suites import SUITES, find_suite
from jr_onnx.target import DEFAULT_BATCH_SIZE
from jr_onnx.tune import OBJECTIVES, SCOPES, Tuning
from jr_onnx.tune import tune as search


def tune(
    model: ModelPath,
    data: Data = None,
    report_data: Annotated[
        Path | None,
        typer.Option(
            help="Examples to report on, in a file of their own; else a share of --data.",
            show_default=False,
        ),
    ] = None,
    report_share: Annotated[
        float, typer.Option(help="Share of --data to report on, which the search never sees.")
    ] = 0.5,
    samples: Samples = None,
    preprocess: Preprocess = None,
    mean: Mean = None,
    std: Std = None,
    max_accuracy_drop: Annotated[
        float, typer.Option(help="The budget: clean accuracy that may be lost, 0.01 is one point.")
    ] = 0.01,
    objective: Annotated[
        str, typer.Option(help=f"What to make large: {', '.join(OBJECTIVES)}.")
    ] = "adaptive",
    jump_scope: Annotated[
        str, typer.Option(help=f"What has a jump of its own: {', '.join(SCOPES)}.")
    ] = "global",
    trials: Annotated[
        int | None,
        typer.Option(
            min=1, help="Candidates to attack.", show_default="12 on a line, 48 proposals"
        ),
    ] = None,
    steps: Steps = 20,
    norm: Norm = "linf",
    epsilon: Epsilon = "0.1",
    suite: Annotated[
        str, typer.Option(help=f"Attacks of the report: {', '.join(SUITES)}.")
    ] = "adaptive",
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps what is finished, and gives it back after an interruption.",
            show_default=False,
        ),
    ] = None,
    output: Output = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Folder for plots, as PNG and SVG.", show_default=False),
    ] = None,
    partial: Partial = False,
    device: Device = "auto",
    seed: Seed = 0,
    batch_size: BatchSize = DEFAULT_BATCH_SIZE,
    json: Json = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Find the jumps that buy most robustness at a bounded loss of clean accuracy.

    With -o, writes them for `retrofit --jumps`. That no jump helps is a result, too.

    Example: jr-onnx tune model.onnx --data test.npz --max-accuracy-drop 0.01 -o jumps.toml
    """
    if data is None:
        raise ParameterError("give the examples to tune on with --data")
    loaded = load(model)
    inputs = (model, *data_files(loaded), data, report_data)
    require_distinct(inputs=inputs, outputs=(output, json))
    require_writable(output, force=force)
    require_json(json, force=force)
    find_suite(suite, norm)
    if plot:
        require_plots(plot, force=force)
    first, *more = [
        open_data(
            path, loaded, samples=samples, preprocess=preprocess, mean=mean, std=std, seed=seed
        )
        for path in filter(None, (data, report_data))
    ]
    bounds = first.data.bounds
    if any(each.data.bounds != bounds for each in more):
        raise DataError(f"{report_data}: has other bounds than {data}. Scale both alike")
    try:
        with stages(quiet=quiet) as progress:
            found = search(
                loaded,
                first.x,
                first.y,
                threat=ThreatModel(norm=norm, epsilon=parse_epsilon(epsilon), bounds=bounds),
                max_accuracy_drop=max_accuracy_drop,
                objective=objective,
                jump_scope=jump_scope,
                trials=trials,
                steps=steps,
                held_out=(more[0].x, more[0].y) if more else None,
                report_share=report_share,
                suite=suite,
                resume=resume,
                preprocessing=first.steps,
                partial=partial,
                device=device,
                seed=seed,
                batch_size=batch_size,
                progress=progress,
            )
    except KeyboardInterrupt:
        if resume:
            warn(f"what was finished is kept in {resume}: the same command goes on from there")
        raise
    _say(found, model)
    write_json(json, report.to_json(**found.to_json()), force=force)
    if output:
        head = f"Made by jr-onnx tune {model} --data {data} (SHA-256 {found.model.sha256})."
        write_atomically(
            output, found.jumps_file(head, found.settings, tuning_verdict(found)), force=force
        )
        say(f"{output}: written, for jr-onnx retrofit {model} --jumps {output}")
    if plot:
        for path in save_plots(found, plot, force=force):
            say(f"{path}: written")
    if found.report.inconclusive:
        raise typer.Exit(Exit.INCONCLUSIVE)


def _say(found: Tuning, model: Path) -> None:
    for entry in found.skipped:
        warn(f"not tuned: {entry.path}: {entry.reason}")
    say(
        f"{model}: {len(found.points) - 1} candidates attacked on "
        f"{len(found.original.correct):,} examples, {found.jump_scope} jumps"
    )
    say(tuning_chart(found))
    say(f"reported on {len(found.report.x):,} other examples")
    say(report.evaluation_table(found.report))
    for finding in found.report.findings:
        say(f"{finding.rule} {finding.level}: {finding.message}")
    say(tuning_verdict(found))
