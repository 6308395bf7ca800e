"""Intervals and tests for shares of examples, single and paired."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_Z95 = 1.959963984540054


def wilson(successes: Array) -> tuple[float, float]:
    """Returns the 95% Wilson score interval of a share.

    Args:
        successes: bool `(samples,)`.

    References:
        Wilson: Probable Inference, the Law of Succession, and Statistical Inference (1927).
    """
    n, share = len(successes), float(successes.mean())
    spread = _Z95**2 / n
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_interval(before: Array, after: Array) -> tuple[float, float]:
    """Returns the 95% interval of the change of a share, both measured on the same examples.

    Args:
        before: bool `(samples,)`.
        after: bool `(samples,)`.

    References:
        Newcombe: Improved confidence intervals for the difference between binomial proportions
        based on paired data (1998), method 10.
    """
    n = len(before)
    both, neither = int((before & after).sum()), int((~before & ~after).sum())
    lost, won = int((before & ~after).sum()), int((after & ~before).sum())
    first, second = float(before.mean()), float(after.mean())
    (low1, high1), (low2, high2) = wilson(before), wilson(after)
    spread = math.sqrt((both + lost) * (won + neither) * (both + won) * (lost + neither))
    excess = both * neither - lost * won
    # Newcombe's continuity correction, where the two go together.
    phi = (max(excess - n / 2, 0) if excess > 0 else excess) / spread if spread else 0.0
    change = second - first

    def half(one: float, other: float) -> float:
        return math.sqrt(max(one**2 - 2 * phi * one * other + other**2, 0.0))

    return (
        change - half(second - low2, high1 - first),
        change + half(high2 - second, first - low1),
    )


def mcnemar(lost: int, won: int) -> float:
    """Returns the two-sided p-value of McNemar's exact test.

    >>> mcnemar(0, 0), mcnemar(1, 7)
    (1.0, 0.0703125)

    Args:
        lost: pairs in which only the first succeeds.
        won: pairs in which only the second does.

    References:
        McNemar: Note on the sampling error of the difference between correlated proportions (1947).
    """
    total = lost + won
    tail = sum(math.comb(total, k) for k in range(min(lost, won) + 1))
    return min(1.0, float(2 * tail / 2**total))
