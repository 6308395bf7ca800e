"""Is the hardened model the original with a jump at every site, and nothing else changed?

Structure: both models are walked side by side. Every field and node must be equal, except that
where the original has a site, the hardened model may have the very nodes of a form, with the jump
that the manifest gives it, from the site's input to its output. Constants may serve several sites.

Numbers: each of those groups of nodes is run alone, in onnxruntime, on special values, on the
neighbours of the jump and on random bit patterns, and compared bitwise with numpy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from jr_onnx.errors import AlreadyRetrofittedError, SessionError
from jr_onnx.model import Address, Constants, Model, Names, NodeBuilder
from jr_onnx.model.graphs import decode_node
from jr_onnx.rewrite import manifest as manifests
from jr_onnx.rewrite.forms import (
    FORMS,
    FUNCTION_DOMAIN,
    NAME_PREFIX,
    Jump,
    SharedConstants,
    Spot,
    jump_relu,
)
from jr_onnx.rewrite.manifest import Entry
from jr_onnx.rewrite.sites import Site, find_sites
from jr_onnx.rewrite.spill import Spilled, data_of, data_spans, spill_again
from jr_onnx.session import Session, installed

Array = np.ndarray[Any, Any]
_RANDOM_PATTERNS = 200_000
_NEIGHBOURS = 50


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it must be.

    Attributes:
        where: a site's path, a node or a field.
        what: what was expected and what is there.
    """

    where: str
    what: str

    def to_json(self) -> dict[str, str]:
        """Returns the entry of `differences`."""
        return {"where": self.where, "what": self.what}


@dataclass(frozen=True)
class Verification:
    """The outcome of `verify`.

    Attributes:
        jumps: effective jump by site path, for the sites found to be retrofitted.
        differences: everything that is not as it must be; empty if equivalent.
        values_compared: how many values the numeric comparison covered.
    """

    jumps: dict[str, Jump]
    differences: tuple[Difference, ...]
    values_compared: int

    @property
    def equivalent(self) -> bool:
        """Whether the hardened model is the original with the jump, and nothing else."""
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        """Returns what `verify --json` writes."""
        return {
            "equivalent": self.equivalent,
            "jumps": self.jumps,
            "differences": [difference.to_json() for difference in self.differences],
            "values_compared": self.values_compared,
        }


Graph = onnx.GraphProto | onnx.FunctionProto


def verify(original: Model, hardened: Model) -> Verification:
    """Compares a hardened model with the original it claims to come from.

    Args:
        original: the model before `retrofit`.
        hardened: the model after.

    Raises:
        AlreadyRetrofittedError: the original is a hardened model itself.
        SessionError: onnxruntime is not installed or cannot run a form.
    """
    if manifests.read(original) is not None:
        raise AlreadyRetrofittedError(
            f"{original.name}: is hardened itself; expected the model from before the retrofit "
            "(`jr-onnx restore` gives it back)"
        )
    manifest = manifests.read(hardened)
    entries = {entry.path: entry for entry in manifest.entries} if manifest else {}
    spilled = manifest.spilled if manifest else ()
    same_place = original.derived(spill_again(original.content, spilled))
    walk = _Walk(same_place, hardened.derived(_bare(original, hardened)))
    walk.compare()
    walk.differences += _compare_spilled(original, hardened, spilled)
    skipped = _left_alone(original, entries)
    differences = [entry for entry in walk.differences if entry.where not in skipped]
    jumps: dict[str, Jump] = {}
    values = 0
    for replacement in walk.replacements:
        entry = entries.get(replacement.site.path)
        if entry is None:
            what = "has a jump that the manifest does not list"
            differences.append(Difference(replacement.site.path, what))
            continue
        wrong, compared = _compare_numbers(replacement, entry, original, hardened)
        wrong = wrong or _compare_form(replacement, entry)
        values += compared
        if wrong:
            differences.append(wrong)
        else:
            jumps[entry.path] = entry.effective_jump
    found = {replacement.site.path for replacement in walk.replacements}
    for path in sorted(entries.keys() - found):
        differences.append(Difference(path, "the manifest lists it, but it has no jump"))
    return Verification(jumps, tuple(differences), values)


def _bare(original: Model, hardened: Model) -> bytes:
    """Returns the hardened model without what a retrofit adds outside the lists of nodes."""
    content = manifests.without(hardened.content)
    imports = {entry.domain for entry in original.proto.opset_import}
    return content if FUNCTION_DOMAIN in imports else manifests.without_function(content)


def _compare_spilled(
    original: Model, hardened: Model, spilled: Sequence[Spilled]
) -> Iterator[Difference]:
    inside = (
        {
            span.index: original.content[span.raw.value : span.raw.end]
            for span in data_spans(original.content)
        }
        if spilled
        else {}
    )
    for record in spilled:
        if data_of(record, hardened) != inside.get(record.index):
            yield Difference(f"initializer {record.index}", f"other weights in {record.location}")


