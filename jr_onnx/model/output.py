"""Writing files so that a crash at any moment leaves either the old one or the new one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from jr_onnx.errors import OutputError


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


def holds(path: Path, content: bytes) -> bool:
    """Whether the file is there and has these very bytes."""
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


def _not_writable(path: Path, reason: str | None) -> OutputError:
    return OutputError(f"{path}: cannot be written ({reason}). Check the path and its permissions")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
