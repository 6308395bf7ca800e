"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich import box
from rich.table import Table
from rich.text import Text

from jr_onnx.evaluate import Evaluation, wilson
from jr_onnx.model import dtype_name
from jr_onnx.rewrite import Site, Skipped


def sites_table(
    sites: Iterable[Site], skipped: Iterable[Skipped], jumps: Mapping[str, float]
) -> Table:
    """Returns one row an activation: what it is, and its jump or why it is left alone."""
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("site", "op", "type", "shape", "jump"):
        table.add_column(title, overflow="fold")
    for site in sites:
        shape = "?" if site.tensor.shape is None else ", ".join(map(_size, site.tensor.shape))
        jump = f"{jumps[site.path]:g}" if site.path in jumps else "none yet"
        _add_row(table, site.path, site.op_type, dtype_name(site.tensor.element), shape, jump)
    for entry in skipped:
        _add_row(table, entry.path, entry.op_type, "", "", f"skipped: {entry.reason}")
    return table


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
    sign = "gain" if gain >= 0 else "loss"
    return (
        f"Naive {sign} of {abs(100 * gain):.1f} points (paired p = {p_value:.2g}): this attack "
        "follows the model's own gradient, which a jump can mislead. It is no proof of robustness "
        "against an attacker who knows of the jump."
    )


def _interval(ends: tuple[float, float]) -> str:
    return "..".join(f"{100 * end:.1f}" for end in ends)


def _size(size: int | str | None) -> str:
    return "?" if size is None else str(size)


def _add_row(table: Table, *cells: str) -> None:
    # Names from a model are data: rich must not read markup in them.
    table.add_row(*map(Text, cells))
