"""jr-onnx.toml -> a configuration, checked as a whole; problems with the lines they stand on."""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from jr_onnx.attacks import ThreatModel
from jr_onnx.errors import ConfigError, JrOnnxError
from jr_onnx.gate.config import TABLES, GateConfig
from jr_onnx.gate.locate import Path as Key
from jr_onnx.gate.locate import line_of, lines_of
from jr_onnx.model import load
from jr_onnx.model.external import data_files
from jr_onnx.suites import find_suite


class ConfigFile:
    """A configuration, and where each of its keys stands.

    Args:
        path: the TOML file.

    Attributes:
        path: the file.
        content: its bytes.
        config: what it says.

    Raises:
        ConfigError: it cannot be read, or makes no sense; all problems at once.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.content = self.path.read_bytes()
            text = self.content.decode()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ConfigError(
                [f"{path}: cannot be read ({reason}). `jr-onnx gate --init` writes one"]
            ) from error
        try:
            written = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError([f"{path}: not valid TOML: {error}"]) from error
        self._lines = lines_of(text)
        try:
            self.config = GateConfig.model_validate(written, context=_threat_of(written))
        except ValidationError as error:
            found = {each["loc"]: self._told(each) for each in error.errors() if not _echoes(each)}
            found |= self._missing_files(written)
            told = sorted(found, key=lambda key: line_of(key, self._lines))
            raise ConfigError([found[key] for key in told]) from error
        problems = dict.fromkeys(self._unfinished())
        if problems:
            raise ConfigError([*problems])

    def problem(self, key: Key, what: str) -> str:
        """Returns the line of a message: where the key stands, and what is wrong with it."""
        spelled = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key)
        where = f"{self.path}:{line_of(key, self._lines)}"
        return f"{where}: {spelled.removeprefix('.')}: {what}"

    def key(self, index: int, *names: str) -> Key:
        """Returns where a model's setting comes from: its own table, or the one at the top."""
        own: Key = ("models", index, *names)
        return own if own in self._lines else names

    def resolve(self, path: str) -> Path:
        """Returns a path of the configuration, relative to its folder."""
        return self.path.parent / path

    def _told(self, error: ErrorDetails) -> str:
        key = error["loc"]
        kind, got = error["type"], error["input"]
        if kind == "extra_forbidden":
            return self.problem(key, _unknown(key))
        if kind == "missing":
            return self.problem(key, "is missing" + _shown(key))
        if kind == "value_error":
            return self.problem(key, str(error["ctx"]["error"]))
        message = error["msg"][:1].lower() + error["msg"][1:].replace("tuple", "list")
        return self.problem(key, f"{message}, got {json.dumps(got, default=str):.80}" + _shown(key))

    def _missing_files(self, written: dict[str, Any]) -> dict[Key, str]:
        """Finds what opening the files would say, where other problems keep it from that."""
        return {
            key: self.problem(key, f"{value}: there is no such file")
            for key, value in _named(written, self._lines)
            if not self.resolve(value).exists()
        }

    def _unfinished(self) -> Iterator[str]:
        """Yields what only the merged tables show."""
        names = [entry.name or entry.under_test for entry in self.config.entries]
        for index, entry in enumerate(self.config.entries):
            if names[index] in names[:index]:
                key: Key = ("models", index, "name")
                yield self.problem(key, f"{names[index]!r} is there twice: give each its name")
            if entry.data.path is None:
                yield self.problem(("models", index), "has no examples: set data.path")
            if entry.threat.epsilon is None:
                yield self.problem(("models", index), "has no epsilon: set threat.epsilon")
                continue
            try:
                ThreatModel(**dict(entry.threat))
                find_suite(entry.evaluation.suite, entry.threat.norm)
            except ValueError as error:
                yield self.problem(self.key(index, "threat", "epsilon"), str(error))
            low, high = entry.gates.min_opset, entry.gates.max_opset
            if low is not None and high is not None and low > high:
                key = self.key(index, "gates", "min_opset")
                yield self.problem(key, f"{low} is above max_opset {high}")


_MODELS = ("original", "hardened", "model")
_FILES = (*_MODELS, "path", "preprocess", "file")


def named_files(config: Path) -> tuple[Path, ...]:
    """Returns a configuration and the models and data it names, external weights, too.

    Problems are not its business: what cannot be read names nothing.
    """
    try:
        text = config.read_bytes().decode()
        named = list(_named(tomllib.loads(text), lines_of(text)))
    except (OSError, ValueError):  # TOML and Unicode errors are ValueErrors
        return (config,)
    found = [config]
    for key, value in named:
        if key[-1] == "file":  # an earlier result, which --json may replace
            continue
        found.append(config.parent / value)
        if key[-1] in _MODELS:
            with suppress(JrOnnxError):
                found += data_files(load(found[-1]))
    return tuple(found)


def _named(written: dict[str, Any], keys: Iterable[Key]) -> Iterator[tuple[Key, str]]:
    for key in keys:
        value: Any = written
        for name in key:
            value = value[name]
        if key[-1] in _FILES and isinstance(value, str) and "\0" not in value:
            yield key, value


def _threat_of(written: dict[str, Any]) -> dict[str, Any]:
    """Returns the norm and the bounds that hold for every model, as far as there is one of each.

    A table of its own may have an epsilon alone, so that no table can be checked by itself.
    """
    models = written.get("models")
    tables = [written, *(models if isinstance(models, list) else [])]
    found = [table.get("threat") for table in tables if isinstance(table, dict)]
    threats: list[dict[str, Any]] = [threat for threat in found if isinstance(threat, dict)]
    bounds = [threat["bounds"] for threat in threats if "bounds" in threat] or [[0, 1]]
    if len(bounds) > 1 or any(threat.get("norm", "linf") != "linf" for threat in threats):
        return {"norm": "l2"}  # which has no width to compare with
    try:
        ThreatModel(epsilon=1e-300, bounds=bounds[0])
    except (ValueError, TypeError):  # told by the bounds themselves
        return {"norm": "l2"}
    return {"norm": "linf", "bounds": bounds[0]}


def _echoes(error: ErrorDetails) -> bool:
    """Whether it says that a list is empty of which only all elements are wrong."""
    return error["type"] == "too_short" and bool(error["input"])


def _shown(key: Key) -> str:
    return ". Head each model with [[models]]" if key == ("models",) else ""


def _unknown(key: Key) -> str:
    table: Any = GateConfig
    for name in key[:-1]:
        if isinstance(name, str):
            table = TABLES[name]
    known = list(table.model_fields)
    near = difflib.get_close_matches(str(key[-1]), known, n=1)
    hint = f": did you mean {near[0]}?" if near else f", only {', '.join(known)}"
    return f"there is no such key{hint}"
