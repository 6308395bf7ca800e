"""From a model to a `gs.Graph`, and from a `gs.Graph` to a hardened copy of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from jr_onnx.errors import ModelError, ParameterError, PostconditionError, RewriteError
from jr_onnx.model import Address, Model, scopes
from jr_onnx.model.model import require_model
from jr_onnx.rewrite import manifest as manifests
from jr_onnx.rewrite.forms import FUNCTION_DOMAIN
from jr_onnx.rewrite.retrofit import JumpSite, retrofit
from jr_onnx.rewrite.select import Selection
from jr_onnx.rewrite.sites import Site, Skipped
from jr_onnx.rewrite.surgeon.finder import find
from jr_onnx.rewrite.surgeon.losses import DROPPABLE, Loss, losses_of, spelled_losses
from jr_onnx.rewrite.surgeon.values import SMALL, lazy_message, leading

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class SurgeonRetrofit:
    """What a retrofit of a `gs.Graph` did.

    Attributes:
        graph: the hardened `gs.Graph`, a copy that shares the weights of the original.
        sites: the activations replaced.
        skipped: those left, each with its reason.
    """

    graph: gs.Graph = field(repr=False)
    sites: tuple[JumpSite, ...]
    skipped: tuple[Skipped, ...]


def import_model(model: Model, *, drop: Collection[str] = ()) -> gs.Graph:
    """Returns the model as a `gs.Graph`, from which gs can export all of it again.

    External data is not read: export the graph into the model's folder, where it will be found.

    Args:
        model: the model, which is not changed.
        drop: what may get lost, names in `DROPPABLE`: `["metadata_props"]`.

    Raises:
        ModelError: gs would lose something, all of which is listed; or it fails.
        ParameterError: `drop` names something else, or the model is no `Model`.
        RewriteError: onnx-graphsurgeon is not installed.
    """
    surgeon = _surgeon()
    require_model(model)
    wrong = sorted(set(drop) - DROPPABLE)
    if wrong:
        known = ", ".join(sorted(DROPPABLE))
        raise ParameterError(f"drop takes {known}; got {', '.join(wrong)}")
    proto = model.parse()
    size = proto.ByteSize()
    proto.DiscardUnknownFields()
    unknown = size - proto.ByteSize()
    with _gs_may_fail(surgeon, model.name, "import"):
        graph = surgeon.import_onnx(proto)
    lost = list(losses_of(proto, _exported(surgeon, graph), "the model"))
    if unknown:
        what = f"{unknown} bytes that onnx {onnx.__version__} does not know"
        lost.append(Loss("unknown fields", what))
    lost = [loss for loss in lost if loss.field not in drop]
    if lost:
        raise ModelError(f"{model.name}: onnx-graphsurgeon would lose {spelled_losses(lost)}")
    return graph


def find_graph_sites(graph: gs.Graph) -> tuple[Site, ...]:
    """Lists the activations to replace, as `find_sites` does of the exported model.

    Operators, constants and neighbours are read off gs's objects by code of its own: a second
    opinion on `find_sites`. Types, shapes and opsets are those of the exported model.

    Raises:
        ModelError: gs cannot export the graph.
        ParameterError: it is no `gs.Graph`.
        RewriteError: onnx-graphsurgeon is not installed.
    """
    surgeon = _surgeon()
    return tuple(find(surgeon, graph, _outline(surgeon, graph)))


def retrofit_graph(
    graph: gs.Graph,
    *,
    jump: float | Sequence[float] | None = None,
    jumps: Mapping[str, float | Sequence[float]] | None = None,
    form: str | None = None,
    target: str = "portable",
    selection: Selection | None = None,
    partial: bool = False,
) -> SurgeonRetrofit:
    """Replaces activations by y = x if x > jump else 0, in a copy of the graph.

    Args:
        graph: a graph that gs can export; it is not changed, nor are its nodes and tensors.
        jump: as of `retrofit`, as are the others.
        jumps: by site path.
        form: the node pattern.
        target: the runtime the graph is for, such as `"tensorrt"`.
        selection: which sites; None for all.
        partial: go on although activations are hidden in fused or quantised operators.

    Raises:
        ModelError: gs cannot export the graph, or onnx.checker refuses what it exports.
        ParameterError: a jump, form or selection makes no sense, or the graph is no `gs.Graph`.
        NothingToRewriteError: no site in the graph, or none selected.
        HiddenActivationError: activations inside fused or quantised operators.
        AlreadyRetrofittedError: the graph has a jump already.
        PostconditionError: the result is not what the engine made; a bug of ours.
        RewriteError: onnx-graphsurgeon is not installed.
    """
    surgeon = _surgeon()
    outline = _outline(surgeon, graph)
    result = retrofit(
        outline,
        jump=jump,
        jumps=jumps,
        form=form,
        target=target,
        selection=selection,
        partial=partial,
    )
    unseen = {done.site for done in result.sites} - set(find(surgeon, graph, outline))
    if unseen:
        paths = ", ".join(sorted(site.path for site in unseen))
        raise PostconditionError(
            f"{outline.name}: {paths} would be replaced, but seen by onnx-graphsurgeon they are no "
            "such activations. Please report this graph"
        )
    hardened = _hardened(surgeon, graph, result.model)
    if _wiring(_outline(surgeon, hardened)) != _wiring(result.model):
        raise PostconditionError(
            f"{outline.name}: the hardened graph does not export to what was asked of it. "
            "Please report this graph"
        )
    return SurgeonRetrofit(hardened, result.sites, result.skipped)


def _surgeon() -> Any:
    try:
        import onnx_graphsurgeon
    except ImportError as error:
        raise RewriteError(
            f"onnx-graphsurgeon cannot be imported ({error}): pip install 'jr-onnx[surgeon]'"
        ) from error
    return onnx_graphsurgeon


def _quiet(surgeon: Any) -> AbstractContextManager[Any]:
    """Keeps gs from printing."""
    logger = surgeon.logger.G_LOGGER
    quiet: AbstractContextManager[Any] = logger.suppress(logger.CRITICAL + 1)
    return quiet


@contextmanager
def _gs_may_fail(surgeon: Any, name: str, what: str) -> Iterator[None]:
    """Says in an error of ours that gs failed."""
    try:
        with _quiet(surgeon):
            yield
    except Exception as error:  # anything: KeyError, UnicodeDecodeError, UnboundLocalError, ...
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ModelError(
            f"{name}: onnx-graphsurgeon cannot {what} this graph ({reason}). "
            "jr_onnx.retrofit takes models that it cannot"
        ) from error


# Copies: of the whole graph, and of the graph without its weights.


def _exported(surgeon: Any, graph: gs.Graph) -> onnx.ModelProto:
    """Returns what gs exports, with stand-ins for the weights: as external data that is nowhere."""
    with _quiet(surgeon):
        copy = _Copy(surgeon, light=True).model(graph)
    with _gs_may_fail(surgeon, graph.name, "export"):
        exported: onnx.ModelProto = surgeon.export_onnx(copy, do_type_check=False)
    return exported


def _outline(surgeon: Any, graph: gs.Graph) -> Model:
    """Returns a valid model of the graph without its weights, for the engine to work on."""
    if not isinstance(graph, surgeon.Graph):
        raise ParameterError(
            f"expected a gs.Graph, got {type(graph).__name__}: import_model of this module makes "
            "one of a Model"
        )
    proto = _exported(surgeon, graph)
    if proto.ir_version < 4:
        # There all initializers were inputs too, and constants all the same. gs drops those inputs.
        weights = {tensor.name for tensor in proto.graph.initializer}
        inputs = [value for value in proto.graph.input if value.name not in weights]
        del proto.graph.input[:]
        proto.graph.input.extend(inputs)
        proto.ir_version = 4
    for scope in scopes(proto):
        for node in scope.graph.node:
            for attribute in node.attribute:
                if attribute.name == "value" and attribute.t.data_location == TensorProto.EXTERNAL:
                    _make_sparse(attribute)
    return Model.of(proto)


def _make_sparse(attribute: onnx.AttributeProto) -> None:
    """Turns a Constant's stand-in into one of zeros: `models.check` has none for external ones."""
    dense = attribute.t
    values = TensorProto(name=dense.name or "left_out", data_type=dense.data_type, dims=[0])
    indices = TensorProto(data_type=TensorProto.INT64, dims=[0])
    attribute.sparse_tensor.CopyFrom(
        onnx.SparseTensorProto(values=values, indices=indices, dims=dense.dims)
    )
    attribute.ClearField("t")
    attribute.name, attribute.type = "sparse_value", onnx.AttributeProto.SPARSE_TENSOR


