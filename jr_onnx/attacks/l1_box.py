"""The nearest point of an l1 ball cut by a box (Croce and Hein, arXiv:2103.01208).

argmin over d of ||d - delta||_2  such that  ||d||_1 <= epsilon,  low <= x + d <= high

d_i = sign(delta_i) * clip(|delta_i| - a, 0, room_i), room_i the way from x_i to its bound, and the
least a >= 0 that fits the ball. Projecting on the ball and then on the box ends short of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
# A sum of float64 may be rounded up: what is scaled to epsilon must stay inside when measured.
_INSIDE = 1 - 1e-12


def project_l1_box(delta: Array, x: Array, epsilon: float, bounds: tuple[float, float]) -> Array:
    """Returns the perturbations nearest to given ones, in the ball and in the box.

    Args:
        delta: `(batch, ...)`.
        x: like delta, inside the bounds.
        epsilon: radius of the ball.
        bounds: smallest and largest value of x plus a perturbation.

    Returns:
        float64, like delta.
    """
    low, high = bounds
    exact = x.astype(np.float64).reshape(len(x), -1)
    flat = delta.astype(np.float64).reshape(len(x), -1)
    size, room = np.abs(flat), np.where(flat > 0, high - exact, exact - low)
    # The norm at a is  sum max(size - a, 0) - sum max(size - room - a, 0):  linear between the
    # corners size and size - room, and falling. Walk down them until it reaches epsilon.
    corners = np.concatenate([size, size - room], axis=1)
    weights = np.concatenate([np.ones_like(size), -np.ones_like(size)], axis=1)
    order = np.argsort(-corners, axis=1)
    corners = np.take_along_axis(corners, order, axis=1)
    weights = np.take_along_axis(weights, order, axis=1)
    count, total = weights.cumsum(axis=1), (weights * corners).cumsum(axis=1)
    reached = total - corners * count >= epsilon * _INSIDE
    before = np.maximum(reached.argmax(axis=1) - 1, 0)[:, None]
    above = np.take_along_axis(total, before, axis=1) - epsilon * _INSIDE
    slope = np.take_along_axis(count, before, axis=1)
    # Without a corner that reaches epsilon, or only below 0, nothing need become smaller.
    crossing = above / np.maximum(slope, 1)
    amount = np.where(reached.any(axis=1, keepdims=True), np.maximum(crossing, 0), 0)
    nearest: Array = np.sign(flat) * np.clip(size - amount, 0, np.maximum(room, 0))
    return nearest.reshape(delta.shape)
