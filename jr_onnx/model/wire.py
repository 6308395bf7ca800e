"""Editing a serialized message in place of a parsed one: untouched bytes stay untouched bytes.

A protobuf message is a sequence of fields, `tag, length, payload` for all that matters here. An
edit names a field by the numbers on the way to it, and turns its bytes into others; only the
lengths of the messages around it are written anew. So fields unknown to this version of ONNX,
fields out of order and unusual encodings survive, and weights are copied once, by `join`.

    model.graph.node[5]                      {7: {0: {1: {5: edit}}}}
    model.functions[2].node[0]               {25: {2: {7: {0: edit}}}}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

# The numbers of onnx.proto, by message.
MODEL_GRAPH, MODEL_OPSET_IMPORT, MODEL_METADATA, MODEL_FUNCTIONS = 7, 8, 14, 25
GRAPH_NODE, FUNCTION_NODE = 1, 7
NODE_INPUT, NODE_OUTPUT, NODE_NAME, NODE_ATTRIBUTE = 1, 2, 3, 5
ATTRIBUTE_GRAPH, ATTRIBUTE_GRAPHS = 6, 11

# From a field's bytes, tag included, to those of the fields that take its place.
Edit = Callable[[bytes], bytes]
# By field number, and by how many fields of that number come before.
Edits: TypeAlias = "dict[int, dict[int, Edit | bytes | Edits]]"

_LENGTH_DELIMITED = 2
_FIXED = {1: 8, 5: 4}
_VARINT, _GROUP_START, _GROUP_END = 0, 3, 4


class LayoutError(ValueError):
    """A message is not written as protobuf writes it, though it can be read."""


class Field(NamedTuple):
    """One field of a message.

    Attributes:
        number: of the field.
        start: where its tag begins.
        value: where its payload begins.
        end: behind its payload.
    """

    number: int
    start: int
    value: int
    end: int


def fields(content: bytes, start: int = 0, end: int | None = None) -> Iterator[Field]:
    """Yields the fields of the message in `content[start:end]`.

    Raises:
        LayoutError: it is no message.
    """
    return map(Field._make, _scan(content, start, len(content) if end is None else end))


def _scan(content: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields the fields as plain tuples: half the time of named ones, and models have millions."""
    at = start
    try:
        while at < end:
            begin = at
            tag = content[at]
            at += 1
            if tag > 0x7F:
                tag, at = _varint(content, begin)
            number, kind = tag >> 3, tag & 7
            if kind == _LENGTH_DELIMITED:
                length = content[at]
                value = at + 1
                if length > 0x7F:
                    length, value = _varint(content, at)
                at = value + length
            elif kind in _FIXED:
                value, at = at, at + _FIXED[kind]
            elif kind == _VARINT:
                value, (_, at) = at, _varint(content, at)
            elif kind == _GROUP_START:
                value, at = at, _end_of_group(content, at, number)
            else:
                raise LayoutError(f"wire type {kind} at byte {begin}")
            if at > end:
                raise LayoutError(f"field {number} at byte {begin} is cut off")
            yield number, begin, value, at
    except IndexError as error:
        raise LayoutError(f"cut off at byte {at}") from error


