"""Reading, checking and writing model files, and the files with their external data."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import onnx

from jr_onnx.errors import InvalidModelError, OutputError
from jr_onnx.model.external import copy_data, without_data
from jr_onnx.model.model import Model


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

    External data stays where it is if the model goes to the same folder, else it is copied along.

    Args:
        model: what to write.
        path: the file to write.
        force: replace files that are there already and differ.

    Returns:
        False if the file held these very bytes already, else True.

    Raises:
        OutputError: a file is there and differs, or cannot be written.
        ExternalDataError: the model's external data is missing or lies outside its folder.
    """
    path = Path(path)
    require_writable(path, force=True)
    if path.is_file() and path.read_bytes() == model.content:
        return False
    require_writable(path, force=force)
    copy_data(model, path.resolve().parent, force=force)
    write_atomically(path, model.content, force=force)
    return True


def write_atomically(path: Path, content: bytes, *, force: bool = False) -> None:
    """Writes a temporary file beside `path`, then renames it; a link is followed.

    Raises:
        OutputError: the file is there and `force` is not given, or it cannot be written.
    """
    require_writable(path, force=force)
    real = path.resolve()
    temporary = None
    try:
        mode = real.stat().st_mode if real.exists() else 0o666 & ~_umask()
        with tempfile.NamedTemporaryFile(dir=real.parent, prefix=".jr-onnx.", delete=False) as file:
            temporary = file.name
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, real)
    except OSError as error:
        raise _not_writable(path, error.strerror) from error
    finally:
        if temporary:
            with contextlib.suppress(OSError):  # gone already, if all went well
                os.unlink(temporary)


def require_writable(path: Path | None, *, force: bool = False) -> None:
    """Refuses an output that cannot work, before any work is done; None is no output.

    Raises:
        OutputError: the file is there and `force` is not given, or it cannot be written.
    """
    if path is None:
        return
    try:
        there, regular = path.exists(), path.is_file()
        if there and not regular:
            raise _not_writable(path, "it is no regular file")
        if there and not force:
            raise OutputError(
                f"{path}: is there already. Pass --force to replace it, or give another path"
            )
        if not path.parent.is_dir():
            raise _not_writable(path, f"there is no folder {path.parent}")
        # Whether a file can be made there, only making one tells: also for root, on /proc.
        with tempfile.NamedTemporaryFile(dir=path.resolve().parent, prefix=".jr-onnx."):
            pass
    except OSError as error:
        raise _not_writable(path, error.strerror) from error


def check(model: Model) -> None:
    """Runs `onnx.checker`, which reads no external data here.

    Raises:
        InvalidModelError: with the checker's own words.
    """
    proto = without_data(model)
    try:
        onnx.checker.check_model(model.content if proto is None else proto)
    except (onnx.checker.ValidationError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InvalidModelError(f"{model.name}: onnx.checker refuses it: {reason}") from error


def _not_writable(path: Path, reason: str | None) -> OutputError:
    return OutputError(f"{path}: cannot be written ({reason}). Check the path and its permissions")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
