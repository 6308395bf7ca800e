"""How near Square in l2 comes to the best point of a linear model, next to its authors' code.

    share = w.(x_adv - x) / (epsilon |w|),   1 at the best point of the ball

The label's logit is out of reach, so that every query is spent. `random` weights have no structure
that a square could use; `smooth` ones are blurred, as an image model's might be.

Example:
    python tools/compare_linear.py --write docs/benchmarks/attacks.md
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tables import markdown, put

from jr_onnx.attacks import Square, ThreatModel
from jr_onnx.attacks.attack import Gradients

Array = np.ndarray[Any, Any]
EPSILON, EXAMPLES, QUERIES = 0.5, 4, 5000


class Linear:
    """logits = [100 - w.x, w.x]: the first class never loses inside the ball."""

    dtype = np.dtype(np.float32)

    def __init__(self, w: Array) -> None:
        self.w = w.astype(np.float32)

    def logits(self, x: Array) -> Array:
        """`(batch, 2)`."""
        z = (x.reshape(len(x), -1) - np.float32(0.5)) @ self.w.reshape(-1)
        return np.stack([np.float32(100) - z, z], axis=1)

    def differentiate(
        self, x: Array, y: Array, *, loss: str = "", targets: Array | None = None
    ) -> Gradients:
        """Not for attacks that see outputs alone."""
        raise NotImplementedError

    def share(self, x_adv: Array, x: Array) -> Array:
        """Of the best point's rise, `(batch,)`."""
        w, delta = self.w.astype(np.float64).reshape(-1), x_adv.astype(np.float64) - x
        risen: Array = delta.reshape(len(x), -1) @ w / (EPSILON * np.linalg.norm(w))
        return risen


def weights(kind: str, side: int) -> Array:
    """Returns `(side, side)`, normal; for `smooth` blurred over two pixels, around the edges."""
    drawn: Array = np.random.default_rng(0).normal(size=(side, side))
    if kind == "random":
        return drawn
    frequency = np.fft.fftfreq(side) * side
    low = np.exp(-0.5 * (frequency[:, None] ** 2 + frequency**2) / 2.0**2)
    blurred = np.fft.ifft2(np.fft.fft2(drawn) * low).real
    scaled: Array = blurred / blurred.std()
    return scaled


def ours(polish: float) -> Callable[[Linear, Array], Array]:
    """Returns our attack."""

    def attack(model: Linear, x: Array) -> Array:
        square = Square(queries=QUERIES, polish=polish)
        threat, rows = ThreatModel(norm="l2", epsilon=EPSILON), np.arange(len(x))
        return square.search(model, x, np.zeros(len(x), int), threat, seed=0, indices=rows)

    return attack


def theirs(model: Linear, x: Array) -> Array:
    """AutoAttack's, on the same weights."""
    w = torch.from_numpy(model.w.reshape(-1))

    def net(images: Any) -> Any:
        z = (images.flatten(1) - 0.5) @ w
        return torch.stack([100 - z, z], dim=1)

    kind = importlib.import_module("pyautoattack.square").SquareAttack
    attack = kind(net, norm="L2", eps=EPSILON, n_queries=QUERIES, seed=0, device="cpu")
    images, labels = torch.from_numpy(x), torch.zeros(len(x), dtype=torch.long)
    attack.init_hyperparam(images)
    torch.manual_seed(0)
    found: Array = attack.attack_single_run(images, labels)[1].numpy()
    return found


def table() -> str:
    """Returns the median share of a few examples, for each model and attack."""
    attacks = {"jr_onnx": ours(0.0), "jr_onnx, polish=0.5": ours(0.5), "AutoAttack": theirs}
    rows = []
    for kind in ("random", "smooth"):
        for side in (8, 28):
            model = Linear(weights(kind, side))
            rng = np.random.default_rng(1)
            x = rng.uniform(0.3, 0.7, (EXAMPLES, 1, side, side)).astype(np.float32)
            shares = [float(np.median(model.share(run(model, x), x))) for run in attacks.values()]
            rows.append([kind, f"{side} x {side}", *(f"{share:.1%}" for share in shares)])
            print(*rows[-1], flush=True)
    return markdown(["weights", "pixels", *attacks], rows, text=2)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Square in l2 on linear models.")
    parser.add_argument("--write", type=Path, help="Markdown file whose table is replaced")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    made = table()
    if arguments.write:
        put(arguments.write, "linear", made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
