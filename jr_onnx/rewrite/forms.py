"""Node patterns that compute y = x if x > jump else +0.

    sub-greater-where   y = Where(Greater(Sub(x, jump), 0), x, 0)
    greater-where       y = Where(Greater(x, jump), x, 0)
    lessequal-where     y = Where(LessOrEqual(x, jump), 0, x)       NaN stays NaN
    thresholded-relu    y = ThresholdedRelu<alpha = jump>(x)
    mul-cast            y = Abs(Relu(x)) * Cast(Greater(x, jump))   NaN stays NaN; opset 7
    function            y = jr_onnx.JumpReLU(x, jump)               a local function

All agree bitwise for every x that is not NaN, -inf included. With gradual underflow (IEEE 754)
x - jump is zero only where x = jump, so the subtraction loses nothing; it would wrap for integers
(int8: -128 - 1 = 127), so integer tensors never take it. A site with an upper bound keeps its Clip:
where x > jump its result is passed on instead of x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from jr_onnx.errors import ParameterError
from jr_onnx.model import NodeBuilder
from jr_onnx.rewrite.sites import INTEGERS, Site

Array = np.ndarray[Any, Any]
# One number, or one for each channel (axis 1).
Jump = float | tuple[float, ...]
FUNCTION_DOMAIN, FUNCTION_NAME = "jr_onnx", "JumpReLU"


def jump_relu(x: Array, jump: Jump, cap: float | None = None) -> Array:
    """The definition, in numpy: what every form must equal bitwise for x that is not NaN.

    Args:
        x: any shape, float or integer dtype; `(batch, channels, ...)` for a jump per channel.
        jump: finite and not negative; rounded to the dtype of x (see `effective_jump`).
        cap: upper bound of the result, above the jump.

    Returns:
        Same shape and dtype as x; +0 where x is NaN.

    References:
        Erichson, Yao, Mahoney: JumpReLU (arXiv:1904.03750), eq. 2.
    """
    threshold = effective_jump(jump, x.dtype)
    if threshold.ndim:
        threshold = threshold.reshape(-1, *[1] * (x.ndim - 2))
    passed = x if cap is None else np.minimum(x, np.asarray(cap, x.dtype))
    with np.errstate(invalid="ignore"):  # NaN is not above the jump, and that is all
        return np.where(x > threshold, passed, np.zeros((), x.dtype))


@lru_cache(maxsize=1024)
def effective_jump(jump: Jump, dtype: np.dtype[Any]) -> Array:
    """Returns the jump that a tensor of this dtype can hold: 0-d, or `(channels,)`.

    Rounded to nearest for floats; for integers the floor, since x > 1.5 means x > 1.

    Raises:
        ParameterError: the jump is NaN, infinite, negative, or too large for the dtype.
    """
    exact = np.asarray(np.asarray(jump, np.float64) + 0.0)  # -0.0 is 0.0 to the cache, so to us too
    if not (np.isfinite(exact) & (exact >= 0)).all():
        raise ParameterError(f"jump must be a finite number >= 0, got {jump}")
    integer = dtype.kind in "iu"
    largest = float(np.iinfo(dtype).max) if integer else np.inf
    with np.errstate(over="ignore"):
        rounded = np.floor(exact) if integer else exact.astype(dtype).astype(np.float64)
    if (rounded > largest).any() or not np.isfinite(rounded).all():
        raise ParameterError(f"jump {jump} is too large for {dtype} tensors")
    array: Array = np.array(rounded, dtype)
    array.flags.writeable = False  # one array for all who ask
    return array


def plain(jump: Array) -> Jump:
    """Returns an effective jump as Python numbers."""
    return tuple(float(value) for value in jump) if jump.ndim else float(jump)


@dataclass(frozen=True)
class Spot:
    """Where a form goes.

    Attributes:
        site: the activation.
        node: its node, kept by sites with a cap.
        jump: the jump as asked for.
        build: takes the new nodes.
    """

    site: Site
    node: onnx.NodeProto
    jump: Jump
    build: NodeBuilder

    @property
    def typed(self) -> bool:
        """Whether the element type is known; if not, constants adapt to x at run time."""
        return bool(self.site.tensor.element)

    def threshold(self) -> str:
        """Appends the jump as a constant, shaped to broadcast along axis 1."""
        return self._constant(self.jump)

    def zero(self) -> str:
        """Appends +0."""
        return self._constant(0.0)

    def passed(self) -> str:
        """Returns what y is above the jump: x, or what the Clip that has a cap makes of it."""
        return self.site.x if self.site.cap is None else self.kept(self.site.x, None)

    def kept(self, x: str, y: str | None) -> str:
        """Appends the original node with another input and output; a fresh output if None."""
        self.build.nodes.append(onnx.NodeProto())
        copy = self.build.nodes[-1]
        copy.CopyFrom(self.node)
        del copy.metadata_props[:]
        copy.ClearField("doc_string")
        copy.name = self.build.name("clip")
        copy.input[0], copy.output[0] = x, y or self.build.name("clip:0")
        return str(copy.output[0])

    def _constant(self, value: Jump) -> str:
        if not self.typed:
            return self.build.op(
                "CastLike", self.build.constant(np.asarray(value, np.float64)), self.site.x
            )
        array = effective_jump(value, self.site.tensor.dtype)
        if array.ndim:
            array = array.reshape(-1, *[1] * (len(self.site.tensor.shape or ()) - 2))
        return self.build.constant(array)


def _sub_greater_where(spot: Spot) -> None:
    threshold, zero = spot.threshold(), spot.zero()
    mask = spot.build.op("Greater", spot.build.op("Sub", spot.site.x, threshold), zero)
    spot.build.op("Where", mask, spot.passed(), zero, output=spot.site.y)


def _greater_where(spot: Spot) -> None:
    threshold, zero = spot.threshold(), spot.zero()
    mask = spot.build.op("Greater", spot.site.x, threshold)
    spot.build.op("Where", mask, spot.passed(), zero, output=spot.site.y)


def _lessequal_where(spot: Spot) -> None:
    threshold, zero = spot.threshold(), spot.zero()
    mask = spot.build.op("LessOrEqual", spot.site.x, threshold)
    spot.build.op("Where", mask, zero, spot.passed(), output=spot.site.y)


def _thresholded_relu(spot: Spot) -> None:
    site = spot.site
    # onnxruntime compares float16 tensors with alpha as it stands, so alpha is rounded here.
    alpha = float(effective_jump(spot.jump, site.tensor.dtype))
    if site.cap is None:
        spot.build.op("ThresholdedRelu", site.x, alpha=alpha, output=site.y)
    else:
        spot.kept(spot.build.op("ThresholdedRelu", site.x, alpha=alpha), site.y)


def _mul_cast(spot: Spot) -> None:
    build, site = spot.build, spot.site
    mask = build.op("Greater", site.x, spot.threshold())
    # Relu turns -inf into 0, which a product with 0 needs; Abs turns its -0 into +0.
    passed = build.op("Relu", site.x) if site.cap is None else spot.passed()
    ones = build.op("Cast", mask, to=site.tensor.element)
    build.op("Mul", build.op("Abs", passed), ones, output=site.y)


def _function(spot: Spot) -> None:
    site = spot.site
    call = spot.build.node(
        FUNCTION_NAME,
        (site.x, spot.threshold()),
        (site.y if site.cap is None else None,),
        domain=FUNCTION_DOMAIN,
    )
    if site.cap is not None:
        spot.kept(call[0], site.y)


def jump_function(opset: int) -> onnx.FunctionProto:
    """Returns the local function of the form `function`, for any element type."""
    nodes = [
        helper.make_node("Greater", ["x", "jump"], ["mask"]),
        helper.make_node("Sub", ["jump", "jump"], ["zero"]),
        helper.make_node("Where", ["mask", "x", "zero"], ["y"]),
    ]
    return helper.make_function(
        FUNCTION_DOMAIN,
        FUNCTION_NAME,
        ["x", "jump"],
        ["y"],
        nodes,
        [helper.make_opsetid("", opset)],
        doc_string="y = x if x > jump else 0 (JumpReLU, arXiv:1904.03750)",
    )


FORMS: dict[str, Callable[[Spot], None]] = {
    "sub-greater-where": _sub_greater_where,
    "greater-where": _greater_where,
    "lessequal-where": _lessequal_where,
    "thresholded-relu": _thresholded_relu,
    "mul-cast": _mul_cast,
    "function": _function,
}


def why_not(form: str, site: Site, jump: Jump, ir_version: int) -> str | None:
    """Says why a form cannot be written at a site, None if it can."""
    element, opset = site.tensor.element, site.opset
    if element in INTEGERS and form not in ("greater-where", "lessequal-where", "function"):
        return "integer tensors take greater-where: Sub wraps, the others know floats only"
    if form == "mul-cast":
        least = 13 if element == TensorProto.BFLOAT16 else 7
        if not element:
            return "Cast needs to know the element type"
    elif form == "thresholded-relu":
        least = 22 if element == TensorProto.BFLOAT16 else 10
        if not element or isinstance(jump, tuple):
            return "ThresholdedRelu takes one number, and its element type must be known"
        alpha = float(effective_jump(jump, site.tensor.dtype))
        if float(np.float32(alpha)) != alpha:
            return f"alpha is a float32, which cannot hold the jump {alpha!r}"
    else:
        least = 12 if form == "lessequal-where" else 9
        least = 16 if element == TensorProto.BFLOAT16 else least
    if form == "function" and (ir_version < 8 or site.in_function):
        return f"local functions need IR 8 (this is {ir_version}), and are not nested here"
    return f"it needs opset {least}, the model has {opset}" if opset < least else None


def check_jump(site: Site, jump: Jump) -> None:
    """Compares a jump with the site.

    Raises:
        ParameterError: it reaches the cap, or has not one number a channel.
    """
    dtype = site.tensor.dtype if site.tensor.element else np.dtype(np.float64)
    highest = effective_jump(jump, dtype).max()
    if site.cap is not None and highest >= site.cap:
        raise ParameterError(
            f"{site.path}: jump {highest:g} must be below the upper bound {site.cap:g} of this "
            f"{site.op_type}"
        )
    if not isinstance(jump, tuple):
        return
    shape = site.tensor.shape
    if shape is None or len(shape) < 2:
        raise ParameterError(
            f"{site.path}: a jump per channel needs a tensor (batch, channels, ...), its shape is "
            f"{'unknown' if shape is None else shape}"
        )
    if isinstance(shape[1], int) and shape[1] != len(jump):
        raise ParameterError(f"{site.path}: {len(jump)} jumps for {shape[1]} channels")


@dataclass(frozen=True)
class Choice:
    """A form, and why it was taken.

    Attributes:
        form: a name in `FORMS`.
        reason: for a reader of the report.
    """

    form: str
    reason: str


# The forms to try for a runtime, the best first, and what is known of it (from its operator table).
TARGETS: dict[str, tuple[Sequence[str], str]] = {
    "portable": (
        ("sub-greater-where", "greater-where", "mul-cast"),
        "operators that every runtime has",
    ),
    "onnxruntime": (
        ("thresholded-relu", "greater-where", "mul-cast"),
        "one kernel instead of three, and Where is single-threaded on the CPU",
    ),
    "tensorrt": (
        ("thresholded-relu", "greater-where", "mul-cast"),
        "TensorRT has ThresholdedRelu in fp32, fp16 and int8",
    ),
    "directml": (
        ("thresholded-relu", "greater-where", "mul-cast"),
        "DirectML has ThresholdedRelu",
    ),
    "openvino": (
        ("greater-where", "mul-cast"),
        "OpenVINO lowers ThresholdedRelu to a product, which makes NaN of -inf",
    ),
    "coreml": (
        ("greater-where", "mul-cast"),
        "Core ML has none of the forms: these nodes run on the CPU",
    ),
}


def choose(site: Site, jump: Jump, ir_version: int, *, form: str | None, target: str) -> Choice:
    """Picks the form for a site.

    Args:
        site: the activation.
        jump: its jump.
        ir_version: of the model.
        form: the form asked for; None leaves it to the target.
        target: a name in `TARGETS`.

    Raises:
        ParameterError: no such form or target, or the form cannot be written here.
    """
    if form is not None and form not in FORMS:
        raise ParameterError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if target not in TARGETS:
        raise ParameterError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    if form is not None:
        reason = why_not(form, site, jump, ir_version)
        if reason:
            raise ParameterError(f"{site.path}: form {form} is not possible: {reason}")
        return Choice(form, "as asked for")
    names, known = TARGETS[target]
    reasons: list[str] = []
    for name in names:
        reason = why_not(name, site, jump, ir_version)
        if reason is None:
            return Choice(name, "; ".join([*reasons, known]))
        reasons.append(f"not {name}: {reason}")
    raise ParameterError(f"{site.path}: no form is possible: {'; '.join(reasons)}")
