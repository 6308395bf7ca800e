"""What is read of a `gs.Graph` without loading its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

Array = np.ndarray[Any, Any]
# Bounds, slopes and shapes are smaller; what is larger is a weight, which nobody here reads.
SMALL = 4096


def leading(surgeon: Any, graph: gs.Graph) -> int:
    """Returns how many Constant nodes an export puts first: functions have no initializers."""
    if not isinstance(graph, surgeon.Function):
        return 0
    return sum(isinstance(tensor, surgeon.Constant) for tensor in graph.tensors().values())


def lazy_message(tensor: gs.Constant) -> TensorProto | onnx.SparseTensorProto | None:
    """Returns the message that a constant not loaded yet stands for, None if it is loaded."""
    message: TensorProto | onnx.SparseTensorProto | None = getattr(tensor._values, "tensor", None)
    return message
