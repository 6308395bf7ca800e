"""What flows into the sites: model, examples -> a histogram of the pre-activations of each site.

One pass over the data, in memory that does not grow with it. The bins are those of the float format
itself, the leading bits of a float32: each is at most 1/512 of its value wide, at any scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jr_onnx.errors import DataError, ModelError
from jr_onnx.model import Model, with_outputs
from jr_onnx.rewrite import Site
from jr_onnx.session import Session, batches

Array = np.ndarray[Any, Any]
_SHIFT = 14
_BINS = (0x7F800000 >> _SHIFT) + 1  # the positive float32 up to infinity


@dataclass(frozen=True)
class Activations:
    """The pre-activations of one site over a data set.

    Attributes:
        total: how many there were.
        positive: how many were above 0, the ones that a ReLU lets pass.
        counts: int64, of the positive ones by bin.
    """

    total: int
    positive: int
    counts: Array = field(repr=False)

    def quantile(self, q: float) -> float:
        """Returns the q-quantile of the positive pre-activations, to 1/512 of its value.

        Args:
            q: 0..1.

        Raises:
            DataError: none was positive.
        """
        if not self.positive:
            raise DataError("no pre-activation was above 0 on the data, so there is no quantile")
        below = np.cumsum(self.counts)
        at = int(np.searchsorted(below, q * self.positive, side="left"))
        inside = self.counts[at] or 1
        share = (q * self.positive - (below[at] - self.counts[at])) / inside
        low, high = _edge(at), _edge(at + 1)
        if not np.isfinite(high):
            return low
        return float(low + np.clip(share, 0, 1) * (high - low))

    def silenced(self, jump: float) -> float:
        """Returns the share of the positive pre-activations that a jump sets to 0, 0..1."""
        if not self.positive:
            return 0.0
        at = int(_bin(np.asarray([jump], np.float32))[0])
        low, high = _edge(at), _edge(at + 1)
        inside = self.counts[at] * (min(jump, high) - low) / (high - low)
        return float((self.counts[:at].sum() + inside) / self.positive)


def observe(
    model: Model,
    sites: Sequence[Site],
    x: Array,
    *,
    device: str = "auto",
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Activations]:
    """Runs the model and counts what goes into each site.

    Args:
        model: the model the sites were found in; one input.
        sites: of its main graph; values inside branches and functions cannot be seen from outside.
        x: `(samples, ...)`, cast to the dtype of the input.
        device: `auto`, `cpu` or `cuda`.
        batch_size: most examples in one run.
        progress: told how many examples more are finished.

    Returns:
        The activations by site path; sites inside branches and functions are left out.

    Raises:
        ModelError: the model has several inputs.
        SessionError: onnxruntime is not there or refuses the model or the data.
    """
    seen = [site for site in sites if len(site.scope) == 1]
    session = Session(with_outputs(model, [site.x for site in seen]), device=device)
    if len(session.inputs) != 1:
        names = [port.name for port in session.inputs]
        raise ModelError(f"{model.name}: one input is needed to observe activations, got {names}")
    port = session.inputs[0]
    counts = {site.path: np.zeros(_BINS, np.int64) for site in seen}
    totals = dict.fromkeys(counts, 0)
    for part, size in batches(port, batch_size, x):
        values = session.run({port.name: part[0]}, [site.x for site in seen])
        for site, value in zip(seen, values, strict=True):
            kept = value[:size] if value.ndim and len(value) == len(part[0]) else value
            totals[site.path] += kept.size
            counts[site.path] += _histogram(kept)
        progress(size)
    return {path: Activations(totals[path], int(each.sum()), each) for path, each in counts.items()}


def _histogram(values: Array) -> Array:
    positive = values[values > 0].astype(np.float32)
    return np.bincount(_bin(positive.reshape(-1)), minlength=_BINS)


def _bin(values: Array) -> Array:
    return (np.ascontiguousarray(values).view(np.uint32) >> _SHIFT).astype(np.int64)


def _edge(at: int) -> float:
    return float(np.array([min(at, _BINS - 1) << _SHIFT], np.uint32).view(np.float32)[0])
