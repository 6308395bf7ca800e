"""Points: jumps that were attacked, and what came out, example by example."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jr_onnx.rewrite import Jump
from jr_onnx.statistics import wilson

Array = np.ndarray[Any, Any]
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Point:
    """One candidate on the part to tune on.

    Attributes:
        jumps: by site path; sites that are left as they are have none.
        origin: what proposed it: `original`, `global`, `quantile`, `per-site` or `per-channel`.
        parameters: what the search chose, by name: one number on a line, else one a site.
        correct: bool `(samples,)`, without attack.
        score: float32 `(samples,)`, of the objective; an upper bound where the search gave up.
        pruned: why the search gave up on it, None if it did not.
    """

    jumps: dict[str, Jump]
    origin: str
    parameters: dict[str, float]
    correct: Array = field(repr=False)
    score: Array = field(repr=False)
    pruned: str | None = None

    @property
    def key(self) -> str:
        """What tells its jumps from others."""
        return key_of(self.jumps)

    @property
    def clean_accuracy(self) -> float:
        """Share classified correctly without attack, 0..1."""
        return float(self.correct.mean())

    @property
    def robustness(self) -> float:
        """Mean score."""
        return float(self.score.mean(dtype=np.float64))

    def to_json(self) -> dict[str, Any]:
        """Returns the entry of `points` in the result; no robustness where it was not finished."""
        return {
            "origin": self.origin,
            "parameters": self.parameters,
            "jumps": self.jumps,
            "clean_accuracy": self.clean_accuracy,
            "clean_accuracy_interval": list(wilson(self.correct)),
            "robustness": None if self.pruned else self.robustness,
            "robustness_interval": None if self.pruned else list(self.interval),
            "pruned": self.pruned,
        }

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the robustness: Wilson's of a share, else of a mean."""
        if np.isin(self.score, (0, 1)).all():
            return wilson(self.score > 0)
        half = _Z95 * float(self.score.std(dtype=np.float64)) / np.sqrt(len(self.score))
        return self.robustness - half, self.robustness + half


def key_of(jumps: Mapping[str, Jump]) -> str:
    """Returns what tells jumps from others."""
    return json.dumps(jumps, sort_keys=True)


def front(points: Iterable[Point]) -> tuple[Point, ...]:
    """Returns the finished points that no other one beats, by falling clean accuracy.

    A point beats another one if it is at least as good both ways and better one way.
    """
    finished = [point for point in points if not point.pruned]
    falling = sorted(finished, key=lambda point: (-point.clean_accuracy, -point.robustness))
    best: list[Point] = []
    for point in falling:
        if not best or point.robustness > best[-1].robustness:
            best.append(point)
    return tuple(best)


def best_of(points: Sequence[Point], least: float) -> Point | None:
    """Returns the point with a jump of the largest robustness, None where there is none.

    Of equals, that of the higher clean accuracy, then the one found first.

    Args:
        points: in the order they were found.
        least: the clean accuracy they must have.
    """
    # Processes that start together may each have the original.
    meeting = [p for p in points if p.jumps and not p.pruned and p.clean_accuracy >= least]
    return max(meeting, key=lambda p: (p.robustness, p.clean_accuracy), default=None)
