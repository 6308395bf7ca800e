"""External data: weights in files beside the model, never read here, copied when the model moves.

A location is a path relative to the model's folder. An absolute one, one with `..`, or a link that
leads out of the folder would let a model read any file of its user: it is refused.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import onnx
from onnx import TensorProto, helper

from jr_onnx.errors import ExternalDataError, OutputError
from jr_onnx.model.graphs import Scope, scopes
from jr_onnx.model.model import Model
from jr_onnx.model.output import holds, write_atomically

_CHUNK = 1 << 20
# A tensor, or the values and the indices of a sparse one.
_Parts = tuple[TensorProto, ...]


def locations(model: Model) -> tuple[str, ...]:
    """Returns the files that hold the model's external data, relative to its folder.

    Raises:
        ExternalDataError: a tensor names no file, or one outside the folder.
    """
    if not model.may_have_external_data:
        return ()
    found = dict.fromkeys(
        _location(tensor, model)
        for tensor in _tensors(model.proto)
        if tensor.data_location == TensorProto.EXTERNAL
    )
    return tuple(found)


def data_files(model: Model, folder: Path | None = None) -> tuple[Path, ...]:
    """Returns where the model's external data is, or would be if the model were in `folder`.

    What no output may overwrite: so a location that leads out of the folder is listed, not refused.
    """
    folder = folder or model.folder
    if folder is None or not model.may_have_external_data:
        return ()
    names = dict.fromkeys(
        _named(tensor)
        for tensor in _tensors(model.proto)
        if tensor.data_location == TensorProto.EXTERNAL
    )
    return tuple(folder / name for name in names if name)


def copy_data(model: Model, folder: Path, *, force: bool = False) -> None:
    """Copies the model's external data to another folder, as files of their own.

    Never as hard links: onnx refuses those, for the original too. Never over a file that differs:
    the weights there may be another model's.

    Args:
        model: whose data it is.
        folder: where to.
        force: replace weights that `retrofit` moved to a file of ours.

    Raises:
        ExternalDataError: a file is missing or outside the model's folder.
        OutputError: a file is there and differs, or it cannot be written.
    """
    for name, data in model.attachments.items():
        if not holds(folder / name, data):
            write_atomically(folder / name, data, force=force)
    names = [name for name in locations(model) if name not in model.attachments]
    if not names:
        return
    missing = []
    for name in names:
        source, goal = data_file(model, name), folder / name
        if not goal.exists():
            missing.append((source, goal))
        elif first_difference(source, goal) is not None:
            raise OutputError(
                f"{goal}: is there already with other data, maybe another model's. Write the model "
                "to another folder, or remove that file first"
            )
    for source, goal in missing:
        _copy(source, goal)


def without_data(model: Model) -> onnx.ModelProto | None:
    """Returns the model with each external tensor turned into an input; None if it has none.

    onnx.checker looks for the files of external tensors in the working directory, or in the folder
    of a file that is not written yet; all else about the model it can judge without them.
    """
    if not model.may_have_external_data:
        return None
    proto = model.parse()
    if not _is_external(tuple(_tensors(proto))):
        return None
    inputs = {value.name for value in proto.graph.input}
    for scope in scopes(proto):
        for parts in _of_attributes(scope):
            if _is_external(parts):
                for tensor in parts:
                    tensor.CopyFrom(TensorProto(data_type=tensor.data_type, dims=[0]))
        if isinstance(scope.graph, onnx.GraphProto):
            for listed in (scope.graph.initializer, scope.graph.sparse_initializer):
                _make_inputs(listed, proto.graph, inputs)
    return proto


def _make_inputs(listed: Any, graph: onnx.GraphProto, inputs: set[str]) -> None:
    """Turns those of the initializers that have external data into inputs of the main graph."""
    initializers = list(listed)
    del listed[:]
    for each in initializers:
        tensor = each.values if isinstance(each, onnx.SparseTensorProto) else each
        if not _is_external(_parts(each)):
            listed.append(each)
        elif tensor.name not in inputs:
            inputs.add(tensor.name)
            value = helper.make_tensor_value_info(tensor.name, tensor.data_type, each.dims)
            graph.input.append(value)


def _tensors(proto: onnx.ModelProto) -> Iterator[TensorProto]:
    for scope in scopes(proto):
        if isinstance(scope.graph, onnx.GraphProto):
            for each in (*scope.graph.initializer, *scope.graph.sparse_initializer):
                yield from _parts(each)
        for parts in _of_attributes(scope):
            yield from parts


def _of_attributes(scope: Scope) -> Iterator[_Parts]:
    for node in scope.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield _parts(attribute.t)
            if attribute.HasField("sparse_tensor"):
                yield _parts(attribute.sparse_tensor)
            yield from map(_parts, (*attribute.tensors, *attribute.sparse_tensors))


def _is_external(parts: _Parts) -> bool:
    return any(tensor.data_location == TensorProto.EXTERNAL for tensor in parts)


def _parts(tensor: TensorProto | onnx.SparseTensorProto) -> _Parts:
    sparse = isinstance(tensor, onnx.SparseTensorProto)
    return (tensor.values, tensor.indices) if sparse else (tensor,)


def _named(tensor: TensorProto) -> str:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return str(entries.get("location", ""))


def _location(tensor: TensorProto, model: Model) -> str:
    name = _named(tensor)
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not name or name.startswith("/") or PureWindowsPath(name).anchor or ".." in parts:
        raise ExternalDataError(
            f"{model.name}: tensor {tensor.name!r} has its data in {name!r}; expected a file "
            "inside the model's folder. Save the model again with its data beside it"
        )
    return name


def data_file(model: Model, name: str) -> Path:
    """Returns the file of one of the model's `locations`.

    Raises:
        ExternalDataError: it is missing, outside the model's folder, or that folder is unknown.
    """
    if model.folder is None:
        raise ExternalDataError(
            f"{model.name}: has external data ({name}), but is not from a file, so its folder "
            "is unknown. Load it with jr_onnx.load"
        )
    folder = model.folder.resolve()
    path = (folder / name).resolve()
    if not path.is_file():
        raise ExternalDataError(
            f"{model.name}: its data file {name!r} is missing in {model.folder}. Put it beside the "
            "model"
        )
    if not path.is_relative_to(folder):
        raise ExternalDataError(
            f"{model.name}: its data file {name!r} is a link to {path}, outside the model's "
            "folder. Put the file itself beside the model"
        )
    return path


def identity(model: Model) -> str:
    """Returns a hash of the model and of its external data, which `sha256` leaves out; reads it.

    Raises:
        ExternalDataError: a file is missing or outside the model's folder.
    """
    names = locations(model)
    if not names:
        return model.sha256
    whole = hashlib.sha256(model.sha256.encode())
    for name in names:
        if name in model.attachments:
            part = hashlib.sha256(model.attachments[name])
        else:
            with data_file(model, name).open("rb") as file:
                part = hashlib.file_digest(file, "sha256")
        whole.update(part.digest())
    return whole.hexdigest()


def first_difference(one: Path, other: Path) -> int | None:
    """Returns the first byte where two files differ; None if they are equal, or one file."""
    if one.samefile(other):
        return None
    at = 0
    with one.open("rb") as left, other.open("rb") as right:
        while True:
            mine, yours = left.read(_CHUNK), right.read(_CHUNK)
            if mine != yours:
                pairs = enumerate(zip(mine, yours, strict=False))
                return at + next((n for n, (a, b) in pairs if a != b), min(len(mine), len(yours)))
            if not mine:
                return None
            at += len(mine)


def _copy(source: Path, goal: Path) -> None:
    try:
        goal.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=goal.parent, prefix=".jr-onnx.", delete=False) as file:
            temporary = Path(file.name)
        try:
            shutil.copyfile(source, temporary)
            shutil.copymode(source, temporary)
            os.replace(temporary, goal)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{goal}: cannot be written ({error.strerror})") from error
