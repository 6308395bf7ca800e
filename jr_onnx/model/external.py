"""External data: weights in files beside the model, never read here, copied when the model moves.

A location is a path relative to the model's folder. An absolute one, one with `..`, or a link that
leads out of the folder would let a model read any file of its user: it is refused.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
from onnx import TensorProto, helper

from jr_onnx.errors import ExternalDataError, OutputError
from jr_onnx.model.graphs import scopes
from jr_onnx.model.model import Model
from jr_onnx.model.output import holds, write_atomically


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
    if model.folder is None:
        raise ExternalDataError(
            f"{model.name}: has external data ({names[0]}), but is not from a file, so its folder "
            "is unknown. Load it with jr_onnx.load"
        )
    missing = []
    for name in names:
        source, goal = _inside(model, name), folder / name
        if not goal.exists():
            missing.append((source, goal))
        elif not goal.samefile(source) and not _same(source, goal):
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
    if not any(tensor.data_location == TensorProto.EXTERNAL for tensor in _tensors(model.proto)):
        return None
    proto = model.parse()
    inputs = {value.name for value in proto.graph.input}
    for scope in scopes(proto):
        for node in scope.graph.node:
            for attribute in node.attribute:
                if attribute.t.data_location == TensorProto.EXTERNAL:
                    attribute.t.CopyFrom(TensorProto(data_type=attribute.t.data_type, dims=[0]))
        if isinstance(scope.graph, onnx.FunctionProto):
            continue
        tensors = list(scope.graph.initializer)
        del scope.graph.initializer[:]
        for tensor in tensors:
            if tensor.data_location != TensorProto.EXTERNAL:
                scope.graph.initializer.append(tensor)
            elif tensor.name not in inputs:
                inputs.add(tensor.name)
                value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
                proto.graph.input.append(value)
    return proto


def _tensors(proto: onnx.ModelProto) -> Iterator[TensorProto]:
    for scope in scopes(proto):
        if isinstance(scope.graph, onnx.GraphProto):
            yield from scope.graph.initializer
            for sparse in scope.graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
        for node in scope.graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


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


def _inside(model: Model, name: str) -> Path:
    assert model.folder is not None
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


def _same(one: Path, other: Path, chunk: int = 1 << 20) -> bool:
    if one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as left, other.open("rb") as right:
        while part := left.read(chunk):
            if part != right.read(chunk):
                return False
    return True


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
