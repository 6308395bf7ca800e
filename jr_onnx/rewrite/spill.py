"""Keeping a hardened model under protobuf's 2 GiB: the largest weights move to a file beside it.

    initializer {name, dims, raw_data}  ->  initializer {name, dims, external: file, offset, length}

Only a model that the new nodes would push over the limit is spilled; its undo puts the weights
back.
"""

from __future__ import annotations

import hashlib
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
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


def spill(content: bytes, excess: int) -> tuple[bytes, dict[str, bytes], tuple[Spilled, ...]]:
    """Moves the largest initializers out.

    Args:
        content: a serialized model.
        excess: how many bytes it must lose, with all that the manifest says of what was moved.

    Returns:
        The smaller model, the content of the file by its name, and what was moved.

    Raises:
        ModelError: its initializers do not hold so much.
    """
    spans = list(data_spans(content))
    chosen, freed = set(), 0
    for span in sorted(spans, key=lambda span: span.raw.value - span.raw.end):
        gain = _gain(span)
        if freed >= excess or gain <= 0:
            break
        chosen.add(span.index)
        freed += gain
    if freed < excess:
        raise ModelError(
            f"the hardened model would pass protobuf's 2 GiB by {excess:,} bytes, and its "
            f"initializers hold only {freed:,}. Save its weights as external data first"
        )
    data = bytearray()
    offsets: dict[int, int] = {}
    for span in spans:
        if span.index in chosen:
            data += bytes(-len(data) % _ALIGNMENT)
            offsets[span.index] = len(data)
            data += memoryview(content)[span.raw.value : span.raw.end]
    # Named by what it holds: another retrofit of the same model may move other weights.
    location = f"jr_onnx_{hashlib.sha256(data).hexdigest()[:12]}.weights"
    moved: list[Spilled] = []
    edits: dict[int, wire.Edit | bytes | wire.Edits] = {}
    for span in spans:
        if span.index not in chosen:
            continue
        before = content[span.field.start : span.raw.value]
        after = content[span.raw.end : span.field.end]
        size = span.raw.end - span.raw.value
        record = Spilled(span.index, location, offsets[span.index], size, before, after)
        moved.append(record)
        edits[span.index] = wire.encode(
            _INITIALIZER, outside(content, span, record).SerializeToString()
        )
    smaller = wire.splice(content, {wire.MODEL_GRAPH: {0: {_INITIALIZER: edits}}})
    return smaller, {location: bytes(data)}, tuple(moved)


def _gain(span: Span) -> int:
    """Returns how much smaller the model is without the data of an initializer, at the least."""
    around = (span.raw.value - span.field.start) + (span.field.end - span.raw.end)
    return span.raw.end - span.raw.value - 4 * around - 512


def outside(content: bytes, span: Span, record: Spilled) -> TensorProto:
    """Returns an initializer with its data in the file."""
    tensor: TensorProto = TensorProto.FromString(
        content[span.field.value : span.raw.start] + content[span.raw.end : span.field.end]
    )
    tensor.data_location = TensorProto.EXTERNAL
    places = {"location": record.location, "offset": record.offset, "length": record.length}
    for key, value in places.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def bring_back(edits: wire.Edits, moved: Sequence[Spilled], model: Model) -> None:
    """Adds the edits that put the weights back inside, read from beside `model`.

    Raises:
        ExternalDataError: the file with the weights is missing or too short.
    """
    here = edits.setdefault(wire.MODEL_GRAPH, {}).setdefault(0, {})
    if not isinstance(here, dict):
        raise ValueError("the graph is replaced as a whole")
    for record in moved:
        content = record.before + data_of(record, model) + record.after
        here.setdefault(_INITIALIZER, {})[record.index] = content


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
