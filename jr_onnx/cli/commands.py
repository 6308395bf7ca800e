"""The commands: each reads its inputs, calls the library, and says what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jr_onnx import report, rewrite
from jr_onnx.activations import observe
from jr_onnx.cli.console import require_distinct, require_json, say, warn, write_json
from jr_onnx.cli.edited import told, undone
from jr_onnx.cli.options import (
    AcceptEdits,
    Device,
    Force,
    Json,
    Jump,
    ModelPath,
    Output,
)
from jr_onnx.cli.reading import Data, Mean, Preprocess, Samples, Std, open_data
from jr_onnx.errors import NotRetrofittedError, ParameterError
from jr_onnx.model import Model, load, save
from jr_onnx.model.external import data_files


def inspect(
    model: ModelPath,
    data: Data = None,
    samples: Samples = None,
    preprocess: Preprocess = None,
    mean: Mean = None,
    std: Std = None,
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
    if jump is not None and data is None:
        raise ParameterError("--jump shows what a jump would set to 0 on examples: give --data")
    loaded = load(model)
    require_distinct(inputs=(model, data, *data_files(loaded)), outputs=(json,))
    require_json(json, force=force)
    examples = None
    if data:
        examples = open_data(
            data, loaded, samples=samples, preprocess=preprocess, mean=mean, std=std, seed=0
        )
    plain, edits = _as_before(loaded)
    sites, skipped = rewrite.find_sites(plain)
    jumps = rewrite.jumps_of(loaded)
    if sites or skipped:
        say(report.sites_table(sites, skipped, jumps))
    seen = {}
    if examples:
        seen = observe(examples.normalized(plain), sites, examples.x, device=device)
    if seen:
        asked = {path: jumps.get(path, jump) for path in seen}
        say(report.activations_table(seen, asked))
    state = f"{len(jumps)} of them hardened" if jumps else "not hardened"
    say(f"{model}: {len(sites)} sites ({state}), {len(skipped)} other activations left alone")
    if not json:
        return
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
        edits=list(edits),
        sites=entries,
        skipped=[entry.to_json() for entry in skipped],
    )
    write_json(json, content, force=force)


def restore(
    model: ModelPath,
    output: Output = None,
    accept_edits: AcceptEdits = False,
    json: Json = None,
    force: Force = False,
) -> None:
    """Give back the original of a hardened model, byte for byte.

    Example: jr-onnx restore model.jr.onnx -o model.onnx
    """
    hardened = load(model)
    original, edits = undone(hardened, rewrite.restore, accept_edits=accept_edits)
    path = output or _restored_path(model, edited=bool(edits))
    require_distinct(inputs=data_files(hardened), outputs=(path, json))
    require_distinct(inputs=(model,), outputs=(json,))
    require_json(json, force=force)
    written = save(original, path, force=force)
    outcome = "written" if written else "is up to date"
    weights = " (of the .onnx file, not of its weights)" if data_files(original) else ""
    what = "NOT the original" if edits else "the original"
    say(f"{path}: {outcome}, {what}, SHA-256 {original.sha256}{weights}")
    if edits:
        warn(f"{path} is NOT the original: {told(model, edits)}, and these edits are in it")
    if json:
        content = report.to_json(
            "jr-onnx/restoration/1",
            model={"path": str(model), "sha256": hardened.sha256},
            output={"path": str(path), "sha256": original.sha256},
            exact=not edits,
            edits=list(edits),
        )
        write_json(json, content, force=force)


def verify(
    original: Annotated[Path, typer.Argument(metavar="ORIGINAL", help="The model before.")],
    hardened: Annotated[Path, typer.Argument(metavar="HARDENED", help="The model after.")],
    data: Data = None,
    samples: Samples = None,
    preprocess: Preprocess = None,
    mean: Mean = None,
    std: Std = None,
    device: Device = "auto",
    json: Json = None,
    force: Force = False,
) -> None:
    """Prove that HARDENED is ORIGINAL with the jump, and nothing else changed.

    Exits with 1 and lists the differences if it is not. With --data, the model as a whole is also
    compared with the same jumps in another form: units that flipped, and predictions that agree.

    Example: jr-onnx verify model.onnx model.jr.onnx
    """
    before, after = load(original), load(hardened)
    weights = (*data_files(before), *data_files(after))
    require_distinct(inputs=(original, hardened, data, *weights), outputs=(json,))
    require_json(json, force=force)
    examples = None
    if data:
        examples = open_data(
            data, before, samples=samples, preprocess=preprocess, mean=mean, std=std, seed=0
        )
    found = rewrite.verify(before, after)
    whole = None
    if examples and found.equivalent:
        seen = (examples.normalized(before), examples.normalized(after))
        whole = rewrite.compare_on_data(*seen, examples.x, device=device)
        say(report.end_to_end(whole))
    for path, jump in found.jumps.items():
        say(f"{path}: jump {jump!r}")
    for path in found.without_jump:
        say(f"{path}: left without a jump")
    for entry in found.not_compared:
        warn(f"weights not compared: {entry}")
    for difference in found.differences:
        say(f"DIFFERENT {difference.where}: {difference.what}")
    outcome = "equivalent" if found.equivalent else "NOT equivalent"
    say(f"{hardened}: {outcome} to {original} with the jump ({found.values_compared:,} values)")
    if json:
        content = report.to_json(
            "jr-onnx/verification/1",
            **found.to_json(),
            end_to_end=whole.to_json() if whole else None,
        )
        write_json(json, content, force=force)
    raise typer.Exit(int(not found.equivalent))


def _as_before(model: Model) -> tuple[Model, tuple[str, ...]]:
    """Returns the model before it was hardened, as far as later edits allow; and these edits."""
    try:
        plain, edits = undone(model, rewrite.original_of, accept_edits=True)
    except NotRetrofittedError as error:
        edits = rewrite.edits_of(model)
        if not edits:
            raise
        jumps = "; ".join(
            f"{path}: jump {jump!r}" for path, jump in rewrite.jumps_of(model).items()
        )
        warn(f"{error}. Here it is listed as it stands")
        say(f"Its manifest has {jumps}")
        return model, edits
    if edits:
        warn(f"{told(model.path, edits)}. Listed is its original with these edits")
    return plain, edits


def _restored_path(model: Path, *, edited: bool) -> Path:
    if model.name.endswith(".jr.onnx") and not edited:
        return model.with_name(model.name.removesuffix(".jr.onnx") + ".onnx")
    return model.with_suffix(".restored.onnx")