def _hardened(surgeon: Any, graph: gs.Graph, model: Model) -> gs.Graph:
    manifest = manifests.read(model)
    assert manifest is not None, "a retrofit writes one"
    spans = {(entry.scope, entry.at): entry.span for entry in manifest.entries}
    new_nodes: dict[tuple[Address, int], Sequence[onnx.NodeProto]] = {}

    def collect(address: Address, nodes: Sequence[onnx.NodeProto]) -> None:
        at = index = 0
        while at < len(nodes):
            span = spans.get((address, index), 0)
            if span:
                new_nodes[address, index] = nodes[at : at + span]
            else:
                for which, attribute in enumerate(nodes[at].attribute):
                    collect((*address, index, which, -1), attribute.g.node)
            at, index = at + (span or 1), index + 1

    proto = model.proto
    collect(("graph",), proto.graph.node)
    for number, function in enumerate(proto.functions):
        collect(("function", number), function.node)
    functions = [function for function in proto.functions if function.domain == FUNCTION_DOMAIN]
    with _quiet(surgeon):
        return _Copy(surgeon, new_nodes=new_nodes).model(graph, functions)


def _wiring(model: Model) -> list[tuple[object, ...]]:
    """Returns what is to be equal: all nodes, but for the Constants that gs puts into functions."""
    return [
        (scope.label, node.op_type, node.name, tuple(node.input), tuple(node.output))
        for scope in scopes(model.proto)
        for node in scope.graph.node
        if node.name or node.op_type != "Constant" or not scope.is_function
    ]


