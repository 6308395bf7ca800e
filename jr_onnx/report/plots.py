"""A tuning as pictures, by matplotlib (extra `[plot]`), each as PNG and SVG.

trade-off          robustness over clean accuracy, with intervals; or both over the line's value
jumps              the jumps of the best point, site by site
pre-activations    what flows into each site, its jump drawn in
"""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from jr_onnx.activations import Activations
from jr_onnx.errors import OutputError, ParameterError
from jr_onnx.model import require_writable, write_atomically
from jr_onnx.rewrite import Jump
from jr_onnx.tune import Point, Tuning

_FORMATS = ("png", "svg")
_COLUMNS = 3
_BINS = 60


def require_matplotlib() -> Any:
    """Imports matplotlib.

    Raises:
        ParameterError: it is not installed.
    """
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise ParameterError(
            f"plots need matplotlib: pip install 'jr-onnx[plot]' ({error})"
        ) from error
    return matplotlib


def require_plots(folder: Path, *, force: bool = False) -> None:
    """Refuses, before any work, what `save_plots` would refuse after it.

    Raises:
        ParameterError: matplotlib is not installed.
        OutputError: a file is there and `force` is not given, or the folder cannot be.
    """
    require_matplotlib()
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; expected a folder, or none yet")
    if folder.exists():
        for name in _PICTURES:
            for path in _paths(folder, name):
                require_writable(path, force=force)
    else:
        *_, highest = (each for each in (folder, *folder.parents) if not each.exists())
        require_writable(highest)


def _paths(folder: Path, name: str) -> list[Path]:
    return [folder / f"{name}.{kind}" for kind in _FORMATS]


def save_plots(tuning: Tuning, folder: Path, *, force: bool = False) -> list[Path]:
    """Writes the pictures into a folder, which is made if it is not there.

    Returns:
        The files.

    Raises:
        ParameterError: matplotlib is not installed.
        OutputError: a file is there and `force` is not given, or it cannot be written.
    """
    require_plots(folder, force=force)
    matplotlib = require_matplotlib()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made ({error.strerror})") from error
    written = []
    for name, draw in _PICTURES.items():
        paths = _paths(folder, name)
        figure = matplotlib.figure.Figure(layout="constrained")
        draw(figure, tuning)
        for path in paths:
            content = io.BytesIO()
            # The same result makes the same file.
            with matplotlib.rc_context({"svg.hashsalt": "jr-onnx", "svg.fonttype": "none"}):
                about = {"Date": None} if path.suffix == ".svg" else None
                figure.savefig(content, format=path.suffix[1:], dpi=150, metadata=about)
            write_atomically(path, content.getvalue(), force=force)
        written += paths
    return written


def _trade_off(figure: Any, tuning: Tuning) -> None:
    figure.set_size_inches(7, 4.5)
    axes = figure.subplots()
    if len(tuning.curves) == 1:
        _over_value(axes, tuning)
    else:
        _over_clean(axes, tuning)
    axes.set_title(tuning.settings.rstrip("."), fontsize=9)
    drawn = [each.get_legend_handles_labels() for each in figure.axes]
    handles, labels = ([*chain(*each)] for each in zip(*drawn, strict=True))
    # One for both axes, where it hides nothing of either.
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)


def _over_value(axes: Any, tuning: Tuning) -> None:
    curve = tuning.curves[0]
    axes.plot(curve.values, curve.accuracy, color="C0", label="clean accuracy")
    axes.axhline(tuning.least, color="C0", linestyle=":", label="budget")
    points = [point for point in tuning.points if not point.pruned]
    at = [next(iter(point.parameters.values()), 0.0) for point in points]
    order = np.argsort(at)
    where = np.array(at)[order]
    scored = [points[number] for number in order]
    robust = axes if tuning.objective.most == 1 else axes.twinx()
    robust.errorbar(
        where,
        [point.robustness for point in scored],
        yerr=_errors(scored),
        color="C1",
        marker="o",
        capsize=2,
        label=f"{tuning.objective.measure} (95%)",
    )
    _mark(robust, tuning, lambda point: next(iter(point.parameters.values())))
    axes.set_xlabel(
        "jump" if curve.name == "global" else "quantile of the positive pre-activations"
    )
    axes.set_ylabel("accuracy, part to tune on")
    if robust is not axes:
        robust.set_ylabel(tuning.objective.measure)


