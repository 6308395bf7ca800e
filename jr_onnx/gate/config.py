"""What a configuration may say: the tables of jr-onnx.toml, their keys and defaults.

Tables at the top hold for every model; the same tables of a model go before them, key by key.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from jr_onnx.attacks import ThreatModel, parse_epsilon
from jr_onnx.suites import SUITES
from jr_onnx.target import DEFAULT_BATCH_SIZE

SCHEMA = "jr-onnx/gate-config/1"


def _number(value: Any) -> Any:
    return parse_epsilon(value) if isinstance(value, str) else value


def _bytes(value: Any) -> Any:
    return int(_BYTES.validate_python(value)) if isinstance(value, str) else value


def _path(value: str) -> str:
    if "\0" in value:
        raise ValueError("a path holds no NUL")
    return value


_BYTES = TypeAdapter(ByteSize)
File = Annotated[str, AfterValidator(_path)]
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
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class DataTable(_Table):
    """The examples."""

    path: File | None = None
    """`.npz`, `.parquet`, `.csv`, or a folder of class folders; relative to the configuration."""
    samples: Annotated[int, Field(ge=1)] | None = None
    """Use so many examples, drawn by the seed; all if left out."""
    preprocess: File | None = None
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
        if epsilon is not None and info.context is not None:
            ThreatModel(epsilon=epsilon, **info.context)
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
    output: str | None = None
    """The output with the logits, of a model with several."""

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

    file: File
    """What `jr-onnx gate --json` wrote, with the same data, threat model, suite and seed."""
    max_clean_accuracy_drop: Share = 0.01
    """JR014: how far clean accuracy may fall below the earlier one."""
    max_robust_accuracy_drop: Share = 0.01
    """JR014: how far robust accuracy may fall below the earlier one."""


class ModelTable(_Table):
    """One model: either `model`, or `original` and `hardened`."""

    name: Annotated[str, Field(min_length=1)] | None = None
    """How reports call it; the file's name if left out."""
    original: File | None = None
    """The model before the retrofit."""
    hardened: File | None = None
    """The model after it."""
    model: File | None = None
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


TABLES: dict[str, type[BaseModel]] = {
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
