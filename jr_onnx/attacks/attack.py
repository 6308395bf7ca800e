"""What every attack shares: the protocol it attacks, and a runner that trusts nobody's claims.

x, y --clean and correct?--> search --re-project, run the model again, count--> AttackResult
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from jr_onnx.attacks.threat import NORMS, ThreatModel
from jr_onnx.errors import DataError, ModelError, ParameterError
from jr_onnx.target import DEFAULT_BATCH_SIZE

Array = np.ndarray[Any, Any]
# told how many examples more are finished
Progress = Callable[[int], None]


class Gradients(Protocol):
    """One forward and backward pass of a classifier, as arrays of float."""

    @property
    def logits(self) -> Array:
        """`(batch, classes)`."""

    @property
    def loss(self) -> Array:
        """`(batch,)`."""

    @property
    def gradient(self) -> Array:
        """Like x."""


class Classifier(Protocol):
    """What an attack needs: `jr_onnx.Target` is one, a few lines of numpy are another."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of its input: a point is judged as the model sees it."""

    def logits(self, x: Array) -> Array:
        """Returns `(batch, classes)`."""

    def differentiate(
        self, x: Array, y: Array, *, loss: str = ..., targets: Array | None = ...
    ) -> Gradients:
        """Returns logits, and loss and gradient for x, of a loss in `jr_onnx.autodiff.LOSSES`.

        The logits are those that the loss works on: what a final softmax is given, not gives.
        """


class Counts(NamedTuple):
    """How often the model ran, in examples."""

    forward: int
    gradient: int


@dataclass(frozen=True)
class AttackResult:
    """What an attack found, confirmed by a fresh forward pass.

    Attributes:
        x_adv: like x, in the classifier's dtype; x itself where the attack failed or the example
            was wrong already.
        correct: bool `(batch,)`: classified correctly without an attack.
        robust: bool `(batch,)`: classified correctly without and under the attack.
        distance: float64 `(batch,)`, of x_adv from x in the threat model's norm.
        seconds: wall time.
        counts: examples run forward, and forward and backward.
    """

    x_adv: Array = field(repr=False)
    correct: Array = field(repr=False)
    robust: Array = field(repr=False)
    distance: Array = field(repr=False)
    seconds: float
    counts: Counts


class CountingClassifier:
    """A classifier that counts the examples it is given."""

    def __init__(self, inner: Classifier) -> None:
        self._inner = inner
        self.forward = 0
        self.gradient = 0

    @property
    def dtype(self) -> np.dtype[Any]:
        """As the classifier's own."""
        return self._inner.dtype

    def logits(self, x: Array) -> Array:
        """As the classifier's own, but finite.

        Raises:
            ModelError: it gave NaN or infinity, of which no prediction can be made.
        """
        self.forward += len(x)
        logits = self._inner.logits(x)
        if not np.isfinite(logits).all():
            row = int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0])
            raise ModelError(
                f"the model's logits are not finite ({logits[row].tolist()}): its predictions "
                "mean nothing, and neither would an attack on it"
            )
        return logits

    def differentiate(
        self, x: Array, y: Array, *, loss: str = "cross_entropy", targets: Array | None = None
    ) -> Gradients:
        """As the classifier's own; what is not finite in the gradient counts as 0.

        Else the next point would be NaN, and its example pass for robust.
        """
        self.gradient += len(x)
        found = self._inner.differentiate(x, y, loss=loss, targets=targets)
        np.nan_to_num(found.gradient, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        return found


class Attack(ABC):
    """An attack is a search; the base class does what must not depend on the search's honesty.

    Attributes:
        name: as results spell it.
        uses_gradients: whether it asks the model for more than its outputs.
        norms: the norms it knows.
    """

    name: str
    uses_gradients: bool = True
    norms: tuple[str, ...] = tuple(NORMS)

    @abstractmethod
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
        """Returns a candidate for each example, `(batch, ...)` like x.

        All examples are classified correctly. `indices` identifies them for random numbers, so
        that a result does not depend on the batching.
        """

    def run(
        self,
        target: Classifier,
        x: Array,
        y: Array,
        threat: ThreatModel,
        *,
        seed: int = 0,
        indices: Array | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        progress: Progress = lambda done: None,
    ) -> AttackResult:
        """Attacks the examples that are classified correctly.

        Args:
            target: the classifier.
            x: `(batch, ...)`, inside the bounds.
            y: int `(batch,)`.
            threat: norm, epsilon, bounds.
            seed: of all random numbers.
            indices: int `(batch,)`, what identifies the examples for random numbers; their
                positions if None.
            batch_size: examples attacked together.
            progress: called with the number of examples just finished.

        Raises:
            DataError: x is empty or outside the bounds, or the labels do not fit it.
            ModelError: the model's logits are not finite.
            ParameterError: the attack does not know the norm.
        """
        check_examples(x, y, threat)
        if threat.norm not in self.norms:
            raise ParameterError(
                f"{self.name} knows the norms {', '.join(self.norms)}, not {threat.norm}"
            )
        if batch_size < 1:
            raise ParameterError(f"batch_size must be at least 1, got {batch_size}")
        x = x.astype(target.dtype)
        numbers = np.arange(len(x)) if indices is None else indices
        start = time.perf_counter()
        counting = CountingClassifier(target)
        correct = np.zeros(len(x), bool)
        x_adv = x.copy()
        for begin in range(0, len(x), batch_size):
            batch = slice(begin, begin + batch_size)
            correct[batch] = counting.logits(x[batch]).argmax(axis=1) == y[batch]
            chosen = np.arange(len(x))[batch][correct[batch]]
            if len(chosen):
                candidates = self.search(
                    counting, x[chosen], y[chosen], threat, seed=seed, indices=numbers[chosen]
                )
                x_adv[chosen] = _admitted(candidates, x[chosen], threat)
            progress(len(x[batch]))
        broken = correct & (_predictions(counting, x_adv, batch_size) != y)
        x_adv[~broken] = x[~broken]
        return AttackResult(
            x_adv=x_adv,
            correct=correct,
            robust=correct & ~broken,
            distance=threat.distance(x_adv, x),
            seconds=time.perf_counter() - start,
            counts=Counts(counting.forward, counting.gradient),
        )


def check_examples(x: Array, y: Array, threat: ThreatModel) -> None:
    """Compares examples and labels with each other and with the bounds.

    Raises:
        DataError: they do not fit; an attack on them would report robustness that is not there.
    """
    if not len(x) or y.shape != (len(x),) or y.dtype.kind not in "iu" or y.min() < 0:
        raise DataError(
            f"expected examples and one integer label >= 0 for each, got x of shape {x.shape} and "
            f"y of shape {y.shape}, {y.dtype}"
        )
    low, high = threat.bounds_in(x.dtype)
    if not (x.min() >= low and x.max() <= high):  # NaN fails, too
        raise DataError(
            f"x ranges over [{x.min():g}, {x.max():g}], outside the bounds [{low:g}, {high:g}] of "
            "the threat model. Scale the data, or give its bounds"
        )


def _admitted(candidates: Array, x: Array, threat: ThreatModel) -> Array:
    """Projects the candidates once more; what is outside even then (NaN) counts as no result."""
    projected = threat.project(candidates, x)
    inside = threat.contains(projected, x)
    projected[~inside] = x[~inside]
    return projected


def _predictions(target: Classifier, x: Array, batch_size: int) -> Array:
    parts = [
        target.logits(x[begin : begin + batch_size]).argmax(axis=1)
        for begin in range(0, len(x), batch_size)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
