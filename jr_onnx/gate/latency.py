"""How much longer one model takes than another, side by side on this machine.

    original, hardened, hardened, original, original, hardened ...     median of hardened / original

Both run one example on one thread, in turn, so that what slows the machine down slows both.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from jr_onnx.errors import ModelError
from jr_onnx.model import Model
from jr_onnx.session import Session, batches

Array = np.ndarray[Any, Any]
_WARM_UP = 5
_SECONDS = 2.0
_FEWEST, _MOST = 20, 1000


@dataclass(frozen=True)
class Latency:
    """Two models on the same example.

    Attributes:
        ratio: the median over the pairs of hardened / original.
        quartiles: of that ratio, 25% and 75%.
        original: median time of one run in seconds.
        hardened: median time of one run in seconds.
        pairs: how many were run.
        provider: the execution provider.
    """

    ratio: float
    quartiles: tuple[float, float]
    original: float
    hardened: float
    pairs: int
    provider: str

    def to_json(self) -> dict[str, Any]:
        """Returns the entry `latency` of the result."""
        return {
            "ratio": self.ratio,
            "quartiles": list(self.quartiles),
            "original_seconds": self.original,
            "hardened_seconds": self.hardened,
            "pairs": self.pairs,
            "provider": self.provider,
        }


def compare_latency(
    original: Model, hardened: Model, x: Array, *, device: str = "auto", seconds: float = _SECONDS
) -> Latency:
    """Runs two models in turn.

    Args:
        original: the model whose time is 1.
        hardened: the other one.
        x: `(samples, ...)`; the first example is run, or as many as a fixed batch asks for.
        device: `auto`, `cpu` or `cuda`.
        seconds: about how long, between 20 and 1,000 pairs.

    Raises:
        SessionError: onnxruntime is not there, or refuses a model or the device.
        DataError: x does not fit a model.
        ModelError: a model has several inputs.
    """
    sessions = [Session(model, device=device, threads=1) for model in (original, hardened)]
    feeds = [_feed(session, x) for session in sessions]

    def timed(which: int) -> float:
        start = time.perf_counter()
        sessions[which].run(feeds[which])
        return time.perf_counter() - start

    for _ in range(_WARM_UP):
        timed(0), timed(1)
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(times) < _FEWEST or (len(times) < _MOST and time.perf_counter() < end):
        if len(times) % 2:
            second, first = timed(1), timed(0)
        else:
            first, second = timed(0), timed(1)
        times.append((first, second))
    ratios = [second / first for first, second in times]
    low, high = (float(each) for each in np.quantile(ratios, [0.25, 0.75]))
    return Latency(
        ratio=median(ratios),
        quartiles=(low, high),
        original=median(first for first, _ in times),
        hardened=median(second for _, second in times),
        pairs=len(times),
        provider=sessions[-1].provider,
    )


def _feed(session: Session, x: Array) -> dict[str, Array]:
    if len(session.inputs) != 1:
        names = ", ".join(port.name for port in session.inputs)
        raise ModelError(f"one input is needed, this model has {len(session.inputs)}: {names}")
    (port,) = session.inputs
    (part, *_), _ = next(batches(port, 1, x[: port.fixed_batch or 1]))
    return {port.name: part}
