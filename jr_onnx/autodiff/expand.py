"""Operators that are formulas of simpler ones, written out before the walk back.

    FusedConv<activation="Relu">(x, w, b)      Relu(Conv(x, w, b))            an `expansion` of ours
    RotaryEmbedding(x, cos, sin)               Split, Mul, Sub, Concat, ...   its ONNX function body
    If<then_branch, else_branch>(true)         the then-branch

Only nodes that vary with the input are touched. An operator takes ONNX's own function body where
it has neither an expansion nor a gradient rule. What computes in integers, or has a body that is
chosen or repeated at run time, stays as it is; the walk back refuses it with the reason given here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx import TensorProto, helper

from jr_onnx.autodiff.emit import Emitter, Term
from jr_onnx.autodiff.flow import captured, depends_on, used_in
from jr_onnx.autodiff.registry import Call, find_rule, is_zero_gradient, since_version
from jr_onnx.errors import InvalidModelError
from jr_onnx.model import Constants, Model, Names, Tensor, ValueTypes
from jr_onnx.model.graphs import ONNX_DOMAINS

# Appends nodes, returns the outputs; None leaves the node to ONNX's function body, if any.
Expansion = Callable[[Call], Sequence[Term | None] | None]

# Why a node can have no gradient, by the names of its outputs.
Refused = dict[tuple[str, ...], str]

ANY_VERSION = 0
_expansions: dict[tuple[str, str, int], Expansion] = {}
_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_CALLED = "jr_onnx.expanded"  # domain of the functions that stand for nodes until they are inlined
_WITH_BODIES = ("If", "Loop", "Scan", "SequenceMap")
# fmt: off
_INTEGER = (
    "ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul",
)
# fmt: on


def expansion(op_type: str, *since: int, domain: str = "") -> Callable[[Expansion], Expansion]:
    """Registers how to write an operator out.

    The function gets a `Call` without cotangents, and returns the outputs it has appended, in
    order. An output that it does not return, or returns as None, must not be used.

    Args:
        op_type: the operator.
        since: the since-versions that it is right for, all if none is given; the opsets for what
            onnx does not know.
        domain: the operator's domain.

    Raises:
        ValueError: there is an expansion already.
    """

    def register(function: Expansion) -> Expansion:
        for version in since or (ANY_VERSION,):
            key = (domain, op_type, version)
            if key in _expansions:
                raise ValueError(f"an expansion for {key} is registered already")
            _expansions[key] = function
        return function

    return register


def expand(proto: onnx.ModelProto, x: str) -> tuple[onnx.ModelProto, Refused]:
    """Writes out the operators that vary with x and have no gradient as they are.

    Args:
        proto: a model without local functions; it is changed.
        x: the input to differentiate by.

    Returns:
        The model, or another one that takes its place; and why nodes that it still has can have no
        gradient.
    """
    expander = _Expander(proto, x)
    if not any(map(expander.wants, proto.graph.node)):
        return proto, {}
    nodes = [made for node in proto.graph.node for made in expander.made_of(node)]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    if not expander.functions:
        return proto, expander.problems
    proto.functions.extend(expander.functions)
    proto.opset_import.add(domain=_CALLED, version=1)
    return expand(inlined(proto), x)  # a body may need it again


def inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the model with its local functions written out.

    Raises:
        InvalidModelError: a call, or an If, has more values than its body.
    """
    try:
        return onnx.inliner.inline_local_functions(proto)
    except RuntimeError as error:
        reason = str(error).rpartition(": ")[2]
        raise InvalidModelError(
            f"{proto.graph.name}: a node does not fit the body that it calls ({reason})"
        ) from error


