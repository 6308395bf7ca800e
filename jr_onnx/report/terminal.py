"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from jr_onnx.activations import Activations
from jr_onnx.evaluate import Evaluation, wilson
from jr_onnx.model import dtype_name
from jr_onnx.rewrite import EndToEnd, Jump, Retrofit, Site, Skipped, choose


def sites_table(
    sites: Iterable[Site], skipped: Iterable[Skipped], jumps: Mapping[str, Jump]
) -> Table:
    """Returns one row an activation: what it is, and its jump or why it is left alone."""
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("site", "op", "type", "shape", "jump"):
        table.add_column(title, overflow="fold")
    for site in sites:
        shape = "?" if site.tensor.shape is None else ", ".join(map(_size, site.tensor.shape))
        jump = _jump(jumps[site.path]) if site.path in jumps else "none yet"
        _add_row(table, site.path, site.op_type, dtype_name(site.tensor.element), shape, jump)
    for entry in skipped:
        _add_row(table, entry.path, entry.op_type, "", "", f"skipped: {entry.reason}")
    return table


_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


def activations_table(seen: Mapping[str, Activations], jumps: Mapping[str, Jump | None]) -> Table:
    """Returns one row a site: quantiles of the positive pre-activations, and what a jump takes."""
    table = Table(box=box.SIMPLE_HEAD)
    titles = [f"{q:.0%} below" for q in _QUANTILES]
    for title in ("site", "positive", *titles, "jump", "silenced"):
        table.add_column(title, justify="left" if title == "site" else "right")
    for path, found in seen.items():
        cells = [f"{found.quantile(q):.3g}" if found.positive else "" for q in _QUANTILES]
        jump = jumps[path]
        _add_row(
            table,
            path,
            f"{found.positive / found.total:.1%}" if found.total else "",
            *cells,
            "" if jump is None else _jump(jump),
            f"{found.silenced(jump):.1%}" if isinstance(jump, float) else "",
        )
    return table


def activations_json(found: Activations | None) -> dict[str, Any] | None:
    """Returns the entry `pre_activations` of `inspect --json`, None where nothing was observed."""
    if found is None:
        return None
    quantiles = {str(q): found.quantile(q) for q in _QUANTILES} if found.positive else {}
    return {"total": found.total, "positive": found.positive, "positive_quantiles": quantiles}


def retrofit_summary(result: Retrofit) -> str:
    """Returns one line: how many sites, which jumps and forms; the jump as the type holds it."""
    total = len(result.sites) + len(result.skipped)
    asked = dict.fromkeys(_jump(done.jump) for done in result.sites)
    jumps = f"jump {next(iter(asked))}" if len(asked) == 1 else f"{len(asked)} different jumps"
    forms = ", ".join(dict.fromkeys(done.form for done in result.sites))
    rounded = {
        f"{dtype_name(done.site.tensor.element)} holds {_jump(done.jump)} as "
        f"{_exact(done.effective_jump)}"
        for done in result.sites
        if _differ(done.jump, done.effective_jump)
    }
    notes = "".join(f"; {note}" for note in sorted(rounded)[:3])
    return f"{len(result.sites)} of {total} activations replaced, {jumps} ({forms}){notes}"


def end_to_end(found: EndToEnd) -> str:
    """Returns one line: flips and agreement on data."""
    return (
        f"on {found.samples:,} examples, against the form {found.other_form}: {found.flips:,} of "
        f"{found.units:,} units flipped, {found.agreement:.2%} of the predictions agree"
    )


def faster_form(result: Retrofit) -> str | None:
    """Returns one line on the form that onnxruntime runs faster, None where there is none."""
    ir_version = result.original.proto.ir_version
    forms = {
        choose(done.site, done.jump, ir_version, form=None, target="onnxruntime").form
        for done in result.sites
    }
    if forms != {"thresholded-relu"} or {done.form for done in result.sites} == forms:
        return None
    return (
        "For onnxruntime, --target onnxruntime is faster and exact too: one ThresholdedRelu a site "
        "instead of Sub, Greater and Where (a ResNet-18 on the CPU: 6% slower than without a jump "
        "instead of 28%, docs/benchmarks/forms.md)"
    )


def evaluation_table(evaluation: Evaluation) -> Table:
    """Returns accuracies of original and hardened model side by side, 95% intervals in brackets."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for model in evaluation.models:
        table.add_column(model.role, justify="right")
    table.add_column("change", justify="right")
    norm, epsilon = evaluation.threat.norm, evaluation.threat.epsilon
    rows = [("clean accuracy", [(model.correct) for model in evaluation.models])]
    for name in evaluation.models[0].attacks:
        kept = [model.attacks[name].robust for model in evaluation.models]
        rows.append((f"under {name.upper()}, {norm} {epsilon:g}", kept))
    for title, kept in rows:
        cells = [f"{share.mean():.1%} [{_interval(wilson(share))}]" for share in kept]
        change = f"{100 * (kept[-1].mean() - kept[0].mean()):+.1f}"
        _add_row(table, title, *cells, change)
    return table


def verdict(evaluation: Evaluation) -> str:
    """Returns what the figures mean and what they do not, in one sentence."""
    gain, p_value = evaluation.naive_gain, evaluation.p_value
    if gain is None or p_value is None:
        return "measured with plain gradient attacks only"
    if p_value > 0.05:
        samples = len(evaluation.x)
        return (
            f"No difference that {samples} examples could show ({100 * gain:+.1f} points, paired "
            f"p = {p_value:.2g})."
        )
    return (
        f"Naive {'gain' if gain > 0 else 'loss'} of {abs(100 * gain):.1f} points (paired "
        f"p = {p_value:.2g}): this attack "
        "follows the model's own gradient, which a jump can mislead. It is no proof of robustness "
        "against an attacker who knows of the jump."
    )


def _interval(ends: tuple[float, float]) -> str:
    return "..".join(f"{100 * end:.1f}" for end in ends)


def _jump(jump: Jump) -> str:
    if isinstance(jump, tuple):
        return f"{min(jump):g}..{max(jump):g} ({len(jump)} channels)"
    return f"{jump:g}"


def _exact(jump: Jump) -> str:
    return _jump(jump) if isinstance(jump, tuple) else repr(jump)


def _differ(asked: Jump, effective: Jump) -> bool:
    """Whether rounding to the tensor's type moved a jump by more than a float32's rounding."""
    return not np.allclose(asked, effective, rtol=2**-23, atol=0)


def _size(size: int | str | None) -> str:
    return "?" if size is None else str(size)


def _add_row(table: Table, *cells: str) -> None:
    # Names from a model are data: rich must not read markup in them.
    table.add_row(*map(Text, cells))
