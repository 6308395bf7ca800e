"""Slopes for the way back through a jump; the way forward stays what it is.

The jump y = x [x > t] has the slope [x > t] almost everywhere, which does not know that a step over
t is worth t. An attack may take another one (BPDA, arXiv:1802.00420):

    exact       [x > t]
    relu        [x > 0]                              the slope before the jump was there
    identity    1
    soft:T      s + x s (1 - s) / T                  that of x s, s = sigmoid((x - t) / T)

The soft slope carries the step itself, spread over a few T. T is in units of the activations, or a
share of the jump: `soft:30%`. It is at least the machine epsilon of their type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from onnx import TensorProto

from jr_onnx.autodiff.emit import Term
from jr_onnx.errors import ParameterError

SURROGATES = ("exact", "relu", "identity", "soft:WIDTH", "soft:PERCENT%")
# The least width, for a share of a jump that is 0, too: what the type can tell from 1 + it, so that
# x / T stays finite.
_NARROW: dict[int, float] = {
    TensorProto.FLOAT16: 2.0**-10,
    TensorProto.BFLOAT16: 2.0**-7,
    TensorProto.FLOAT: 2.0**-23,
    TensorProto.DOUBLE: 2.0**-52,
}


@dataclass(frozen=True)
class Surrogate:
    """One of the slopes.

    Attributes:
        name: `exact`, `relu`, `identity` or `soft`.
        width: T of `soft`, in units of the activations; 0 for the others.
        relative: whether the width is a share of the jump instead.
    """

    name: str
    width: float = 0.0
    relative: bool = False

    @classmethod
    def parse(cls, text: str) -> Surrogate:
        """Reads `exact`, `relu`, `identity`, `soft:0.3`, or `soft:30%`.

        Raises:
            ParameterError: it is none of these, or the width is not finite and positive.
        """
        name, colon, width = text.partition(":")
        relative = width.endswith("%")
        try:
            number = float(width.removesuffix("%")) if colon else 0.0
        except ValueError:
            name, number = "", 0.0
        found = cls(name, number / 100 if relative else number, relative)
        soft = found.name == "soft" and math.isfinite(found.width) and found.width > 0
        if not soft and (colon or name not in SURROGATES[:3]):
            raise ParameterError(
                f"surrogate must be one of {', '.join(SURROGATES)} (a width > 0 in units of the "
                f"activations, say soft:0.3), got {text!r}"
            )
        return found

    def slope(self, x: Term, threshold: Term) -> Term | None:
        """Appends the slope at x, None where it is 1."""
        if self.name == "identity":
            return None
        if self.name == "relu":
            return x > 0
        least = _NARROW.get(x.element, _NARROW[TensorProto.FLOAT])
        absolute = max(self.width, least)
        width = (self.width * threshold).op("Max", least) if self.relative else absolute
        s = ((x - threshold) / width).op("Sigmoid")
        return s + x * (s * (1 - s)) / width


EXACT = Surrogate("exact")
# For all jumps, or by site path or pattern of such.
Surrogates = str | Mapping[str, str]


def choose(surrogate: Surrogates, paths: list[str]) -> dict[str, Surrogate]:
    """Returns the slope for each jump.

    Args:
        surrogate: one for all, or by site path (`*` and `?` as in file names); sites that no
            pattern names are exact, and the last pattern that names one counts.
        paths: of the jumps in the model.

    Raises:
        ParameterError: no such surrogate, or a pattern that names no jump.
    """
    if isinstance(surrogate, str):
        return dict.fromkeys(paths, Surrogate.parse(surrogate))
    chosen = dict.fromkeys(paths, EXACT)
    for pattern, text in surrogate.items():
        named = [path for path in paths if path == pattern or fnmatchcase(path, pattern)]
        if not named:
            raise ParameterError(
                f"surrogate: {pattern!r} names no jump of the model, which has "
                f"{', '.join(paths) or 'none'}"
            )
        chosen.update(dict.fromkeys(named, Surrogate.parse(text)))
    return chosen
