"""What flows into the sites: model, examples -> a histogram of the pre-activations of each site.

    model, examples --observe--> Activations by site --quantile_jumps--> jump by site

One pass over the data, in memory that does not grow with it. The bins are those of the float format
itself, the leading bits of a float32: each is at most 1/512 of its value wide, at any scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jr_onnx.errors import DataError, ModelError, ParameterError
from jr_onnx.model import Model, with_outputs
from jr_onnx.rewrite import Site, find_sites, original_of
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
        channel_means: float64 `(channels,)`, the mean of the positive ones of each channel (axis
            1), 0 where there was none; None where the number of channels is not fixed.
    """

    total: int
    positive: int
    counts: Array = field(repr=False)
    channel_means: Array | None = field(default=None, repr=False)

    def quantile(self, q: float) -> float:
        """Returns the q-quantile of the positive pre-activations, to 1/512 of its value.

        Args:
            q: 0..1; at 0 a jump that silences none, at 1 one that silences all.

        Raises:
            ParameterError: q is not in 0..1.
            DataError: none was positive.
        """
        _check_quantile(q)
        if not self.positive:
            raise DataError("no pre-activation was above 0 on the data, so there is no quantile")
        below = np.cumsum(self.counts)
        # At q = 0 the first bin that has any, not the first of all.
        at = int(np.searchsorted(below, q * self.positive, side="left" if q > 0 else "right"))
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
    if not seen:
        return {}
    session = Session(with_outputs(model, [site.x for site in seen]), device=device)
    if len(session.inputs) != 1:
        names = [port.name for port in session.inputs]
        raise ModelError(f"{model.name}: one input is needed to observe activations, got {names}")
    port = session.inputs[0]
    counts = {site.path: np.zeros(_BINS, np.int64) for site in seen}
    totals = dict.fromkeys(counts, 0)
    channels = {site.path: _ChannelMeans.of(site) for site in seen}
    for part, size in batches(port, batch_size, x):
        values = session.run({port.name: part[0]}, [site.x for site in seen])
        for site, value in zip(seen, values, strict=True):
            kept = value[:size] if value.ndim and len(value) == len(part[0]) else value
            totals[site.path] += kept.size
            counts[site.path] += _histogram(kept)
            channels[site.path].add(kept)
        progress(size)
    return {
        path: Activations(totals[path], int(each.sum()), each, channels[path].means)
        for path, each in counts.items()
    }


class _ChannelMeans:
    """Sums and counts of the positive values of each channel."""

    def __init__(self, channels: int | None) -> None:
        self._sums = None if channels is None else np.zeros((2, channels))

    @classmethod
    def of(cls, site: Site) -> _ChannelMeans:
        """Starts from nothing."""
        return cls(channels_of(site))

    def add(self, values: Array) -> None:
        if self._sums is not None and values.ndim > 1:
            axes = (0, *range(2, values.ndim))
            above = np.maximum(values, 0).astype(np.float64, copy=False)
            self._sums += above.sum(axis=axes), (above > 0).sum(axis=axes)

    @property
    def means(self) -> Array | None:
        if self._sums is None:
            return None
        means: Array = self._sums[0] / np.maximum(self._sums[1], 1)
        return means


def channels_of(site: Site) -> int | None:
    """Returns how many channels a site has, None where there are none or it is not known."""
    shape = site.tensor.shape
    size = shape[1] if shape is not None and len(shape) > 1 else None
    return size if isinstance(size, int) else None


def quantile_jumps(
    model: Model,
    x: Array,
    q: float,
    *,
    device: str = "auto",
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """Returns each site's own jump: the q-quantile of its positive pre-activations.

    One number means different things at different depths; a quantile silences the same share.

    Example:
        >>> import jr_onnx as jr
        >>> model = jr.load("sample_models/lenet_mnist.onnx")
        >>> x = jr.load_npz("sample_models/mnist_test.npz").x
        >>> jumps = jr.quantile_jumps(model, x, 0.2, device="cpu")
        >>> {path: round(jump, 2) for path, jump in jumps.items()}
        {'relu': 0.33, 'relu_1': 1.02, 'relu_2': 0.62, 'relu_3': 0.44}
        >>> len(jr.retrofit(model, jumps=jumps).sites)
        4

    Args:
        model: the original, or hardened: then its original is observed. One input.
        x: `(samples, ...)`, cast to the dtype of the input.
        q: 0..1, the share of the positive pre-activations that the jump silences.
        device: `auto`, `cpu` or `cuda`.
        batch_size: most examples in one run.
        progress: told how many examples more are finished.

    Returns:
        The jumps by site path, for `retrofit`. Sites inside branches and functions, which cannot be
        observed, and sites that are never above 0 on x are left out.

    Raises:
        ParameterError: q is not in 0..1.
        ModelError: the model has several inputs.
        NotRetrofittedError: the hardened model was changed since it was retrofitted.
        SessionError: onnxruntime is not there or refuses the model or the data.
    """
    _check_quantile(q)
    plain = original_of(model)
    sites, _ = find_sites(plain)
    seen = observe(plain, sites, x, device=device, batch_size=batch_size, progress=progress)
    return {path: found.quantile(q) for path, found in seen.items() if found.positive}


def _check_quantile(q: float) -> None:
    if not 0 <= q <= 1:
        raise ParameterError(f"a quantile is a number from 0 to 1, got {q}")


def _histogram(values: Array) -> Array:
    positive = values[values > 0].astype(np.float32)
    return np.bincount(_bin(positive.reshape(-1)), minlength=_BINS)


def _bin(values: Array) -> Array:
    return (np.ascontiguousarray(values).view(np.uint32) >> _SHIFT).astype(np.int64)


def _edge(at: int) -> float:
    return float(np.array([min(at, _BINS - 1) << _SHIFT], np.uint32).view(np.float32)[0])
