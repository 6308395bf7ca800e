"""The main job: original + jump -> hardened model, tried out, written, and compared on data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import typer

from jr_onnx import report, rewrite
from jr_onnx import session as sessions
from jr_onnx.activations import quantile_jumps
from jr_onnx.attacks import ThreatModel, parse_epsilon
from jr_onnx.cli.console import bars, require_distinct, require_json, say, warn, write_json
from jr_onnx.cli.edited import told, undone
from jr_onnx.cli.exits import Exit
from jr_onnx.cli.options import (
    AcceptEdits,
    BatchSize,
    Device,
    Epsilon,
    Exclude,
    First,
    Force,
    Form,
    Include,
    Json,
    Jump,
    Jumps,
    Last,
    ModelPath,
    Output,
    OutputName,
    Partial,
    Quantile,
    Quiet,
    Runtime,
    Seed,
    SkipLoad,
    Steps,
)
from jr_onnx.cli.reading import Data, Examples, Mean, Preprocess, Samples, Std, open_data
from jr_onnx.errors import ParameterError, PostconditionError, SessionError
from jr_onnx.evaluate import Evaluation, check_fit, evaluate
from jr_onnx.model import Model, load, require_writable, save
from jr_onnx.model.external import data_files
from jr_onnx.suites import naive
from jr_onnx.target import DEFAULT_BATCH_SIZE, Target


def retrofit(
    model: ModelPath,
    jump: Jump = None,
    jumps: Jumps = None,
    jump_quantile: Quantile = None,
    output: Output = None,
    form: Form = None,
    runtime: Runtime = None,
    include: Include = None,
    exclude: Exclude = None,
    first: First = None,
    last: Last = None,
    partial: Partial = False,
    accept_edits: AcceptEdits = False,
    skip_load: SkipLoad = False,
    data: Data = None,
    samples: Samples = None,
    preprocess: Preprocess = None,
    mean: Mean = None,
    std: Std = None,
    epsilon: Epsilon = "0.1",
    steps: Steps = 40,
    output_name: OutputName = None,
    device: Device = "auto",
    seed: Seed = 0,
    batch_size: BatchSize = DEFAULT_BATCH_SIZE,
    json: Json = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Replace every ReLU by y = x if x > jump else 0, and validate the result.

    With --data, original and hardened model are compared: clean accuracy, and accuracy under PGD.

    Example: jr-onnx retrofit model.onnx --jump 0.3 --data test.npz --epsilon 8/255
    """
    if jump is None and jumps is None and jump_quantile is None:
        raise ParameterError("no jump is given: pass --jump, --jumps or --jump-quantile")
    if form is not None and runtime is not None:
        raise ParameterError("--target picks the form: give either --form or --target")
    if jump_quantile is not None and data is None:
        raise ParameterError("--jump-quantile needs --data, the examples to take it from")
    if skip_load and data is not None:
        raise ParameterError("--skip-load and --data exclude each other: examples need a session")
    loaded = load(model)
    path = output or _hardened_path(model)
    weights = (*data_files(loaded), *data_files(loaded, path.parent))
    require_distinct(inputs=(data, jumps, *weights), outputs=(path, json))
    require_distinct(inputs=(model,), outputs=(json,))
    require_json(json, force=force)
    require_writable(path, force=True)  # `save` decides on replacing, when it knows the content
    radius, examples = parse_epsilon(epsilon), None
    if data:
        examples = open_data(
            data, loaded, samples=samples, preprocess=preprocess, mean=mean, std=std, seed=seed
        )
    bounds = examples.data.bounds if examples else (0.0, 1.0)
    threat = ThreatModel(epsilon=radius, bounds=bounds)
    selection = rewrite.Selection(
        include=include or (), exclude=exclude or (), first=first, last=last
    )
    by_site = _read_jumps(jumps, selection) if jumps else {}
    original, edits = undone(loaded, rewrite.original_of, accept_edits=accept_edits)
    if examples and jump_quantile is not None:
        seen = examples.normalized(original)
        quantiles = quantile_jumps(seen, examples.x, jump_quantile, device=device)
        by_site = {**quantiles, **by_site}
        if jump is None:
            _tell_unobserved(original, selection, by_site)
    result = rewrite.retrofit(
        original,
        jump=jump,
        jumps=by_site,
        form=form,
        target=runtime or "portable",
        selection=selection,
        partial=partial,
    )
    tried = _try_out(result, examples, device, output_name, skip=skip_load)
    written = save(result.model, path, force=force)
    say(f"{model}: {report.retrofit_summary(result)}")
    say(f"{path}: {'written' if written else 'is up to date'}")
    _tell_losses(loaded, result, edits)
    hint = report.faster_form(result) if form is None and runtime is None and not quiet else None
    if hint:
        say(hint)
    evaluation = None
    if examples:
        with bars(len(examples), quiet=quiet) as progress:
            evaluation = evaluate(
                Model(result.model.content, path),
                examples.x,
                examples.y,
                threat=threat,
                suite=naive(steps=steps),
                baseline=result.original,
                preprocessing=examples.steps,
                device=device,
                seed=seed,
                batch_size=batch_size,
                progress=progress,
                output=output_name,
                keep_examples=False,
            )
        _say_evaluation(evaluation, data)
    if json:
        content = report.to_json(
            "jr-onnx/retrofit/1",
            model={"path": str(model), "sha256": loaded.sha256},
            output={"path": str(path), "sha256": result.model.sha256},
            loaded=tried,
            edits=list(edits),
            **result.to_json(),
            evaluation=evaluation.to_json() if evaluation else None,
        )
        write_json(json, content, force=force)
    if evaluation and evaluation.inconclusive:
        raise typer.Exit(Exit.INCONCLUSIVE)


