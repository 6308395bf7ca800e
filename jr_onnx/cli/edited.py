"""Hardened models that somebody edited since: undone where that is possible, and told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from jr_onnx import rewrite
from jr_onnx.errors import NotRetrofittedError
from jr_onnx.model import Model


class Undo(Protocol):
    """`rewrite.restore` or `rewrite.original_of`."""

    def __call__(self, model: Model, *, force: bool = False) -> Model:
        """Returns the model before it was hardened."""


def undone(model: Model, undo: Undo, *, accept_edits: bool) -> tuple[Model, tuple[str, ...]]:
    """Returns the model before it was hardened, and the edits that are in it, mostly none.

    Raises:
        NotRetrofittedError: there are edits that are not accepted, or that moved the sites.
    """
    try:
        return undo(model), ()
    except NotRetrofittedError as error:
        edits = rewrite.edits_of(model)
        if not edits:
            raise
        if not accept_edits:
            raise NotRetrofittedError(
                f"{told(model.path, edits)}. Go back to the file as jr-onnx wrote it or to the "
                "original model, or keep the edits with --accept-edits (`jr-onnx verify ORIGINAL "
                "HARDENED` lists them)"
            ) from error
    return undo(model, force=True), edits


def told(path: Path | None, edits: Sequence[str]) -> str:
    """Returns which parts were edited, as the start of a sentence."""
    return f"{path} was edited after it was hardened, in {', '.join(edits)}"
