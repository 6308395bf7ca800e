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

from jr_onnx.attacks.threat import ThreatModel

Array = np.ndarray[Any, Any]
# told how many examples more are finished
Progress = Callable[[int], None]
DEFAULT_BATCH_SIZE = 64


class Gradients(Protocol):
    """One forward and backward pass of a classifier, as arrays."""

    @property
    def logits(self) -> Array:
        """`(batch, classes)`."""

    @property
    def gradient(self) -> Array:
        """Like x."""


class Classifier(Protocol):
    """What an attack needs: `jr_onnx.Target` is one, a few lines of numpy are another."""

    def logits(self, x: Array) -> Array:
        """Returns `(batch, classes)`."""

    def differentiate(self, x: Array, y: Array, *, loss: str = ...) -> Gradients:
        """Returns logits, and the gradient of the loss of (x, y) for x."""


class Counts(NamedTuple):
    """How often the model ran, in examples."""

    forward: int
    gradient: int


@dataclass(frozen=True)
class AttackResult:
    """What an attack found, confirmed by a fresh forward pass.

    Attributes:
        x_adv: like x; x itself where the attack failed or the example was wrong already.
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

    def logits(self, x: Array) -> Array:
        """As the classifier's own."""
        self.forward += len(x)
        return self._inner.logits(x)

    def differentiate(self, x: Array, y: Array, *, loss: str = "cross_entropy") -> Gradients:
        """As the classifier's own."""
        self.gradient += len(x)
        return self._inner.differentiate(x, y, loss=loss)


class Attack(ABC):
    """An attack is a search; the base class does what must not depend on the search's honesty."""

    name: str

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
            batch_size: examples attacked together.
            progress: called with the number of examples just finished.
        """
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
                    counting, x[chosen], y[chosen], threat, seed=seed, indices=chosen
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