class _Expander:
    """Rewrites the nodes of one graph, in order.

    Attributes:
        functions: that the new nodes call.
        problems: why nodes cannot be differentiated, by the names of their outputs.
    """

    def __init__(self, proto: onnx.ModelProto, x: str) -> None:
        self.functions: list[onnx.FunctionProto] = []
        self.problems: Refused = {}
        self._proto = proto
        self._opsets = {entry.domain: entry.version for entry in proto.opset_import}
        self._active = depends_on(proto.graph, x)
        self._elements: dict[str, int] = {}

    def wants(self, node: onnx.NodeProto) -> bool:
        """Whether the node varies with x and has no gradient as it is."""
        used = {*node.input, *captured(node)}
        if is_zero_gradient(node) or self._active.isdisjoint(used):
            return False
        if node.op_type in _WITH_BODIES or self._expansion(node):
            return True
        active = (at for at, name in enumerate(node.input) if name in self._active)
        return any(find_rule(node, self._opsets, at) is None for at in active)

    def made_of(self, node: onnx.NodeProto) -> Sequence[onnx.NodeProto]:
        """Returns the nodes that take its place, itself where nothing can."""
        self._note_elements(node)
        if not self.wants(node):
            return [node]
        try:
            expanded = self._expanded(node)
            if expanded is not None:
                return expanded
            if node.op_type == "If":
                return [self._branch(node)]
            _refuse(node)
            return [self._body(node)]
        except NotImplementedError as reason:
            self.problems[tuple(node.output)] = str(reason)
            return [node]

    # What is cached is made for the first node that needs it: most models have none.
    @cached_property
    def _model(self) -> Model:
        return Model.of(self._proto)

    @cached_property
    def _types(self) -> ValueTypes:
        return ValueTypes(self._model)

    @cached_property
    def _constants(self) -> Constants:
        return Constants(self._model)

    @cached_property
    def _emit(self) -> Emitter:
        return Emitter(Names.of(self._proto), "expanded", self._model.scopes[0].opset)

    def _constant(self, name: str) -> np.ndarray[Any, Any] | None:
        return self._constants.value(self._model.scopes[0], name)

    def _tensor(self, name: str) -> Tensor:
        known = self._types.of(self._model.scopes[0], name)
        return known if known.element else Tensor(self._elements.get(name, 0), known.shape)

    def _note_elements(self, node: onnx.NodeProto) -> None:
        """Fills in what onnx cannot infer after an operator that it does not know.

        Shapes and masks it infers all the same: what is left has the type of a float input.
        """
        elements = [self._tensor(name).element for name in node.input if name]
        found = next((element for element in elements if element in _FLOATS), 0)
        self._elements.update(dict.fromkeys(node.output, found))

    def _expansion(self, node: onnx.NodeProto) -> Expansion | None:
        domain = "" if node.domain in ONNX_DOMAINS else node.domain
        exact = _expansions.get((domain, node.op_type, since_version(node, self._opsets)))
        return exact or _expansions.get((domain, node.op_type, ANY_VERSION))

    def _expanded(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        formula = self._expansion(node)
        if formula is None:
            return None
        tensors = {name: self._tensor(name) for name in (*node.input, *node.output)}
        before = len(self._emit.nodes)
        results = formula(Call(node, self._emit, (), 0, tensors, self._constant))
        if results is None:
            return None
        given = [result.name if result else "" for result in results]
        named = {name: output for name, output in zip(given, node.output, strict=False) if output}
        made = self._emit.nodes[before:]
        for each in made:
            each.input[:] = [named.get(name, name) for name in each.input]
            each.output[:] = [named.get(name, name) for name in each.output]
        return made

    def _branch(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """Returns a call of the branch that a fixed condition takes."""
        condition = self._constant(node.input[0])
        if condition is None:
            _refuse(node)
            return node
        chosen = "then_branch" if condition.all() else "else_branch"
        branch = next(entry.g for entry in node.attribute if entry.name == chosen)
        weights = [
            helper.make_node("Constant", [], [tensor.name], value=tensor)
            for tensor in branch.initializer
        ]
        nodes = [*weights, *branch.node]
        own = {"", *(name for inner in nodes for name in inner.output)}
        inputs = [name for name in dict.fromkeys(used_in(branch)) if name not in own]
        outputs = [output.name for output in branch.output]
        function = helper.make_function(_CALLED, "If", inputs, outputs, nodes, [])
        return self._call(node, function, inputs)

    def _body(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """Returns a call of the function body that the standard gives, the node itself if none."""
        opset = self._emit.opset
        try:
            schema: Any = onnx.defs.get_schema(node.op_type, opset, node.domain)
        except onnx.defs.SchemaError:
            return node
        plain = [at for at in schema.function_opset_versions if at <= opset]
        typed = [at for at in schema.context_dependent_function_opset_versions if at <= opset]
        if plain:
            content = schema.get_function_with_opset_version(max(plain))
        elif typed:
            content = schema.get_context_dependent_function_with_opset_version(
                max(typed), node.SerializeToString(), [self._type(name) for name in node.input]
            )
        else:
            return node
        function = onnx.FunctionProto.FromString(content)
        if not function.node or not _same_in(function, opset):
            return node
        given = {attribute.name for attribute in node.attribute}
        for name, attribute in schema.attributes.items():
            if name not in given and attribute.default_value.type:
                node.attribute.append(attribute.default_value)
        return self._call(node, function, node.input)

    def _type(self, name: str) -> bytes:
        tensor = self._tensor(name) if name else Tensor()
        if not tensor.element:
            return b""
        return bytes(
            helper.make_tensor_type_proto(tensor.element, tensor.shape).SerializeToString()
        )

    def _call(
        self, node: onnx.NodeProto, function: onnx.FunctionProto, inputs: Sequence[str]
    ) -> onnx.NodeProto:
        function.domain, function.name = _CALLED, f"{node.op_type}_{len(self.functions)}"
        del function.opset_import[:]
        function.opset_import.extend(self._proto.opset_import)
        self.functions.append(function)
        called = helper.make_node(function.name, inputs, node.output, node.name, domain=_CALLED)
        if node.op_type != "If":
            called.attribute.extend(node.attribute)
        return called


def _refuse(node: onnx.NodeProto) -> None:
    """Raises the reason why an operator has no gradient, if it is one of those that cannot."""
    if node.domain in ONNX_DOMAINS and node.op_type in _WITH_BODIES:
        raise NotImplementedError(
            "its body uses values that depend on the input, and which one runs, or how often, is "
            "known only at run time. Export the model for a fixed input shape, without control "
            "flow, or let onnxruntime's basic optimization fold it"
        )
    if node.op_type in _INTEGER:
        raise NotImplementedError(
            "it computes in integers. Take the model as it was before quantization, or quantize "
            "in the QDQ format (QuantizeLinear and DequantizeLinear around float operators)"
        )
    if node.domain.startswith("com.microsoft"):
        raise NotImplementedError(
            "onnxruntime's own operator. Take the model as it was before onnxruntime optimized or "
            "quantized it"
        )


def _same_in(function: onnx.FunctionProto, opset: int) -> bool:
    """Whether the operators of a body mean the same in another opset.

    From opset 18 on the operators that bodies are made of have only got more types.
    """
    # Some bodies hold no standard operator, and import none.
    own = (entry.version for entry in function.opset_import if not entry.domain)
    written_for = next(own, opset)
    versions = ({"": written_for}, {"": opset})
    return written_for >= 18 or all(
        len({since_version(node, each) for each in versions}) == 1 for node in function.node
    )