def _left_alone(original: Model, entries: dict[str, Entry]) -> set[str]:
    """Returns the sites that a partial retrofit says it left: none where there is no manifest."""
    if not entries:
        return set()
    sites, _ = find_sites(original)
    return {site.path for site in sites} - entries.keys()


@dataclass(frozen=True)
class _Replacement:
    """What a site became: its nodes, and before them the constants that it uses, its own or not."""

    site: Site
    nodes: list[onnx.NodeProto]


@dataclass
class _Walk:
    """The two models side by side; what it finds on the way."""

    original: Model
    hardened: Model
    differences: list[Difference] = field(default_factory=list)
    replacements: list[_Replacement] = field(default_factory=list)

    def compare(self) -> None:
        sites, _ = find_sites(self.original)
        self._sites = {(site.scope, site.index): site for site in sites}
        left, right = self.original.parse(), self.hardened.parse()
        pairs: list[tuple[Address, Graph, Graph]] = [(("graph",), left.graph, right.graph)]
        for index, (mine, yours) in enumerate(zip(left.functions, right.functions, strict=False)):
            pairs.append((("function", index), mine, yours))
        for address, mine, yours in pairs:
            self._nodes(address, mine, yours)
            del mine.node[:], yours.node[:]
        self.differences += _compare_fields(left, right, "model", skip=("graph",))
        self.differences += _compare_fields(left.graph, right.graph, "graph")
        if not self.differences and left.SerializeToString() != right.SerializeToString():
            self._differ("model", "fields that this version of ONNX does not know are different")

    def _differ(self, where: str, what: str) -> None:
        self.differences.append(Difference(where, what))

    def _nodes(self, address: Address, left: Graph, right: Graph) -> None:
        theirs = list(right.node)
        constants: dict[str, onnx.NodeProto] = {}
        at = 0
        for index, node in enumerate(left.node):
            here = theirs[at] if at < len(theirs) else None
            site = self._sites.get((address, index))
            if site is not None:
                group = _group(theirs, at, node, constants)
                if group is None:
                    plain = "still a plain" if here == node else "no way from input to output of"
                    self._differ(site.path, f"{plain} {node.op_type}: not retrofitted")
                else:
                    self._replacement(site, group, constants)
                at += 1 if group is None else len(group)
            elif here is None:
                self._differ(_spelled(node), "expected this node, it is missing")
            else:
                self._node((*address, index), node, here)
                at += 1
        for node in theirs[at:]:
            self._differ(_spelled(node), "a node that the original does not have")

    def _replacement(
        self, site: Site, group: list[onnx.NodeProto], constants: dict[str, onnx.NodeProto]
    ) -> None:
        new = {node.output[0]: node for node in group if _is_constant(node)}
        constants.update(new)
        nodes = [node for node in group if not _is_constant(node)]
        used = dict.fromkeys(name for node in nodes for name in node.input if name in constants)
        self.replacements.append(_Replacement(site, [*map(constants.__getitem__, used), *nodes]))
        for name in new.keys() - used.keys():
            self._differ(_spelled(new[name]), "a constant that no form uses")

    def _node(self, place: Address, left: onnx.NodeProto, right: onnx.NodeProto) -> None:
        """Compares two nodes; bodies of If, Loop and Scan node by node."""
        for which, (mine, yours) in enumerate(zip(left.attribute, right.attribute, strict=False)):
            pairs = [(-1, mine.g, yours.g)] if mine.HasField("g") and yours.HasField("g") else []
            pairs += [
                (number, *graphs)
                for number, graphs in enumerate(zip(mine.graphs, yours.graphs, strict=False))
            ]
            for number, one, other in pairs:
                self._nodes((*place, which, number), one, other)
                del one.node[:], other.node[:]
        if left != right:
            self._differ(_spelled(left), f"expected {_short(left)}, got {_short(right)}")


def _compare_fields(
    left: Any, right: Any, where: str, skip: tuple[str, ...] = ()
) -> Iterator[Difference]:
    for descriptor in left.DESCRIPTOR.fields:
        if descriptor.name in skip:
            continue
        mine, yours = getattr(left, descriptor.name), getattr(right, descriptor.name)
        name = f"{where}.{descriptor.name}"
        if hasattr(mine, "extend"):
            yield from _compare_repeated(mine, yours, name)
        elif left.HasField(descriptor.name) != right.HasField(descriptor.name) or mine != yours:
            yield Difference(name, f"expected {_short(mine)}, got {_short(yours)}")


def _compare_repeated(mine: Any, yours: Any, where: str) -> Iterator[Difference]:
    if len(mine) != len(yours):
        yield Difference(where, f"expected {len(mine)} entries, got {len(yours)}")
    for index, (one, other) in enumerate(zip(mine, yours, strict=False)):
        if one != other:
            name = getattr(one, "name", "") or getattr(one, "key", "") or index
            yield Difference(f"{where}[{name}]", f"expected {_short(one)}, got {_short(other)}")


