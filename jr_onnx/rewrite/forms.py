"""Node patterns that compute y = x if x > jump else +0.

    sub-greater-where   s = Sub(x, jump); m = Greater(s, 0); y = Where(m, x, 0)
    greater-where                         m = Greater(x, jump); y = Where(m, x, 0)

Both give +0 for NaN and -inf. With gradual underflow (IEEE 754) x - jump is zero only where
x = jump, so the two agree bitwise for floats. Sub wraps for integers (int8: -128 - 1 = 127), so
integer tensors take greater-where.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import helper

from jr_onnx.errors import ParameterError
from jr_onnx.model import NodeBuilder
from jr_onnx.rewrite.sites import INTEGERS, Site

Array = np.ndarray[Any, Any]
Form = Callable[[NodeBuilder, str, str, Array], None]
DEFAULT_FORM = "sub-greater-where"


def jump_relu(x: Array, jump: float) -> Array:
    """The definition, in numpy: what every form must equal bitwise for x that is not NaN.

    Args:
        x: any shape, float or integer dtype.
        jump: finite and not negative; rounded to the dtype of x (see `effective_jump`).

    Returns:
        Same shape and dtype as x; +0 where x is NaN.

    References:
        Erichson, Yao, Mahoney: JumpReLU (arXiv:1904.03750), eq. 2.
    """
    return np.where(x > effective_jump(jump, x.dtype), x, np.zeros((), x.dtype))


def effective_jump(jump: float, dtype: np.dtype[Any]) -> Array:
    """Returns the jump that a tensor of this dtype can hold, as a 0-d array.

    Rounded to nearest for floats; for integers the floor, since x > 1.5 means x > 1.

    Raises:
        ParameterError: the jump is NaN, infinite, negative, or too large for the dtype.
    """
    if not np.isfinite(jump) or jump < 0:
        raise ParameterError(f"jump must be a finite number >= 0, got {jump}")
    integer = np.issubdtype(dtype, np.integer)
    too_large = f"jump {jump} is too large for {dtype} tensors"
    if integer and jump > np.iinfo(dtype).max:
        raise ParameterError(too_large)
    with np.errstate(over="ignore"):
        rounded = np.asarray(np.floor(jump) if integer else jump).astype(dtype)
    if not integer and not np.isfinite(rounded.astype(np.float64)):
        raise ParameterError(too_large)
    return rounded


def sub_greater_where(build: NodeBuilder, x: str, y: str, jump: Array) -> None:
    """Appends the nodes of the paper's definition, spelled with operators of opset 9."""
    threshold = build.constant(jump)
    zero = build.constant(np.zeros((), jump.dtype))
    shifted = build.op("Sub", x, threshold)
    mask = build.op("Greater", shifted, zero)
    build.op("Where", mask, x, zero, output=y)


def greater_where(build: NodeBuilder, x: str, y: str, jump: Array) -> None:
    """Appends the same without the subtraction."""
    threshold = build.constant(jump)
    zero = build.constant(np.zeros((), jump.dtype))
    mask = build.op("Greater", x, threshold)
    build.op("Where", mask, x, zero, output=y)


FORMS: dict[str, Form] = {
    "sub-greater-where": sub_greater_where,
    "greater-where": greater_where,
}


def form_for(site: Site, wanted: str) -> str:
    """Returns the name of the form that is exact for the site's element type."""
    if wanted not in FORMS:
        raise ParameterError(f"form must be one of {', '.join(FORMS)}, got {wanted!r}")
    if site.tensor.element in INTEGERS and wanted == "sub-greater-where":
        return "greater-where"
    return wanted


def site_jump(site: Site, jump: float) -> Array:
    """Returns the effective jump in the site's element type."""
    return effective_jump(jump, helper.tensor_dtype_to_np_dtype(site.tensor.element))
