"""What attacks on a batch share: the loop, random numbers of each example, scores, grids.

Goal       away from the label, or towards one class
climb      x_{t+1} = project(move(x_t, loss, gradient)); an example leaves when the goal is reached
in_turn    one search after another (restarts, targets) on the examples that are left
scores     logits, or log(p) where the model gives probabilities
Grid       (batch, ...) <-> (batch, channels, height, width)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jr_onnx.attacks.attack import Classifier
from jr_onnx.attacks.nearest import chosen_targets, misclassified, reached
from jr_onnx.attacks.threat import ThreatModel
from jr_onnx.autodiff.losses import LABELS, LOSSES, find_loss
from jr_onnx.errors import ParameterError

Array = np.ndarray[Any, Any]

# rows (the examples still there), their points, losses, gradients -> their next points
Move = Callable[[Array, Array, Array, Array], Array]


@dataclass(frozen=True)
class Goal:
    """What the examples of a batch are to become.

    Attributes:
        classes: int `(batch,)`: their labels, or the classes they are to be given.
        towards: whether it is the latter.
    """

    classes: Array
    towards: bool = False

    @classmethod
    def of(
        cls, chosen: Sequence[int] | None, target: Classifier, x: Array, y: Array, indices: Array
    ) -> Goal:
        """Returns away from the labels, or towards the classes that were chosen for all the data.

        Raises:
            ParameterError: they do not fit the examples or the model.
        """
        if chosen is None:
            return cls(y)
        classes = target.logits(x[:1]).shape[1]
        return cls(chosen_targets(chosen, y, indices, classes), towards=True)

    @property
    def sign(self) -> int:
        """Of the gradient of a loss that grows away from the classes."""
        return -1 if self.towards else 1

    def reached(self, z: Array, rows: Array) -> Array:
        """Whether the examples `rows`, of these logits, are what they are to become, bool."""
        return (reached if self.towards else misclassified)(z, self.classes[rows])


def climb(
    target: Classifier,
    x: Array,
    goal: Goal,
    threat: ThreatModel,
    move: Move,
    *,
    start: Array,
    steps: int,
    loss: str,
    targets: Array | None = None,
    leave: bool = True,
) -> Array:
    """Moves each example uphill until the goal is reached, at most `steps` times.

    Args:
        target: the classifier.
        x: `(batch, ...)`.
        goal: for each of them.
        threat: into which every point is projected.
        move: makes the next point.
        start: like x, the first points.
        steps: gradients, and moves, of each example.
        loss: a name in `jr_onnx.autodiff.LOSSES`.
        targets: int `(batch,)`, where the loss has one.
        leave: whether an example leaves the batch at its goal.

    Returns:
        Like x: the first point of each example at its goal, or its last, which was not tried.
    """
    # In float16 a short step would be lost in rounding: the path is finer than what the model sees.
    path, centre, x_adv = finer(start).copy(), finer(x), start.astype(x.dtype)
    alive, same = np.arange(len(x)), path.dtype == x.dtype
    for _ in range(steps):
        aims = None if targets is None else targets[alive]
        found = target.differentiate(x_adv[alive], goal.classes[alive], loss=loss, targets=aims)
        kept = ~goal.reached(found.logits, alive) if leave else np.ones(len(alive), bool)
        alive = alive[kept]
        if not len(alive):
            break
        uphill = goal.sign * found.gradient[kept]
        moved = move(alive, path[alive], goal.sign * found.loss[kept], uphill)
        path[alive] = threat.project(moved, centre[alive])
        x_adv[alive] = path[alive] if same else threat.project(path[alive], x[alive])
    return x_adv


def finer(x: Array) -> Array:
    """Returns x in float32 where it is float16, else as it is."""
    return x.astype(np.promote_types(x.dtype, np.float32), copy=False)


def in_turn(
    target: Classifier, x: Array, goal: Goal, searches: Iterable[Callable[[Array], Array]]
) -> Array:
    """Runs each search on the examples that the ones before did not bring to their goal.

    Args:
        target: the classifier.
        x: `(batch, ...)`.
        goal: for each of them.
        searches: int `(rows,)`, the examples that are left -> a candidate for each.

    Returns:
        Like x: the point of an example at its goal, else the last candidate.
    """
    x_adv, left = x.copy(), np.arange(len(x))
    for number, search in enumerate(searches):
        if number:
            left = left[~goal.reached(target.logits(x_adv[left]), left)]
        if not len(left):
            break
        x_adv[left] = search(left)
    return x_adv


def generators(seed: int, indices: Array) -> list[np.random.Generator]:
    """Returns a generator for each example, whatever batch it is in."""
    return [np.random.default_rng((seed, int(index))) for index in indices]


def reseeded(seed: int, number: int) -> int:
    """Returns the seed of one run of several; the first, number 0, has the seed itself."""
    if number == 0:
        return seed
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0])


def radius(attack: str, threat: ThreatModel) -> float:
    """Returns epsilon.

    Raises:
        ParameterError: it is inf, and the attack's steps are in units of it.
    """
    if not np.isfinite(threat.epsilon):
        raise ParameterError(f"{attack} needs a finite epsilon, got {threat.epsilon}")
    return threat.epsilon


def check_loss(loss: str, *, aimed: bool = False) -> None:
    """Compares a loss with those that need nothing but the labels.

    Args:
        loss: its name.
        aimed: whether it is to fall for a class that is aimed at, instead of rising for the label.

    Raises:
        ParameterError: there is no such loss, or it has a target or a reference; or it is flat, or
            all but flat, far from the class that is aimed at.
    """
    if aimed and loss not in ("cross_entropy", "margin"):
        raise ParameterError(
            f"with target_classes the loss must be cross_entropy or margin, got {loss!r}"
        )
    if find_loss(loss).compares != (LABELS,):
        names = ", ".join(name for name, each in LOSSES.items() if each.compares == (LABELS,))
        raise ParameterError(f"loss must be one of {names} or cw:K, got {loss!r}")


def check_classes(
    attack: str, loss: str, classes: int, instead: str = "the loss cross_entropy or margin"
) -> None:
    """Compares the number of classes with what a loss is defined for.

    Raises:
        ParameterError: there are too few.
    """
    least = find_loss(loss).classes
    if classes < least:
        raise ParameterError(
            f"{attack} with the loss {loss} needs {least} classes, the model has {classes}: take "
            f"{instead}"
        )


def check_classes_of(attack: str, loss: str, target: Classifier, x: Array) -> None:
    """The same for a model; costs one forward pass of one example where the loss is demanding.

    Raises:
        ParameterError: it has too few classes.
    """
    if find_loss(loss).classes > LOSSES["margin"].classes:
        check_classes(attack, loss, target.logits(x[:1]).shape[1])


def scores(target: Classifier, x: Array) -> Array:
    """Returns logits up to a constant per example, float64 `(batch, classes)`.

    A black-box attack sees what the model gives. After a softmax that is p = exp(z) / sum(exp(z)),
    and log(p) differs from the logits z by a constant per example, which no margin notices; margins
    of p itself vanish where the model is sure.
    """
    z = target.logits(x)
    unit = np.finfo(z.dtype)
    exact = z.astype(np.float64)
    # Row by row: what a row means must not depend on the batch. Logits all but never look like it.
    near_one = np.abs(exact.sum(axis=1) - 1) <= 4 * z.shape[1] * float(unit.eps)
    probable = np.logical_and(near_one, exact.min(axis=1) >= 0)
    logs = np.log(np.maximum(exact, float(unit.smallest_subnormal)))
    return np.where(probable[:, None], logs, exact)


class Draws:
    """Uniform numbers from each example's own generator, the same in any batch.

    Args:
        generators: one for each example.
        count: numbers taken at a time.
    """

    _block = 64

    def __init__(self, generators: list[np.random.Generator], count: int) -> None:
        self._generators, self._count = generators, count
        self._numbers = np.empty((len(generators), self._block, count))
        self._used = self._block

    def take(self, rows: Array) -> Array:
        """Returns numbers of [0, 1), `(rows, count)`; rows that left do not come back."""
        if self._used == self._block:
            for row in rows:
                self._numbers[row] = self._generators[row].random((self._block, self._count))
            self._used = 0
        self._used += 1
        taken: Array = self._numbers[rows, self._used - 1]
        return taken


@dataclass(frozen=True)
class Grid:
    """How examples are laid out as images; a flat vector is a row of pixels.

    Attributes:
        shape: of one example: `(..., height, width)`, or `(..., height, width, channels)` with 1,
            3 or 4 channels where the first reading has none of these.
    """

    shape: tuple[int, ...]

    @property
    def channels_last(self) -> bool:
        """Whether the last dimension is the channels."""
        usual = (1, 3, 4)
        return len(self.shape) > 2 and self.shape[-1] in usual and self.shape[-3] not in usual

    def images(self, x: Array) -> Array:
        """Returns x as `(batch, channels, height, width)`."""
        if self.channels_last:
            x = np.moveaxis(x, -1, 1)
        height, width = (1, 1, *x.shape[1:])[-2:]
        return x.reshape(len(x), -1, height, width)

    def restore(self, images: Array) -> Array:
        """Returns images as `(batch, *shape)`."""
        if not self.channels_last:
            return images.reshape(len(images), *self.shape)
        first = images.reshape(len(images), self.shape[-1], *self.shape[:-1])
        return np.moveaxis(first, 1, -1)
