"""A tuning for the terminal: the trade-off as a chart, and what it means in plain words."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from jr_onnx.report.terminal import verdict
from jr_onnx.rewrite import Jump
from jr_onnx.tune import Point, Tuning

_WIDTH = 24
_EIGHTHS = " ▏▎▍▌▋▊▉"


def tuning_chart(tuning: Tuning) -> Table:
    """Returns one row a point: its jumps, clean accuracy, robustness, and both as bars.

    Of a line all points, of a search the front and the best points of its lines.
    """
    scale = tuning.objective.most
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("jumps", "clean", "", tuning.objective.measure, "", ""):
        table.add_column(title, justify="right" if title and title != "jumps" else "left")
    for point in _shown(tuning):
        low, high = point.interval
        spelled = f"{_score(point.robustness, tuning)} [{_end(low, tuning)}..{_end(high, tuning)}]"
        table.add_row(
            *map(
                Text,
                (
                    _name(point),
                    f"{point.clean_accuracy:.1%}",
                    _bar(point.clean_accuracy, 8),
                    spelled,
                    _bar(point.robustness / scale, _WIDTH),
                    _note(point, tuning),
                ),
            )
        )
    return table


def tuning_verdict(tuning: Tuning) -> str:
    """Returns what came out, and what it is worth, on data that the search never saw."""
    best, change = tuning.best, tuning.clean_change
    lines = []
    if best is None or change is None:
        lines.append(
            f"No jump keeps clean accuracy within {tuning.max_accuracy_drop:.1%} of the original's."
        )
    elif not tuning.helps:
        lines.append(
            f"No jump helps: none of {_attacked(tuning)} within the budget has a higher "
            f"{tuning.objective.measure} than the model without a jump "
            f"({_score(tuning.original.robustness, tuning)}); the best one has "
            f"{_score(best.robustness, tuning)}. The figures reported are of that one."
        )
    if tuning.objective.name == "naive":
        lines.append(
            "The objective is naive: the jumps were chosen for what they do to PGD on the model's "
            "own gradient, which a jump can mislead. That is no robustness."
        )
    if change is not None:
        low, high = (100 * end for end in change.interval)
        budget = 100 * tuning.max_accuracy_drop
        kept = "within" if tuning.within_budget else "NOT within"
        lines.append(
            f"On {len(tuning.report.x):,} examples that the search never saw, clean accuracy "
            f"changes by {100 * change.change:+.1f} points (95% {low:+.1f} to {high:+.1f}): {kept} "
            f"the budget of {budget:g} point{'' if budget == 1 else 's'}."
        )
        lines.append(verdict(tuning.report))
    return "\n".join(lines)


def _attacked(tuning: Tuning) -> str:
    count = sum(point.clean_accuracy >= tuning.least for point in tuning.points[1:])
    return f"{count} candidates" if count != 1 else "1 candidate"


def _shown(tuning: Tuning) -> list[Point]:
    if len(tuning.curves) == 1:
        return [point for point in tuning.points if not point.pruned]
    lines = [_best_of(tuning, line.name) for line in tuning.curves]
    wanted = [tuning.original, *lines, *tuning.front, tuning.best]
    chosen = {id(point): point for point in wanted if point is not None}
    return list(chosen.values())


def _best_of(tuning: Tuning, origin: str) -> Point | None:
    points = [p for p in tuning.points if p.origin == origin and not p.pruned]
    return max(points, key=lambda point: point.robustness, default=None)


def _name(point: Point) -> str:
    if point.origin in ("global", "quantile"):
        (name, value), *_ = point.parameters.items()
        return f"{name} {value:.3g}"
    if not point.jumps:
        return "no jump"
    listed = ", ".join(_jump(jump) for jump in list(point.jumps.values())[:4])
    return f"{point.origin} {listed}{', ...' if len(point.jumps) > 4 else ''}"


def _jump(jump: Jump) -> str:
    return f"{min(jump):.3g}..{max(jump):.3g}" if isinstance(jump, tuple) else f"{jump:.3g}"


def _note(point: Point, tuning: Tuning) -> str:
    if point is tuning.best:
        return "chosen" if tuning.helps else "best jump"
    return "over budget" if point.clean_accuracy < tuning.least else ""


def _score(value: float, tuning: Tuning) -> str:
    return f"{value:.4g}" if tuning.objective.name == "distance" else f"{value:.1%}"


def _end(value: float, tuning: Tuning) -> str:
    return f"{value:.4g}" if tuning.objective.name == "distance" else f"{100 * value:.1f}"


def _bar(share: float, width: int) -> str:
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
