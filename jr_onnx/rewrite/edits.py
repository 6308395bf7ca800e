"""hardened model -> which of its parts somebody else edited since."""

from __future__ import annotations

from jr_onnx.model import Model
from jr_onnx.model.model import readable
from jr_onnx.rewrite import manifest as manifests


def edits_of(model: Model) -> tuple[str, ...]:
    """Returns the parts that are not as `retrofit` wrote them: `graph.node`, `model.doc_string`.

    Empty for a model as it was written, and for one without a manifest.

    Raises:
        NotRetrofittedError: there is a manifest, but it cannot be read.
        InvalidModelError: the model itself cannot.
    """
    with readable(model):
        manifest = manifests.read(model)
        if manifest is None or not manifests.is_edited(manifest, model.content):
            return ()
        parts = manifests.changed_parts(manifest, model.content)
    return tuple(parts) or ("the order of its fields",)
