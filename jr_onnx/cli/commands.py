"""The commands: each reads its inputs, calls the library, and says what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jr_onnx import report, rewrite
from jr_onnx import session as sessions
from jr_onnx.activations import observe
from jr_onnx.attacks import PGD, ThreatModel, parse_epsilon
from jr_onnx.cli.console import bars, require_distinct, say, write_json
from jr_onnx.cli.options import (
    BatchSize,
    Data,
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
    Partial,
    Quantile,
    Quiet,
    Runtime,
    Seed,
    Steps,
)
from jr_onnx.data import Dataset, load_npz
from jr_onnx.errors import ParameterError, PostconditionError, SessionError
from jr_onnx.evaluate import Evaluation, check_fit, evaluate
from jr_onnx.model import Model, load, require_writable, save
from jr_onnx.target import DEFAULT_BATCH_SIZE, Target


def inspect(
    model: ModelPath,
    data: Data = None,
    jump: Jump = None,
    device: Device = "auto",
    json: Json = None,
    force: Force = False,
) -> None:
    """List every activation: what would be replaced, what not and why.

    With --data, also quantiles of the positive pre-activations of each site, and with --jump (or
    in a hardened model) the share of them that the jump sets to 0.

    Example: jr-onnx inspect model.onnx --data test.npz --jump 0.3
    """
    require_distinct(inputs=(model, data), outputs=(json,))
    require_writable(json, force=force)
    loaded = load(model)
    plain = rewrite.original_of(loaded)
    samples = load_npz(data) if data else None
    sites, skipped = rewrite.find_sites(plain)
    jumps = rewrite.jumps_of(loaded)
    if sites or skipped:
        say(report.sites_table(sites, skipped, jumps))
    seen = observe(plain, sites, samples.x, device=device) if samples else {}
    if seen:
        asked = {path: jumps.get(path, jump) for path in seen}
        say(report.activations_table(seen, asked))
    state = f"{len(jumps)} of them hardened" if jumps else "not hardened"
    say(f"{model}: {len(sites)} sites ({state}), {len(skipped)} other activations left alone")
    entries = [
        {
            **site.to_json(),
            "effective_jump": jumps.get(site.path),
            "pre_activations": report.activations_json(seen.get(site.path)),
        }
        for site in sites
    ]
    content = report.to_json(
        "jr-onnx/inspection/1",
        model={"path": str(model), "sha256": loaded.sha256},
        sites=entries,
        skipped=[entry.to_json() for entry in skipped],
    )
    write_json(json, content, force=force)


def retrofit(
    model: ModelPath,
    jump: Jump = None,
    jumps: Jumps = None,
    jump_quantile: Quantile = None,
    output: Output = None,
    form: Form = None,
    runtime: Runtime = "portable",
    include: Include = None,
    exclude: Exclude = None,
    first: First = None,
    last: Last = None,
    partial: Partial = False,
    data: Data = None,
    epsilon: Epsilon = "0.1",
    steps: Steps = 40,
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
    threat = ThreatModel(epsilon=parse_epsilon(epsilon))
    original = load(model)
    path = output or _hardened_path(model)
    require_distinct(inputs=(data, jumps), outputs=(path, json))
    require_distinct(inputs=(model,), outputs=(json,))
    require_writable(json, force=force)
    require_writable(path, force=True)  # `save` decides on replacing, when it knows the content
    samples = load_npz(data, bounds=threat.bounds) if data else None
    by_site = rewrite.load_jumps(jumps) if jumps else {}
    if jump_quantile is not None:
        by_site = {**_quantiles(original, samples, jump_quantile, device, force), **by_site}
    result = rewrite.retrofit(
        original,
        jump=jump,
        jumps=by_site,
        form=form,
        target=runtime,
        selection=rewrite.Selection(
            include=include or (), exclude=exclude or (), first=first, last=last
        ),
        partial=partial,
        force=force,
    )
    _try_out(result, samples, device)
    written = save(result.model, path, force=force)
    say(f"{model}: {report.retrofit_summary(result)}")
    say(f"{path}: {'written' if written else 'is up to date'}")
    if form is None and runtime == "portable":
        hint = report.faster_form(result)
        if hint:
            say(hint)
    evaluation = None
    if samples:
        with bars(len(samples), quiet=quiet) as progress:
            evaluation = evaluate(
                Model(result.model.content, path),
                samples.x,
                samples.y,
                threat=threat,
                attacks=[PGD(steps=steps)],
                baseline=result.original,
                device=device,
                seed=seed,
                batch_size=batch_size,
                progress=progress,
            )
        _say_evaluation(evaluation, data)
    content = report.to_json(
        "jr-onnx/retrofit/1",
        model={"path": str(model), "sha256": original.sha256},
        output={"path": str(path), "sha256": result.model.sha256},
        **result.to_json(),
        evaluation=evaluation.to_json() if evaluation else None,
    )
    write_json(json, content, force=force)


def restore(model: ModelPath, output: Output = None, force: Force = False) -> None:
    """Give back the original of a hardened model, byte for byte.

    Example: jr-onnx restore model.jr.onnx -o model.onnx
    """
    original = rewrite.restore(load(model), force=force)
    path = output or _restored_path(model)
    written = save(original, path, force=force)
    say(f"{path}: {'written' if written else 'is up to date'}, SHA-256 {original.sha256}")


def verify(
    original: Annotated[Path, typer.Argument(metavar="ORIGINAL", help="The model before.")],
    hardened: Annotated[Path, typer.Argument(metavar="HARDENED", help="The model after.")],
    data: Data = None,
    device: Device = "auto",
    json: Json = None,
    force: Force = False,
) -> None:
    """Prove that HARDENED is ORIGINAL with the jump, and nothing else changed.

    Exits with 1 and lists the differences if it is not. With --data, the model as a whole is also
    compared with the same jumps in another form: units that flipped, and predictions that agree.

    Example: jr-onnx verify model.onnx model.jr.onnx
    """
    require_distinct(inputs=(original, hardened, data), outputs=(json,))
    require_writable(json, force=force)
    samples = load_npz(data) if data else None
    before, after = load(original), load(hardened)
    found = rewrite.verify(before, after)
    whole = None
    if samples and found.equivalent:
        whole = rewrite.compare_on_data(before, after, samples.x, device=device)
        say(report.end_to_end(whole))
    for path, jump in found.jumps.items():
        say(f"{path}: jump {jump!r}")
    for difference in found.differences:
        say(f"DIFFERENT {difference.where}: {difference.what}")
    outcome = "equivalent" if found.equivalent else "NOT equivalent"
    say(f"{hardened}: {outcome} to {original} with the jump ({found.values_compared:,} values)")
    content = report.to_json(
        "jr-onnx/verification/1",
        **found.to_json(),
        end_to_end=whole.to_json() if whole else None,
    )
    write_json(json, content, force=force)
    raise typer.Exit(int(not found.equivalent))


def _quantiles(
    model: Model, samples: Dataset | None, quantile: float, device: str, force: bool
) -> dict[str, float]:
    """Returns each site's quantile of its positive pre-activations."""
    if samples is None or not 0 <= quantile <= 1:
        raise ParameterError("--jump-quantile takes a number from 0 to 1, and needs --data")
    plain = rewrite.original_of(model, force=force)
    sites, _ = rewrite.find_sites(plain)
    seen = observe(plain, sites, samples.x, device=device)
    return {path: found.quantile(quantile) for path, found in seen.items() if found.positive}


