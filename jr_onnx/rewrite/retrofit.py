"""original + jump -> hardened: every site replaced by its form, every other byte as it was."""

from __future__ import annotations

import gc
import reprlib
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import onnx

from jr_onnx.errors import (
    AlreadyRetrofittedError,
    HiddenActivationError,
    InvalidModelError,
    ModelError,
    NothingToRewriteError,
    NotRetrofittedError,
    ParameterError,
    PostconditionError,
)
from jr_onnx.model import Model, Names, NodeBuilder, check, wire
from jr_onnx.model import model as limits
from jr_onnx.model.differences import has_unknown_fields
from jr_onnx.model.graphs import node_field
from jr_onnx.model.model import readable
from jr_onnx.rewrite import manifest as manifests
from jr_onnx.rewrite.forms import (
    FORMS,
    FUNCTION_DOMAIN,
    NAME_PREFIX,
    Jump,
    SharedConstants,
    Spot,
    as_jump,
    check_jump,
    check_names,
    choose,
)
from jr_onnx.rewrite.manifest import Entry
from jr_onnx.rewrite.pattern import Pattern
from jr_onnx.rewrite.restore import edits_at, restore
from jr_onnx.rewrite.select import Selection
from jr_onnx.rewrite.sites import Site, Skipped, find_sites
from jr_onnx.rewrite.spill import spill

# What a form says anew; a node may say more.
_COMPUTED = ("input", "output", "name", "op_type", "domain", "overload", "attribute")


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
    asked = _Asked.of(jump, jumps)
    check_names(form, target)
    if selection is not None and not isinstance(selection, Selection):
        raise ParameterError(f"selection must be a Selection, got {reprlib.repr(selection)}")
    with _no_garbage(), readable(model):
        original = original_of(model, force=force)
        sites, skipped = find_sites(original)
        hidden = [entry for entry in skipped if entry.hidden]
        if hidden and not partial:
            raise HiddenActivationError(_told(original, "activations are hidden", hidden))
        chosen, left = selection.split(sites) if selection else (sites, ())
        plans, unnamed = _plans(original, chosen, asked, form, target)
        asked.check_paths(sites)
        skipped = (*skipped, *left, *unnamed)
        if not plans:
            raise NothingToRewriteError(_told(original, "nothing to rewrite", skipped))
        result = Retrofit(_hardened(original, plans), original, tuple(plans), skipped)
        _postcondition(result)
        return result


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
    for scope in model.scopes:
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
    by_path: dict[str, Jump]

    @classmethod
    def of(cls, jump: object, jumps: object) -> _Asked:
        by_path = {} if jumps is None else jumps
        if not isinstance(by_path, Mapping) or not all(isinstance(path, str) for path in by_path):
            raise ParameterError(
                f"jumps must have a jump for each site path, got {reprlib.repr(jumps)}"
            )
        if jump is None and not by_path:
            raise ParameterError("no jump is given: pass a jump, or jumps by site")
        return cls(
            None if jump is None else as_jump(jump),
            {path: as_jump(each, f"the jump of {path!r}") for path, each in by_path.items()},
        )

    def at(self, site: Site) -> Jump | None:
        return self.by_path.get(site.path, self.everywhere)

    def check_paths(self, sites: Sequence[Site]) -> None:
        unknown = sorted(self.by_path.keys() - {site.path for site in sites})
        if unknown:
            known = ", ".join(site.path for site in sites[:10])
            raise ParameterError(
                f"jumps are given for {', '.join(unknown)}, which are no sites of the model. "
                f"Its sites are {known}{', ...' if len(sites) > 10 else ''} (jr-onnx inspect)"
            )


def _plans(
    model: Model, sites: Sequence[Site], asked: _Asked, form: str | None, target: str
) -> tuple[list[JumpSite], list[Skipped]]:
    plans: list[JumpSite] = []
    unnamed: list[Skipped] = []
    refused: dict[str, str] = {}
    for site in sites:
        jump = asked.at(site)
        if jump is None:
            unnamed.append(Skipped(site.path, site.op_type, "no jump is given for it"))
            continue
        try:
            effective = check_jump(site, jump)
            choice = choose(site, jump, model.proto.ir_version, form=form, target=target)
        except ParameterError as error:
            refused[site.path] = str(error)
        else:
            plans.append(JumpSite(site, choice.form, choice.reason, jump, effective))
    if refused:
        more = f"; and at {len(refused) - 5} more sites" if len(refused) > 5 else ""
        raise ParameterError(
            f"{'; '.join(list(refused.values())[:5])}{more}. To leave such a site as it is: "
            f"--exclude {shlex.quote(next(iter(refused)))}, in Python Selection(exclude=...)"
        )
    imported = {entry.domain for entry in model.proto.opset_import}
    if FUNCTION_DOMAIN in imported and any(plan.form == "function" for plan in plans):
        raise ParameterError(
            f"form function is not possible: the model has a domain {FUNCTION_DOMAIN!r} of its own"
        )
    return plans, unnamed


