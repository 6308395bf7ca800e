"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from jr_onnx.activations import Activations
from jr_onnx.attacks import ThreatModel
from jr_onnx.evaluate import Evaluation, Gain, ModelEvaluation
from jr_onnx.findings import Finding, is_inconclusive
from jr_onnx.model import dtype_name
from jr_onnx.rewrite import TARGETS, EndToEnd, Jump, JumpSite, Retrofit, Site, Skipped, choose
from jr_onnx.statistics import wilson


def sites_table(
    sites: Iterable[Site], skipped: Iterable[Skipped], jumps: Mapping[str, Jump]
) -> Table:
    """Returns one row an activation: what it is, and its jump or why it is left alone."""
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("site", "op", "type", "shape", "jump"):
        table.add_column(title, overflow="fold")
    for site in sites:
        shape = "?" if site.tensor.shape is None else ", ".join(map(_size, site.tensor.shape))
        own = f"{site.jump:g} of its own" if site.jump else "none yet"
        jump = _jump(jumps[site.path]) if site.path in jumps else own
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
    """Returns how many sites, which jumps and forms, the jump as the type holds it; what is left.

    One line, and another one for each of the first reasons to take a form (but the default), or to
    leave an activation as it is.
    """
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
    head = f"{len(result.sites)} of {total} activations replaced, {jumps} ({forms}){notes}"
    return "\n".join([head, *_chosen(result.sites), *_left(result.skipped)])


_MOST_REASONS = 4


def _chosen(sites: Sequence[JumpSite]) -> Iterator[str]:
    """Yields why a form was taken, where it was neither asked for nor the default of all."""
    untold = ("as asked for", TARGETS["portable"][1])
    reasons = dict.fromkeys((done.form, done.reason) for done in sites)
    told = [f"  {form}: {reason}" for form, reason in reasons if reason not in untold]
    yield from told[:_MOST_REASONS]


def _left(skipped: Sequence[Skipped]) -> Iterator[str]:
    by_reason: dict[str, list[str]] = {}
    for entry in skipped:
        by_reason.setdefault(entry.reason, []).append(entry.path)
    for reason, paths in list(by_reason.items())[:_MOST_REASONS]:
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        yield f"  left as it is: {', '.join(paths[:3])}{more}: {reason}"
    if len(by_reason) > _MOST_REASONS:
        yield f"  and {len(by_reason) - _MOST_REASONS} other reasons, see `jr-onnx inspect`"


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
    """Returns accuracies of original and hardened model side by side, 95% intervals in brackets.

    After an interruption it has the trials that were run, and no change.
    """
    models, suite = evaluation.models, evaluation.suite
    compared = len(models) > 1 and evaluation.complete
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for model in models:
        table.add_column(
            f"{model.role}{'' if model.complete else ', interrupted'}", justify="right"
        )
    if compared:
        table.add_column("change", justify="right")
    rows: list[tuple[str, list[Any]]] = [("clean accuracy", [model.correct for model in models])]
    for trial in suite.trials:
        kept = [_kept(model, trial.name) for model in models]
        ball = _ball(trial.threat_model(evaluation.threat))
        if any(each is not None for each in kept):
            rows.append(
                (f"{'and ' if suite.cascade and len(rows) > 1 else ''}{trial.name}{ball}", kept)
            )
    if len(rows) > 2:
        title = "worst case" if evaluation.complete else "worst case so far"
        rows.append((title, [model.robust for model in models]))
    for title, kept in rows:
        cells = ["" if share is None else with_interval(share) for share in kept]
        if compared:
            both = all(share is not None for share in kept)
            cells.append(f"{100 * (kept[-1].mean() - kept[0].mean()):+.1f}" if both else "")
        _add_row(table, title, *cells)
    return table


