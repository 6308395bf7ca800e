"""Node patterns that compute y = x if x > jump else +0.

    sub-greater-where   y = Where(Greater(Sub(x, jump), 0), x, 0)
    greater-where       y = Where(Greater(x, jump), x, 0)
    lessequal-where     y = Where(LessOrEqual(x, jump), 0, x)       NaN stays NaN
    thresholded-relu    y = ThresholdedRelu<alpha = jump>(x)
    mul-cast            y = Abs(Relu(x)) * Cast(Greater(x, jump))   NaN stays NaN; opset 7
    function            y = jr_onnx.JumpReLU(x, jump)               a local function

All agree bitwise for every x that is not NaN, -inf included. With gradual underflow (IEEE 754)
x - jump is zero only where x = jump, so the subtraction loses nothing; it would wrap for integers
(int8: -128 - 1 = 127), so what may be an integer tensor never takes it. A site with an upper bound
keeps its Clip: where x > jump its result is passed on instead of x.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from jr_onnx.errors import ParameterError
from jr_onnx.model import Names, NodeBuilder, Tensor, dtype_name
from jr_onnx.rewrite.sites import INTEGERS, Site

Array = np.ndarray[Any, Any]
# One number, or one for each channel (axis 1).
Jump = float | tuple[float, ...]
FUNCTION_DOMAIN, FUNCTION_NAME = "jr_onnx", "JumpReLU"
NAME_PREFIX = "jr_onnx/v1"


def as_jump(value: object, what: str = "jump") -> Jump:
    """Returns a jump as a Python number, or as a tuple of them.

    Args:
        value: a number, or a sequence or 1-d array of one number for each channel; finite, >= 0.
        what: how messages call it.

    Raises:
        ParameterError: it is none.
    """
    value = value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
    several = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    listed: Sequence[Any] = value if several else [value]  # type: ignore[assignment]
    given = [each.item() if isinstance(each, np.generic) else each for each in listed]
    if not given or not all(map(_is_number, given)):
        raise ParameterError(
            f"{what} must be a number or a list of numbers (one a channel), got "
            f"{reprlib.repr(value)}"
        )
    # Compared before it is converted: an integer may be larger than any float.
    if not all(0 <= each <= sys.float_info.max for each in given):
        raise ParameterError(f"{what} must be a finite number >= 0, got {reprlib.repr(value)}")
    numbers = tuple(float(each) + 0.0 for each in given)  # -0.0 is 0.0
    return numbers if several else numbers[0]


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


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


def effective_jump(jump: Jump, dtype: np.dtype[Any]) -> Array:
    """Returns the jump that a tensor of this dtype can hold: 0-d, or `(channels,)`.

    Rounded to nearest for floats; for integers the floor, since x > 1.5 means x > 1.

    Raises:
        ParameterError: the jump is NaN, infinite, negative, or too large for the dtype.
    """
    return _effective(as_jump(jump), dtype)


@lru_cache(maxsize=1024)
def _effective(jump: Jump, dtype: np.dtype[Any]) -> Array:
    exact = np.asarray(jump, np.float64)
    integer = dtype.kind in "iu"
    # The float next to the largest int64 is above it.
    beyond = float(np.iinfo(dtype).max) + 1 if integer else np.inf
    with np.errstate(over="ignore"):
        rounded = np.floor(exact) if integer else exact.astype(dtype).astype(np.float64)
    if (rounded >= beyond).any():
        raise ParameterError(f"jump {jump} is too large for {dtype} tensors")
    array: Array = np.array(rounded, dtype)
    array.flags.writeable = False  # one array for all who ask
    return array


class SharedConstants:
    """The constants of the new nodes in one list: each is made once, where it is first used.

    They are Constant nodes: unlike initializers those are allowed in functions and at IR 3.
    """

    def __init__(self, names: Names) -> None:
        self._names = names
        self._made: dict[tuple[object, ...], str] = {}
        self._new: list[onnx.NodeProto] = []

    def name(self, role: str, array: Array) -> str:
        """Returns the name of the constant, called `jr_onnx/v1/role` where that is free."""
        key = (role, array.dtype, array.shape, array.tobytes())
        if key not in self._made:
            name = self._names.fresh(f"{NAME_PREFIX}/{role}")
            self._made[key] = output = self._names.fresh(f"{name}:0")
            value = numpy_helper.from_array(array)
            self._new.append(helper.make_node("Constant", [], [output], name=name, value=value))
        return self._made[key]

    def take(self) -> list[onnx.NodeProto]:
        """Returns the nodes that are new since the last call."""
        new, self._new = self._new, []
        return new


@dataclass(frozen=True)
class Spot:
    """Where a form goes.

    Attributes:
        site: the activation.
        node: its node, kept by sites with a cap.
        jump: the jump as asked for.
        build: takes the new nodes.
        constants: those that the sites of a list of nodes share.
    """

    site: Site
    node: onnx.NodeProto
    jump: Jump
    build: NodeBuilder
    constants: SharedConstants

    @property
    def typed(self) -> bool:
        """Whether the element type is known; if not, constants adapt to x at run time."""
        return bool(self.site.tensor.element)

    def threshold(self) -> str:
        """Returns the jump as a constant, shaped to broadcast along axis 1."""
        return self._constant("jump", self.jump)

    def zero(self) -> str:
        """Returns +0 as a constant."""
        return self._constant("zero", 0.0)

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

    def _constant(self, role: str, value: Jump) -> str:
        if not self.typed:
            exact = self.constants.name(role, np.asarray(value, np.float64))
            return self.build.op("CastLike", exact, self.site.x)
        array = effective_jump(value, self.site.tensor.dtype)
        if array.ndim:
            array = array.reshape(-1, *[1] * (len(self.site.tensor.shape or ()) - 2))
        return self.constants.name(role, array)


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


_WITHOUT_SUB = ("greater-where", "lessequal-where", "function")
_SMALL_INTEGERS = (TensorProto.INT8, TensorProto.INT16)


def why_not(form: str, site: Site, jump: Jump, ir_version: int) -> str | None:
    """Says why a form cannot be written at a site, None if it can."""
    element, opset = site.tensor.element, site.opset
    if not element and form not in _WITHOUT_SUB:
        return "its element type must be known, and it is not before the model runs"
    if element in INTEGERS and form not in _WITHOUT_SUB:
        return "integer tensors take greater-where: Sub wraps, the others know floats only"
    if form == "function" and site.in_function:
        return "it is in a local function, which cannot call another one of ours"
    if form == "function" and ir_version < 8:
        return f"local functions need IR 8, the model has {ir_version}"
    if form == "thresholded-relu":
        if isinstance(jump, tuple):
            return "ThresholdedRelu takes one number, not one for each channel"
        alpha = float(effective_jump(jump, site.tensor.dtype))
        if float(np.float32(alpha)) != alpha:
            return f"alpha is a float32, which cannot hold the jump {alpha!r}"
    least = _least_opset(form, element)
    return f"it needs opset {least}, the model has {opset}" if opset < least else None


def _least_opset(form: str, element: int) -> int:
    """Returns the first opset whose operators take the element type."""
    bfloat16 = element == TensorProto.BFLOAT16
    if form == "mul-cast":
        return 13 if bfloat16 else 7
    if form == "thresholded-relu":
        return 22 if bfloat16 else 10
    if form == "function" and element in _SMALL_INTEGERS:
        return 14
    if bfloat16:
        return 16
    return 12 if form == "lessequal-where" else 9


def check_jump(site: Site, jump: Jump) -> Jump:
    """Compares a jump with the site, and returns the one that its tensor can hold.

    Raises:
        ParameterError: it reaches the cap, or has not one number a channel.
    """
    try:
        effective = _rounded(jump, site.tensor.element)
    except ParameterError as error:
        raise ParameterError(f"{site.path}: {error}") from error
    highest = max(effective) if isinstance(effective, tuple) else effective
    if site.cap is not None and highest >= site.cap:
        raise ParameterError(
            f"{site.path}: jump {highest:g} must be below the upper bound {site.cap:g} of this "
            f"{site.op_type}"
        )
    if not isinstance(jump, tuple):
        return effective
    shape = site.tensor.shape
    if shape is None or len(shape) < 2:
        raise ParameterError(
            f"{site.path}: a jump per channel needs a tensor (batch, channels, ...), its shape is "
            f"{'unknown' if shape is None else shape}"
        )
    if not isinstance(shape[1], int):
        raise ParameterError(
            f"{site.path}: a jump per channel needs a fixed number of channels, it is "
            f"{shape[1] or 'unknown'}"
        )
    if shape[1] != len(jump):
        raise ParameterError(f"{site.path}: {len(jump)} jumps for {shape[1]} channels")
    return effective


@lru_cache(maxsize=1024)
def _rounded(jump: Jump, element: int) -> Jump:
    """Returns the effective jump as Python numbers; that of a type not known yet is exact."""
    dtype = Tensor(element).dtype if element else np.dtype(np.float64)
    rounded = effective_jump(jump, dtype)
    return tuple(map(float, rounded)) if rounded.ndim else float(rounded)


@dataclass(frozen=True)
class Choice:
    """A form, and why it was taken.

    Attributes:
        form: a name in `FORMS`.
        reason: for a reader of the report.
    """

    form: str
    reason: str


# The forms to try for a runtime, the best first, and why that: measured for onnxruntime
# (docs/benchmarks/forms.md), from the operator tables of the others.
TARGETS: dict[str, tuple[Sequence[str], str]] = {
    "portable": (
        ("sub-greater-where", "greater-where", "mul-cast"),
        "operators that every runtime has",
    ),
    "onnxruntime": (
        ("thresholded-relu", "mul-cast", "greater-where"),
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
# ONNX has ThresholdedRelu for more types than any of these runtimes.
_KERNELS = (TensorProto.FLOAT, TensorProto.FLOAT16)


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
    check_names(form, target)
    if form is not None:
        reason = why_not(form, site, jump, ir_version)
        if reason:
            raise ParameterError(f"{site.path}: form {form} is not possible: {reason}")
        return Choice(form, "as asked for")
    names, known = TARGETS[target]
    reasons: list[str] = []
    for name in names:
        reason = why_not(name, site, jump, ir_version)
        if reason is None and name == "thresholded-relu" and site.tensor.element not in _KERNELS:
            reason = f"{target} has no kernel of it for {dtype_name(site.tensor.element)}"
        if reason is None:
            return Choice(name, "; ".join(reasons) or known)
        reasons.append(f"not {name}: {reason}")
    raise ParameterError(f"{site.path}: no form is possible: {'; '.join(reasons)}")


def check_names(form: str | None, target: str) -> None:
    """Raises `ParameterError` where there is no such form or target."""
    if form is not None and form not in tuple(FORMS):
        raise ParameterError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if target not in tuple(TARGETS):
        raise ParameterError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
