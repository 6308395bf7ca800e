"""Data -> a part to tune on, and a part to report on that the search never sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jr_onnx.data import digest
from jr_onnx.errors import DataError, ParameterError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Part:
    """Examples and labels.

    Attributes:
        x: `(samples, ...)`.
        y: int `(samples,)`.
    """

    x: Array = field(repr=False)
    y: Array = field(repr=False)

    def __len__(self) -> int:
        return len(self.x)

    @property
    def digest(self) -> str:
        """A hash of examples and labels."""
        return digest(self.x, self.y)


def split(x: Array, y: Array, *, report_share: float, seed: int) -> tuple[Part, Part]:
    """Splits class by class, at random.

    Args:
        x: `(samples, ...)`.
        y: int `(samples,)`.
        report_share: of each class, the share that goes to the report part, above 0, below 1.
        seed: of the draw.

    Returns:
        The part to tune on, and the part to report on, each in the order of the data.

    Raises:
        ParameterError: the share is not between 0 and 1.
        DataError: one of the parts would be empty.
    """
    if not 0 < report_share < 1:
        raise ParameterError(f"report_share must be above 0 and below 1, got {report_share}")
    rng = np.random.default_rng(seed)
    # A random order, then class by class: each class is spread evenly over the ranks.
    order = rng.permutation(len(y))
    order = order[np.argsort(y[order], kind="stable")]
    ranks = np.arange(len(y))
    # Where the running share passes a whole number, an example goes to the report part.
    offset = rng.uniform()
    reported = np.floor((ranks + 1) * report_share + offset) > np.floor(
        ranks * report_share + offset
    )
    held_out = np.zeros(len(y), bool)
    held_out[order[reported]] = True
    if held_out.all() or not held_out.any():
        raise DataError(
            f"{len(y)} example{'' if len(y) == 1 else 's'} cannot be split into a part to tune on "
            "and one to report on: give more, or the two parts in files of their own"
        )
    return Part(x[~held_out], y[~held_out]), Part(x[held_out], y[held_out])


def check_disjoint(tuned: Part, reported: Part) -> None:
    """Refuses two parts that share examples.

    Raises:
        DataError: an example is in both, so that figures of the second would not be held out.
    """
    seen = set(_digests(tuned.x))
    shared = sum(each in seen for each in _digests(reported.x))
    if shared:
        raise DataError(
            f"{shared} of the {len(reported)} examples to report on are among those to tune on: "
            "figures would not be held out. Give other examples, or one file, which is then split"
        )


def _digests(x: Array) -> Iterator[str]:
    # As float32: a picture is the same one in a file of float64.
    return (digest(example.astype(np.float32)) for example in x)
