"""A jump for each site, or each channel, proposed by Optuna: points so far -> the next candidate.

per-site      a jump v_s for each site
per-channel   and one number `spread`, from 0 to 1: channel c of site s gets v_s (m_c / m_s)^spread,
              m the mean of the positive pre-activations of the channel and of the site

so each scope has the one before it as a special case, and the search of per-channel jumps has one
dimension more than that of per-site jumps, whatever the number of channels.

A proposal that breaks the accuracy budget is shrunk towards 0 until it meets it: all jumps by the
same factor, by bisection, in forward passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jr_onnx.activations import Activations
from jr_onnx.rewrite import Jump, Site
from jr_onnx.tune.ledger import optuna, quiet
from jr_onnx.tune.lines import largest_jump
from jr_onnx.tune.points import Point

Array = np.ndarray[Any, Any]
SPREAD = "jr_onnx/spread"


@dataclass(frozen=True)
class Space:
    """What may be proposed.

    Attributes:
        sites: those that get a jump.
        limits: the largest jump of each, by site path.
        seen: their activations.
        per_channel: whether channels get jumps of their own.
    """

    sites: Sequence[Site]
    limits: Mapping[str, float]
    seen: Mapping[str, Activations]
    per_channel: bool

    @property
    def name(self) -> str:
        """The scope."""
        return "per-channel" if self.per_channel else "per-site"

    def jumps(self, parameters: Mapping[str, float], factor: float = 1.0) -> dict[str, Jump]:
        """Returns the jumps of a proposal, all times a factor."""
        found: dict[str, Jump] = {}
        for site in self.sites:
            jump = factor * parameters[site.path]
            if jump > 0:
                found[site.path] = self._spread(site, jump, parameters.get(SPREAD, 0.0))
        return found

    def _spread(self, site: Site, jump: float, spread: float) -> Jump:
        means = self.seen[site.path].channel_means
        if means is None or spread == 0:
            return jump
        fires = means > 0
        # A channel that never fires has no mean, and any jump will do.
        ratio = np.where(fires, means / means[fires].mean(), 1.0) ** spread
        return tuple(np.minimum(jump * ratio, largest_jump(site)).tolist())

    def parameters(self, point: Point) -> dict[str, float]:
        """Returns a point as a proposal: those on a line have no spread."""
        if point.origin == self.name:
            return point.parameters
        numbers = {site.path: float(point.jumps.get(site.path, 0.0)) for site in self.sites}  # type: ignore[arg-type]
        return {**numbers, SPREAD: 0.0} if self.per_channel else numbers


def propose(space: Space, points: Sequence[Point], *, seed: int, worker: int) -> dict[str, float]:
    """Returns the next proposal, which depends on nothing but the arguments.

    Args:
        space: what may be proposed.
        points: finished, in order.
        seed: of the search.
        worker: which of the processes at work this is.

    References:
        Ozaki et al.: Multiobjective Tree-Structured Parzen Estimator (JAIR 2022).
    """
    module = optuna()
    ranges = {path: (0.0, limit) for path, limit in space.limits.items() if limit > 0}
    if space.per_channel:
        ranges[SPREAD] = (0.0, 1.0)
    distributions = {
        name: module.distributions.FloatDistribution(*bounds) for name, bounds in ranges.items()
    }
    number = np.random.SeedSequence([seed, len(points), worker]).generate_state(1)
    with quiet(module):
        sampler = module.samplers.TPESampler(seed=int(number[0]), constant_liar=False)
        study = module.create_study(directions=["maximize", "maximize"], sampler=sampler)
        study.add_trials([_trial(module, space, each, distributions) for each in points])
        found = study.ask(distributions).params
    return {**dict.fromkeys(space.limits, 0.0), **found}


def _trial(module: Any, space: Space, point: Point, distributions: Mapping[str, Any]) -> Any:
    given = space.parameters(point)
    states = module.trial.TrialState
    return module.trial.create_trial(
        state=states.PRUNED if point.pruned else states.COMPLETE,
        values=None if point.pruned else [point.clean_accuracy, point.robustness],
        params={
            name: min(max(given[name], each.low), each.high) for name, each in distributions.items()
        },
        distributions=distributions,
    )
