"""The search: a model at any jumps, a budget -> points.

global, quantile           a line: the limit at the budget, then candidates up to it
per-site, per-channel      both lines, then candidates that Optuna proposes from all points so far
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jr_onnx.activations import Activations
from jr_onnx.errors import ParameterError
from jr_onnx.rewrite import Jump, Site
from jr_onnx.tune.judge import Judge
from jr_onnx.tune.ledger import Ledger
from jr_onnx.tune.lines import (
    CleanCurve,
    Line,
    bisect,
    clean_curve,
    global_line,
    quantile_line,
    site_line,
)
from jr_onnx.tune.trials import Space, propose

SCOPES = ("global", "quantile", "per-site", "per-channel")
# Candidates on each line; proposals after them.
ON_A_LINE, PROPOSED = 12, 48
# told what is going on, how much of it is done, and of how much
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Search:
    """What a search needs.

    Attributes:
        judge: measures candidates.
        ledger: keeps them.
        sites: those that get a jump.
        seen: their activations.
        seed: of all random numbers.
        progress: what to tell.
    """

    judge: Judge
    ledger: Ledger
    sites: Sequence[Site]
    seen: Mapping[str, Activations]
    seed: int
    progress: Progress

    def run(self, scope: str, trials: int | None) -> tuple[CleanCurve, ...]:
        """Fills the ledger.

        Args:
            scope: in `SCOPES`.
            trials: candidates to attack on the line, or to propose after both lines.

        Returns:
            The clean-accuracy curves of the lines.
        """
        check_scope(scope, trials)
        self._known({}, "original", {}, told=0, of=1)
        lines = [global_line(self.sites, self.seen), quantile_line(self.sites, self.seen)]
        if scope in SCOPES[:2]:
            return (self._along(lines[SCOPES.index(scope)], trials or ON_A_LINE),)
        curves = tuple(self._along(line, ON_A_LINE) for line in lines)
        self._propose(self._space(curves, lines, scope), trials or PROPOSED)
        return curves

    def _along(self, line: Line, count: int) -> CleanCurve:
        curve = clean_curve(line, self.judge.accuracy, self.judge.least)
        parameter = "jump" if line.name == "global" else line.name
        for number, value in enumerate(curve.candidates(count)):
            self._known(line.jumps(value), line.name, {parameter: value}, told=number, of=count)
        return curve

    def _known(
        self,
        jumps: Mapping[str, Jump],
        origin: str,
        parameters: Mapping[str, float],
        *,
        told: int,
        of: int,
    ) -> None:
        """Attacks a candidate on a line, to the end, unless that was done before."""
        self.progress(origin, told, of)
        if self.ledger.find(jumps) is None:
            self.ledger.add(self.judge.point(jumps, origin, parameters))
        self.progress(origin, told + 1, of)

    def _space(self, curves: Sequence[CleanCurve], lines: Sequence[Line], scope: str) -> Space:
        """Lets each site go as far as it can alone, and at least as far as on the lines."""
        limits: dict[str, float] = {}
        for number, site in enumerate(self.sites):
            self.progress("limits of the sites", number, len(self.sites))
            line = site_line(site, self.seen[site.path])
            limits[site.path] = self._limit(line)
        for curve, line in zip(curves, lines, strict=True):
            for path, jump in line.jumps(curve.limit).items():
                assert isinstance(jump, float)
                limits[path] = max(limits[path], jump)
        return Space(self.sites, limits, self.seen, scope == "per-channel")

    def _limit(self, line: Line) -> float:
        def meets(value: float) -> bool:
            return self.judge.accuracy(line.jumps(value)) >= self.judge.least

        return line.top if meets(line.top) else bisect(meets, 0.0, line.top)

    def _propose(self, space: Space, count: int) -> None:
        while True:
            self.ledger.refresh()
            done = sum(point.origin == space.name for point in self.ledger.points)
            self.progress(space.name, min(done, count), count)
            if done >= count or not any(space.limits.values()):
                return
            points = self.ledger.points
            asked = propose(space, points, seed=self.seed, worker=self.ledger.worker)
            jumps, parameters = self._shrunk(space, asked)
            finished = [point for point in points if not point.pruned]
            self.ledger.add(self.judge.point(jumps, space.name, parameters, rivals=finished))

    def _shrunk(
        self, space: Space, asked: dict[str, float]
    ) -> tuple[dict[str, Jump], dict[str, float]]:
        """Brings a proposal inside the budget."""

        def meets(factor: float) -> bool:
            return self.judge.accuracy(space.jumps(asked, factor)) >= self.judge.least

        factor = 1.0 if meets(1.0) else bisect(meets, 0.0, 1.0)
        kept = {
            name: factor * asked[name] if name in space.limits else asked[name] for name in asked
        }
        return space.jumps(kept), kept


def check_scope(scope: str, trials: int | None) -> None:
    """Raises `ParameterError` where there is no such scope, or no trial."""
    if scope not in SCOPES:
        raise ParameterError(f"jump_scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    if trials is not None and trials < 1:
        raise ParameterError(f"trials must be at least 1, got {trials}")
