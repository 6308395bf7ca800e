"""The gate's questions one at a time, for tests: an `AssertionError` says what the gate would."""

from __future__ import annotations

import os
from typing import Any

from pydantic import ValidationError

from jr_onnx import rewrite
from jr_onnx.attacks import ThreatModel, parse_epsilon
from jr_onnx.data import Dataset, load_data
from jr_onnx.errors import ParameterError
from jr_onnx.gate.config import EvaluationTable, GatesTable
from jr_onnx.gate.run import judge
from jr_onnx.gate.subject import Subject, alone
from jr_onnx.gate.verdict import ModelResult, Status
from jr_onnx.model import Model, load
from jr_onnx.preprocess import preprocessing_for

ModelOrPath = Model | str | os.PathLike[str]


def assert_retrofit_equivalent(
    original: ModelOrPath, hardened: ModelOrPath, *, all_sites: bool = True
) -> rewrite.Verification:
    """Asserts that a hardened model is its original with jumps, and nothing else (JR009, JR010).

    Example:
        >>> import jr_onnx as jr
        >>> from jr_onnx.gate import assert_retrofit_equivalent
        >>> net = jr.load("sample_models/lenet_mnist.onnx")
        >>> found = assert_retrofit_equivalent(net, jr.retrofit(net, jump=0.3).model)
        >>> len(found.jumps)
        4

    Args:
        original: the model before the retrofit, or its path.
        hardened: the model after it, or its path.
        all_sites: whether every site must have a jump.

    Raises:
        AssertionError: it is not.
        JrOnnxError: a model cannot be read.
    """
    __tracebackhide__ = True
    found = rewrite.verify(_model(original), _model(hardened))
    wrong = [f"JR009 {each.where}: {each.what}" for each in found.differences]
    wrong += [f"JR009 weights not compared: {each}" for each in found.not_compared]
    if all_sites:
        wrong += [f"JR010 {path}: has no jump" for path in found.without_jump]
    if wrong:
        raise AssertionError("not the original with its jumps:\n" + "\n".join(wrong))
    return found


def assert_robust(
    model: ModelOrPath,
    data: Dataset | str | os.PathLike[str],
    *,
    epsilon: float | str,
    at_least: float,
    norm: str = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    original: ModelOrPath | None = None,
    suite: str = "adaptive",
    samples: int | None = None,
    seed: int = 0,
    device: str = "auto",
    output: str | None = None,
    **steps: Any,
) -> ModelResult:
    """Asserts robust accuracy in the worst case, by attacks that work (JR002, JR004 to JR009).

    Args:
        model: the model, or its path.
        data: the examples, or their path.
        epsilon: radius of the ball in units of x, 0.03 or "8/255".
        at_least: what the lower end of the 95% interval must reach, 0..1.
        norm: of the ball.
        bounds: smallest and largest value of an input element.
        original: what to transfer from; None for the one that a hardened model carries.
        suite: which attacks.
        samples: use so many examples, drawn by the seed; only where data is a path.
        seed: of all random numbers.
        device: `auto`, `cpu` or `cuda`.
        output: the output with the logits; None for the only one.
        steps: other fields of `Preprocessing`, `mean` and `std` among them.

    Raises:
        AssertionError: it is not reached, or the attacks are in doubt.
        JrOnnxError: model or data cannot be used, or an argument makes no sense.
    """
    __tracebackhide__ = True
    loaded = _model(model)
    before, edits = alone(loaded) if original is None else (_model(original), ())
    preprocessing = preprocessing_for(loaded, bounds=bounds, **steps)
    if not isinstance(data, Dataset):
        data = load_data(data, preprocessing=preprocessing, limit=samples, seed=seed)
    radius = parse_epsilon(epsilon) if isinstance(epsilon, str) else epsilon
    try:
        evaluation = EvaluationTable.model_validate(
            {"suite": suite, "seed": seed, "device": device, "output": output}
        )
        gates = GatesTable(
            min_robust_accuracy=at_least, min_adaptive_gain=-1.0, all_sites_retrofitted=False
        )
    except ValidationError as error:
        raise ParameterError(_told(error)) from error
    subject = Subject(
        name=loaded.name,
        model=loaded,
        original=before,
        edits=edits,
        examples=data,
        steps=preprocessing,
        threat=ThreatModel(norm=norm, epsilon=radius, bounds=bounds),
        evaluation=evaluation,
        gates=gates,
    )
    result = judge(subject)
    doubtful = (Status.FAIL, Status.INCONCLUSIVE)
    wrong = [check for check in result.checks if check.status in doubtful]
    if wrong:
        lines = [f"{each.code} {each.rule.name}, {each.status}: {each.message}" for each in wrong]
        raise AssertionError(f"{loaded.name}: not shown to be robust:\n" + "\n".join(lines))
    return result


def _told(error: ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "value_error":  # one of our own, with a message of its own
        return str(first["ctx"]["error"])
    name = str(first["loc"][0]).replace("min_robust_accuracy", "at_least")
    return f"{name}: {first['msg'][:1].lower()}{first['msg'][1:]}, got {first['input']!r}"


def _model(model: ModelOrPath) -> Model:
    return model if isinstance(model, Model) else load(model)
