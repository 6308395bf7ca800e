"""jr-onnx.toml -> what to hold which models to, checked as a whole before any work.

Tables at the top hold for every model; the same tables of a model go before them, key by key.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from jr_onnx.attacks import ThreatModel, parse_epsilon
from jr_onnx.errors import ConfigError
from jr_onnx.gate.locate import Path as Key
from jr_onnx.gate.locate import line_of, lines_of
from jr_onnx.suites import SUITES
from jr_onnx.suites import find_suite as suite_of
from jr_onnx.target import DEFAULT_BATCH_SIZE

SCHEMA = "jr-onnx/gate-config/1"


def _number(value: Any) -> Any:
    return parse_epsilon(value) if isinstance(value, str) else value


def _bytes(value: Any) -> Any:
    return int(_BYTES.validate_python(value)) if isinstance(value, str) else value


_BYTES = TypeAdapter(ByteSize)
Share = Annotated[float, Field(ge=0, le=1)]
Change = Annotated[float, Field(ge=-1, le=1)]
Ratio = Annotated[float, Field(gt=0)]
Numbers = Annotated[tuple[float, ...], Field(strict=False, min_length=1)]
Pair = Annotated[tuple[float, float], Field(strict=False)]
Size = Annotated[
    int,
    BeforeValidator(_bytes),
    Field(gt=0),
    WithJsonSchema({"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "string"}]}),
]
Epsilon = Annotated[
    float,
    BeforeValidator(_number),
    WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string"}]}),
]


class _Table(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


class DataTable(_Table):
    """The examples."""

    path: str | None = None
    """`.npz`, `.parquet`, `.csv`, or a folder of class folders; relative to the configuration."""
    samples: Annotated[int, Field(ge=1)] | None = None
    """Use so many examples, drawn by the seed; all if left out."""
    preprocess: str | None = None
    """A TOML file that says how pictures become examples."""
    mean: Numbers | None = None
    """Subtracted before the model, in units of x, one number or one a channel."""
    std: Numbers | None = None
    """Divided by then, one number or one a channel."""


class ThreatTable(_Table):
    """What the attacker may do."""

    norm: str = "linf"
    """Of the ball: linf, l2 or l1."""
    bounds: Pair = (0.0, 1.0)
    """Smallest and largest value of an input element."""
    epsilon: Epsilon | None = None
    """Radius of the ball, in units of x: a number, or a fraction such as "8/255"."""

    @field_validator("epsilon")
    @classmethod
    def _fits(cls, epsilon: float | None, info: ValidationInfo) -> float | None:
        if epsilon is not None and {"norm", "bounds"} <= info.data.keys():
            ThreatModel(epsilon=epsilon, **info.data)
        return epsilon

    @field_validator("norm", "bounds")
    @classmethod
    def _known(cls, value: Any, info: ValidationInfo) -> Any:
        ThreatModel(epsilon=1e-300, **{str(info.field_name): value})
        return value


class EvaluationTable(_Table):
    """How it is attacked."""

    suite: str = "adaptive"
    """Which attacks: adaptive, standard, paper or naive."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of all random numbers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where it works."""
    batch_size: Annotated[int, Field(ge=1)] = DEFAULT_BATCH_SIZE
    """Most examples in one run."""

    @field_validator("suite")
    @classmethod
    def _known(cls, suite: str) -> str:
        if suite not in SUITES:
            raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {suite!r}")
        return suite


class GatesTable(_Table):
    """The thresholds. One that is left out is not checked, unless it has a default."""

    max_clean_accuracy_drop: Share | None = None
    """JR001: the upper end of the 95% interval of the drop must not be above."""
    min_robust_accuracy: Share | None = None
    """JR002: the lower end of the 95% interval of the worst case must not be below."""
    min_adaptive_gain: Change = 0.0
    """JR003: the lower end of the 95% interval of the gain in the worst case must be above."""
    masking: Literal["fail", "warn"] = "fail"
    """JR004: what gradient masking does to the build."""
    verify_equivalent: bool = True
    """JR009: the hardened model must be the original with its jumps, and nothing else."""
    all_sites_retrofitted: bool = True
    """JR010: every site of the original must have a jump."""
    max_latency_ratio: Ratio | None = None
    """JR011: the hardened model's time over the original's, of one example on one thread."""
    min_opset: Annotated[int, Field(ge=1)] | None = None
    """JR012: the smallest opset of the model."""
    max_opset: Annotated[int, Field(ge=1)] | None = None
    """JR012: the largest opset of the model."""
    max_size: Size | None = None
    """JR013: bytes of the model with its external data, or text such as "10 MB"."""
    max_size_ratio: Ratio | None = None
    """JR013: the hardened model's bytes over the original's."""


