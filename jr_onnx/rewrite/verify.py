"""Is the hardened model the original with a jump at every site, and nothing else changed?

Structure: both models are walked side by side. Every field and node must be equal, except that
where the manifest lists a site of the original, the hardened model has the very nodes of a form,
with that jump, from the site's input to its output. Constants may serve several sites. Weights in
files of their own are compared byte by byte, unless both models have the same files.

Numbers: each of those groups of nodes is run alone, in onnxruntime, on special values, on the
neighbours of the jump and on random bit patterns, and compared bitwise with numpy.

Undo: `restore` gives back the original's bytes, so the manifest and its hashes are true.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto

from jr_onnx.errors import (
    AlreadyRetrofittedError,
    ExternalDataError,
    NotRetrofittedError,
    ParameterError,
)
from jr_onnx.model import Address, Constants, Model, Names, NodeBuilder
from jr_onnx.model.differences import (
    UNKNOWN,
    Difference,
    compare_fields,
    compare_messages,
    compare_repeated,
    unknown_fields,
)
from jr_onnx.model.external import data_file, first_difference, locations
from jr_onnx.model.model import readable
from jr_onnx.rewrite import manifest as manifests
from jr_onnx.rewrite.forms import (
    FORMS,
    FUNCTION_DOMAIN,
    FUNCTION_NAME,
    NAME_PREFIX,
    Jump,
    SharedConstants,
    Spot,
    check_jump,
)
from jr_onnx.rewrite.manifest import Entry, Manifest
from jr_onnx.rewrite.numbers import compare_numbers
from jr_onnx.rewrite.restore import restore
from jr_onnx.rewrite.retrofit import form_nodes
from jr_onnx.rewrite.sites import Site, find_sites
from jr_onnx.rewrite.spill import Spilled, data_of, data_spans, outside


@dataclass(frozen=True)
class Verification:
    """The outcome of `verify`.

    Attributes:
        jumps: effective jump by site path, for the sites found to be retrofitted.
        differences: everything that is not as it must be; empty if equivalent.
        values_compared: how many values the numeric comparison covered.
        without_jump: paths of the sites that the retrofit left alone, as its manifest says.
        not_compared: files with weights that could not be compared, each with its reason.
    """

    jumps: dict[str, Jump]
    differences: tuple[Difference, ...]
    values_compared: int
    without_jump: tuple[str, ...] = ()
    not_compared: tuple[str, ...] = ()

    @property
    def equivalent(self) -> bool:
        """Whether the hardened model is the original with the jumps, and nothing else.

        As far as it was compared: see `not_compared`.
        """
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        """Returns what `verify --json` writes."""
        return {
            "equivalent": self.equivalent,
            "jumps": self.jumps,
            "without_jump": list(self.without_jump),
            "differences": [difference.to_json() for difference in self.differences],
            "values_compared": self.values_compared,
            "not_compared": list(self.not_compared),
        }


Graph = onnx.GraphProto | onnx.FunctionProto


def verify(original: Model, hardened: Model) -> Verification:
    """Compares a hardened model with the original it claims to come from.

    Args:
        original: the model before `retrofit`.
        hardened: the model after.

    Raises:
        AlreadyRetrofittedError: the original is a hardened model itself.
        ExternalDataError: weights that `retrofit` moved to a file are missing.
        SessionError: onnxruntime is not installed.
        InvalidModelError: one is no ONNX model, or a damaged one.
    """
    with readable(original, hardened):
        return _verify(original, hardened)


def _verify(original: Model, hardened: Model) -> Verification:
    if manifests.read(original) is not None:
        raise AlreadyRetrofittedError(
            f"{original.name}: is hardened itself; expected the model from before the retrofit "
            "(`jr-onnx restore` gives it back)"
        )
    found: list[Difference] = []
    manifest = None
    try:
        manifest = manifests.read(hardened)
    except NotRetrofittedError as error:
        found.append(Difference("model.metadata_props", str(error)))
    has_manifest = not found
    sites, _ = find_sites(original)
    walk = _Walk(original, hardened, manifest, sites, found)
    walk.compare()
    found += _compare_spilled(original, hardened, walk.spilled)
    not_compared = _compare_data(original, hardened, found)
    jumps: dict[str, Jump] = {}
    values = 0
    constants = Constants(original)
    for replacement in walk.replacements:
        path = replacement.site.path
        entry = walk.entries.get(path)
        if entry is None:
            if has_manifest:
                found.append(Difference(path, "has a jump that the manifest does not list"))
            continue
        wrong = [_compare_entry(entry, replacement.site)]
        if wrong == [None]:
            numbers, compared = compare_numbers(
                replacement.site, replacement.nodes, entry.effective_jump, constants, hardened
            )
            values += compared
            wrong = [numbers, _compare_form(replacement, entry)]
        found += [Difference(path, what) for what in wrong if what is not None]
        if not any(wrong):
            jumps[path] = entry.effective_jump
    for path in sorted(walk.entries.keys() - {site.path for site in sites}):
        found.append(Difference(path, "the manifest lists it, but it is no site of the original"))
    if manifest is not None and not found:
        found += _compare_undo(original, hardened, manifest)
    return Verification(jumps, tuple(found), values, tuple(walk.left), tuple(not_compared))


def _compare_undo(original: Model, hardened: Model, manifest: Manifest) -> Iterator[Difference]:
    changed = manifests.changed_parts(manifest, hardened.content)
    for part in changed:
        yield Difference(part, "is not as jr-onnx wrote it: `jr-onnx restore` refuses that")
    if changed:
        return
    try:
        if restore(hardened).content != original.content:
            yield Difference("model", "its undo gives other bytes than the original's")
    except NotRetrofittedError as error:
        yield Difference("model", str(error))


def _compare_spilled(
    original: Model, hardened: Model, spilled: Mapping[int, Spilled]
) -> Iterator[Difference]:
    view = memoryview(original.content)
    inside = {span.index: span.raw for span in data_spans(original.content)} if spilled else {}
    for record in spilled.values():
        raw = inside.get(record.index)
        if raw is None or data_of(record, hardened) != view[raw.value : raw.end]:
            yield Difference(f"initializer {record.index}", f"other weights in {record.location}")


def _compare_data(original: Model, hardened: Model, found: list[Difference]) -> list[str]:
    """Compares external data; returns what could not be compared, with the reason."""
    not_compared = []
    for name in locations(original):
        if original.folder is not None and original.folder == hardened.folder:
            continue
        try:
            mine = data_file(original, name)
        except ExternalDataError as error:
            not_compared.append(f"{name}: {error}")
            continue
        if hardened.folder is None:
            not_compared.append(f"{name}: the folder of the hardened model is unknown")
            continue
        try:
            at = first_difference(mine, data_file(hardened, name))
            what = None if at is None else f"the weights differ from byte {at:,} of the file on"
        except ExternalDataError as error:
            what = str(error)
        if what is not None:
            found.append(Difference(f"external data {name}", what))
    return not_compared


@dataclass(frozen=True)
class _Replacement:
    """What a site became: its nodes, and before them the constants that it uses, its own or not."""

    site: Site
    old: onnx.NodeProto
    nodes: list[onnx.NodeProto]


class _Walk:
    """The two models side by side.

    Attributes:
        entries: of the manifest, by path.
        spilled: initializers that the retrofit moved to a file, by position.
        replacements: the sites that became something else.
        left: paths of the sites that are not in the manifest, and have no jump.
    """

    def __init__(
        self,
        original: Model,
        hardened: Model,
        manifest: Manifest | None,
        sites: Sequence[Site],
        differences: list[Difference],
    ) -> None:
        self._original, self._hardened = original, hardened
        self._sites = {(site.scope, site.index): site for site in sites}
        self._differences = differences
        self._names: set[str] = set()
        self.entries = {entry.path: entry for entry in manifest.entries} if manifest else {}
        self.spilled = {each.index: each for each in manifest.spilled} if manifest else {}
        self.replacements: list[_Replacement] = []
        self.left: list[str] = []

    def compare(self) -> None:
        left, right = self._original.proto, self._hardened.proto
        imports, functions = list(right.opset_import), list(right.functions)
        if any(entry.form == "function" for entry in self.entries.values()):
            self._function(imports, functions)
        kept = [entry for entry in right.metadata_props if entry.key != manifests.KEY]
        listed = ("graph", "functions", "opset_import", "metadata_props")
        self._fields(left, right, "model", skip=listed)
        self._differences += compare_repeated(left.opset_import, imports, "model.opset_import")
        self._differences += compare_repeated(left.metadata_props, kept, "model.metadata_props")
        self._initializers(left.graph, right.graph)
        self._graph(("graph",), left.graph, right.graph, "graph", skip=("node", "initializer"))
        if len(left.functions) != len(functions):
            counts = f"expected {len(left.functions)} entries, got {len(functions)}"
            self._differ("model.functions", counts)
        for index, (mine, yours) in enumerate(zip(left.functions, functions, strict=False)):
            self._graph(("function", index), mine, yours, f"function {mine.domain}::{mine.name}")

    def _function(
        self, imports: list[onnx.OperatorSetIdProto], functions: list[onnx.FunctionProto]
    ) -> None:
        """Compares what the form `function` adds, and takes it out of the lists."""
        imported, function = manifests.function_of(self._original)
        for expected, listed, where in (
            (imported, imports, "model.opset_import"),
            (function, functions, f"function {FUNCTION_DOMAIN}::{FUNCTION_NAME}"),
        ):
            added = next((each for each in listed if each.domain == FUNCTION_DOMAIN), None)
            if added is None:
                self._differ(where, f"there is none of the domain {FUNCTION_DOMAIN}")
                continue
            listed.remove(added)
            if added != expected:
                self._differences += compare_messages(expected, added, where)

    def _initializers(self, left: onnx.GraphProto, right: onnx.GraphProto) -> None:
        expected: list[TensorProto] = list(left.initializer)
        content = self._original.content
        for span in data_spans(content) if self.spilled else ():
            record = self.spilled.get(span.index)
            if record is not None:
                expected[span.index] = outside(content, span, record)
        self._differences += compare_repeated(expected, right.initializer, "graph.initializer")

    def _differ(self, where: str, what: str) -> None:
        self._differences.append(Difference(where, what))

    def _fields(self, left: Any, right: Any, where: str, skip: tuple[str, ...]) -> None:
        self._differences += compare_fields(left, right, where, skip)
        if unknown_fields(left) != unknown_fields(right):
            self._differ(where, UNKNOWN)

    def _graph(
        self,
        address: Address,
        left: Graph,
        right: Graph,
        where: str,
        skip: tuple[str, ...] = ("node",),
    ) -> None:
        self._fields(left, right, where, skip)
        theirs = list(right.node)
        makers = {name: at for at, node in reversed([*enumerate(theirs)]) for name in node.output}
        constants: dict[str, onnx.NodeProto] = {}
        at = 0
        for index, node in enumerate(left.node):
            # Nodes are told apart by their outputs, which are unique.
            here = next((makers.get(name, -1) for name in node.output if name), at)
            site = self._sites.get((address, index))
            if not at <= here < len(theirs):
                self._differ(site.path if site else _spelled(node), "expected, and missing")
                continue
            group, at = theirs[at : here + 1], here + 1
            if site is not None and _is_ours(group[-1]):
                self._replaced(site, node, group, constants)
                continue
            self._extra(group[:-1])
            if site is not None and self.entries and site.path not in self.entries:
                self.left.append(site.path)
            elif site is not None:
                self._differ(site.path, f"still a plain {group[-1].op_type}: not retrofitted")
            self._node((*address, index), node, group[-1])
        self._extra(theirs[at:])

    def _extra(self, nodes: Iterable[onnx.NodeProto]) -> None:
        for node in nodes:
            self._differ(_spelled(node), "a node that the original does not have")

    def _replaced(
        self,
        site: Site,
        node: onnx.NodeProto,
        group: list[onnx.NodeProto],
        constants: dict[str, onnx.NodeProto],
    ) -> None:
        self._extra(each for each in group if not _is_ours(each))
        ours = [each for each in group if _is_ours(each)]
        self._check_names(ours, site)
        new = {each.output[0]: each for each in ours if _is_constant(each)}
        constants.update(new)
        nodes = [each for each in ours if not _is_constant(each)]
        used = dict.fromkeys(name for each in nodes for name in each.input if name in constants)
        nodes = [*map(constants.__getitem__, used), *nodes]
        self.replacements.append(_Replacement(site, node, nodes))
        for name in new.keys() - used.keys():
            self._differ(_spelled(new[name]), "a constant that no form uses")

    def _check_names(self, nodes: Iterable[onnx.NodeProto], site: Site) -> None:
        for node in nodes:
            for name in (f"node {node.name}", *(name for name in node.output if name != site.y)):
                if name in self._names:
                    self._differ(_spelled(node), f"{name!r} is there twice")
                self._names.add(name)

    def _node(self, place: Address, left: onnx.NodeProto, right: onnx.NodeProto) -> None:
        """Compares two nodes; bodies of If, Loop and Scan node by node."""
        where = _spelled(left)
        if not any(each.HasField("g") or each.graphs for each in left.attribute):
            if left != right:
                self._differences += compare_messages(left, right, where)
            return
        self._fields(left, right, where, skip=("attribute",))
        if len(left.attribute) != len(right.attribute):
            counts = f"expected {len(left.attribute)} entries, got {len(right.attribute)}"
            self._differ(f"{where}.attribute", counts)
        for which, (mine, yours) in enumerate(zip(left.attribute, right.attribute, strict=False)):
            name = f"{where}.{mine.name}"
            self._fields(mine, yours, name, skip=("g", "graphs"))
            if mine.HasField("g") != yours.HasField("g") or len(mine.graphs) != len(yours.graphs):
                self._differ(name, "has other graphs")
            pairs = [(-1, mine.g, yours.g)] if mine.HasField("g") else []
            pairs += [
                (number, one, other)
                for number, (one, other) in enumerate(zip(mine.graphs, yours.graphs, strict=False))
            ]
            for number, one, other in pairs:
                self._graph((*place, which, number), one, other, name)


def _is_constant(node: onnx.NodeProto) -> bool:
    return node.op_type == "Constant" and not node.input and len(node.output) == 1


def _is_ours(node: onnx.NodeProto) -> bool:
    return bool(node.name.startswith(f"{NAME_PREFIX}/"))


def _compare_entry(entry: Entry, site: Site) -> str | None:
    """Compares what the manifest says of a site with the site."""
    if entry.form not in FORMS:
        return f"the manifest names the form {entry.form!r}, there is none"
    try:
        effective = check_jump(site, entry.jump)
    except ParameterError as error:
        return f"the manifest has a jump that it cannot have: {error}"
    if effective != entry.effective_jump:
        return (
            f"the manifest says that the jump {entry.jump!r} is {entry.effective_jump!r} here, "
            f"expected {effective!r}"
        )
    return None


def _compare_form(replacement: _Replacement, entry: Entry) -> str | None:
    """Compares the new nodes with those of the form in everything but the names of ours."""
    site = replacement.site
    names = Names((*replacement.old.input, *replacement.old.output))
    build, constants = NodeBuilder(names, NAME_PREFIX), SharedConstants(names)
    new = form_nodes(entry.form, Spot(site, replacement.old, entry.jump, build, constants))
    expected = _shape_of([*constants.take(), *new], site)
    got = _shape_of(replacement.nodes, site)
    other = f"its nodes are not those of the form {entry.form}"
    if [node.op_type for node in got] != [node.op_type for node in expected]:
        kinds = (", ".join(node.op_type for node in nodes) for nodes in (expected, got))
        return "{}: expected {}, got {}".format(other, *kinds)
    for mine, yours in zip(expected, got, strict=True):
        if mine != yours:
            first = next(compare_messages(mine, yours, mine.op_type))
            return f"{other}: {first.where}: {first.what}"
    return None


def _shape_of(nodes: list[onnx.NodeProto], site: Site) -> list[onnx.NodeProto]:
    """Returns the nodes with the names of ours replaced by positions."""
    position: dict[str, str] = {site.y: site.y}
    found = []
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = ""
        del copy.input[:], copy.output[:]
        copy.input.extend(position.get(name, name) for name in node.input)
        for name in node.output:
            copy.output.append(position.setdefault(name, f"value {len(position)}"))
        found.append(copy)
    return found


def _spelled(node: onnx.NodeProto) -> str:
    return f"node {node.name or (node.output[0] if node.output else '')!r} ({node.op_type})"
