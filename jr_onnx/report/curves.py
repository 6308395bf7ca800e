"""The curve over epsilon, for the terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from jr_onnx.curves import RobustnessCurve
from jr_onnx.report.terminal import doubt, with_interval


def curve_table(curve: RobustnessCurve) -> Table:
    """Returns one row an epsilon: the worst case of each model, 95% intervals in brackets."""
    table = Table(box=box.SIMPLE_HEAD)
    titles = [f"epsilon, {curve.evaluations[0].threat.norm}"]
    titles += [model.first.role for model in curve.models]
    naive, worst = curve.gains("naive"), curve.gains("robust")
    if worst:
        titles.append("change")
    if worst and curve.adaptive:
        titles.append("naive change")
    for title in titles:
        table.add_column(title, justify="right")
    for at, epsilon in enumerate(curve.epsilons):
        cells = [f"{epsilon:g}", *(with_interval(model.robust[at]) for model in curve.models)]
        if worst:
            low, high = (100 * end for end in worst[at].interval)
            cells.append(f"{100 * worst[at].change:+.1f} [{low:+.1f}..{high:+.1f}]")
        if worst and curve.adaptive:
            cells.append(f"{100 * naive[at].change:+.1f}")
        # Text: rich must not read the brackets as markup.
        table.add_row(*map(Text, cells))
    return table


def curve_verdict(curve: RobustnessCurve) -> str:
    """Returns what the curve says and what it does not."""
    if not curve.complete:
        return "Interrupted: the epsilons that are missing were not finished."
    return doubt(curve.findings) + _said(curve)


def _said(curve: RobustnessCurve) -> str:
    gains = curve.gains("robust")
    if not gains or not curve.adaptive:
        suite = curve.evaluations[0].suite.name
        return (
            f"Each figure is an upper bound: what no attack of the suite {suite} broke, a better "
            "one may."
        )
    better = [
        f"{epsilon:g}"
        for epsilon, gain in zip(curve.epsilons, gains, strict=True)
        if gain.interval[0] > 0
    ]
    if not better:
        return "No gain shown at any epsilon, once attacks know of the jump."
    return f"A gain in the worst case is shown at epsilon {', '.join(better)}."
