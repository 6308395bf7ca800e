"""The reverse walk: a forward graph and a loss head -> the graph of the input's gradient."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import onnx
from onnx import TensorProto, helper

from jr_onnx.autodiff.emit import Emitter, Term
from jr_onnx.autodiff.flow import captured, depends_on, spelled
from jr_onnx.autodiff.gelu import find_gelus, slope
from jr_onnx.autodiff.losses import REFERENCE, Head, Loss, classes_of, find_loss
from jr_onnx.autodiff.prepare import Prepared, prepare
from jr_onnx.autodiff.quantization import in_floats
from jr_onnx.autodiff.registry import (
    Call,
    Rule,
    UnknownError,
    find_rule,
    is_zero_gradient,
    opset_for,
)
from jr_onnx.autodiff.scaling import needs_scaling, scaled, unscaled
from jr_onnx.autodiff.surrogates import EXACT, Surrogate, Surrogates, choose
from jr_onnx.errors import JrOnnxError, ModelError, ParameterError, UnsupportedOpError
from jr_onnx.model import Model, Names, Tensor, check
from jr_onnx.model.graphs import opset_of


@dataclass(frozen=True)
class InputGradient:
    """A gradient graph, and the names of its inputs and outputs.

    Attributes:
        model: the graph as a model of its own; inputs of the original other than x stay inputs.
        x: the input that the gradient is for.
        compared: the names of the inputs that the loss reads, by what they are: `labels` and
            `targets`, int64 `(batch,)`, `reference`, like the output.
        logits: `(batch, classes)`: the model's output, or what a final softmax is given.
        loss: float `(batch,)`, per example.
        gradient: shaped like x: d loss[i] / d x[i]; of x's type, float32 for float16.
        ending: what the model makes of the logits: `softmax`, `log_softmax`, or `logits` if it
            gives them as they are.
        jumps: the site paths of the jumps in the model.
    """

    model: Model = field(repr=False)
    x: str
    compared: Mapping[str, str]
    logits: str
    loss: str
    gradient: str
    ending: str
    jumps: tuple[str, ...]


def input_gradient(
    model: Model,
    *,
    loss: str = "cross_entropy",
    surrogate: Surrogates = "exact",
    x: str | None = None,
    output: str | None = None,
) -> InputGradient:
    """Builds the graph that gives logits, loss and d loss / d input in one pass.

    Examples must not influence each other: the graph gives the gradient of the summed losses.

    Example:
        >>> import jr_onnx as jr
        >>> hardened = jr.retrofit(jr.load("sample_models/lenet_mnist.onnx"), jump=1.0).model
        >>> graph = jr.input_gradient(hardened, loss="dlr", surrogate="soft:0.3")
        >>> graph.x, dict(graph.compared), graph.jumps
        ('input', {'labels': 'labels'}, ('relu', 'relu_1', 'relu_2', 'relu_3'))

    Args:
        model: a classifier with an output `(batch, classes)`; any output for `drift`.
        loss: a name in `LOSSES`, or `cw:K`.
        surrogate: the slope of the jumps on the way back: `exact`, `relu`, `identity` or
            `soft:WIDTH` (`soft:0.3`, `soft:30%`); one for all, or by site path or pattern. The way
            forward is not changed.
        x: the input to differentiate by, None for the only one.
        output: the output to differentiate, None for the only one.

    Raises:
        ModelError: inputs or outputs are not what is needed, or do not depend on each other.
        InvalidModelError: the model is damaged.
        UnsupportedOpError: nodes without a rule, all of them listed.
        UnsupportedOpsetError: an opset older than 7.
        ParameterError: no such loss or surrogate, or too few classes for the loss.
    """
    try:
        return _built(model, find_loss(loss), loss, surrogate, x, output)
    except JrOnnxError:
        raise
    except Exception:
        # A node without inputs, a name that is no text: onnx.checker knows them all, and is slow.
        check(model)
        raise


def _built(
    model: Model,
    head: Loss,
    loss: str,
    surrogate: Surrogates,
    x: str | None,
    output: str | None,
) -> InputGradient:
    copy = prepare(model, x=x, output=output)
    slopes = choose(surrogate, [jump.path for jump in copy.jumps.values()])
    names = Names.of(copy.proto)
    emit = Emitter(names, "gradient", opset_of(copy.proto.opset_import))
    compared = {what: names.fresh(what) for what in head.compares}
    z = copy.logits if head.classes else copy.output
    out = copy.known.tensor(z)
    logits, value, start = _loss_head(emit, head, loss, z, out, compared)
    size = None
    if needs_scaling(_all_of(copy)):
        start, size = scaled(start)
    seed = start.to(out.element or start.element).name
    if size is not None or logits != z:
        seed = emit.reshape_like(seed, z)
    cotangents = _walk_back(copy, emit, {z: seed}, slopes)
    if copy.x not in cotangents:
        raise ModelError(
            f"{model.name}: the output {copy.output!r} does not depend on the input {copy.x!r}"
        )
    found = Term(emit, cotangents[copy.x], copy.known.tensor(copy.x).element)
    found = found.op("Identity") if size is None else unscaled(found, size)
    copy.proto.graph.node.extend(emit.nodes)
    _declare(copy, compared, logits, value, found, z)
    paths = tuple(jump.path for jump in copy.jumps.values())
    return InputGradient(
        model.derived(Model.of(copy.proto).content),
        copy.x,
        compared,
        logits,
        value,
        found.name,
        copy.ending,
        paths,
    )


def _loss_head(
    emit: Emitter, loss: Loss, name: str, z: str, tensor: Tensor, compared: Mapping[str, str]
) -> tuple[str, str, Term]:
    """Appends the loss; returns the names of the logits and the loss, and its gradient for them."""
    shape = tensor.shape
    if shape is None and not loss.classes:
        raise ModelError(f"the rank of the output {z!r} is unknown, {name} needs it")
    flat = loss.classes > 0 and (shape is None or len(shape) != 2)
    logits = emit.op("Flatten", z, axis=1) if flat else z
    classes = classes_of(shape)
    if classes is not None and classes < loss.classes:
        way_on = (
            "take margin or cross_entropy"
            if classes > 1
            else "a single output is no logits: give it a second one, 0, or take drift"
        )
        raise ParameterError(
            f"the loss {name} needs {loss.classes} classes, the model has {classes}: {way_on}"
        )
    # float16 is lifted to float32, where the loss does not overflow.
    element = TensorProto.DOUBLE if tensor.element == TensorProto.DOUBLE else TensorProto.FLOAT
    term = Term(emit, logits, tensor.element or element).to(element)
    rank = 2 if loss.classes else len(shape or ())
    value, gradient = loss.build(Head(emit, term, compared, rank))
    return logits, emit.op("Reshape", value.name, emit.integers(-1)), gradient


def _all_of(copy: Prepared) -> Iterator[Tensor]:
    """Yields what is known of all values."""
    yield copy.known.tensor(copy.x)
    for node in copy.proto.graph.node:
        yield from (copy.known.tensor(name) for name in node.output if name)


def _walk_back(
    copy: Prepared, emit: Emitter, cotangents: dict[str, str], slopes: Mapping[str, Surrogate]
) -> dict[str, str]:
    proto, x = copy.proto, copy.x
    active = depends_on(proto.graph, x)
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    problems: list[tuple[str, bool]] = []  # with whether an operator before it may be the cause
    used = set(cotangents)
    made = {name: node for node in proto.graph.node for name in node.output if name}
    gelus = find_gelus(proto.graph, copy.known.constant)

    def add(name: str, contribution: str) -> None:
        before = cotangents.get(name)
        cotangents[name] = emit.op("Add", before, contribution) if before else contribution

    for node in reversed(proto.graph.node):
        if used.isdisjoint(node.output) or is_zero_gradient(node):
            continue
        inputs = (*node.input, *captured(node))
        used.update(inputs)
        refused = copy.refused.get(tuple(node.output))
        if refused:  # even where a rule after it says zero: Cast, of what was computed in integers
            problems.append((f"{spelled(node)}: {refused}", False))
            cotangents.update({name: "" for name in inputs if name in active - cotangents.keys()})
            continue
        if not any(name in cotangents for name in node.output):
            continue
        known = tuple(cotangents.get(name, "") for name in node.output)
        jump = copy.jumps.get(node.output[0])
        # The exact slope is that of the nodes themselves.
        if jump is not None and known[0] and slopes[jump.path] != EXACT:
            if jump.x in active:
                y = copy.known.tensor(node.output[0])
                add(jump.x, jump.cotangent(emit, known[0], y, slopes[jump.path]))
            continue
        gelu = gelus.get(node.output[0])
        if gelu and known[0] and gelu in active:
            x_of = Term(emit, gelu, copy.known.tensor(node.output[0]).element)
            add(gelu, (x_of.like(known[0]) * slope(x_of)).name)
            continue
        tensors = {name: copy.known.tensor(name) for name in (*node.input, *node.output)}
        reasons: dict[str, bool] = {}
        for wrt, name in enumerate(inputs):
            if name not in active:
                continue
            contribution: str | None = None
            try:
                rule = _rule_for(node, opsets, wrt, known)
                call = Call(node, emit, known, wrt, tensors, copy.known.constant, made.get)
                contribution = rule(in_floats(call)) if any(known) else None
            except NotImplementedError as reason:
                reasons[str(reason)] = isinstance(reason, UnknownError)
            if contribution:
                add(name, contribution)
            elif contribution is None:  # the walk goes on, only to find the other problems
                cotangents.setdefault(name, "")
        if reasons:
            problems.append((f"{spelled(node)}: {', '.join(reasons)}", all(reasons.values())))
    if problems:
        inherited = itertools.takewhile(lambda problem: problem[1], reversed(problems))
        causes = [problem for problem in reversed(problems) if not problem[1]]
        raise UnsupportedOpError([text for text, _ in (*inherited, *causes)])
    return cotangents


def _rule_for(
    node: onnx.NodeProto, opsets: dict[str, int], wrt: int, known: tuple[str, ...]
) -> Rule:
    if wrt >= len(node.input):
        raise NotImplementedError("its body uses values that depend on the input")
    found = find_rule(node, opsets, wrt)
    if found is None:
        raise NotImplementedError(f"no rule at opset {opset_for(node, opsets)}, input {wrt}")
    if any(known[1:]) and not found.all_outputs:
        others = [name for name, g in zip(node.output[1:], known[1:], strict=True) if g]
        raise NotImplementedError(f"no rule for the gradient of its outputs {others}")
    return found.rule


def _declare(
    copy: Prepared, compared: Mapping[str, str], logits: str, loss: str, gradient: Term, z: str
) -> None:
    graph, x, out = copy.proto.graph, copy.known.tensor(copy.x), copy.known.tensor(z)
    batch = x.shape[:1] if x.shape else None
    wide = TensorProto.DOUBLE if out.element == TensorProto.DOUBLE else TensorProto.FLOAT
    value_info = helper.make_tensor_value_info
    for what, name in compared.items():
        if what == REFERENCE:
            graph.input.append(value_info(name, wide, out.shape))
        else:
            graph.input.append(value_info(name, TensorProto.INT64, batch))
    if logits not in {value.name for value in graph.output}:
        graph.output.append(value_info(logits, out.element, None))
    graph.output.append(value_info(loss, wide, batch))
    graph.output.append(value_info(gradient.name, gradient.element, x.shape))
