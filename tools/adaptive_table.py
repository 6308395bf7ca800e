"""The jump's effect on the MNIST sample: as the paper measures it, and under adaptive attacks.

    jump 0, 0.5, 1.0, 1.5 --suite adaptive, linf 0.1------------> accuracies, paired changes
                          --IFGSM; DeepFool, without a ball and
                            with or without a closing bisection-> accuracy, relative perturbations

What is finished is kept in --resume, so that a run goes on where it was.

Example:
    python tools/adaptive_table.py --resume table --write docs/benchmarks/attacks.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tables import markdown, put

import jr_onnx as jr
from jr_onnx.attacks import IFGSM, DeepFool, ThreatModel
from jr_onnx.checkpoint import Checkpoint
from jr_onnx.evaluate import Evaluation, Gain
from jr_onnx.statistics import wilson
from jr_onnx.suites import Suite, Trial

SAMPLES = Path(__file__).resolve().parents[1] / "sample_models"
JUMPS = (0.5, 1.0, 1.5)
THREAT = ThreatModel(norm="linf", epsilon=0.1)
# The paper's 0.01 is in units of standard deviations; the sample normalises inside.
STEP = 0.01 * 0.3081


def paper() -> Suite:
    """The paper's IFGSM, and DeepFool as published and brought back to the boundary."""
    published, bisected = DeepFool(steps=40, bisections=0), DeepFool(steps=40)
    return Suite(
        "paper's",
        (
            Trial(name="ifgsm", attack=IFGSM(step_size=STEP), norm="linf"),
            Trial(name="deepfool-linf", attack=published, norm="linf"),
            Trial(name="deepfool-linf-bisected", attack=bisected, norm="linf"),
            Trial(name="deepfool-l2", attack=published, norm="l2"),
            Trial(name="deepfool-l2-bisected", attack=bisected, norm="l2"),
        ),
        cascade=False,
    )


def measure(suite: str | Suite, samples: int, seed: int, folder: Path | None) -> list[Evaluation]:
    """Evaluates the sample at each jump, next to the original."""
    original, data = jr.load(SAMPLES / "lenet_mnist.onnx"), jr.load_npz(SAMPLES / "mnist_test.npz")
    return [
        jr.evaluate(
            jr.retrofit(original, jump=jump).model,
            data.x[:samples],
            data.y[:samples],
            threat=THREAT,
            suite=suite,
            baseline=original,
            device="cpu",
            seed=seed,
            checkpoint=Checkpoint(folder) if folder else None,
        )
        for jump in JUMPS
    ]


def accuracies(evaluations: Sequence[Evaluation]) -> str:
    """Returns accuracies and changes, a row for each jump."""
    # The trials behind this one are APGD's, through soft slopes.
    last = "noise"
    titles = ["jump", "clean", "naive", "without APGD on soft slopes", "suite `adaptive`"]
    titles += ["naive change", "without APGD", "suite's change", "p"]
    first = evaluations[0].models[0]
    models = [first, *(evaluation.models[1] for evaluation in evaluations)]
    rows = []
    for jump, model in zip((0.0, *JUMPS), models, strict=True):
        kinds = [(each.naive, each.outcomes[last].robust, each.robust) for each in (first, model)]
        gains = [Gain.of(*pair) for pair in zip(*kinds, strict=True)]
        changes = [_change(gain) for gain in gains] + [f"{gains[-1].p_value:.1g}"]
        shares = [_share(each) for each in (model.correct, *kinds[1])]
        rows.append([f"{jump:g}", *shares, *(changes if jump else [""] * 4)])
    return markdown(titles, rows)


def trials(evaluations: Sequence[Evaluation]) -> str:
    """Returns what each trial left of the examples that the trials before it had left."""
    titles = ["after", "jump 0", *(f"jump {jump:g}" for jump in JUMPS)]
    models = [evaluations[0].models[0], *(each.models[1] for each in evaluations)]
    rows = []
    for trial in evaluations[0].suite.trials:
        outcomes = [model.outcomes.get(trial.name) for model in models]
        rows.append(
            [
                trial.name,
                *("" if each is None else f"{each.robust.mean():.1%}" for each in outcomes),
            ]
        )
    return markdown(titles, rows)


def perturbations(evaluations: Sequence[Evaluation]) -> str:
    """Returns IFGSM's accuracies and DeepFool's mean relative perturbations."""
    titles = ["attack", "figure", "jump 0", *(f"jump {jump:g}" for jump in JUMPS)]
    models = [(evaluations[0], evaluations[0].models[0])]
    models += [(evaluation, evaluation.models[1]) for evaluation in evaluations]
    rows = []
    for trial in evaluations[0].suite.trials:
        entries = [model.outcomes[trial.name].to_json() for _, model in models]
        if trial.name == "ifgsm":
            left = [model.outcomes["ifgsm"].result.robust.sum() for _, model in models]
            cells = [f"{each / len(evaluations[0].x):.1%}" for each in left]
            rows.append([trial.name, "accuracy", *cells])
            continue
        cells = [_percent(entry["mean_relative_distance"]) for entry in entries]
        rows.append([trial.name, "mean relative perturbation", *cells])
        missing = [entry["tried"] - entry["broken"] for entry in entries]
        if any(missing):
            rows.append([trial.name, "not broken", *map(str, missing)])
    return markdown(titles, rows, text=2)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _share(each: Any) -> str:
    low, high = wilson(each)
    return f"{np.mean(each):.1%} [{100 * low:.1f}..{100 * high:.1f}]"


def _change(gain: Gain) -> str:
    low, high = gain.interval
    return f"{100 * gain.change:+.1f} [{100 * low:+.1f}..{100 * high:+.1f}]"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="The jump's effect, naive and adaptive.")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="folder of what is finished")
    parser.add_argument("--write", type=Path, help="Markdown file whose tables are replaced")
    arguments = parser.parse_args(argv)
    given = arguments.samples, arguments.seed, arguments.resume
    found = measure("adaptive", *given)
    made = {
        "adaptive": accuracies(found),
        "trials": trials(found),
        "paper": perturbations(measure(paper(), *given)),
    }
    for name, content in made.items():
        if arguments.write:
            put(arguments.write, name, content)
        print(content)
    for finding in dict.fromkeys(each for evaluation in found for each in evaluation.findings):
        print(finding.rule, finding.level, finding.message)
    return 0


if __name__ == "__main__":
    sys.exit(main())
