"""Do the nodes of a site compute the jump? They are run alone, and compared bitwise with numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from jr_onnx.errors import ParameterError, SessionError
from jr_onnx.model import Constants, Model
from jr_onnx.rewrite.forms import FUNCTION_DOMAIN, Jump, effective_jump, jump_relu
from jr_onnx.rewrite.sites import INTEGERS, Site
from jr_onnx.session import Session, installed

Array = np.ndarray[Any, Any]
_RANDOM_PATTERNS = 200_000
_NEIGHBOURS = 50


def compare_numbers(
    site: Site, nodes: Sequence[onnx.NodeProto], jump: Jump, constants: Constants, hardened: Model
) -> tuple[str | None, int]:
    """Runs the nodes of a site on special values, and compares them with numpy.

    Args:
        site: the activation as it was.
        nodes: what it became, with the constants that it uses.
        jump: as the tensor holds it.
        constants: of the original, among them the bounds of its Clip.
        hardened: the model with the local function that the nodes may call.

    Returns:
        What differs, None if nothing does; and how many values were compared.

    Raises:
        SessionError: onnxruntime is not installed.
    """
    known = site.tensor.element
    compared = 0
    for element in [known] if known else _possible(site, jump):
        x = _inputs(site, jump, helper.tensor_dtype_to_np_dtype(element))
        expected = jump_relu(x, jump, site.cap)
        try:
            got = _run(_alone(site, nodes, element, constants, hardened), x, site)
        except Exception as error:  # whatever damaged nodes make onnxruntime and onnx say
            if not installed():
                raise
            words = " ".join(str(error).split())
            return f"its nodes do not run ({type(error).__name__}: {words:.200})", compared
        compared += x.size
        if (got.dtype, got.shape) != (x.dtype, x.shape):
            return (
                f"its nodes give {got.dtype} {got.shape}, expected {x.dtype} {x.shape}",
                compared,
            )
        bits = np.dtype(f"u{x.dtype.itemsize}")
        with np.errstate(invalid="ignore"):
            number = x == x  # what a form makes of NaN is its own affair
        differs = (expected.view(bits) != got.view(bits)) & number
        if not known and not isinstance(jump, tuple):
            # Where the type is known at run time only, onnxruntime may compare float16 tensors with
            # the jump as it was before rounding: they differ at the rounded jump alone.
            differs &= x != np.asarray(jump, x.dtype)
        if differs.any():
            first = np.flatnonzero(differs)[0]
            return (
                f"{differs.sum()} of {x.size} values differ from the jump {jump!r} of the "
                f"manifest: at x = {x.flat[first]} expected {expected.flat[first]}, got "
                f"{got.flat[first]}",
                compared,
            )
    return None, compared


def _possible(site: Site, jump: Jump) -> list[int]:
    """Returns the types that a local function may be called with, and that can hold the jump."""
    integers = INTEGERS if site.opset >= 14 and site.cap is None else ()
    return [
        element
        for element in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, *integers)
        if _holds(helper.tensor_dtype_to_np_dtype(element), jump)
    ]


def _holds(dtype: np.dtype[Any], jump: Jump) -> bool:
    try:
        effective_jump(jump, dtype)
    except ParameterError:
        return False
    return True


def _run(model: Model, x: Array, site: Site) -> Array:
    try:
        return Session(model, device="cpu").run({site.x: x})[0]
    except SessionError:
        if not installed():
            raise
        # No kernel for this type (bfloat16, int16): the form is evaluated by onnx itself.
        with np.errstate(invalid="ignore"):
            return np.asarray(ReferenceEvaluator(model.proto).run(None, {site.x: x})[0])  # type: ignore[index]


def _inputs(site: Site, jump: Jump, dtype: np.dtype[Any]) -> Array:
    """Returns inputs with the site's rank; `(n, channels, 1, ...)` for a jump per channel."""
    rank = len(site.tensor.shape) if site.tensor.shape is not None else 1
    if not isinstance(jump, tuple):
        x = probes(dtype, jump)
        return x.reshape(-1, *[1] * (rank - 1))
    columns = [probes(dtype, one, _RANDOM_PATTERNS // len(jump)) for one in jump]
    return np.stack(columns, axis=1).reshape(-1, len(jump), *[1] * (rank - 2))


def probes(dtype: np.dtype[Any], jump: float, count: int = _RANDOM_PATTERNS) -> Array:
    """Returns 1-d inputs that tell forms apart.

    Specials, denormals, the jump and its 50 neighbours on either side, random bit patterns (every
    pattern for types of 16 bits or fewer).

    Args:
        dtype: of the result.
        jump: around which to look closely.
        count: how many random patterns.
    """
    bits = np.dtype(f"u{dtype.itemsize}")
    if dtype.itemsize <= 2:
        return np.arange(2 ** (8 * dtype.itemsize), dtype=np.uint32).astype(bits).view(dtype)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        special = np.array([0, 1, limits.min, limits.max], dtype)
        near = np.arange(-_NEIGHBOURS, _NEIGHBOURS + 1, dtype=np.int64) + int(jump)
        around = np.clip(near, limits.min, limits.max).astype(dtype)
    else:
        info = np.finfo(dtype)
        tiny = [info.tiny, info.smallest_subnormal, info.max, np.inf, np.nan]
        special = np.array([0.0, -0.0, *tiny, *(-value for value in tiny)], dtype)
        around = _neighbours(np.asarray(jump, dtype))
    rng = np.random.default_rng(0)
    random = rng.integers(0, np.iinfo(bits).max, count, bits, endpoint=True)
    return np.concatenate([special, around, random.view(dtype)])


def _neighbours(jump: Array) -> Array:
    up, down = [jump], [jump]
    for _ in range(_NEIGHBOURS):
        up.append(np.nextafter(up[-1], np.inf, dtype=jump.dtype))
        down.append(np.nextafter(down[-1], -np.inf, dtype=jump.dtype))
    return np.array([*down, *up], jump.dtype)


def _alone(
    site: Site,
    nodes: Sequence[onnx.NodeProto],
    element: int,
    constants: Constants,
    hardened: Model,
) -> Model:
    """Returns a model of the site's new nodes alone, with the bounds of its Clip."""
    rank = len(site.tensor.shape) if site.tensor.shape is not None else 1
    shape = [f"d{axis}" for axis in range(rank)]
    graph = helper.make_graph(
        nodes,
        "site",
        [helper.make_tensor_value_info(site.x, element, shape)],
        [helper.make_tensor_value_info(site.y, element, shape)],
        _bounds(site, nodes, constants),
    )
    functions = [each for each in hardened.proto.functions if each.domain == FUNCTION_DOMAIN]
    opsets = [helper.make_opsetid("", site.opset)]
    opsets += [helper.make_opsetid(FUNCTION_DOMAIN, 1)] if functions else []
    model = helper.make_model(graph, opset_imports=opsets, functions=functions)
    model.ir_version = max(8, min(hardened.proto.ir_version, 10))
    return Model.of(model)


def _bounds(site: Site, nodes: Sequence[onnx.NodeProto], constants: Constants) -> list[TensorProto]:
    made = {name for node in nodes for name in node.output}
    outside = {name for node in nodes for name in node.input} - made
    bounds = {name: constants.at(site.scope, name) for name in sorted(outside - {"", site.x})}
    return [
        numpy_helper.from_array(value, name) for name, value in bounds.items() if value is not None
    ]
