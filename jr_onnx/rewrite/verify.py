"""Is the hardened model the original with a jump at every site, and nothing else changed?

Structure: both models are walked side by side, without trust in the manifest. Every field and node
must be equal, except that where the original has a site, the hardened model may have a few new
nodes from the site's input to its output.

Numbers: each of those groups of nodes is run alone, in onnxruntime, on special values, on the
neighbours of the jump and on random bit patterns, and compared bitwise with numpy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper

from jr_onnx.model import Model, Scope, scopes
from jr_onnx.rewrite import manifest as manifests
from jr_onnx.rewrite.forms import jump_relu
from jr_onnx.rewrite.manifest import NAME_PREFIX, Entry
from jr_onnx.rewrite.sites import Site, find_sites
from jr_onnx.session import Session

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

    jumps: dict[str, float]
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


@dataclass(frozen=True)
class _Replacement:
    site: Site
    nodes: list[onnx.NodeProto]


def verify(original: Model, hardened: Model) -> Verification:
    """Compares a hardened model with the original it claims to come from.

    Args:
        original: the model before `retrofit`.
        hardened: the model after.

    Raises:
        SessionError: onnxruntime is not installed or cannot run a form.
    """
    sites, _ = find_sites(original)
    by_place = {(site.scope, site.index): site for site in sites}
    manifest = manifests.read(hardened.proto)
    entries = {entry.path: entry for entry in manifest.entries} if manifest else {}
    differences = list(_outside_the_nodes(original, hardened))
    replacements: list[_Replacement] = []
    theirs = {
        scope.address[:2]: scope for scope in scopes(hardened.proto) if len(scope.address) < 3
    }
    for scope in scopes(original.proto):
        if len(scope.address) < 3 and scope.address[:2] in theirs:
            other = theirs[scope.address[:2]]
            differences += _compare_nodes(scope, other, by_place, replacements)
    jumps: dict[str, float] = {}
    values = 0
    for replacement in replacements:
        entry = entries.get(replacement.site.path)
        wrong, compared = _compare_numbers(replacement, entry)
        values += compared
        if wrong:
            differences.append(wrong)
        elif entry:
            jumps[entry.path] = entry.effective_jump
    for path in entries.keys() - {replacement.site.path for replacement in replacements}:
        differences.append(Difference(path, "the manifest lists it, but it has no jump"))
    return Verification(jumps, tuple(differences), values)


def _outside_the_nodes(original: Model, hardened: Model) -> Iterator[Difference]:
    left, right = original.parse(), hardened.parse()
    manifests.remove(right)
    for proto in (left, right):
        del proto.graph.node[:]
        for function in proto.functions:
            del function.node[:]
    yield from _compare_fields(left, right, "model", skip=("graph",))
    yield from _compare_fields(left.graph, right.graph, "graph")


def _compare_fields(
    left: Any, right: Any, where: str, skip: tuple[str, ...] = ()
) -> Iterator[Difference]:
    for field in left.DESCRIPTOR.fields:
        if field.name in skip:
            continue
        mine, yours = getattr(left, field.name), getattr(right, field.name)
        name = f"{where}.{field.name}"
        if hasattr(mine, "extend"):
            yield from _compare_repeated(mine, yours, name)
        elif left.HasField(field.name) != right.HasField(field.name) or mine != yours:
            yield Difference(name, f"expected {_short(mine)}, got {_short(yours)}")


def _compare_repeated(mine: Any, yours: Any, where: str) -> Iterator[Difference]:
    if len(mine) != len(yours):
        yield Difference(where, f"expected {len(mine)} entries, got {len(yours)}")
    for index, (one, other) in enumerate(zip(mine, yours, strict=False)):
        if one != other:
            name = getattr(one, "name", "") or getattr(one, "key", "") or index
            yield Difference(f"{where}[{name}]", f"expected {_short(one)}, got {_short(other)}")


def _compare_nodes(
    left: Scope, right: Scope, sites: dict[Any, Site], found: list[_Replacement]
) -> Iterator[Difference]:
    theirs = list(right.graph.node)
    at = 0
    for index, node in enumerate(left.graph.node):
        here = theirs[at] if at < len(theirs) else None
        site = sites.get((left.address, index))
        if site is not None:
            group = _group(theirs, at, site)
            if group is None:
                what = (
                    "still a plain" if here == node else "no way from its input to its output for"
                )
                yield Difference(site.path, f"{what} {node.op_type}: not retrofitted")
                at += 1
            else:
                found.append(_Replacement(site, group))
                at += len(group)
        elif here is None:
            yield Difference(_spelled(node), "expected this node, it is missing")
        else:
            if here != node:
                yield Difference(_spelled(node), f"expected {_short(node)}, got {_short(here)}")
            at += 1
    for node in theirs[at:]:
        yield Difference(_spelled(node), "a node that the original does not have")


def _group(nodes: list[onnx.NodeProto], start: int, site: Site) -> list[onnx.NodeProto] | None:
    """Returns the new nodes that lead from the site's x to its y and touch nothing else."""
    inner = {site.x}
    for end in range(start, len(nodes)):
        node = nodes[end]
        if not node.name.startswith(NAME_PREFIX) or not inner.issuperset(node.input):
            return None
        inner.update(node.output)
        if site.y in node.output:
            return nodes[start : end + 1]
    return None