def _over_clean(axes: Any, tuning: Tuning) -> None:
    origins = dict.fromkeys(point.origin for point in tuning.points)
    for number, origin in enumerate(origins):
        points = [p for p in tuning.points if p.origin == origin and not p.pruned]
        if points:
            axes.errorbar(
                [point.clean_accuracy for point in points],
                [point.robustness for point in points],
                yerr=_errors(points),
                fmt="*" if origin == "original" else "o",
                markersize=12 if origin == "original" else 6,
                zorder=2.5 if origin == "original" else 2,
                color=f"C{number}",
                alpha=0.6,
                label=origin,
            )
    best = tuning.front
    axes.step(
        [point.clean_accuracy for point in best],
        [point.robustness for point in best],
        where="post",
        color="black",
        linewidth=1,
        label="front",
    )
    _mark(axes, tuning, lambda point: point.clean_accuracy)
    axes.axvline(tuning.least, color="C0", linestyle=":", label="budget")
    axes.set_xlim(right=min(axes.get_xlim()[1], 1.005))
    axes.set_xlabel("clean accuracy, part to tune on")
    axes.set_ylabel(tuning.objective.measure)


def _mark(axes: Any, tuning: Tuning, where: Callable[[Point], float]) -> None:
    if tuning.best is not None:
        label = "chosen" if tuning.helps else "best jump"
        at = where(tuning.best), tuning.best.robustness
        axes.plot(*at, "*", color="black", markersize=12, zorder=3, label=label)


def _errors(points: list[Point]) -> Any:
    ends = np.array([point.interval for point in points])
    middle = np.array([point.robustness for point in points])
    return np.abs(ends.T - middle)


def _jumps(figure: Any, tuning: Tuning) -> None:
    paths = [site.path for site in tuning.sites]
    figure.set_size_inches(7, 1 + 0.3 * len(paths))
    axes = figure.subplots()
    jumps = _best_jumps(tuning)
    for row, path in enumerate(paths):
        values = np.atleast_1d(jumps.get(path, 0.0))
        axes.barh(row, values.mean(), color="C1")
        if len(values) > 1:
            axes.plot(values, np.full(len(values), row), "|", color="black")
    axes.set_yticks(range(len(paths)), paths)
    axes.invert_yaxis()
    axes.set_xlabel("jump, in units of the activations" + _whose(tuning))


def _pre_activations(figure: Any, tuning: Tuning) -> None:
    paths = [site.path for site in tuning.sites]
    rows = -(-len(paths) // _COLUMNS)
    figure.set_size_inches(3.2 * min(_COLUMNS, len(paths)), 2.4 * rows + 0.4)
    grid = figure.subplots(rows, min(_COLUMNS, len(paths)), squeeze=False)
    jumps = _best_jumps(tuning)
    for axes in grid.flat[len(paths) :]:
        axes.remove()
    for axes, path in zip(grid.flat, paths, strict=False):
        found = tuning.activations[path]
        edges, share = _histogram(found)
        axes.stairs(share, edges, fill=True, color="C0", alpha=0.6)
        for jump in np.unique(np.atleast_1d(jumps.get(path, 0.0))):
            axes.axvline(jump, color="C1", linewidth=1)
        axes.set_title(f"{path} ({found.positive / found.total:.0%} above 0)", fontsize=9)
        axes.set_yticks([])
    figure.supxlabel("positive pre-activations, and the jump" + _whose(tuning), fontsize=9)


def _histogram(found: Activations) -> tuple[Any, Any]:
    """Returns the edges of equal bins up to the 99.5% quantile, and the share in each."""
    edges = np.linspace(0, found.quantile(0.995), _BINS + 1)
    below = np.array([found.silenced(float(edge)) for edge in edges])
    return edges, np.diff(below)


def _best_jumps(tuning: Tuning) -> dict[str, Jump]:
    return dict(tuning.best.jumps) if tuning.best else {}


def _whose(tuning: Tuning) -> str:
    return "" if tuning.helps else " (of the best candidate: no jump helps)"


_PICTURES = {"trade-off": _trade_off, "jumps": _jumps, "pre-activations": _pre_activations}
