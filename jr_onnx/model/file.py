"""Reading, checking and writing model files, and the files with their external data."""

from __future__ import annotations

import os
from pathlib import Path

import onnx

from jr_onnx.errors import InvalidModelError, OutputError
from jr_onnx.model.external import copy_data, data_files, without_data
from jr_onnx.model.model import Model, require_model
from jr_onnx.model.output import holds, require_writable, write_atomically


def load(path: str | os.PathLike[str]) -> Model:
    """Reads the model file; external weights stay on disk.

    Raises:
        InvalidModelError: no such file, not ONNX, or truncated.
        ModelError: the file passes protobuf's limit of 2 GiB.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidModelError(
            f"{path}: cannot be read ({error.strerror}). Check the path of the model"
        ) from error
    model = Model(content, path)
    _ = model.proto  # a file that is not ONNX is refused here, not at its first use
    return model


def save(model: Model, path: str | os.PathLike[str], *, force: bool = False) -> bool:
    """Writes the model; a crash at any moment leaves either the old file or the new one.

    External data stays where it is if the model goes to the same folder, else it is copied along,
    though never over other data.

    Args:
        model: what to write.
        path: the file to write.
        force: replace the file if it is there already and differs.

    Returns:
        False if the file held these very bytes already, else True.

    Raises:
        OutputError: a file is there and differs, or cannot be written; or it has the model's own
            weights.
        ExternalDataError: the model's external data is missing or lies outside its folder.
    """
    require_model(model)
    path = Path(path)
    require_writable(path, force=True)
    real = path.resolve()
    weights = (*data_files(model), *data_files(model, real.parent))
    if real in {each.resolve() for each in weights}:
        raise OutputError(
            f"{path}: has weights of the model, and would be overwritten. Give each file a path of "
            "its own"
        )
    is_new = not holds(path, model.content)
    if is_new:
        require_writable(path, force=force)
    copy_data(model, real.parent, force=force)
    if is_new:
        write_atomically(path, model.content, force=force)
    return is_new


def check(model: Model) -> None:
    """Runs `onnx.checker`, which reads no external data here.

    Raises:
        InvalidModelError: with the checker's own words.
    """
    require_model(model)
    proto = without_data(model)
    try:
        onnx.checker.check_model(model.content if proto is None else proto)
    except (onnx.checker.ValidationError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InvalidModelError(f"{model.name}: onnx.checker refuses it: {reason}") from error
