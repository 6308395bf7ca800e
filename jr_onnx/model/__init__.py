"""The only package that speaks protobuf: load, save, check, walk, build.

file or bytes --load--> Model (immutable bytes) --parse--> ModelProto --seal--> Model --save--> file
"""

from jr_onnx.model import wire
from jr_onnx.model.builder import Names, NodeBuilder
from jr_onnx.model.constants import Constants, attribute_of
from jr_onnx.model.file import check, load, save
from jr_onnx.model.graphs import Address, Scope, scopes
from jr_onnx.model.model import Model, with_outputs
from jr_onnx.model.output import require_writable, write_atomically
from jr_onnx.model.types import Tensor, ValueTypes, dtype_name

__all__ = [
    "Address",
    "Constants",
    "Model",
    "Names",
    "NodeBuilder",
    "Scope",
    "Tensor",
    "ValueTypes",
    "attribute_of",
    "check",
    "dtype_name",
    "load",
    "require_writable",
    "save",
    "scopes",
    "wire",
    "with_outputs",
    "write_atomically",
]
