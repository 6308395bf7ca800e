"""A model is its bytes: immutable, so the original is still there whatever is done with it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, EncodeError, Message

from jr_onnx.errors import InvalidModelError, ModelError, ParameterError
from jr_onnx.model import wire
from jr_onnx.model.graphs import Definitions, Scope, scopes

LARGEST = 2**31  # bytes of a serialized protobuf message


@dataclass(frozen=True)
class Model:
    """A serialized ONNX model.

    Attributes:
        content: the serialized `ModelProto`; weights in external files are not part of it.
        path: the file that holds these bytes, None if there is none.
        folder: where external data is looked for, the folder of `path` by default.
        attachments: external data that is in no file yet, by location; `save` writes it.
    """

    content: bytes = field(repr=False)
    path: Path | None = None
    folder: Path | None = field(default=None, repr=False)
    attachments: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if len(self.content) >= LARGEST:
            raise ModelError(
                f"{self.path or 'model'}: {len(self.content):,} bytes, protobuf holds at most "
                "2 GiB. Save the weights as external data first (onnx.save_model with "
                "save_as_external_data=True)"
            )
        if self.folder is None and self.path is not None:
            object.__setattr__(self, "folder", self.path.parent)

    @classmethod
    def of(cls, proto: onnx.ModelProto, folder: Path | None = None) -> Model:
        """Serializes `proto`.

        Raises:
            ModelError: the serialized model would pass protobuf's limit of 2 GiB.
        """
        try:
            return cls(proto.SerializeToString(), folder=folder)
        except (EncodeError, ValueError) as error:
            raise ModelError(
                f"the model cannot be serialized ({error}). protobuf holds at most 2 GiB: "
                "save the weights as external data first (onnx.save_model with "
                "save_as_external_data=True)"
            ) from error

    def derived(self, content: bytes) -> Model:
        """Returns another model that shares this one's external data, and is no file yet."""
        return Model(content, folder=self.folder, attachments=self.attachments)

    def parse(self) -> onnx.ModelProto:
        """Returns a fresh `ModelProto`, the caller's own to edit.

        Raises:
            InvalidModelError: the bytes are no ONNX model, or only a part of one.
        """
        where = self.path or "model"
        proto = onnx.ModelProto()
        try:
            proto.ParseFromString(self.content)
        except DecodeError as error:
            raise InvalidModelError(
                f"{where}: not an ONNX model, or a truncated one ({error}). "
                "Export or copy the file again"
            ) from error
        # protobuf takes many a foreign file (an empty one, too) for a message of unknown fields.
        if not (proto.ir_version and proto.HasField("graph") and proto.opset_import):
            raise InvalidModelError(
                f"{where}: not an ONNX model, or a truncated one (expected an IR version, a graph "
                "and an opset import). Export or copy the file again"
            )
        return proto

    @cached_property
    def proto(self) -> onnx.ModelProto:
        """The parsed model, shared by all readers: use `parse` for a copy to edit."""
        return self.parse()

    @cached_property
    def scopes(self) -> tuple[Scope, ...]:
        """Every list of nodes of `proto`, found once: the search looks at every attribute."""
        return tuple(scopes(self.proto))

    @cached_property
    def definitions(self) -> Definitions:
        """Which of the `scopes` defines a name."""
        return Definitions(self.scopes)

    @cached_property
    def may_have_external_data(self) -> bool:
        """Whether a tensor may have external data: the name of the file has the key `location`."""
        return b"location" in self.content

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of `content`, in hex."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def name(self) -> str:
        """How messages call the model."""
        return str(self.path) if self.path else self.proto.graph.name or "model"


def require_model(model: object) -> None:
    """Raises `ParameterError` for a path, a `ModelProto` or the like."""
    if not isinstance(model, Model):
        raise ParameterError(
            f"expected a Model, got {type(model).__name__}: jr_onnx.load reads one from a path, "
            "jr_onnx.Model.of makes one of a ModelProto"
        )


def text(field: str | bytes) -> str:
    """Returns a string, which protobuf gives as bytes where it is not UTF-8.

    Raises:
        UnicodeDecodeError: it is not; `readable` says so in an error of ours.
    """
    return field if isinstance(field, str) else field.decode()


@contextmanager
def readable(*models: Model) -> Iterator[None]:
    """Says by a named error that a model is no `Model`, or what in its bytes made us fail.

    Raises:
        ParameterError: one is something else: a path, a `ModelProto`.
        InvalidModelError: it is no ONNX model, or a damaged one; a name or a doc string in it is
            not UTF-8; its bytes are not laid out as protobuf does it.
    """
    for model in models:
        require_model(model)
    try:
        yield
    except (UnicodeDecodeError, TypeError, DecodeError, wire.LayoutError) as error:
        for model in models:
            _require_sound(model, error)
        raise


def _require_sound(model: Model, failure: Exception) -> None:
    """Raises `InvalidModelError` if the model may be the reason of a failure."""
    where = model.path or "model"
    if not _is_text(model.parse()):
        raise InvalidModelError(
            f"{where}: a name or a doc string in it is not UTF-8 ({failure})"
        ) from failure
    if isinstance(failure, (DecodeError, wire.LayoutError)):
        raise InvalidModelError(
            f"{where}: its bytes are not laid out as protobuf does it ({failure}). Load and save "
            "it with onnx, or export it again"
        ) from failure


def _is_text(message: Message) -> bool:
    """Whether all text in a message is UTF-8: what is not, protobuf gives as bytes."""
    for descriptor, value in message.ListFields():
        values = [value] if isinstance(value, (str, bytes, Message)) else value
        if descriptor.type == descriptor.TYPE_MESSAGE and not all(map(_is_text, values)):
            return False
        if descriptor.type == descriptor.TYPE_STRING and bytes in map(type, values):
            return False
    return True


def with_outputs(model: Model, names: Iterable[str]) -> Model:
    """Returns a model that also gives the named values of its main graph as outputs."""
    proto = model.parse()
    present = {value.name for value in proto.graph.output}
    for name in dict.fromkeys(names):
        if name not in present:
            proto.graph.output.add(name=name)
    return model.derived(proto.SerializeToString())
