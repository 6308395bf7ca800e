"""Changes that a camera makes: brightness, contrast, blur, rotation, shift, in steps of severity.

brightness  x +- s * 0.5 (high - low)           contrast  mean + (1 - 0.8 s) (x - mean)
blur        Gaussian, s * 5% of the side        rotation  +- s * 30 degrees
shift       s * 10% of the side, four ways      with severity s = 1 / n, ..., 1
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jr_onnx.attacks.attack import Attack, Classifier
from jr_onnx.attacks.batch import Grid
from jr_onnx.attacks.nearest import check_at_least, misclassified
from jr_onnx.attacks.threat import ThreatModel
from jr_onnx.errors import ParameterError

Array = np.ndarray[Any, Any]
Bounds = tuple[float, float]
# images, severity, bounds -> the corrupted images, one array for each way to do it
Corruption = Callable[[Array, float, Bounds], Iterator[Array]]


@dataclass(frozen=True, kw_only=True)
class Corruptions(Attack):
    """The mildest corruption that changes the class: a check of sanity, not of security.

    No norm bounds a rotation, so epsilon must be inf: the severity is the bound, and the distance
    reported says how far away the point is. Nothing is random.

    Attributes:
        kinds: names in `CORRUPTIONS`; all by default.
        severities: steps of severity.

    References:
        Rotations and shifts as strong as in Engstrom et al. (arXiv:1712.02779); steps of severity
        after Hendrycks and Dietterich (arXiv:1903.12261).
    """

    name = "corruptions"
    uses_gradients = False
    kinds: tuple[str, ...] = ("brightness", "contrast", "blur", "rotation", "shift")
    severities: int = 5

    def __post_init__(self) -> None:
        check_at_least(1, severities=self.severities)
        unknown = [kind for kind in self.kinds if kind not in CORRUPTIONS]
        if unknown or not self.kinds:
            raise ParameterError(
                f"kinds must be some of {', '.join(CORRUPTIONS)}, got {self.kinds!r}"
            )

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
        """Returns the first misclassified corruption of each example, or its last.

        Raises:
            ParameterError: epsilon is finite, or what only an image has is wanted of a vector.
        """
        if np.isfinite(threat.epsilon):
            raise ParameterError(
                f"{self.name} are bounded by their severity, not by a norm: give epsilon inf"
            )
        spatial = [kind for kind in self.kinds if kind in _SPATIAL]
        if spatial and len(x.shape) < 3:
            raise ParameterError(
                f"{', '.join(spatial)} need images, got examples of shape {x.shape[1:]}: choose "
                "other kinds"
            )
        grid, x_adv, alive = Grid(x.shape[1:]), x.copy(), np.arange(len(x))
        for number in range(self.severities):
            for kind in self.kinds:
                severity = (number + 1) / self.severities
                images = grid.images(x).astype(np.float64)
                # All ways of one kind are made for all examples: they are few and cheap.
                for corrupted in CORRUPTIONS[kind](images, severity, threat.bounds):
                    points = grid.restore(corrupted)[alive]
                    x_adv[alive] = threat.project(points, x[alive])
                    alive = alive[~misclassified(target.logits(x_adv[alive]), y[alive])]
                    if not len(alive):
                        return x_adv
        return x_adv


def brightness(images: Array, severity: float, bounds: Bounds) -> Iterator[Array]:
    """Adds the same to every element."""
    for sign in (1, -1):
        yield images + sign * severity * 0.5 * (bounds[1] - bounds[0])


def contrast(images: Array, severity: float, bounds: Bounds) -> Iterator[Array]:
    """Draws every element to the image's mean."""
    mean = images.mean(axis=(1, 2, 3), keepdims=True)
    yield mean + (1 - 0.8 * severity) * (images - mean)


def blur(images: Array, severity: float, bounds: Bounds) -> Iterator[Array]:
    """Averages over the neighbours; beyond the edge is the edge."""
    rows, columns = (_averages(side, severity * 0.05 * side) for side in images.shape[2:])
    yield rows @ images @ columns.T


def rotation(images: Array, severity: float, bounds: Bounds) -> Iterator[Array]:
    """Rotates around the centre."""
    row, column = _positions(images)
    middle_row, middle_column = row.mean(), column.mean()
    row, column = row - middle_row, column - middle_column
    for sign in (1, -1):
        angle = np.deg2rad(sign * severity * 30)
        cosine, sine = np.cos(angle), np.sin(angle)
        yield resample(
            images,
            middle_row + cosine * row - sine * column,
            middle_column + sine * row + cosine * column,
        )


def shift(images: Array, severity: float, bounds: Bounds) -> Iterator[Array]:
    """Moves the image up, down, left and right."""
    row, column = _positions(images)
    height, width = images.shape[2:]
    for sign in (1, -1):
        yield resample(images, row + sign * severity * 0.1 * height, column)
        yield resample(images, row, column + sign * severity * 0.1 * width)


CORRUPTIONS: dict[str, Corruption] = {
    each.__name__: each for each in (brightness, contrast, blur, rotation, shift)
}
_SPATIAL = ("blur", "rotation", "shift")


def resample(images: Array, row: Array, column: Array) -> Array:
    """Returns the images at other positions, bilinearly; beyond the edge is the edge.

    Args:
        images: `(batch, channels, height, width)`.
        row: float `(height, width)`, where to look.
        column: the same.
    """
    row = np.clip(row, 0, images.shape[2] - 1)
    column = np.clip(column, 0, images.shape[3] - 1)
    top, left = np.floor(row).astype(int), np.floor(column).astype(int)
    bottom = np.minimum(top + 1, images.shape[2] - 1)
    right = np.minimum(left + 1, images.shape[3] - 1)
    down, along = row - top, column - left
    above = images[:, :, top, left] * (1 - along) + images[:, :, top, right] * along
    below = images[:, :, bottom, left] * (1 - along) + images[:, :, bottom, right] * along
    mixed: Array = above * (1 - down) + below * down
    return mixed


def _positions(images: Array) -> tuple[Array, Array]:
    row, column = np.indices(images.shape[2:]).astype(np.float64)
    return row, column


def _averages(side: int, width: float) -> Array:
    """Returns the Gaussian weights of each position for each, `(side, side)`, edges repeated."""
    reach = 3 * side
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (offsets / width) ** 2)
    averages = np.zeros((side, side))
    for position in range(side):
        np.add.at(averages[position], np.clip(position + offsets, 0, side - 1), weights)
    normed: Array = averages / weights.sum()
    return normed
