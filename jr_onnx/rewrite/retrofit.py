"""original + jump -> hardened: every site replaced by its form, everything else as it was."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import onnx

from jr_onnx import model as models
from jr_onnx.errors import (
    AlreadyRetrofittedError,
    InvalidModelError,
    NothingToRewriteError,
    PostconditionError,
)
from jr_onnx.model import Model, Names, NodeBuilder
from jr_onnx.rewrite import manifest as manifests
from jr_onnx.rewrite.forms import DEFAULT_FORM, FORMS, effective_jump, form_for, site_jump
from jr_onnx.rewrite.manifest import NAME_PREFIX, Entry
from jr_onnx.rewrite.restore import Nodes, locate, replace_nodes, restore
from jr_onnx.rewrite.sites import Site, Skipped, find_sites


@dataclass(frozen=True)
class JumpSite:
    """A site that got its jump.

    Attributes:
        site: the activation as it was.
        form: the node pattern it became.
        jump: the jump asked for.
        effective_jump: the same, as the tensor's type holds it.
    """

    site: Site
    form: str
    jump: float
    effective_jump: float

    def to_json(self) -> dict[str, Any]:
        """Returns the site as `retrofit --json` lists it."""
        return {
            **self.site.to_json(),
            "form": self.form,
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


def retrofit(model: Model, *, jump: float, form: str = DEFAULT_FORM) -> Retrofit:
    """Replaces every site by y = x if x > jump else 0.

    A model that is hardened already gets the new jump in place of the old one.

    Args:
        model: the model, which is not changed.
        jump: finite and >= 0, in units of the activations.
        form: the node pattern (see `forms`).

    Raises:
        ParameterError: the jump or the form makes no sense.
        NothingToRewriteError: no site in the model.
        AlreadyRetrofittedError: hardened nodes without a usable manifest.
        PostconditionError: the result is not valid or cannot be undone; a bug of ours.

    References:
        Erichson, Yao, Mahoney: JumpReLU (arXiv:1904.03750).
    """
    effective_jump(jump, models.Tensor(onnx.TensorProto.DOUBLE).dtype)
    original = original_of(model)
    sites, skipped = find_sites(original)
    if not sites:
        raise NothingToRewriteError(_nothing(original, skipped))
    proto = original.parse()
    names = Names.of(proto)
    done: list[JumpSite] = []
    entries: list[Entry] = []
    by_scope = [list(group) for _, group in groupby(sites, key=lambda site: site.scope)]
    # Inner scopes first: an address counts the nodes of the outer ones as they were.
    for group in reversed(by_scope):
        jumps = [_plan(site, jump, form) for site in group]
        entries[:0] = _replace(locate(proto, group[0].scope), jumps, names)
        done[:0] = jumps
    manifests.write(proto, original, entries)
    result = Retrofit(Model.of(proto, original.path), original, tuple(done), skipped)
    _postcondition(result)
    return result


def original_of(model: Model) -> Model:
    """Returns the model itself, or what it was before it was retrofitted.

    Raises:
        NotRetrofittedError: it was changed since it was retrofitted.
        AlreadyRetrofittedError: it has hardened nodes, but no manifest.
    """
    if manifests.read(model.proto) is not None:
        return Model(restore(model).content, model.path)
    for scope in models.scopes(model.proto):
        for node in scope.graph.node:
            if node.name.startswith(NAME_PREFIX):
                raise AlreadyRetrofittedError(
                    f"{model.name}: node {node.name!r} is a jump already, but the manifest is gone "
                    "(a tool dropped the model's metadata). Retrofit the original model instead"
                )
    return model


def _plan(site: Site, jump: float, form: str) -> JumpSite:
    return JumpSite(site, form_for(site, form), jump, float(site_jump(site, jump)))


def _replace(graph: Nodes, jumps: list[JumpSite], names: Names) -> list[Entry]:
    at_index = {planned.site.index: planned for planned in jumps}
    nodes: list[onnx.NodeProto] = []
    entries: list[Entry] = []
    for index, node in enumerate(graph.node):
        planned = at_index.get(index)
        if planned is None:
            nodes.append(node)
            continue
        new = _hardened(node, planned, names)
        entries.append(_entry(node, planned, len(new)))
        nodes += new
    replace_nodes(graph, nodes)
    return entries


def _hardened(node: onnx.NodeProto, planned: JumpSite, names: Names) -> list[onnx.NodeProto]:
    site = planned.site
    build = NodeBuilder(names, f"{NAME_PREFIX}/{site.y}")
    FORMS[planned.form](build, site.x, site.y, site_jump(site, planned.jump))
    last = build.nodes[-1]
    if node.HasField("doc_string"):
        last.doc_string = node.doc_string
    last.metadata_props.extend(node.metadata_props)
    return build.nodes


def _entry(node: onnx.NodeProto, planned: JumpSite, count: int) -> Entry:
    site = planned.site
    return Entry(
        path=site.path,
        form=planned.form,
        jump=planned.jump,
        effective_jump=planned.effective_jump,
        scope=site.scope,
        index=site.index,
        count=count,
        node=node.SerializeToString(),
    )


def _postcondition(result: Retrofit) -> None:
    if restore(result.model).content != result.original.content:
        raise PostconditionError(
            f"{result.original.name}: the undo of the rewrite is not byte-identical; "
            "nothing was written. Please report this model"
        )
    try:
        models.check(result.model)
    except InvalidModelError as error:
        models.check(result.original)  # refused already? Then that is the news, and it is raised
        raise PostconditionError(f"the hardened model is invalid: {error}") from error


def _nothing(model: Model, skipped: tuple[Skipped, ...]) -> str:
    reasons = "; ".join(f"{entry.path} ({entry.op_type}): {entry.reason}" for entry in skipped[:5])
    more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
    found = f"skipped {reasons}{more}" if skipped else "it has no Relu"
    return f"{model.name}: nothing to rewrite, {found}. Nothing was written"
