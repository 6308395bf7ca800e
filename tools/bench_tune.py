"""Times tuning's one session against the original model, and against a session a candidate.

    one session    jumps as inputs of the session           / the original, run as often
    one for each   retrofit, load (build the gradient), run / the same

All take their turns at each jump; a ratio is that of the medians of CPU seconds, on one core.

Examples:
    python tools/bench_tune.py
    python tools/bench_tune.py --networks ResNet-20 --rounds 9 --write docs/benchmarks/tuning.md
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from tables import markdown, put

import jr_onnx as jr
from jr_onnx.tune import JumpTarget

SAMPLE = Path(__file__).resolve().parents[1] / "sample_models/lenet_mnist.onnx"
SAMPLE_NAME = "LeNet (MNIST sample)"
JUMPS = 50
Array = np.ndarray[Any, Any]


def seconds(run: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    before = time.process_time()
    run()
    return time.process_time() - before


class Case:
    """A model, examples, and everything that is timed on them."""

    def __init__(self, model: jr.Model, x: Array) -> None:
        self.x, self.y = x, np.zeros(len(x), np.int64)
        self._model, self._sites = model, jr.find_sites(model)[0]
        self._original = jr.Target(model, device="cpu")
        self._open = JumpTarget(model, self._sites, device="cpu")
        self._open.at({}).differentiate(x, self.y)

    def original(self, jump: float) -> None:
        """The original, whatever the jump."""
        self._original.logits(self.x)

    def shared(self, jump: float) -> None:
        """Another jump in the session that is there."""
        self._at(jump).logits(self.x)

    def alone(self, jump: float) -> None:
        """Another jump, with a session of its own."""
        self._alone(jump).logits(self.x)

    def gradient(self, jump: float) -> None:
        """A gradient at another jump, in the session that is there."""
        self._at(jump).differentiate(self.x, self.y)

    def gradient_alone(self, jump: float) -> None:
        """A gradient at another jump, with a session of its own."""
        self._alone(jump).differentiate(self.x, self.y)

    def _at(self, jump: float) -> jr.Target:
        return self._open.at({site.path: jump for site in self._sites})

    def _alone(self, jump: float) -> jr.Target:
        return jr.Target(jr.retrofit(self._model, jump=jump).model, device="cpu")


def measured(case: Case, rounds: int) -> dict[str, str]:
    """Returns ratios of medians, and the medians, over all jumps of all rounds.

    What needs a session of its own takes its turn at every tenth jump only.
    """
    taken: dict[str, list[float]] = {}
    for _ in range(rounds):
        for number, jump in enumerate(np.linspace(0, 3, JUMPS).tolist()):
            runs = [case.original, case.shared]
            if number % 10 == 0:
                runs += [case.alone, case.gradient, case.gradient_alone]
            for run in runs:
                taken.setdefault(run.__name__, []).append(seconds(partial(run, jump)))
    typical = {name: median(each) for name, each in taken.items()}
    return {
        "original, ms": f"{1000 * typical['original']:.1f}",
        "one session for all": f"{typical['shared'] / typical['original']:.2f}",
        "a session for each": f"{typical['alone'] / typical['original']:.2f}",
        "gradient, one session for all, ms": f"{1000 * typical['gradient']:.1f}",
        "gradient, a session for each": f"{typical['gradient_alone'] / typical['gradient']:.2f}",
    }


def case_of(name: str, examples: int) -> Case:
    """Returns the sample, or a network of `tools/architectures.py` with random weights."""
    if name == SAMPLE_NAME:
        data = jr.load_npz(SAMPLE.with_name("mnist_test.npz"))
        return Case(jr.load(SAMPLE), data.x[:examples])
    from architectures import ARCHITECTURES, exported, network  # needs torch

    image = ARCHITECTURES[name].image
    x = np.random.default_rng(0).random((examples, *image)).astype(np.float32)
    return Case(exported(network(name), image), x)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--networks", nargs="*", default=[SAMPLE_NAME])
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", type=Path, help="Markdown file whose table to replace")
    asked = parser.parse_args()
    columns = {
        name: measured(case_of(name, asked.examples), asked.rounds) for name in asked.networks
    }
    rows = list(next(iter(columns.values())))
    table = markdown(
        ["a jump more, of 50", *columns],
        [[row, *(column[row] for column in columns.values())] for row in rows],
    )
    print(table)
    if asked.write:
        put(asked.write, "tuning", table)


if __name__ == "__main__":
    # One core, so that onnxruntime takes one thread, and none spins for want of work.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    main()