def _hardened(original: Model, plans: Sequence[JumpSite]) -> Model:
    # Where no byte of the model spells the prefix of our names, none of its own can clash.
    free = NAME_PREFIX.encode() not in original.content
    names = Names(()) if free else Names.of(original.proto)
    nodes = {scope.address: scope.graph.node for scope in original.scopes}
    entries: dict[str, Entry] = {}
    edits: wire.Edits = {}
    for scope, group in groupby(plans, key=lambda plan: plan.site.scope):
        writer = _Writer(nodes[scope], node_field(scope), names, free, entries)
        here = edits_at(edits, scope)
        for plan in group:
            here[plan.site.index] = partial(writer.replace, plan)
    try:
        content = wire.splice(original.content, edits)
        listed = [entries[plan.site.path] for plan in plans]
        hardened = manifests.add(content, original, listed)
    except wire.LayoutError as error:
        raise ModelError(
            f"{original.name}: the file is written in a way that protobuf itself does not write "
            f"({error}), so it cannot be edited in place. Load it with onnx.load, save it with "
            "onnx.save, and retrofit that"
        ) from error
    excess = len(hardened) - limits.LARGEST + 1
    if excess <= 0:
        return original.derived(hardened)
    del hardened  # as large as all the rest
    content, data, spilled = spill(content, excess)
    content = manifests.add(content, original, listed, spilled)
    return Model(content, folder=original.folder, attachments=data)


class _Writer:
    """Writes the nodes of the sites in one list; those alike but for names share a pattern."""

    def __init__(
        self,
        nodes: Sequence[onnx.NodeProto],
        number: int,
        names: Names,
        free: bool,
        entries: dict[str, Entry],
    ) -> None:
        self._number = number
        self._nodes = nodes
        self._names = names
        self._free = free
        self._entries = entries
        self._constants = SharedConstants(names)
        self._patterns: dict[tuple[object, ...], Pattern] = {}

    def replace(self, plan: JumpSite, old: bytes) -> bytes:
        """Returns the fields that take the place of the field `old`, and lists them."""
        site, node = plan.site, self._nodes[plan.site.index]
        prefix = self._names.fresh(f"{NAME_PREFIX}/{site.y}")
        if _says_more(node) or site.cap is not None or not self._free or site.x == site.y:
            new = self._built(plan, node, NodeBuilder(self._names, prefix))
            content, span = self._encoded(new), len(new)
        else:
            pattern = self._pattern(plan, node, prefix)
            content = pattern.fill(self._number, site.x, site.y, prefix)
            span = len(pattern.nodes)
        constants = self._constants.take()
        if constants:
            content = self._encoded(constants) + content
            span += len(constants)
        self._entries[site.path] = Entry(
            site.path, plan.form, plan.jump, plan.effective_jump, site.scope, site.index, span, old
        )
        return content

    def _pattern(self, plan: JumpSite, node: onnx.NodeProto, prefix: str) -> Pattern:
        site = plan.site
        # The constant of a jump per channel has the rank of x.
        rank = len(site.tensor.shape or ()) if isinstance(plan.jump, tuple) else 0
        key = (plan.form, plan.jump, site.tensor.element, rank)
        pattern = self._patterns.get(key)
        if pattern is None:
            nodes = self._built(plan, node, NodeBuilder(Names(()), prefix))
            pattern = self._patterns[key] = Pattern.of(nodes, site.x, site.y, prefix)
        return pattern

    def _built(
        self, plan: JumpSite, node: onnx.NodeProto, build: NodeBuilder
    ) -> list[onnx.NodeProto]:
        return form_nodes(plan.form, Spot(plan.site, node, plan.jump, build, self._constants))

    def _encoded(self, nodes: Sequence[onnx.NodeProto]) -> bytes:
        return b"".join(wire.encode(self._number, node.SerializeToString()) for node in nodes)


def form_nodes(form: str, spot: Spot) -> list[onnx.NodeProto]:
    """Returns the nodes of a form; what the original's says beside its computation goes along.

    Documentation, metadata and fields that this version of ONNX does not know go to the node that
    gives the output, device configurations to every node, each with the values that it has.
    """
    FORMS[form](spot)
    nodes, node = spot.build.nodes, spot.node
    if _says_more(node):
        rest = onnx.NodeProto()
        rest.CopyFrom(node)
        for field in (*_COMPUTED, "device_configurations"):
            rest.ClearField(field)
        for new in nodes:
            new.DiscardUnknownFields()  # of a Clip that is kept
            _place(new, node.device_configurations)
        nodes[-1].MergeFrom(rest)
    return nodes


def _says_more(node: onnx.NodeProto) -> bool:
    return (
        node.HasField("doc_string")
        or len(node.metadata_props) > 0
        or len(node.device_configurations) > 0
        or has_unknown_fields(node)
    )


def _place(node: onnx.NodeProto, devices: Iterable[onnx.NodeDeviceConfigurationProto]) -> None:
    node.ClearField("device_configurations")
    values = {*node.input, *node.output}
    for device in devices:
        copy = node.device_configurations.add()
        copy.CopyFrom(device)
        del copy.sharding_spec[:]
        copy.sharding_spec.extend(
            spec for spec in device.sharding_spec if spec.tensor_name in values
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
        check(hardened)
    except InvalidModelError as error:
        check(original)  # refused already? Then that is the news, and it is raised
        raise PostconditionError(f"the hardened model is invalid: {error}") from error


def _told(model: Model, what: str, skipped: Sequence[Skipped]) -> str:
    reasons = "; ".join(f"{entry.path} ({entry.op_type}): {entry.reason}" for entry in skipped[:5])
    more = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
    found = f"skipped {reasons}{more}" if skipped else "it has no Relu"
    return f"{model.name}: {what}, {found}. Nothing was written"
