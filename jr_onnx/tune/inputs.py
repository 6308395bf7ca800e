"""The model with its jumps as inputs of the graph: one session for every candidate.

    y = Relu(x)              becomes   y = x * Cast(x > t)
    y = Clip(x, 0, cap)      becomes   y = Clip(x, 0, cap) * Cast(x > t)

with t an input, one number or one a channel. At t = 0 that is the activation itself, and at any t
the jump, for every finite x; a product costs far less than Where (docs/benchmarks/forms.md). What a
retrofit writes is exact for infinite x, too: this copy only serves the search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx
from onnx import TensorProto, helper

from jr_onnx.activations import channels_of
from jr_onnx.model import Model, Names, NodeBuilder, dtype_name
from jr_onnx.rewrite import Site, Skipped

_PREFIX = "jr_onnx/tune"
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)


@dataclass(frozen=True)
class OpenModel:
    """A model whose jumps are inputs.

    Attributes:
        model: the model.
        names: of the inputs, by site path.
        shapes: of the inputs, by site path: `()`, or `(channels, 1, ...)`.
    """

    model: Model = field(repr=False)
    names: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]


def tunable(sites: Sequence[Site]) -> tuple[tuple[Site, ...], tuple[Skipped, ...]]:
    """Returns the sites that can be tuned, and the others with the reason."""
    kept, left = [], []
    for site in sites:
        reason = _why_not(site)
        if reason is None:
            kept.append(site)
        else:
            left.append(Skipped(site.path, site.op_type, reason))
    return tuple(kept), tuple(left)


def _why_not(site: Site) -> str | None:
    if len(site.scope) > 1:
        return "it is in a branch or a function, whose values cannot be observed"
    if site.tensor.element not in _FLOATS:
        return f"its type is {dtype_name(site.tensor.element)}, float16, 32 or 64 is needed"
    return None


def open_jumps(model: Model, sites: Sequence[Site], *, per_channel: bool = False) -> OpenModel:
    """Returns a copy of the model that takes its jumps as inputs.

    Args:
        model: the model the sites were found in.
        sites: those that take a jump, all `tunable`.
        per_channel: whether sites with a known number of channels take one jump a channel.
    """
    proto = model.parse()
    names = Names.of(proto)
    inputs: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    written: dict[int, list[onnx.NodeProto]] = {}
    for site in sites:
        build = NodeBuilder(names, f"{_PREFIX}/{site.y}")
        inputs[site.path] = threshold = build.name("jump")
        shapes[site.path] = _shape(site) if per_channel else ()
        written[site.index] = _nodes(build, site, proto.graph.node[site.index], threshold)
        proto.graph.input.append(
            helper.make_tensor_value_info(threshold, site.tensor.element, shapes[site.path])
        )
    nodes = [new for at, node in enumerate(proto.graph.node) for new in written.get(at, [node])]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return OpenModel(model.derived(proto.SerializeToString()), inputs, shapes)


def _shape(site: Site) -> tuple[int, ...]:
    channels = channels_of(site)
    return () if channels is None else (channels, *[1] * (len(site.tensor.shape or ()) - 2))


def _nodes(
    build: NodeBuilder, site: Site, node: onnx.NodeProto, threshold: str
) -> list[onnx.NodeProto]:
    passed = site.x
    if site.cap is not None:
        clip = onnx.NodeProto()
        clip.CopyFrom(node)
        clip.output[0] = passed = build.name("clip")
        build.nodes.append(clip)
    mask = build.op("Greater", site.x, threshold)
    ones = build.op("Cast", mask, to=site.tensor.element)
    build.op("Mul", passed, ones, output=site.y)
    return build.nodes
