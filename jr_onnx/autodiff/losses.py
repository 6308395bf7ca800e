"""Loss heads: logits z and what they are compared with -> a loss per example and its gradient.

    cross_entropy     -log softmax(z)[y]
    margin            max over j != y of z[j], less z[y]: positive where misclassified
    cw:K              min(margin, K), K the confidence, 0 in plain cw      arXiv:1608.04644
    dlr               margin / (z_(1) - z_(3))                             arXiv:2003.01690
    targeted_dlr      (z[t] - z[y]) / (z_(1) - (z_(3) + z_(4)) / 2)        arXiv:2003.01690
    logit_difference  z[t] - z[y]
    drift             sum((z - r)^2), for models that are no classifiers

with labels y, targets t, reference outputs r, and z_(1) >= z_(2) >= ... the sorted logits. An
attack makes each of them larger. The gradients are closed forms, in float32, or float64 where z is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from onnx import TensorProto

from jr_onnx.autodiff.emit import Emitter, Term
from jr_onnx.errors import ParameterError

LABELS, TARGETS, REFERENCE = "labels", "targets", "reference"
# AutoAttack's guard against logits that are all alike.
_TINY = 1e-12


@dataclass(frozen=True)
class Head:
    """Where a loss is appended.

    Attributes:
        emit: takes the nodes.
        z: `(batch, classes)`; for drift the output in its own shape.
        given: the names of the graph's inputs `labels`, `targets`, `reference`.
        rank: of z.
    """

    emit: Emitter
    z: Term
    given: Mapping[str, str]
    rank: int

    def hot(self, classes: str) -> Term:
        """Returns a class for each example, int64 `(batch,)`, as rows of 0 and 1 shaped like z."""
        emit = self.emit
        number = emit.op("Gather", emit.op("Shape", self.z.name), emit.integers(1), axis=0)
        values = emit.constant(np.array([0, 1], np.float32))
        # onnxruntime has no float64 kernel of OneHot.
        rows = emit.op("OneHot", classes, number, values, axis=1)
        return Term(emit, rows, TensorProto.FLOAT).to(self.z.element)

    def sorted(self, count: int) -> list[str]:
        """Returns the classes of the largest logits, each int64 `(batch,)`."""
        emit, z = self.emit, self.z.name
        if emit.opset >= 10:
            _, classes = emit.node("TopK", [z, emit.integers(count)], [None, None], axis=1)
        else:
            _, classes = emit.node("TopK", [z], [None, None], axis=1, k=count)
        places = [emit.scalar(at, TensorProto.INT64) for at in range(count)]
        return [emit.op("Gather", classes, at, axis=1) for at in places]

    def rival(self) -> Term:
        """Returns the best class other than the label, as rows of 0 and 1."""
        first, second = self.sorted(2)
        is_label = self.emit.op("Equal", first, self.given[LABELS])
        return self.hot(self.emit.op("Where", is_label, second, first))

    def along(self, direction: Term) -> tuple[Term, Term]:
        """Returns the loss sum(z * direction) and its gradient."""
        return (self.z * direction).sum([1]), direction

    def over(self, direction: Term, scale: Term) -> tuple[Term, Term]:
        """Returns the loss sum(z * direction) / sum(z * scale) and its gradient."""
        above, below = (self.z * direction).sum([1]), (self.z * scale).sum([1]) + _TINY
        loss = above / below
        return loss, (direction - loss * scale) / below


def cross_entropy(head: Head) -> tuple[Term, Term]:
    """-log softmax(z)[y]; its gradient softmax(z) - onehot(y).

    For the label that is p - 1, which is 0 for p near 1, or less the others' p, which is not.
    """
    log_p, hot = head.z.op("LogSoftmax", axis=1), head.hot(head.given[LABELS])
    others = log_p.op("Exp") * (1 - hot)
    return -(log_p * hot).sum([1]), others - hot * others.sum([1])


def margin(head: Head) -> tuple[Term, Term]:
    """The best other logit, less the label's."""
    return head.along(head.rival() - head.hot(head.given[LABELS]))


def carlini_wagner(head: Head, *, confidence: float) -> tuple[Term, Term]:
    """The margin, as far as it is wanted."""
    loss, gradient = margin(head)
    return loss.op("Min", confidence), gradient * (loss < confidence)


def dlr(head: Head) -> tuple[Term, Term]:
    """Difference of logits ratio: does not change when the logits are scaled or shifted."""
    first, _, third = map(head.hot, head.sorted(3))
    return head.over(head.rival() - head.hot(head.given[LABELS]), first - third)


def targeted_dlr(head: Head) -> tuple[Term, Term]:
    """The same towards a target."""
    first, _, third, fourth = map(head.hot, head.sorted(4))
    return head.over(_towards_target(head), first - 0.5 * (third + fourth))


def logit_difference(head: Head) -> tuple[Term, Term]:
    """The target's logit, less the label's."""
    return head.along(_towards_target(head))


def drift(head: Head) -> tuple[Term, Term]:
    """Squared distance of the outputs from given ones."""
    far = head.z - head.z.like(head.given[REFERENCE])
    squares = far * far
    # No axes would mean all of them.
    return squares.sum(range(1, head.rank)) if head.rank > 1 else squares, 2 * far


def _towards_target(head: Head) -> Term:
    return head.hot(head.given[TARGETS]) - head.hot(head.given[LABELS])


@dataclass(frozen=True)
class Loss:
    """A loss, and what it needs.

    Attributes:
        build: appends the loss, `(batch, 1, ...)`, and its gradient, shaped like z.
        compares: the inputs it reads: `labels`, `targets`, `reference`.
        classes: the fewest classes it is defined for; 0 where any output will do.
    """

    build: Callable[[Head], tuple[Term, Term]]
    compares: tuple[str, ...] = (LABELS,)
    classes: int = 2


LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(cross_entropy),
    "margin": Loss(margin),
    "cw": Loss(partial(carlini_wagner, confidence=0.0)),
    "dlr": Loss(dlr, classes=3),
    "targeted_dlr": Loss(targeted_dlr, (LABELS, TARGETS), classes=4),
    "logit_difference": Loss(logit_difference, (LABELS, TARGETS)),
    "drift": Loss(drift, (REFERENCE,), classes=0),
}


def classes_of(shape: Sequence[int | str | None] | None) -> int | None:
    """Returns how many outputs an example has, None if that is not known.

    Args:
        shape: of the outputs of a batch.
    """
    sizes = [] if shape is None else [size for size in shape[1:] if isinstance(size, int)]
    return math.prod(sizes) if shape is not None and len(sizes) == len(shape[1:]) else None


def find_loss(name: str) -> Loss:
    """Returns a loss by its name in `LOSSES`, or `cw:K` with a confidence K >= 0.

    Raises:
        ParameterError: there is none.
    """
    base, colon, number = name.partition(":")
    if not colon and name in LOSSES:
        return LOSSES[name]
    try:
        confidence = float(number)
    except ValueError:
        confidence = math.nan
    if base != "cw" or not 0 <= confidence < math.inf:
        raise ParameterError(f"loss must be one of {', '.join(LOSSES)} or cw:K, got {name!r}")
    return replace(LOSSES["cw"], build=partial(carlini_wagner, confidence=confidence))
