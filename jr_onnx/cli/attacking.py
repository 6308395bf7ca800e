"""The commands that attack: one attack, or a suite on a model and its original."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from jr_onnx import report, rewrite
from jr_onnx.attacks import (
    ATTACKS,
    NORMS,
    Corruptions,
    ThreatModel,
    parse_attack,
    parse_epsilon,
)
from jr_onnx.checkpoint import Checkpoint
from jr_onnx.cli.console import (
    bars,
    require_distinct,
    require_folder,
    require_json,
    say,
    warn,
    write_json,
)
from jr_onnx.cli.exits import Exit
from jr_onnx.cli.options import (
    BatchSize,
    Device,
    Epsilon,
    Force,
    Json,
    ModelPath,
    Output,
    OutputName,
    Quiet,
    Resume,
    Seed,
    given,
)
from jr_onnx.cli.reading import Data, Mean, Preprocess, Samples, Std, open_data, steps_for
from jr_onnx.curves import CurveInterrupted, RobustnessCurve, robustness_curve
from jr_onnx.errors import NotRetrofittedError, ParameterError
from jr_onnx.evaluate import Evaluation, EvaluationInterrupted, check_fit
from jr_onnx.evaluate import evaluate as run_suite
from jr_onnx.examples import AdversarialExamples, check_images
from jr_onnx.findings import Finding
from jr_onnx.model import Model, load, require_writable
from jr_onnx.model.external import data_files
from jr_onnx.preprocess import Preprocessing, normalized
from jr_onnx.report.curves import curve_table, curve_verdict
from jr_onnx.suites import SUITES, Suite, Trial, find_suite
from jr_onnx.target import DEFAULT_BATCH_SIZE, Target

Norm = Annotated[str, typer.Option("--norm", help=f"Of the ball: {', '.join(NORMS)}.")]


# What makes an attack; a replay makes none.
_OF_THE_ATTACK = (
    "samples",
    "name",
    "settings",
    "norm",
    "epsilon",
    "surrogate",
    "output",
    "images",
    "resume",
    "seed",
)


def attack(
    context: typer.Context,
    model: ModelPath,
    data: Data = None,
    samples: Samples = None,
    preprocess: Preprocess = None,
    mean: Mean = None,
    std: Std = None,
    name: Annotated[str, typer.Option("--attack", help=f"One of {', '.join(ATTACKS)}.")] = "pgd",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="An option of the attack: --set steps=100.", show_default=False),
    ] = None,
    norm: Norm = "linf",
    epsilon: Epsilon = "0.1",
    surrogate: Annotated[
        str,
        typer.Option(help="Slope of the jumps on the way back: exact, relu, identity, soft:30%."),
    ] = "exact",
    replay: Annotated[
        Path | None,
        typer.Option(
            help="Try the adversarial examples of this file instead (-o wrote it).",
            show_default=False,
        ),
    ] = None,
    output: Output = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder for the broken examples as PNG.", show_default=False),
    ] = None,
    resume: Resume = None,
    output_name: OutputName = None,
    device: Device = "auto",
    seed: Seed = 0,
    batch_size: BatchSize = DEFAULT_BATCH_SIZE,
    json: Json = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Attack a model; with -o, keep the adversarial examples.

    Example: jr-onnx attack model.onnx --data test.npz --attack pgd --epsilon 8/255 -o adv.npz
    """
    if (data is None) == (replay is None):
        raise ParameterError("give either --data (what to attack) or --replay (what to try again)")
    ignored = given(context, *_OF_THE_ATTACK) if replay else []
    if ignored:
        raise ParameterError(
            "--replay tries finished examples again, and attacks nothing: leave out "
            f"{', '.join(ignored)}"
        )
    loaded = load(model)
    files = (model, *data_files(loaded))
    require_distinct(inputs=(*files, data, replay), outputs=(output, json))
    require_writable(output, force=force)
    require_json(json, force=force)
    if data is None:
        assert replay is not None
        steps = steps_for(loaded, preprocess, mean, std)
        seen = normalized(loaded, steps.mean, steps.std, layout=steps.layout)
        target = Target(seen, device=device, batch_size=batch_size, output=output_name)
        _replay(loaded, target, steps, replay, json, force)
        return
    examples = open_data(
        data, loaded, samples=samples, preprocess=preprocess, mean=mean, std=std, seed=seed
    )
    if images is not None:
        check_images(examples.data.shape, layout=examples.steps.layout)
        require_folder(images, force=force)
    trial = Trial(name=name, attack=parse_attack(name, settings or ()), surrogate=surrogate)
    if isinstance(trial.attack, Corruptions) and not given(context, "epsilon"):
        epsilon = "inf"  # no ball bounds them
    threat = ThreatModel(norm=norm, epsilon=parse_epsilon(epsilon), bounds=examples.data.bounds)
    interrupted: KeyboardInterrupt | None = None
    with bars(len(examples), quiet=quiet) as progress:
        try:
            evaluation = run_suite(
                loaded,
                examples.x,
                examples.y,
                threat=threat,
                suite=Suite(name, (trial,)),
                preprocessing=examples.steps,
                device=device,
                seed=seed,
                batch_size=batch_size,
                checkpoint=Checkpoint(resume) if resume else None,
                progress=progress,
                output=output_name,
                keep_examples=output is not None or images is not None,
                on_finding=_warn,
            )
        except EvaluationInterrupted as stop:
            evaluation, interrupted = stop.partial, stop
    _say(evaluation, data)
    # What --resume keeps need not be written; the same command is to go on, and to write it all.
    kept = interrupted is not None and resume is not None
    if (output or images) and evaluation.models[-1].outcomes and not kept:
        found = AdversarialExamples.of(evaluation, examples.y)
        if output:
            found.save(output, force=force)
            say(f"{output}: {int(found.broken.sum())} adversarial examples written")
        if images:
            written = found.save_images(
                images,
                threat.bounds,
                channels=examples.steps.channels,
                layout=examples.steps.layout,
                force=force,
            )
            say(f"{images}: {written} images written")
    write_json(json, report.to_json(**evaluation.to_json()), force=force)
    if interrupted is not None:
        raise interrupted
    if evaluation.inconclusive:
        raise typer.Exit(Exit.INCONCLUSIVE)