def _group(
    nodes: list[onnx.NodeProto],
    start: int,
    replaced: onnx.NodeProto,
    constants: Mapping[str, onnx.NodeProto],
) -> list[onnx.NodeProto] | None:
    """Returns the new nodes that lead from a site's inputs to its output.

    They touch nothing else, but for constants that an earlier site of the same list brought along.
    """
    inner = {"", *replaced.input}
    for end in range(start, len(nodes)):
        node = nodes[end]
        ours = node.name.startswith(NAME_PREFIX)
        if not ours or not all(name in inner or name in constants for name in node.input):
            return None
        inner.update(node.output)
        if replaced.output[0] in node.output:
            return nodes[start : end + 1]
    return None


def _is_constant(node: onnx.NodeProto) -> bool:
    return node.op_type == "Constant" and not node.input and len(node.output) == 1


def _compare_form(replacement: _Replacement, entry: Entry) -> Difference | None:
    """Compares the new nodes with those that the form has: op types, wiring, constants."""
    site = replacement.site
    if entry.form not in FORMS:
        return Difference(site.path, f"the manifest names the form {entry.form!r}, there is none")
    build, constants = NodeBuilder(Names(()), NAME_PREFIX), SharedConstants(Names(()))
    FORMS[entry.form](Spot(site, decode_node(entry.field), entry.jump, build, constants))
    expected = [*constants.take(), *build.nodes]
    if _shape_of(expected, site) == _shape_of(replacement.nodes, site):
        return None
    return Difference(site.path, f"its nodes are not those of the form {entry.form}")


def _shape_of(nodes: list[onnx.NodeProto], site: Site) -> list[bytes]:
    """Returns the nodes with names replaced by positions; what else they carry stays."""
    position: dict[str, str] = {site.y: "y"}
    found = []
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = ""
        copy.ClearField("doc_string")
        del copy.metadata_props[:], copy.input[:], copy.output[:]
        copy.input.extend(position.get(name, name) for name in node.input)
        for name in node.output:
            copy.output.append(position.setdefault(name, f"#{len(position)}"))
        found.append(copy.SerializeToString(deterministic=True))
    return found


def _compare_numbers(
    replacement: _Replacement, entry: Entry, original: Model, hardened: Model
) -> tuple[Difference | None, int]:
    site, jump = replacement.site, entry.effective_jump
    known = site.tensor.element
    # A local function may be called with any of these.
    elements = [known] if known else [TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16]
    compared = 0
    for element in elements:
        x = _inputs(site, jump, helper.tensor_dtype_to_np_dtype(element))
        expected = jump_relu(x, jump, site.cap)
        got = _run(_alone(replacement, element, original, hardened), x, site)
        compared += x.size
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
            return Difference(
                site.path,
                f"{differs.sum()} of {x.size} values differ from the jump {jump!r} of the "
                f"manifest: at x = {x.flat[first]!r} expected {expected.flat[first]!r}, got "
                f"{got.flat[first]!r}",
            ), compared
    return None, compared


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


def _alone(replacement: _Replacement, element: int, original: Model, hardened: Model) -> Model:
    """Returns a model of the site's new nodes alone, with the bounds of its Clip."""
    site = replacement.site
    rank = len(site.tensor.shape) if site.tensor.shape is not None else 1
    shape = [f"d{axis}" for axis in range(rank)]
    graph = helper.make_graph(
        replacement.nodes,
        "site",
        [helper.make_tensor_value_info(site.x, element, shape)],
        [helper.make_tensor_value_info(site.y, element, shape)],
        _bounds(replacement, original),
    )
    functions = [each for each in hardened.proto.functions if each.domain == FUNCTION_DOMAIN]
    opsets = [helper.make_opsetid("", site.opset)]
    opsets += [helper.make_opsetid(FUNCTION_DOMAIN, 1)] if functions else []
    model = helper.make_model(graph, opset_imports=opsets, functions=functions)
    model.ir_version = max(8, min(hardened.proto.ir_version, 10))
    return Model.of(model)


def _bounds(replacement: _Replacement, original: Model) -> list[TensorProto]:
    made = {name for node in replacement.nodes for name in node.output}
    outside = {name for node in replacement.nodes for name in node.input} - made
    bounds = sorted(outside - {"", replacement.site.x})
    if not bounds:
        return []  # most sites have none, and a look at the constants is a look at all nodes
    constants = Constants(original)
    scope = next(each for each in original.scopes if each.address == replacement.site.scope)
    tensors = []
    for name in bounds:
        value = constants.value(scope, name)
        if value is not None:
            tensors.append(numpy_helper.from_array(value, name))
    return tensors


def _spelled(node: onnx.NodeProto) -> str:
    return f"node {node.name or (node.output[0] if node.output else '')!r} ({node.op_type})"


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