class _Copy:
    """Copies a graph with all its nodes and tensors, but for the nodes that others replace.

    `gs.Graph.copy` goes by name, forgets types, producers and where data lies, and shares lists
    that an export appends to.
    """

    def __init__(
        self,
        surgeon: Any,
        *,
        new_nodes: Mapping[tuple[Address, int], Sequence[onnx.NodeProto]] | None = None,
        light: bool = False,
    ) -> None:
        self._gs = surgeon
        self._importer = surgeon.importers.onnx_importer.OnnxImporter
        self._new_nodes = new_nodes or {}
        self._light = light
        self._tensors: dict[int, Any] = {}

    def model(self, graph: gs.Graph, functions: Sequence[onnx.FunctionProto] = ()) -> gs.Graph:
        """Copies the main graph, its functions and its subgraphs.

        Args:
            graph: what to copy.
            functions: to add to those it has.
        """
        copied = [
            self._function(function, ("function", number))
            for number, function in enumerate(graph.functions)
        ]
        copied += [self._importer.import_function(function) for function in functions]
        copy = self._gs.Graph(
            **self._content(graph, ("graph",)),
            producer_name=graph.producer_name,
            producer_version=graph.producer_version,
            functions=copied,
        )
        copy.name_idx = graph.name_idx
        return copy

    def _function(self, function: gs.Function, address: Address) -> gs.Function:
        content = self._content(function, address)
        attributes = {name: self._attribute(value, ()) for name, value in function.attrs.items()}
        return self._gs.Function(domain=function.domain, attrs=attributes, **content)

    def _content(self, graph: gs.Graph, address: Address) -> dict[str, Any]:
        imports = graph.import_domains
        return {
            "nodes": list(self._nodes(graph, address)),
            "inputs": [self._tensor(tensor) for tensor in graph.inputs],
            "outputs": [self._tensor(tensor) for tensor in graph.outputs],
            "name": graph.name,
            "doc_string": graph.doc_string,
            "opset": graph.opset,
            "import_domains": None
            if imports is None
            else [helper.make_opsetid(entry.domain, entry.version) for entry in imports],
            "ir_version": graph.ir_version,
        }

    def _nodes(self, graph: gs.Graph, address: Address) -> Iterator[gs.Node]:
        known: dict[str, gs.Tensor] = {}  # the constants of one site serve the next ones too
        for index, node in enumerate(graph.nodes, leading(self._gs, graph)):
            new = self._new_nodes.get((address, index))
            if new is None:
                yield self._node(node, (*address, index))
                continue
            for tensor in (*node.inputs, *node.outputs):
                known[tensor.name] = self._tensor(tensor)
            for proto in new:
                # Adds the values that are new to `known`.
                yield self._importer.import_node(proto, {}, known, graph.opset, None)

    def _node(self, node: gs.Node, place: Address) -> gs.Node:
        attributes = OrderedDict(
            (name, self._attribute(value, (*place, which, -1)))
            for which, (name, value) in enumerate(node.attrs.items())
        )
        return self._gs.Node(
            op=node.op,
            name=node.name,
            attrs=attributes,
            inputs=[self._tensor(tensor) for tensor in node.inputs],
            outputs=[self._tensor(tensor) for tensor in node.outputs],
            domain=node.domain,
        )

    def _attribute(self, value: Any, address: Address) -> Any:
        if isinstance(value, self._gs.Graph):
            return self._gs.Graph(**self._content(value, address))
        if isinstance(value, self._gs.Tensor):
            return self._tensor(value)
        return list(value) if isinstance(value, list) else value

    def _tensor(self, tensor: gs.Tensor) -> gs.Tensor:
        if id(tensor) not in self._tensors:
            constant = isinstance(tensor, self._gs.Constant)
            copy = self._constant(tensor) if constant else self._variable(tensor)
            self._tensors[id(tensor)] = copy
        return self._tensors[id(tensor)]

    def _variable(self, tensor: gs.Variable) -> gs.Variable:
        shape = None if tensor.shape is None else list(tensor.shape)
        return self._gs.Variable(tensor.name, tensor.dtype, shape, tensor.type)

    def _constant(self, tensor: gs.Constant) -> gs.Constant:
        values = self._light_values(tensor) if self._light else tensor._values
        copy = self._gs.Constant(tensor.name, values, tensor.data_location)
        copy._export_dtype = tensor._export_dtype
        return copy

    def _light_values(self, tensor: gs.Constant) -> Any:
        """Returns a constant's values if they are small, else only their type and shape."""
        lazy = lazy_message(tensor)
        if isinstance(lazy, onnx.SparseTensorProto):
            return tensor._values
        if np.prod(tensor.shape, dtype=np.int64) <= SMALL:
            if lazy is None:
                return tensor._values
            message = TensorProto()
            message.CopyFrom(lazy)  # an export writes the tensor's name into the message
        else:
            to_onnx = self._gs.exporters.onnx_exporter.dtype_to_onnx
            element = to_onnx(tensor.export_dtype) if lazy is None else lazy.data_type
            message = TensorProto(data_type=element, dims=tensor.shape)
            message.data_location = TensorProto.EXTERNAL
            message.external_data.add(key="location", value="left_out")
        return self._gs.ir.tensor.LazyValues(message)