def evaluate(
    model: ModelPath,
    data: Data = None,
    samples: Samples = None,
    preprocess: Preprocess = None,
    mean: Mean = None,
    std: Std = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            help="The model before; of a hardened model, its own original.", show_default=False
        ),
    ] = None,
    suite: Annotated[str, typer.Option(help=f"One of {', '.join(SUITES)}.")] = "adaptive",
    norm: Norm = "linf",
    epsilon: Epsilon = "0.1",
    curve: Annotated[
        str | None,
        typer.Option(
            help="Accuracy over these epsilons, 0.02,0.05,8/255, instead of at --epsilon.",
            show_default=False,
        ),
    ] = None,
    resume: Resume = None,
    output_name: OutputName = None,
    device: Device = "auto",
    seed: Seed = 0,
    batch_size: BatchSize = DEFAULT_BATCH_SIZE,
    json: Json = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Measure robust accuracy under a suite of attacks, next to the original's.

    Example: jr-onnx evaluate model.jr.onnx --data test.npz --suite adaptive --epsilon 8/255
    """
    if data is None:
        raise ParameterError("give the examples to attack with --data")
    loaded, before = load(model), load(baseline) if baseline else None
    files = (model, *data_files(loaded), baseline, *(data_files(before) if before else ()))
    require_distinct(inputs=(*files, data), outputs=(json,))
    require_json(json, force=force)
    find_suite(suite, norm)
    examples = open_data(
        data, loaded, samples=samples, preprocess=preprocess, mean=mean, std=std, seed=seed
    )
    threat = ThreatModel(norm=norm, epsilon=parse_epsilon(epsilon), bounds=examples.data.bounds)
    if before is None and rewrite.jumps_of(loaded):
        try:
            before = rewrite.original_of(loaded)
        except NotRetrofittedError as error:
            raise NotRetrofittedError(f"{error}. Or name the original with --baseline") from error
    shared: Any = {
        "threat": threat,
        "suite": suite,
        "baseline": before,
        "preprocessing": examples.steps,
        "device": device,
        "seed": seed,
        "batch_size": batch_size,
        "checkpoint": Checkpoint(resume) if resume else None,
        "output": output_name,
        "keep_examples": False,
        "on_finding": _warn,
    }
    found: Evaluation | RobustnessCurve | None
    interrupted: KeyboardInterrupt | None = None
    with bars(len(examples), quiet=quiet) as progress:
        try:
            if curve is None:
                found = run_suite(loaded, examples.x, examples.y, progress=progress, **shared)
            else:
                found = robustness_curve(
                    loaded,
                    examples.x,
                    examples.y,
                    epsilons=[parse_epsilon(each) for each in curve.split(",")],
                    progress=progress,
                    **shared,
                )
        except (EvaluationInterrupted, CurveInterrupted) as stop:
            found, interrupted = stop.partial, stop
    if found is not None:
        _say(found, data)
        write_json(json, report.to_json(**found.to_json()), force=force)
    if interrupted is not None:
        raise interrupted
    if found is not None and found.inconclusive:
        raise typer.Exit(Exit.INCONCLUSIVE)


def _warn(finding: Finding) -> None:
    warn(finding.message, kind=f"{finding.rule} {finding.level}")


def _say(found: Evaluation | RobustnessCurve, data: Path | None) -> None:
    if isinstance(found, Evaluation):
        examples, provider = len(found.x), found.models[-1].provider
        tables = [report.evaluation_table(found), report.distances_table(found)]
        verdict = report.verdict(found)
    else:
        examples, provider = len(found.evaluations[0].x), found.models[-1].first.provider
        tables, verdict = [curve_table(found)], curve_verdict(found)
    say(f"attacked on {examples:,} examples of {data} by {provider}")
    for table in filter(None, tables):
        say(table)
    for finding in found.findings:
        say(f"{finding.rule} {finding.level}: {finding.message}")
    say(verdict)


def _replay(
    model: Model, target: Target, steps: Preprocessing, path: Path, json: Path | None, force: bool
) -> None:
    examples = AdversarialExamples.load(path)
    if examples.normalized_otherwise(model, steps):
        mean, std = (_spelled(examples.about.get(name)) for name in ("mean", "std"))
        warn(
            f"{path}: {model.name} was attacked with mean {mean} and std {std}, and now has mean "
            f"{_spelled(steps.mean)} and std {_spelled(steps.std)}: these are figures of another "
            "input. Give --mean and --std as they were"
        )
    check_fit(target, examples.x_adv, examples.y)
    clean = target.logits(examples.x).argmax(axis=1) == examples.y
    attacked = target.logits(examples.x_adv).argmax(axis=1) == examples.y
    figures = {
        "clean_accuracy": float(clean.mean()),
        "accuracy_under_replay": float((clean & attacked).mean()),
        "broken_before": int(examples.broken.sum()),
        "broken": int((clean & ~attacked).sum()),
    }
    say(
        f"{model.name}: {clean.mean():.1%} of {len(clean):,} examples are classified correctly, "
        f"{figures['accuracy_under_replay']:.1%} still are after the attack of {path} "
        f"({figures['broken']:,} broken, {figures['broken_before']:,} on the model it was made on)"
    )
    entries = {"model": {"path": str(model.path), "sha256": model.sha256}, "about": examples.about}
    content = report.to_json("jr-onnx/replay/1", **entries, samples=len(clean), **figures)
    write_json(json, content, force=force)


def _spelled(numbers: Sequence[float] | None) -> str:
    return ",".join(f"{number:g}" for number in numbers) if numbers else "none"
