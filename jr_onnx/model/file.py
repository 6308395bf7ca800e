"""Reading, checking and writing model files."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import onnx

from jr_onnx.errors import InvalidModelError, OutputError
from jr_onnx.model.model import Model


def load(path: str | os.PathLike[str]) -> Model:
    """Reads the model file; external weights stay on disk.

    Raises:
        InvalidModelError: no such file, not ONNX, or truncated.
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

    Args:
        model: what to write.
        path: the file to write.
        force: replace a file that is there already and differs.

    Returns:
        False if the file held these very bytes already, else True.

    Raises:
        OutputError: the file is there and differs, or cannot be written.
    """
    path = Path(path)
    with contextlib.suppress(OSError):
        if path.read_bytes() == model.content:
            return False
    write_atomically(path, model.content, force=force)
    return True


def write_atomically(path: Path, content: bytes, *, force: bool = False) -> None:
    """Writes a temporary file beside `path`, then renames it.

    Raises:
        OutputError: the file is there and `force` is not given, or it cannot be written.
    """
    require_writable(path, force=force)
    temporary = None
    try:
        mode = path.stat().st_mode if path.exists() else 0o666 & ~_umask()
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = file.name
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise OutputError(
            f"{path}: cannot be written ({error.strerror}). Check the directory and its permissions"
        ) from error


def require_writable(path: Path | None, *, force: bool = False) -> None:
    """Refuses an output that cannot work, before any work is done; None is no output.

    Raises:
        OutputError: the file is there and `force` is not given, or its folder is not.
    """
    if path is None:
        return
    if path.exists() and not force:
        raise OutputError(
            f"{path}: is there already. Pass --force (force=True) to replace it, or another path"
        )
    if path.is_dir() or not path.parent.is_dir():
        reason = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise OutputError(f"{path}: cannot be written, {reason}. Give the path of a file")


def check(model: Model) -> None:
    """Runs `onnx.checker`.

    Raises:
        InvalidModelError: with the checker's own words.
    """
    try:
        onnx.checker.check_model(model.content)
    except (onnx.checker.ValidationError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InvalidModelError(f"{model.name}: onnx.checker refuses it: {reason}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