def runs(content: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yields number, start and end of each stretch of fields of one number."""
    current, begin = 0, start
    for number, at, _, _ in _scan(content, start, end):
        if number != current:
            if at > begin:
                yield current, begin, at
            current, begin = number, at
    if end > begin:
        yield current, begin, end


def splice(content: bytes, edits: Edits) -> bytes:
    """Returns the message with fields replaced.

    Args:
        content: a serialized message.
        edits: for each field, its edit, or the edits inside that message, or the bytes that take
            its place.

    Raises:
        LayoutError: there is no such field, or a length that is written anew has needless bytes.
    """
    chunks: list[bytes | memoryview] = []
    _splice(memoryview(content), content, 0, len(content), edits, chunks)
    return b"".join(chunks)


def payload(field: bytes) -> bytes:
    """Returns what a length-delimited field holds: the inverse of `encode`."""
    _, at = _varint(field, 0)
    length, at = _varint(field, at)
    return field[at : at + length]


def encode(number: int, payload: bytes) -> bytes:
    """Returns a length-delimited field."""
    length = len(payload)
    if number < 16 and length < 0x80:
        return bytes((number << 3 | _LENGTH_DELIMITED, length)) + payload
    return _encode_varint(number << 3 | _LENGTH_DELIMITED) + _encode_varint(length) + payload


def insert(content: bytes, additions: Sequence[tuple[int, bytes]]) -> bytes:
    """Returns the message with fields added where protobuf itself would write them.

    Args:
        content: a serialized message.
        additions: field numbers and payloads, by ascending number.
    """
    chunks: list[bytes | memoryview] = []
    view, copied = memoryview(content), 0
    ends = [(field.number, field.end) for field in fields(content)]
    for number, payload in additions:
        at = max((end for known, end in ends if known <= number), default=0)
        at = max(at, copied)
        chunks += [view[copied:at], encode(number, payload)]
        copied = at
    return b"".join([*chunks, view[copied:]])


def remove(content: bytes, unwanted: Callable[[int, bytes], bool]) -> bytes:
    """Returns the message without some of its fields.

    Args:
        content: a serialized message.
        unwanted: told the number and the payload of each field but the graph.
    """
    view, chunks, copied = memoryview(content), [], 0
    for field in fields(content):
        if field.number != MODEL_GRAPH and unwanted(field.number, content[field.value : field.end]):
            chunks.append(view[copied : field.start])
            copied = field.end
    return b"".join([*chunks, view[copied:]])


def _splice(
    view: memoryview,
    content: bytes,
    start: int,
    end: int,
    edits: Edits,
    chunks: list[bytes | memoryview],
) -> None:
    seen = dict.fromkeys(edits, 0)
    left, copied = sum(map(len, edits.values())), start
    for number, begin, value, behind in _scan(content, start, end):
        wanted = edits.get(number)
        if wanted is None or content[begin] & 7 != _LENGTH_DELIMITED:
            continue
        here = wanted.get(seen[number])
        seen[number] += 1
        if here is None:
            continue
        left -= 1
        if begin > copied:
            chunks.append(view[copied:begin])
        copied = behind
        if isinstance(here, bytes):
            chunks.append(here)
        elif isinstance(here, dict):
            inner: list[bytes | memoryview] = []
            _splice(view, content, value, behind, here, inner)
            _, tag_end = _varint(content, begin)
            if view[tag_end:value] != _encode_varint(behind - value):
                raise LayoutError(f"field {number} at byte {begin} has an overlong length")
            chunks += [view[begin:tag_end], _encode_varint(sum(map(len, inner))), *inner]
        else:
            chunks.append(here(content[begin:behind]))
        if not left:
            break  # most of a file comes behind its nodes
    if left:
        missing = [(number, index) for number in edits for index in edits[number]]
        first = min((number, index) for number, index in missing if index >= seen[number])
        raise LayoutError(f"no field {first} in the message")
    chunks.append(view[copied:end])


def _varint(content: bytes, at: int) -> tuple[int, int]:
    byte = content[at]
    if byte < 0x80:
        return byte, at + 1
    value, shift = byte & 0x7F, 7
    while True:
        at += 1
        byte = content[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + 1
        shift += 7


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _end_of_group(content: bytes, at: int, number: int) -> int:
    """Returns the position behind a group (a relic of proto2 that an unknown field may be)."""
    while True:
        tag, behind = _varint(content, at)
        if tag & 7 == _GROUP_END:
            if tag >> 3 != number:
                raise LayoutError(f"group {number} ends as {tag >> 3}")
            return behind
        at = next(fields(content, at)).end
