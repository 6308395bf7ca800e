"""What tuning found: the jumps, the points they were chosen from, and held-out figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jr_onnx.activations import Activations
from jr_onnx.attacks import ThreatModel
from jr_onnx.evaluate import Evaluation, Gain
from jr_onnx.model import Model
from jr_onnx.rewrite import Jump, Site, Skipped
from jr_onnx.tune.lines import CleanCurve
from jr_onnx.tune.objective import Objective
from jr_onnx.tune.points import Point, best_of, front


@dataclass(frozen=True)
class Tuning:
    """The result of `tune`.

    Attributes:
        model: the model without a jump.
        threat: the threat model.
        objective: what was made large.
        jump_scope: what was searched.
        max_accuracy_drop: the budget, a share of the examples.
        least: the clean accuracy that it asked for on the part to tune on.
        seed: of all random numbers.
        sites: those that were tuned.
        skipped: those that were not, each with its reason.
        activations: what flows into the sites, by site path.
        curves: clean accuracy along the lines.
        points: every candidate that was attacked, in order; the first is the original.
        report: original, and the best point as the retrofitted model that it is, on the part that
            the search never saw; only the original where no jump meets the budget.
    """

    model: Model = field(repr=False)
    threat: ThreatModel
    objective: Objective = field(repr=False)
    jump_scope: str
    max_accuracy_drop: float
    least: float
    seed: int
    sites: tuple[Site, ...] = field(repr=False)
    skipped: tuple[Skipped, ...] = field(repr=False)
    activations: Mapping[str, Activations] = field(repr=False)
    curves: tuple[CleanCurve, ...] = field(repr=False)
    points: tuple[Point, ...] = field(repr=False)
    report: Evaluation = field(repr=False)

    @property
    def original(self) -> Point:
        """The model without a jump."""
        return self.points[0]

    @cached_property
    def best(self) -> Point | None:
        """The best point with a jump that meets the budget, None where none does."""
        return best_of(self.points, self.least)

    @property
    def helps(self) -> bool:
        """Whether the best point scores higher than the original, on the part to tune on."""
        return self.best is not None and self.best.robustness > self.original.robustness

    @property
    def confirmed(self) -> bool:
        """Whether the gain in the worst case is above 0 at 95%, on the part to report on."""
        gain = self.report.adaptive_gain
        return self.helps and gain is not None and gain.interval[0] > 0

    @property
    def jumps(self) -> dict[str, Jump]:
        """The jumps by site path, for `retrofit`; empty where no jump helps."""
        return dict(self.best.jumps) if self.best is not None and self.helps else {}

    @cached_property
    def front(self) -> tuple[Point, ...]:
        """The points that no other beats in both clean accuracy and robustness."""
        return front(self.points)

    @property
    def clean_change(self) -> Gain | None:
        """The change of clean accuracy by the best point, on the part to report on."""
        models = self.report.models
        return Gain.of(models[0].correct, models[1].correct) if len(models) > 1 else None

    @property
    def settings(self) -> str:
        """What was searched, in one line."""
        threat = self.threat
        return (
            f"{self.jump_scope} jumps, objective {self.objective.name}, {threat.norm} "
            f"{threat.epsilon:g}, budget {self.max_accuracy_drop:g}, seed {self.seed}."
        )

    @property
    def within_budget(self) -> bool:
        """Whether the best point kept the budget on the part to report on."""
        change = self.clean_change
        return change is None or -change.change <= self.max_accuracy_drop + 1e-9

    def jumps_file(self, *comments: str) -> bytes:
        """Returns the jumps as TOML, for `retrofit --jumps`; the jumps there were if none helps.

        Args:
            comments: lines for its head.
        """
        jumps = self.jumps or {site.path: site.jump for site in self.sites}
        lines = [f"# {line}" for comment in comments for line in comment.splitlines()]
        lines += [f"{_key(path)} = {_value(jump)}" for path, jump in jumps.items()]
        return ("\n".join(lines) + "\n").encode()

    def to_json(self) -> dict[str, Any]:
        """Returns the result, schema `jr-onnx/tuning/1`."""
        change = self.clean_change
        return {
            "schema": "jr-onnx/tuning/1",
            "model": {
                "path": str(self.model.path) if self.model.path else None,
                "sha256": self.model.sha256,
            },
            "threat": self.threat.to_json(),
            "objective": self.objective.to_json(),
            "jump_scope": self.jump_scope,
            "max_accuracy_drop": self.max_accuracy_drop,
            "seed": self.seed,
            "samples": {"tune": len(self.original.correct), "report": len(self.report.x)},
            "sites": [site.path for site in self.sites],
            "skipped": [entry.to_json() for entry in self.skipped],
            "curves": [curve.to_json() for curve in self.curves],
            "points": [point.to_json() for point in self.points],
            "front": [point.to_json() for point in self.front],
            "original": self.original.to_json(),
            "best": self.best.to_json() if self.best else None,
            "helps": self.helps,
            "confirmed": self.confirmed,
            "jumps": self.jumps,
            "report": {
                "clean_change": change.to_json() if change else None,
                "within_budget": self.within_budget,
                "evaluation": self.report.to_json(),
            },
        }


def _key(path: str) -> str:
    # A TOML string is a JSON string, but for DEL.
    return json.dumps(path, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(jump: Jump) -> str:
    return f"[{', '.join(map(repr, jump))}]" if isinstance(jump, tuple) else repr(jump)
