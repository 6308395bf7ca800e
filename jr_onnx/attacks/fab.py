"""Fast adaptive boundary attack, FAB and FAB-T (Croce and Hein, arXiv:1907.02044); linf, l2, l1.

boundary   f + g.(z - x_t) = 0,  of the nearest rival:  f = z[t] - z[y],  g its gradient
d, d_0     shortest moves from x_t and from the example x onto it, inside the bounds
x_{t+1}    = (1 - a) (x_t + eta d) + a (x + eta d_0),   a = min(|d| / (|d| + |d_0|), alpha_max)
and        x_{t+1} = x + beta (x_{t+1} - x)  where it is misclassified: back towards x
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jr_onnx.attacks.attack import Attack, Classifier
from jr_onnx.attacks.nearest import (
    Nearest,
    check_at_least,
    check_positive,
    misclassified,
    nearest_boundary,
    ranked_rivals,
)
from jr_onnx.attacks.threat import NORMS, ThreatModel, per_example
from jr_onnx.errors import ParameterError

Array = np.ndarray[Any, Any]
# Below every slope of a float32 model, and 1 / it does not overflow.
_TINY = 1e-200


def move_onto(x: Array, g: Array, rise: Array, bounds: tuple[float, float], norm: str) -> Array:
    """Returns the shortest d with g.d = rise and x + d inside the bounds.

    With v = |g| and room_i the way to the bound that helps:

        linf   d_i = min(s, room_i)         the s for which v.d = |rise|
        l2     d_i = min(s v_i, room_i)     the same
        l1     the steepest elements up to their bounds, the last of them in part

    and the signs put back. Where the bounds are in the way, the farthest corner.

    Args:
        x: float64 `(batch, n)`, inside the bounds.
        g: float64 `(batch, n)`.
        rise: float64 `(batch,)`.
        bounds: of an element.
        norm: `linf`, `l2` or `l1`.
    """
    sign = np.sign(g) * np.where(rise < 0, -1, 1)[:, None]
    v, need = np.abs(g), np.abs(rise)[:, None]
    room = np.where(sign > 0, bounds[1] - x, np.where(sign < 0, x - bounds[0], 0))
    if norm == "l1":
        order = np.argsort(-v, axis=1, kind="stable")
        steep, wide = (np.take_along_axis(part, order, axis=1) for part in (v, room))
        before = np.cumsum(steep * wide, axis=1) - steep * wide
        size = np.clip((need - before) / np.maximum(steep, _TINY), 0, wide)
        unordered = np.empty_like(size)
        np.put_along_axis(unordered, order, size, axis=1)
        size = unordered
    else:
        speed = np.where(v > 0, 1.0, 0.0) if norm == "linf" else v
        size = np.minimum(_scale(v, speed, room, need) * speed, room)
    d: Array = sign * size
    return d


def _scale(v: Array, speed: Array, room: Array, need: Array) -> Array:
    """Returns the s for which sum v min(s speed, room) = need, `(batch, 1)`.

    Where it stays below need, the s at which all elements are at their bounds.
    The sum is linear between the values of s at which an element meets its bound.
    """
    meets = room / np.maximum(speed, _TINY)
    order = np.argsort(meets, axis=1)
    meets, full, slope = (
        np.take_along_axis(part, order, axis=1) for part in (meets, v * room, v * speed)
    )
    # before the i-th element meets its bound: what the earlier ones gave, what the others give
    given = np.cumsum(full, axis=1) - full
    slopes = np.cumsum(slope[:, ::-1], axis=1)[:, ::-1]
    reached = given + meets * slopes >= need
    at = reached.argmax(axis=1)[:, None]
    given, slopes = (np.take_along_axis(part, at, axis=1) for part in (given, slopes))
    scale = (need - given) / np.maximum(slopes, _TINY)
    return np.where(reached.any(axis=1, keepdims=True), scale, meets[:, -1:])


@dataclass(frozen=True, kw_only=True)
class FAB(Attack):
    """FAB over all rivals: each step takes a gradient for every class.

    Attributes:
        steps: for each start.
        restarts: starts; the first is the example itself, the others random points within half of
            the distance found (or of epsilon), anywhere inside the bounds where none was.
        alpha_max: largest weight of the example's own projection.
        eta: overshoot.
        beta: share of the way kept on going back towards the example.
        bisections: halvings of the way back to the boundary at the end (the paper's final search
            has 3); 0 for none, as in AutoAttack.

    References:
        Croce and Hein: Minimally distorted Adversarial Examples with a Fast Adaptive Boundary
        Attack (arXiv:1907.02044).
    """

    name = "fab"
    steps: int = 100
    restarts: int = 1
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    bisections: int = 10

    def __post_init__(self) -> None:
        check_at_least(1, steps=self.steps, restarts=self.restarts, eta=self.eta)
        check_at_least(0, bisections=self.bisections, alpha_max=self.alpha_max)
        check_positive(beta=self.beta)
        for name, value in (("alpha_max", self.alpha_max), ("beta", self.beta)):
            if value > 1:
                raise ParameterError(f"{name} must be at most 1, got {value}")

    def compared(self, rivals: Array) -> Iterator[Array]:
        """Yields the classes that one run compares, int `(batch, n)`, from all, best first."""
        yield rivals

    def search(
        self,
        target: Classifier,
        x: Array,
        y: Array,
        threat: ThreatModel,
        *,
        seed: int,
        indices: Array,
    ) -> Array:
        """Returns the nearest misclassified point over all runs and starts, or the last.

        Raises:
            ParameterError: there is one class only.
        """
        ranked = ranked_rivals(target.differentiate(x, y, loss="margin").logits, y)
        nearest = Nearest(x, threat)
        rngs = [np.random.default_rng((seed, int(index))) for index in indices]
        for rivals in self.compared(ranked):
            for restart in range(self.restarts):
                start = self._start(nearest, x, threat, rngs) if restart else x.copy()
                self._run(target, nearest, x, y, start, rivals, threat)
        nearest.bisect(target, y, self.bisections)
        return nearest.x_adv

    def _start(
        self, nearest: Nearest, x: Array, threat: ThreatModel, rngs: list[np.random.Generator]
    ) -> Array:
        points = []
        for each, size, rng in zip(x, nearest.size, rngs, strict=True):
            radius = min(size, threat.epsilon) / 2
            if np.isinf(radius):
                points.append(rng.uniform(*threat.bounds, x.shape[1:]))
            else:
                points.append(each + NORMS[threat.norm].sample(x.shape[1:], radius, rng))
        return nearest.bounded(np.stack(points), np.arange(len(x)))

    def _run(
        self,
        target: Classifier,
        nearest: Nearest,
        x: Array,
        y: Array,
        start: Array,
        rivals: Array,
        threat: ThreatModel,
    ) -> None:
        # In float64: a step may be smaller than a float16 model's points are apart.
        home, here = x.astype(np.float64), start.astype(np.float64)
        alive = nearest.open
        for _ in range(self.steps):
            if not len(alive):
                break
            points = nearest.bounded(here[alive], alive)
            edge = nearest_boundary(target, points, y[alive], rivals[alive], threat.norm)
            # Onto the boundary itself is not beyond it, and the next step would be 0.
            f = edge.loss - 2 * edge.rounding
            moved = self._step(home[alive], here[alive], f, edge.gradient, threat)
            points = nearest.bounded(moved, alive)
            wrong = misclassified(target.logits(points), y[alive])
            nearest.offer(alive, points, wrong)
            # Where units are dead there is no boundary to step to: back towards x as well.
            flat = np.isinf(edge.ratio)
            share = per_example(np.where(wrong | flat, self.beta, 1), moved)
            here[alive] = home[alive] + share * (moved - home[alive])
            stuck = np.logical_and(flat, threat.distance(points, x[alive]) == 0)
            alive = alive[np.logical_and(nearest.is_open(alive), ~stuck)]

    def _step(self, home: Array, here: Array, f: Array, g: Array, threat: ThreatModel) -> Array:
        x, x_t, slope = (part.reshape(len(home), -1) for part in (home, here, g))
        at_home = f + (slope * (x - x_t)).sum(axis=1)
        d = move_onto(x_t, slope, -f, threat.bounds, threat.norm)
        d_0 = move_onto(x, slope, -at_home, threat.bounds, threat.norm)
        size, size_0 = NORMS[threat.norm].distance(d), NORMS[threat.norm].distance(d_0)
        share = size / np.maximum(size + size_0, _TINY)
        a = np.minimum(share, self.alpha_max)[:, None]
        mixed: Array = (1 - a) * (x_t + self.eta * d) + a * (x + self.eta * d_0)
        return np.clip(mixed, *threat.bounds).reshape(home.shape)


@dataclass(frozen=True, kw_only=True)
class TargetedFAB(FAB):
    """FAB-T: one run towards each of the best rivals, a gradient a step.

    Attributes:
        targets: rivals, at most; 9 as in AutoAttack.
    """

    name = "fab_t"
    targets: int = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, targets=self.targets)

    def compared(self, rivals: Array) -> Iterator[Array]:
        """Yields the best rivals one by one."""
        for at in range(min(self.targets, rivals.shape[1])):
            yield rivals[:, at : at + 1]