def _try_out(result: rewrite.Retrofit, samples: Dataset | None, device: str) -> None:
    """Loads the hardened model, and runs one example, before anything is written."""
    if samples:
        for model in (result.original, result.model):
            target = Target(model, device=device)
            check_fit(target, samples.x, samples.y)
            target.differentiate(samples.x[:1], samples.y[:1])
    elif sessions.installed() or device != "auto":
        try:
            sessions.Session(result.model, device=device)
        except SessionError as error:
            # Does the original load? If not, its own error is the news.
            sessions.Session(result.original, device=device)
            raise PostconditionError(f"the hardened model does not load: {error}") from error
    else:
        say("onnxruntime is not installed: the model is checked by onnx.checker only")


def _say_evaluation(evaluation: Evaluation, data: Path | None) -> None:
    providers = ", ".join(dict.fromkeys(model.provider for model in evaluation.models))
    say(f"validated on {len(evaluation.x):,} examples of {data} by {providers}")
    say(report.evaluation_table(evaluation))
    say(report.verdict(evaluation))


def _hardened_path(model: Path) -> Path:
    if model.name.endswith(".jr.onnx"):  # a new jump in place of the old one
        return model
    return model.with_suffix(".jr.onnx")


def _restored_path(model: Path) -> Path:
    if model.name.endswith(".jr.onnx"):
        return model.with_name(model.name.removesuffix(".jr.onnx") + ".onnx")
    return model.with_suffix(".restored.onnx")
