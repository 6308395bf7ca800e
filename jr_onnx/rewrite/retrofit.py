"""original + jump -> hardened: every site replaced by its form, every other byte as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from jr_onnx import model as models
from jr_onnx.errors import (
    AlreadyRetrofittedError,
    HiddenActivationError,
    InvalidModelError,
    NothingToRewriteError,
    NotRetrofittedError,
    ParameterError,
    PostconditionError,
)
from jr_onnx.model import Model, Names, NodeBuilder, wire
from jr_onnx.model import model as limits
from jr_onnx.model.graphs import decode_node, field_path, node_field
from jr_onnx.rewrite import manifest as manifests
from jr_onnx.rewrite.forms import (
    FORMS,
    Choice,
    Jump,
    Spot,
    check_jump,
    choose,
    effective_jump,
    plain,
)
from jr_onnx.rewrite.manifest import NAME_PREFIX, Entry
from jr_onnx.rewrite.pattern import Pattern
from jr_onnx.rewrite.restore import edits_at, restore
from jr_onnx.rewrite.select import Selection
from jr_onnx.rewrite.sites import Site, Skipped, find_sites
from jr_onnx.rewrite.spill import spill


@dataclass(frozen=True)
class JumpSite:
    """A site that got its jump.

    Attributes:
        site: the activation as it was.
        form: the node pattern it became.
        reason: why that one.
        jump: the jump asked for: a number, or one for each channel.
        effective_jump: the same, as the tensor's type holds it.
    """

    site: Site
    form: str
    reason: str
    jump: Jump
    effective_jump: Jump

    def to_json(self) -> dict[str, Any]:
        """Returns the site as `retrofit --json` lists it."""
        return {
            **self.site.to_json(),
            "form": self.form,
            "form_reason": self.reason,
            "jump": self.jump,
            "effective_jump": self.effective_jump,
        }


@dataclass(frozen=True)
class Retrofit:
    """What a retrofit did.

    Attributes:
        model: the hardened model.
        original: the model it came from (before any earlier retrofit).
        sites: the activations replaced.
        skipped: those left, each with its reason.
    """

    model: Model = field(repr=False)
    original: Model = field(repr=False)
    sites: tuple[JumpSite, ...]
    skipped: tuple[Skipped, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns sites and skipped as `retrofit --json` lists them."""
        return {
            "sites": [site.to_json() for site in self.sites],
            "skipped": [entry.to_json() for entry in self.skipped],
        }


def retrofit(
    model: Model,
    *,
    jump: float | Sequence[float] | None = None,
    jumps: Mapping[str, float | Sequence[float]] | None = None,
    form: str | None = None,
    target: str = "portable",
    selection: Selection | None = None,
    partial: bool = False,
    force: bool = False,
) -> Retrofit:
    """Replaces activations by y = x if x > jump else 0.

    A model that is hardened already gets the new jump in place of the old one.

    Example:
        >>> import jr_onnx as jr
        >>> model = jr.load("sample_models/lenet_mnist.onnx")
        >>> result = jr.retrofit(model, jumps={"relu": 0.5, "relu_3": 1.0}, target="onnxruntime")
        >>> [(done.site.path, done.form, done.jump) for done in result.sites]
        [('relu', 'thresholded-relu', 0.5), ('relu_3', 'thresholded-relu', 1.0)]
        >>> result.skipped[0].path, result.skipped[0].reason
        ('relu_1', 'no jump is given for it')

    Args:
        model: the model, which is not changed.
        jump: finite and >= 0, in units of the activations; a sequence is one number for each
            channel (axis 1).
        jumps: by site path; comes before `jump`, which then serves the other sites.
        form: the node pattern, a name in `FORMS`; None picks the best for the target.
        target: the runtime the model is for, a name in `TARGETS`.
        selection: which sites; None for all.
        partial: go on although the model has activations that cannot be replaced because they are
            inside fused or quantised operators.
        force: go on although the model was changed since an earlier retrofit.

    Raises:
        ParameterError: a jump, form or selection makes no sense.
        NothingToRewriteError: no site in the model, or none selected.
        HiddenActivationError: activations inside fused or quantised operators.
        AlreadyRetrofittedError: hardened nodes without a usable manifest.
        NotRetrofittedError: the model was changed since an earlier retrofit.
        PostconditionError: the result is not valid or cannot be undone; a bug of ours.

    References:
        Erichson, Yao, Mahoney: JumpReLU (arXiv:1904.03750).
    """
    with _no_garbage():
        return _retrofit(model, jump, jumps, form, target, selection, partial, force)


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Pauses the cyclic collector: a rewrite makes many small objects and no cycles among them.

    It would otherwise walk all of them again and again, a fifth of the time of a large model.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _retrofit(
    model: Model,
    jump: float | Sequence[float] | None,
    jumps: Mapping[str, float | Sequence[float]] | None,
    form: str | None,
    target: str,
    selection: Selection | None,
    partial: bool,
    force: bool,
) -> Retrofit:
    asked = _Asked(_jump(jump), {path: _jump(value) for path, value in (jumps or {}).items()})
    original = original_of(model, force=force)
    sites, skipped = find_sites(original)
    hidden = [entry for entry in skipped if entry.hidden]
    if hidden and not partial:
        raise HiddenActivationError(_told(original, "activations are hidden", hidden))
    chosen, left = (selection or Selection()).split(sites)
    plans, unnamed = _plans(original, chosen, asked, form, target)
    asked.check_paths(sites)
    skipped = (*skipped, *left, *unnamed)
    if not plans:
        raise NothingToRewriteError(_told(original, "nothing to rewrite", skipped))
    result = Retrofit(_hardened(original, plans), original, tuple(plans), skipped)
    _postcondition(result)
    return result


