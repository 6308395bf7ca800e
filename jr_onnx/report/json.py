"""The JSON documents: a schema name, the tool, then the result."""

from __future__ import annotations

import json
from typing import Any

from jr_onnx import __version__


def to_json(schema: str, **entries: Any) -> bytes:
    """Returns a document as UTF-8.

    Args:
        schema: its name and version, `jr-onnx/retrofit/1`.
        entries: what follows; NaN is refused, as JSON has none.
    """
    document = {"schema": schema, "tool": {"name": "jr-onnx", "version": __version__}, **entries}
    return (json.dumps(document, indent=2, allow_nan=False) + "\n").encode()
