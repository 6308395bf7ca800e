"""An earlier result of the gate, to compare with: only what was measured in the same way is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jr_onnx.errors import DataError

_SCHEMA = "jr-onnx/gate/1"


@dataclass(frozen=True)
class Earlier:
    """The figures of one model in an earlier result.

    Attributes:
        clean_accuracy: 0..1.
        robust_accuracy: 0..1.
        conditions: all else that they depend on, by name.
    """

    clean_accuracy: float
    robust_accuracy: float
    conditions: dict[str, Any]

    def require_same(self, conditions: dict[str, Any], where: str) -> None:
        """Refuses a comparison of what was measured differently.

        Args:
            conditions: those of now.
            where: the file and the model, for the message.

        Raises:
            DataError: one of them differs.
        """
        for name, now in conditions.items():
            before = self.conditions.get(name)
            if before != now:
                raise DataError(
                    f"{where}: was measured with {name} {before}, this time it is {now}: the two "
                    "cannot be compared. Write a new one with jr-onnx gate --json, or set it back"
                )


def read_baseline(path: Path) -> dict[str, Earlier]:
    """Returns the models of an earlier result that were attacked, by name.

    Raises:
        DataError: it cannot be read, or is something else.
    """
    try:
        document = json.loads(path.read_bytes())
        if document["schema"] != _SCHEMA:
            raise ValueError(f"its schema is {document['schema']!r}, expected {_SCHEMA!r}")
        attacked = [model for model in document["models"] if model["evaluation"]]
        return {model["name"]: _earlier(model) for model in attacked}
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"{path}: is no result of jr-onnx gate --json ({type(error).__name__}: {error})"
        ) from error


def _earlier(model: dict[str, Any]) -> Earlier:
    evaluation = model["evaluation"]
    judged = evaluation["models"][-1]
    data = model["data"]
    conditions = conditions_of(evaluation, data["sha256"], data.get("output"))
    return Earlier(float(judged["clean_accuracy"]), float(judged["robust_accuracy"]), conditions)


def conditions_of(evaluation: dict[str, Any], data: str, output: str | None) -> dict[str, Any]:
    """Returns what figures depend on beside the model.

    Args:
        evaluation: JSON of one, or what there will be of it.
        data: hash of the examples.
        output: name of the output with the logits, None for the only one.
    """
    names = ("threat", "suite", "seed", "samples", "mean", "std")
    found = {name: evaluation[name] for name in names}
    found |= {name: list(found[name]) for name in ("mean", "std") if found[name] is not None}
    return {**found, "data": data, "output": output}