def _read_jumps(path: Path, selection: rewrite.Selection) -> dict[str, float | list[float]]:
    jumps = rewrite.load_jumps(path)
    for site in jumps:
        pattern = selection.excluding(site)
        if pattern is not None:
            raise ParameterError(
                f"{path} has a jump for {site!r}, and --exclude {pattern!r} leaves it out: drop "
                "one of the two"
            )
    return jumps


def _tell_unobserved(
    original: Model, selection: rewrite.Selection, jumps: Mapping[str, object]
) -> None:
    """Says which sites have no quantile, and why."""
    chosen, _ = selection.split(rewrite.find_sites(original)[0])
    left = [site.path for site in chosen if site.path not in jumps]
    if not left:
        return
    message = (
        f"--jump-quantile finds no jump for {_listed(left)}: values in branches and functions "
        "cannot be observed, and a site that is never above 0 has no quantile. Give them one with "
        "--jump or --jumps"
    )
    if len(left) == len(chosen):
        raise ParameterError(message)
    warn(f"{message}; they are left alone now")


def _tell_losses(before: Model, result: rewrite.Retrofit, edits: Sequence[str]) -> None:
    """Says what a second retrofit did not keep: jumps, and the way back to the original."""
    if edits:
        warn(
            f"{told(before.path, edits)}. The edits are kept, so `jr-onnx restore` of the "
            "result will NOT give the original"
        )
    kept = {done.site.path for done in result.sites}
    lost = [path for path in rewrite.jumps_of(before) if path not in kept]
    if lost:
        warn(
            f"{_listed(lost)} had a jump in {before.path}, and no longer: a retrofit starts from "
            "the original. Name all jumps, with --jumps, to keep them"
        )


def _listed(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
    return ", ".join(paths[:5]) + more


def _try_out(
    result: rewrite.Retrofit,
    examples: Examples | None,
    device: str,
    output: str | None,
    *,
    skip: bool,
) -> bool:
    """Loads the hardened model, and runs one example, before anything is written.

    Returns:
        Whether onnxruntime has loaded it.
    """
    if examples:
        for model in (result.original, result.model):
            target = Target(examples.normalized(model), device=device, output=output)
            check_fit(target, examples.x, examples.y)
            target.differentiate(examples.x[:1], examples.y[:1])
        return True
    if skip:
        say("--skip-load: the model is checked by onnx.checker only, onnxruntime has not loaded it")
        return False
    if device == "auto" and not sessions.installed():
        say("onnxruntime is not installed: the model is checked by onnx.checker only")
        return False
    try:
        sessions.Session(result.model, device=device)
    except SessionError as error:
        _load_original(result.original, device)  # if it does not load, its own error is the news
        raise PostconditionError(f"the hardened model does not load: {error}") from error
    return True


def _load_original(model: Model, device: str) -> None:
    try:
        sessions.Session(model, device=device)
    except SessionError as error:
        raise SessionError(
            f"{error}. If another runtime is to run it, --skip-load hardens it unloaded"
        ) from error


def _say_evaluation(evaluation: Evaluation, data: Path | None) -> None:
    providers = ", ".join(dict.fromkeys(model.provider for model in evaluation.models))
    say(f"validated on {len(evaluation.x):,} examples of {data} by {providers}")
    say(report.evaluation_table(evaluation))
    for finding in evaluation.findings:
        say(f"{finding.rule} {finding.level}: {finding.message}")
    say(report.verdict(evaluation))


def _hardened_path(model: Path) -> Path:
    if model.name.endswith(".jr.onnx"):  # a new jump in place of the old one
        return model
    return model.with_suffix(".jr.onnx")
