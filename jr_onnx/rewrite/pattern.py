"""A form written once, with gaps for names, and filled in for every site that takes it.

    nodes of the form for x, y, prefix     Sub(x, jr_onnx/v1/jump:0) -> prefix/sub:0, ...
    pattern                                bytes, gap, bytes, gap, ...
    filled in for another site             the same bytes as building its nodes, in a fraction of
                                           the time

Lengths are a part of the bytes, so a pattern is laid out anew for names of other lengths; a model
has few of those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import onnx

from jr_onnx.model import wire

_X, _Y, _PREFIX = range(3)
_NAMES = (wire.NODE_INPUT, wire.NODE_OUTPUT, wire.NODE_NAME)
# A gap: field number, which of x, y and prefix, what follows it. Bytes: 0, 0, the bytes.
_Part = tuple[int, int, bytes]
_Names = tuple[bytes, bytes, bytes]


@dataclass(frozen=True)
class _Layout:
    """The bytes for names of certain lengths: a format, and which name goes into which gap."""

    text: bytes
    pick: Callable[[_Names], Any]


@dataclass(frozen=True)
class Pattern:
    """Nodes as bytes, with gaps.

    Attributes:
        nodes: each a sequence of fields to write and of gaps.
    """

    nodes: tuple[tuple[_Part, ...], ...]
    _layouts: dict[tuple[int, ...], _Layout] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, nodes: Sequence[onnx.NodeProto], x: str, y: str, prefix: str) -> Pattern:
        """Turns every name of the nodes that is x, y or below the prefix into a gap."""
        return cls(tuple(_gaps(node, x.encode(), y.encode(), prefix.encode()) for node in nodes))

    def fill(self, number: int, x: str, y: str, prefix: str) -> bytes:
        """Returns the nodes with other names, each as a field of that number."""
        names = (x.encode(), y.encode(), prefix.encode())
        lengths = (number, len(names[_X]), len(names[_Y]), len(names[_PREFIX]))
        layout = self._layouts.get(lengths)
        if layout is None:
            layout = self._layouts[lengths] = self._lay_out(number, names)
        filled: bytes = layout.text % layout.pick(names)
        return filled

    def _lay_out(self, number: int, names: _Names) -> _Layout:
        text, order = bytearray(), []
        for parts in self.nodes:
            node, size = bytearray(), 0
            for tag, which, rest in parts:
                if not tag:
                    node += rest.replace(b"%", b"%%")
                    size += len(rest)
                    continue
                whole = wire.encode(tag, names[which] + rest)
                head = whole[: len(whole) - len(names[which]) - len(rest)]
                node += head.replace(b"%", b"%%") + b"%b" + rest.replace(b"%", b"%%")
                size += len(whole)
                order.append(which)
            head = wire.encode(number, bytes(size))[:-size]
            text += head.replace(b"%", b"%%") + node
        return _Layout(bytes(text), itemgetter(*order))


def _gaps(node: onnx.NodeProto, x: bytes, y: bytes, prefix: bytes) -> tuple[_Part, ...]:
    content = node.SerializeToString()
    parts: list[_Part] = []
    for part in wire.fields(content):
        value = content[part.value : part.end]
        if part.number in _NAMES and value in (x, y):
            parts.append((part.number, _X if value == x else _Y, b""))
        elif part.number in _NAMES and value.startswith(prefix + b"/"):
            parts.append((part.number, _PREFIX, value[len(prefix) :]))
        else:
            parts.append((0, 0, content[part.start : part.end]))
    return tuple(parts)
