"""The hardened model as a whole on real examples, against the same jumps in another form.

Two correct models need not agree to the last bit: the jump is a discontinuity, and rounding may put
a unit that sits at it on the other side. So what is compared is how many units flipped, and whether
the predictions agree; closeness of the outputs would be the wrong question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jr_onnx.errors import ModelError, NothingToRewriteError
from jr_onnx.model import Model, with_outputs
from jr_onnx.rewrite import manifest as manifests
from jr_onnx.rewrite.forms import why_not
from jr_onnx.rewrite.retrofit import retrofit
from jr_onnx.rewrite.sites import Site, find_sites
from jr_onnx.session import Session, batches

Array = np.ndarray[Any, Any]
_OTHER_FORMS = ("greater-where", "sub-greater-where", "mul-cast")


@dataclass(frozen=True)
class EndToEnd:
    """How two forms of the same jumps compare on the same examples.

    Attributes:
        samples: how many examples were run.
        other_form: the form of the model compared with.
        units: how many values went through the sites of the main graph.
        flips: how many of them were 0 in one model and not in the other.
        agreement: share of examples with the same argmax of the first output, 0..1.
    """

    samples: int
    other_form: str
    units: int
    flips: int
    agreement: float

    def to_json(self) -> dict[str, Any]:
        """Returns the entry `end_to_end` of `verify --json`."""
        return dict(vars(self))


def compare_on_data(
    original: Model, hardened: Model, x: Array, *, device: str = "auto", batch_size: int = 64
) -> EndToEnd:
    """Runs the hardened model, and the original with the same jumps in another form.

    Args:
        original: the model before the retrofit; one input.
        hardened: the model after.
        x: `(samples, ...)`, cast to the dtype of the input.
        device: `auto`, `cpu` or `cuda`.
        batch_size: most examples in one run.

    Raises:
        ModelError: the model has several inputs, or no second form is possible.
        NothingToRewriteError: the hardened model has no jump.
        SessionError: onnxruntime is not there or refuses a model or the data.
    """
    manifest = manifests.read(hardened)
    if manifest is None:
        raise NothingToRewriteError(f"{hardened.name}: has no jump to compare on data")
    entries = {entry.path: entry for entry in manifest.entries}
    sites = [site for site in find_sites(original)[0] if site.path in entries]
    form = _another_form(original, sites, {entry.form for entry in entries.values()})
    jumps = {path: entry.jump for path, entry in entries.items()}
    other = retrofit(original, jumps=jumps, form=form, partial=True).model
    seen = [site.y for site in sites if len(site.scope) == 1]
    sessions = [Session(with_outputs(model, seen), device=device) for model in (hardened, other)]
    if len(sessions[0].inputs) != 1:
        names = [port.name for port in sessions[0].inputs]
        raise ModelError(f"{hardened.name}: one input is needed to run it on data, got {names}")
    port = sessions[0].inputs[0]
    first = sessions[0].outputs[0].name
    units = flips = agreed = 0
    for part, real in batches(port, batch_size, x):
        one, two = (session.run({port.name: part[0]}, [first, *seen]) for session in sessions)
        agreed += int((_argmax(one[0]) == _argmax(two[0]))[:real].sum())
        for mine, yours in zip(one[1:], two[1:], strict=True):
            flipped = _of_real((mine > 0) != (yours > 0), real, len(part[0]))
            units += flipped.size
            flips += int(flipped.sum())
    return EndToEnd(len(x), form, units, flips, agreed / len(x))


def _another_form(model: Model, sites: Sequence[Site], taken: set[str]) -> str:
    for form in _OTHER_FORMS:
        possible = all(why_not(form, site, 0.0, model.proto.ir_version) is None for site in sites)
        if possible and form not in taken:
            return form
    raise ModelError(f"{model.name}: there is no second form to compare with at this opset")


def _of_real(units: Array, real: int, batch: int) -> Array:
    """Returns the units of the examples that are real, where the first axis tells them apart."""
    if real == batch or not units.ndim or len(units) % batch:
        return units
    return units[: len(units) // batch * real]


def _argmax(output: Array) -> Array:
    found: Array = output.reshape(len(output), -1).argmax(axis=1)
    return found