def distances_table(evaluation: Evaluation) -> Table | None:
    """Returns the perturbations that attacks without a ball needed, None if there are none."""
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("relative perturbation", "model", "broken", "mean", "largest"):
        table.add_column(title, justify="left" if title[0] in "r" else "right")
    for model in evaluation.models:
        for outcome in model.outcomes.values():
            if np.isfinite(outcome.threat.epsilon):
                continue
            found = outcome.to_json()
            sizes = [found["mean_relative_distance"], found["max_relative_distance"]]
            cells = ["" if size is None else f"{size:.2%}" for size in sizes]
            broken = f"{found['broken']} of {found['tried']}"
            _add_row(table, outcome.trial.name, model.role, broken, *cells)
    return table if table.row_count else None


def verdict(evaluation: Evaluation) -> str:
    """Returns what the figures mean and what they do not, in plain words."""
    naive, adaptive = evaluation.naive_gain, evaluation.adaptive_gain
    if not evaluation.complete:
        return "Interrupted: these figures are of the attacks that were finished, and too good."
    return doubt(evaluation.findings) + _said(evaluation, naive, adaptive)


def doubt(findings: Iterable[Finding]) -> str:
    """Returns what goes before a verdict that findings leave nothing of, else nothing."""
    rules = sorted({each.rule for each in findings if is_inconclusive([each])})
    if not rules:
        return ""
    return f"Inconclusive: by {' and '.join(rules)} these figures are neither good nor bad news. "


def _said(evaluation: Evaluation, naive: Gain | None, adaptive: Gain | None) -> str:
    if naive is None:
        return (
            "The worst case over all attacks of the suite: an upper bound of the accuracy under "
            "the best attack."
        )
    if adaptive is not None:
        return _adaptive_verdict(evaluation, naive, adaptive)
    if naive.p_value > 0.05:
        return (
            f"No difference that {len(evaluation.x)} examples could show "
            f"({100 * naive.change:+.1f} points, paired p = {naive.p_value:.2g})."
        )
    return (
        f"Naive {_points(naive)}: attacks of this suite follow the model's own gradient, which a "
        "jump can mislead. It is no proof of robustness against an attacker who knows of the jump: "
        "see --suite adaptive."
    )


def _adaptive_verdict(evaluation: Evaluation, naive: Gain, adaptive: Gain) -> str:
    plain = f"{100 * naive.change:+.1f} points under attacks on the model's own gradient"
    worst = f"{100 * adaptive.change:+.1f} points in the worst case ({_paired(adaptive)})"
    if adaptive.interval[0] > 0:
        masked = " A part of the first is masking." if evaluation.masked else ""
        return f"Gain: {plain}; {worst}, attacks that know of the jump included.{masked}"
    if evaluation.masked:
        return (
            f"Masking: {plain} become {worst} as soon as attacks know of the jump. It hides the "
            "gradient; that it makes the model more robust is not shown."
        )
    return f"No gain shown: {plain}; {worst}."


def _points(gain: Gain) -> str:
    kind = "gain" if gain.change > 0 else "loss"
    return f"{kind} of {abs(100 * gain.change):.1f} points ({_paired(gain)})"


def _paired(gain: Gain) -> str:
    low, high = (100 * end for end in gain.interval)
    return f"95% {low:+.1f} to {high:+.1f}, paired p = {gain.p_value:.2g}"


def _kept(model: ModelEvaluation, trial: str) -> Any:
    """Returns who is left after a trial; None if it was not run although some were left."""
    outcome = model.outcomes.get(trial)
    if outcome is not None:
        return outcome.robust
    return model.robust if model.complete and not model.robust.any() else None


def with_interval(share: Any) -> str:
    """Returns a share of the examples, bool `(samples,)`, with its 95% interval."""
    return f"{share.mean():.1%} [{_interval(wilson(share))}]"


def _ball(threat: ThreatModel) -> str:
    return f", {threat.norm} {threat.epsilon:g}" if np.isfinite(threat.epsilon) else ""


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