class BaselineTable(_Table):
    """An earlier result to compare with."""

    file: str
    """What `jr-onnx gate --json` wrote, with the same data, threat model, suite and seed."""
    max_clean_accuracy_drop: Share = 0.01
    """JR014: how far clean accuracy may fall below the earlier one."""
    max_robust_accuracy_drop: Share = 0.01
    """JR014: how far robust accuracy may fall below the earlier one."""


class ModelTable(_Table):
    """One model: either `model`, or `original` and `hardened`."""

    name: Annotated[str, Field(min_length=1)] | None = None
    """How reports call it; the file's name if left out."""
    original: str | None = None
    """The model before the retrofit."""
    hardened: str | None = None
    """The model after it."""
    model: str | None = None
    """A model alone; a hardened one is compared with the original that it carries."""
    data: DataTable = DataTable()
    threat: ThreatTable = ThreatTable()
    evaluation: EvaluationTable = EvaluationTable()
    gates: GatesTable = GatesTable()

    @model_validator(mode="after")
    def _either(self) -> ModelTable:
        if (self.original is None) != (self.hardened is None) or (
            (self.model is None) == (self.hardened is None)
        ):
            raise ValueError("give either model, or both original and hardened")
        return self

    @property
    def under_test(self) -> str:
        """The path of the model that is judged."""
        return str(self.hardened or self.model)


class GateConfig(_Table):
    """The configuration of `jr-onnx gate`."""

    models: Annotated[tuple[ModelTable, ...], Field(strict=False, min_length=1)]
    data: DataTable = DataTable()
    threat: ThreatTable = ThreatTable()
    evaluation: EvaluationTable = EvaluationTable()
    gates: GatesTable = GatesTable()
    baseline: BaselineTable | None = None

    @cached_property
    def entries(self) -> tuple[ModelTable, ...]:
        """The models with the tables at the top filled in."""
        return tuple(
            model.model_copy(
                update={
                    name: _merged(getattr(self, name), getattr(model, name))
                    for name in ("data", "threat", "evaluation", "gates")
                }
            )
            for model in self.models
        )


_T = TypeVar("_T", bound=_Table)


def _merged(general: _T, own: _T) -> _T:
    given = {name: getattr(own, name) for name in own.model_fields_set}
    return general.model_copy(update=given)


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
            self.config = GateConfig.model_validate(written)
        except ValidationError as error:
            found = [each for each in error.errors() if not _is_an_echo(each)]
            found.sort(key=lambda each: line_of(each["loc"], self._lines))
            raise ConfigError([self._told(each) for each in found]) from error
        problems = [*self._unfinished()]
        if problems:
            raise ConfigError(problems)

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
            return self.problem(key, "is missing")
        if kind == "value_error":
            return self.problem(key, str(error["ctx"]["error"]))
        message = error["msg"][:1].lower() + error["msg"][1:].replace("tuple", "list")
        return self.problem(key, f"{message}, got {json.dumps(got, default=str):.80}")

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
                suite_of(entry.evaluation.suite, entry.threat.norm)
            except ValueError as error:
                yield self.problem(("models", index, "threat"), str(error))
            low, high = entry.gates.min_opset, entry.gates.max_opset
            if low is not None and high is not None and low > high:
                key = self.key(index, "gates", "min_opset")
                yield self.problem(key, f"{low} is above max_opset {high}")


def _is_an_echo(error: ErrorDetails) -> bool:
    """Whether it says that a list is empty of which only all elements are wrong."""
    return error["type"] == "too_short" and bool(error["input"])


def _unknown(key: Key) -> str:
    table: Any = GateConfig
    for name in key[:-1]:
        if isinstance(name, str):
            table = _TABLES[name]
    known = list(table.model_fields)
    near = difflib.get_close_matches(str(key[-1]), known, n=1)
    hint = f": did you mean {near[0]}?" if near else f", only {', '.join(known)}"
    return f"there is no such key{hint}"


_TABLES: dict[str, type[_Table]] = {
    "models": ModelTable,
    "data": DataTable,
    "threat": ThreatTable,
    "evaluation": EvaluationTable,
    "gates": GatesTable,
    "baseline": BaselineTable,
}


def config_schema() -> dict[str, Any]:
    """Returns the JSON Schema of the configuration."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA,
        **GateConfig.model_json_schema(),
    }
