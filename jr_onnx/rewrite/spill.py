"""Keeping a hardened model under protobuf's 2 GiB: the largest weights move to a file beside it.

    initializer {name, dims, raw_data}  ->  initializer {name, dims, external: file, offset, length}

Only a model that the new nodes would push over the limit is spilled; its undo puts the weights
back.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from onnx import TensorProto

from jr_onnx.errors import ExternalDataError, ModelError
from jr_onnx.model import Model, wire

_INITIALIZER, _RAW_DATA = 5, 9
_ALIGNMENT = 4096  # lets a reader map the file


@dataclass(frozen=True)
class Spilled:
    """One initializer that was moved out.

    Attributes:
        index: its position among the initializers of the main graph.
        location: the file's name.
        offset: where its bytes begin there.
        length: how many they are.
        before: the bytes of the original field up to its data.
        after: those behind it.
    """

    index: int
    location: str
    offset: int
    length: int
    before: bytes
    after: bytes

    def to_json(self) -> dict[str, Any]:
        """Returns the entry of the manifest."""
        sides = {"before": b64encode(self.before).decode(), "after": b64encode(self.after).decode()}
        return {**vars(self), **sides}

    @classmethod
    def of_json(cls, record: dict[str, Any]) -> Spilled:
        """Reads the entry of the manifest."""
        return cls(
            index=int(record["index"]),
            location=str(record["location"]),
            offset=int(record["offset"]),
            length=int(record["length"]),
            before=b64decode(record["before"], validate=True),
            after=b64decode(record["after"], validate=True),
        )


def spill(content: bytes, excess: int, location: str) -> tuple[bytes, bytes, tuple[Spilled, ...]]:
    """Moves the largest initializers out.

    Args:
        content: a serialized model.
        excess: how many bytes it must lose.
        location: the name of the file they go to.

    Returns:
        The smaller model, the content of the file, and what was moved.

    Raises:
        ModelError: its initializers do not hold so much.
    """
    spans = list(data_spans(content))
    chosen, freed = set(), 0
    for span in sorted(spans, key=lambda span: span.raw.value - span.raw.end):
        if freed >= excess:
            break
        chosen.add(span.index)
        freed += span.raw.end - span.raw.value
    if freed < excess:
        raise ModelError(
            f"the hardened model would pass protobuf's 2 GiB by {excess:,} bytes, and its "
            f"initializers hold only {freed:,}. Save its weights as external data first"
        )
    data = bytearray()
    moved: list[Spilled] = []
    for span in spans:
        if span.index not in chosen:
            continue
        data += bytes(-len(data) % _ALIGNMENT)
        raw, field = span.raw, span.field
        before, after = content[field.start : raw.value], content[raw.end : field.end]
        size = raw.end - raw.value
        moved.append(Spilled(span.index, location, len(data), size, before, after))
        data += memoryview(content)[raw.value : raw.end]
    return spill_again(content, moved), bytes(data), tuple(moved)


def spill_again(content: bytes, moved: Sequence[Spilled]) -> bytes:
    """Returns a model with the given initializers moved out."""
    return _edited(content, moved, _outside)


def bring_back(content: bytes, moved: Sequence[Spilled], model: Model) -> bytes:
    """Returns the content with its weights inside again, read from beside `model`.

    Raises:
        ExternalDataError: the file with the weights is missing or too short.
    """
    return _edited(
        content, moved, lambda _, record: record.before + data_of(record, model) + record.after
    )


def data_of(record: Spilled, model: Model) -> bytes:
    """Returns the bytes of an initializer that was moved out.

    Raises:
        ExternalDataError: the file is missing or too short.
    """
    if record.location in model.attachments:
        found = model.attachments[record.location]
        return found[record.offset : record.offset + record.length]
    where = f"{model.name}: its weights in {record.location!r}"
    if model.folder is None:
        raise ExternalDataError(f"{where} cannot be found, as it is from no file. Use jr_onnx.load")
    try:
        with (model.folder / record.location).open("rb") as file:
            file.seek(record.offset)
            found = file.read(record.length)
    except OSError as error:
        raise ExternalDataError(
            f"{where} cannot be read ({error.strerror}). Put the file beside the model"
        ) from error
    if len(found) < record.length:
        raise ExternalDataError(f"{where} are cut off. Copy the file again")
    return found


@dataclass(frozen=True)
class Span:
    """Where an initializer of the main graph keeps its raw data."""

    index: int
    field: wire.Field
    raw: wire.Field


def data_spans(content: bytes) -> Iterator[Span]:
    """Yields where the initializers of the main graph that have raw data keep it."""
    graph = next(each for each in wire.fields(content) if each.number == wire.MODEL_GRAPH)
    index = -1
    for field in wire.fields(content, graph.value, graph.end):
        if field.number == _INITIALIZER:
            index += 1
            for part in wire.fields(content, field.value, field.end):
                if part.number == _RAW_DATA:
                    yield Span(index, field, part)


def _edited(
    content: bytes, moved: Sequence[Spilled], edit: Callable[[bytes, Spilled], bytes]
) -> bytes:
    if not moved:
        return content
    edits: wire.Edits = {
        (_INITIALIZER, record.index): lambda old, record=record: edit(old, record)  # type: ignore[misc]
        for record in moved
    }
    return wire.splice(content, {(wire.MODEL_GRAPH, 0): edits})


def _outside(old: bytes, record: Spilled) -> bytes:
    """Returns an initializer's field with its data in the file."""
    field = next(wire.fields(old))
    tensor = TensorProto.FromString(old[field.value : field.end])
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    places = {"location": record.location, "offset": record.offset, "length": record.length}
    for key, value in places.items():
        tensor.external_data.add(key=key, value=str(value))
    return wire.encode(_INITIALIZER, tensor.SerializeToString())