def original_of(model: Model, *, force: bool = False) -> Model:
    """Returns the model itself, or what it was before it was retrofitted.

    Raises:
        NotRetrofittedError: it was changed since it was retrofitted, and `force` is not given.
        AlreadyRetrofittedError: it has hardened nodes, but no manifest.
    """
    if manifests.read(model) is not None:
        return restore(model, force=force)
    if NAME_PREFIX.encode() not in model.content:
        return model  # no name of ours: no need to look at each
    for scope in models.scopes(model.proto):
        for node in scope.graph.node:
            if node.name.startswith(NAME_PREFIX):
                raise AlreadyRetrofittedError(
                    f"{model.name}: node {node.name!r} is a jump already, but the manifest is gone "
                    "(a tool dropped the model's metadata). Retrofit the original model instead"
                )
    return model


@dataclass(frozen=True)
class _Asked:
    """The jumps asked for."""

    everywhere: Jump | None
    by_path: dict[str, Jump | None]

    def __post_init__(self) -> None:
        if self.everywhere is None and not self.by_path:
            raise ParameterError("no jump is given: pass a jump, or jumps by site")
        for jump in (self.everywhere, *self.by_path.values()):
            if jump is not None:
                effective_jump(jump, np.dtype(np.float64))

    def of(self, site: Site) -> Jump | None:
        return self.by_path.get(site.path, self.everywhere)

    def check_paths(self, sites: Sequence[Site]) -> None:
        unknown = sorted(self.by_path.keys() - {site.path for site in sites})
        if unknown:
            known = ", ".join(site.path for site in sites[:10])
            raise ParameterError(
                f"jumps are given for {', '.join(unknown)}, which are no sites of the model. "
                f"Its sites are {known}{', ...' if len(sites) > 10 else ''} (jr-onnx inspect)"
            )


def _jump(value: float | Sequence[float] | None) -> Jump | None:
    if value is None or isinstance(value, (int, float, np.number)):
        return None if value is None else float(value)
    return tuple(float(number) for number in value)


def _plans(
    model: Model, sites: Sequence[Site], asked: _Asked, form: str | None, target: str
) -> tuple[list[JumpSite], list[Skipped]]:
    plans: list[JumpSite] = []
    unnamed: list[Skipped] = []
    for site in sites:
        jump = asked.of(site)
        if jump is None:
            unnamed.append(Skipped(site.path, site.op_type, "no jump is given for it"))
            continue
        check_jump(site, jump)
        choice = choose(site, jump, model.proto.ir_version, form=form, target=target)
        plans.append(_plan(site, jump, choice))
    return plans, unnamed


def _plan(site: Site, jump: Jump, choice: Choice) -> JumpSite:
    dtype = site.tensor.dtype if site.tensor.element else np.dtype(np.float64)
    effective = plain(effective_jump(jump, dtype).astype(np.float64))
    return JumpSite(site, choice.form, choice.reason, jump, effective)