def _compare_numbers(
    replacement: _Replacement, entry: Entry | None
) -> tuple[Difference | None, int]:
    site = replacement.site
    if entry is None:
        return Difference(site.path, "has a jump that the manifest does not list"), 0
    dtype = helper.tensor_dtype_to_np_dtype(site.tensor.element)
    x = probes(dtype, entry.effective_jump)
    expected = jump_relu(x, entry.effective_jump)
    got = Session(_alone(replacement)).run({site.x: x})[0]
    number = x == x  # what a form makes of NaN is its own affair
    bits = np.dtype(f"u{dtype.itemsize}")
    wrong = np.flatnonzero((expected.view(bits) != got.view(bits)) & number)
    if not len(wrong):
        return None, len(x)
    first = wrong[0]
    return Difference(
        site.path,
        f"{len(wrong)} of {len(x)} values differ from the jump {entry.effective_jump!r} of the "
        f"manifest: at x = {x[first]!r} expected {expected[first]!r}, got {got[first]!r}",
    ), len(x)


def probes(dtype: np.dtype[Any], jump: float) -> Array:
    """Returns 1-d inputs that tell forms apart.

    Specials, denormals, the jump and its 50 neighbours on either side, random bit patterns (every
    pattern for types of 16 bits or fewer).
    """
    bits = np.dtype(f"u{dtype.itemsize}")
    if dtype.itemsize <= 2:
        return np.arange(2 ** (8 * dtype.itemsize), dtype=np.uint32).astype(bits).view(dtype)
    if np.issubdtype(dtype, np.integer):
        special = np.array([0, 1, -1, np.iinfo(dtype).min, np.iinfo(dtype).max], dtype)
        around = np.arange(int(jump) - _NEIGHBOURS, int(jump) + _NEIGHBOURS + 1).astype(dtype)
    else:
        info = np.finfo(dtype)
        tiny = [info.tiny, info.smallest_subnormal, info.max, np.inf, np.nan]
        special = np.array([0.0, -0.0, *tiny, *(-value for value in tiny)], dtype)
        around = _neighbours(np.asarray(jump, dtype))
    rng = np.random.default_rng(0)
    random = rng.integers(0, np.iinfo(bits).max, _RANDOM_PATTERNS, bits, endpoint=True)
    return np.concatenate([special, around, random.view(dtype)])


def _neighbours(jump: Array) -> Array:
    up, down = [jump], [jump]
    for _ in range(_NEIGHBOURS):
        up.append(np.nextafter(up[-1], np.inf, dtype=jump.dtype))
        down.append(np.nextafter(down[-1], -np.inf, dtype=jump.dtype))
    return np.array([*down, *up], jump.dtype)


def _alone(replacement: _Replacement) -> Model:
    site = replacement.site
    graph = helper.make_graph(
        replacement.nodes,
        "site",
        [helper.make_tensor_value_info(site.x, site.tensor.element, ["n"])],
        [helper.make_tensor_value_info(site.y, site.tensor.element, ["n"])],
    )
    opset = helper.make_opsetid("", site.opset)
    return Model.of(helper.make_model(graph, opset_imports=[opset], ir_version=8))


def _spelled(node: onnx.NodeProto) -> str:
    return f"node {node.name or (node.output[0] if node.output else '')!r} ({node.op_type})"


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
