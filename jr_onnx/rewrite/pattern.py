"""A form written once, with gaps for names, and filled in for every site that takes it.

nodes of the form for x, y, prefix     Sub(x, prefix/constant:0) -> prefix/sub:0, ...
pattern                                bytes, gap, bytes, gap, ...
filled in for another site             the same bytes as building its nodes, in a tenth of
                                       the time
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx

from jr_onnx.model import wire

_X, _Y, _PREFIX = range(3)
_NAMES = (wire.NODE_INPUT, wire.NODE_OUTPUT, wire.NODE_NAME)
# A gap: field number, which of x, y and prefix, what follows it. Bytes: 0, 0, the bytes.
_Part = tuple[int, int, bytes]
# Tag and length of a name, by field number and length.
_SHORT = 128
_HEADS = {
    field: [wire.encode(field, bytes(length))[:2] for length in range(_SHORT)] for field in _NAMES
}


@dataclass(frozen=True)
class Pattern:
    """Nodes as bytes, with gaps.

    Attributes:
        nodes: each a sequence of fields to write and of gaps.
    """

    nodes: tuple[tuple[_Part, ...], ...]

    @classmethod
    def of(cls, nodes: Sequence[onnx.NodeProto], x: str, y: str, prefix: str) -> Pattern:
        """Turns every name of the nodes that is x, y or below the prefix into a gap."""
        return cls(tuple(_gaps(node, x.encode(), y.encode(), prefix.encode()) for node in nodes))

    def fill(self, number: int, x: str, y: str, prefix: str) -> bytes:
        """Returns the nodes with other names, each as a field of that number."""
        names = (x.encode(), y.encode(), prefix.encode())
        written = []
        for parts in self.nodes:
            fields = []
            for field, which, rest in parts:
                if not field:
                    fields.append(rest)
                    continue
                name = names[which] + rest
                # The loop of the loops: a call of wire.encode would be half of its time.
                if len(name) < _SHORT:
                    fields.append(_HEADS[field][len(name)])
                    fields.append(name)
                else:
                    fields.append(wire.encode(field, name))
            written.append(wire.encode(number, b"".join(fields)))
        return b"".join(written)


def _gaps(node: onnx.NodeProto, x: bytes, y: bytes, prefix: bytes) -> tuple[_Part, ...]:
    content = node.SerializeToString()
    parts: list[_Part] = []
    for field in wire.fields(content):
        value = content[field.value : field.end]
        if field.number in _NAMES and value in (x, y):
            parts.append((field.number, _X if value == x else _Y, b""))
        elif field.number in _NAMES and value.startswith(prefix + b"/"):
            parts.append((field.number, _PREFIX, value[len(prefix) :]))
        else:
            parts.append((0, 0, content[field.start : field.end]))
    return tuple(parts)