def _hardened(original: Model, plans: Sequence[JumpSite]) -> Model:
    writer = _Writer(original)
    entries: list[Entry] = []
    edits: wire.Edits = {}
    for plan in plans:
        number = node_field(plan.site.scope)

        def replace(old: bytes, plan: JumpSite = plan, number: int = number) -> bytes:
            content, count = writer.written(old, plan, number)
            entries.append(_entry(old, plan, count))
            return content

        here = edits_at(edits, field_path(plan.site.scope))
        here[number, plan.site.index] = replace
    content = wire.splice(original.content, edits)
    order = {plan.site.path: position for position, plan in enumerate(plans)}
    entries.sort(key=lambda entry: order[entry.path])
    # base64 makes 4 bytes of 3; the rest of an entry is a path, numbers and names.
    manifest = sum(2 * len(entry.field) + 4 * len(entry.path) + 400 for entry in entries)
    excess = len(content) + manifest - limits.LARGEST
    if excess <= 0:
        return original.derived(manifests.add(content, original, entries))
    location = f"jr_onnx_{original.sha256[:12]}.weights"
    content, data, spilled = spill(content, excess + 4096, location)
    content = manifests.add(content, original, entries, spilled)
    return Model(content, folder=original.folder, attachments={location: data})


class _Writer:
    """Writes the nodes of sites; sites that differ in nothing but names share a pattern."""

    def __init__(self, original: Model) -> None:
        # Where no byte of the model spells the prefix of our names, none of its own can clash.
        self._free = NAME_PREFIX.encode() not in original.content
        self._names = Names(()) if self._free else Names.of(original.proto)
        self._patterns: dict[tuple[Any, ...], Pattern] = {}

    def written(self, old: bytes, plan: JumpSite, number: int) -> tuple[bytes, int]:
        """Returns the fields that take the place of the field `old`, and how many they are."""
        site, node = plan.site, decode_node(old)
        noted = node.HasField("doc_string") or len(node.metadata_props) > 0
        prefix = self._names.fresh(f"{NAME_PREFIX}/{site.y}")
        if noted or site.cap is not None or not self._free or site.x == site.y:
            nodes = _nodes(node, plan, NodeBuilder(self._names, prefix))
            fields = [wire.encode(number, each.SerializeToString()) for each in nodes]
            return b"".join(fields), len(nodes)
        rank = None if site.tensor.shape is None else len(site.tensor.shape)
        key = (plan.form, plan.jump, site.tensor.element, rank)
        pattern = self._patterns.get(key)
        if pattern is None:
            nodes = _nodes(node, plan, NodeBuilder(Names(()), prefix))
            pattern = self._patterns[key] = Pattern.of(nodes, site.x, site.y, prefix)
        return pattern.fill(number, site.x, site.y, prefix), len(pattern.nodes)


def _nodes(node: onnx.NodeProto, plan: JumpSite, build: NodeBuilder) -> list[onnx.NodeProto]:
    FORMS[plan.form](Spot(plan.site, node, plan.jump, build))
    last = build.nodes[-1]
    if node.HasField("doc_string"):
        last.doc_string = node.doc_string
    last.metadata_props.extend(node.metadata_props)
    return build.nodes


def _entry(old: bytes, plan: JumpSite, count: int) -> Entry:
    site = plan.site
    return Entry(
        path=site.path,
        form=plan.form,
        jump=plan.jump,
        effective_jump=plan.effective_jump,
        scope=site.scope,
        index=site.index,
        count=count,
        field=old,
    )


def _postcondition(result: Retrofit) -> None:
    original, hardened = result.original, result.model
    try:
        undone = restore(hardened).content == original.content
    except NotRetrofittedError:
        undone = False
    if not undone:
        raise PostconditionError(
            f"{original.name}: the undo of the rewrite is not byte-identical; nothing was written. "
            "Please report this model"
        )
    try:
        models.check(hardened)
    except InvalidModelError as error:
        models.check(original)  # refused already? Then that is the news, and it is raised
        raise PostconditionError(f"the hardened model is invalid: {error}") from error


def _told(model: Model, what: str, skipped: Sequence[Skipped]) -> str:
    reasons = "; ".join(f"{entry.path} ({entry.op_type}): {entry.reason}" for entry in skipped[:5])
    more = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
    found = f"skipped {reasons}{more}" if skipped else "it has no Relu"
    return f"{model.name}: {what}, {found}. Nothing was written"
