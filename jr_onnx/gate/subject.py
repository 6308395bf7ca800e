"""One model, its examples and its thresholds, which are checked before any attack runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from jr_onnx import rewrite
from jr_onnx.attacks import ThreatModel
from jr_onnx.data import Dataset, digest
from jr_onnx.errors import DataError, NotRetrofittedError
from jr_onnx.evaluate import check_fit
from jr_onnx.findings import of_the_data
from jr_onnx.gate.baseline import Earlier
from jr_onnx.gate.config import BaselineTable, EvaluationTable, GatesTable
from jr_onnx.model import Model
from jr_onnx.preprocess import Preprocessing, normalized
from jr_onnx.target import Target


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One model, and what it is held to.

    Attributes:
        name: how reports call it.
        model: the model that is judged.
        original: the model before its jumps, None where it has none.
        edits: what was changed in a model alone since its retrofit; its original is lost then.
        examples: x and y.
        steps: how they were made; their mean and std come before the models.
        threat: what the attacker may do.
        evaluation: suite, seed, device, batch size, output.
        gates: the thresholds.
        baseline: tolerances, None where there is nothing to compare with.
        earlier: the figures to compare with, None where the baseline does not have this model.
    """

    name: str
    model: Model
    original: Model | None = None
    edits: tuple[str, ...] = ()
    examples: Dataset = field(repr=False)
    steps: Preprocessing
    threat: ThreatModel
    evaluation: EvaluationTable = field(default_factory=EvaluationTable)
    gates: GatesTable = field(default_factory=GatesTable)
    baseline: BaselineTable | None = None
    earlier: Earlier | None = None

    @cached_property
    def digest(self) -> str:
        """A hash of the examples."""
        return digest(self.examples.x, self.examples.y)

    def target(self, model: Model) -> Target:
        """Returns a model as it is attacked, in a session of its own."""
        seen = normalized(model, self.steps.mean, self.steps.std, layout=self.steps.layout)
        table = self.evaluation
        return Target(seen, device=table.device, batch_size=table.batch_size, output=table.output)

    def require_contract(self) -> None:
        """Checks that the data looks like what the model, without its jumps, was made for.

        And that the model with its jumps runs.

        Raises:
            DataError: it does not fit, or has other labels or another scale.
            ModelError: the model is no classifier.
            SessionError: onnxruntime refuses the model or the device.
        """
        target = self.target(self.original or self.model)
        x, y = self.examples.x, self.examples.y
        check_fit(target, x, y)
        if self.original is not None:
            check_fit(self.target(self.model), x, y)
        correct = target.logits(x).argmax(axis=1) == y
        found = of_the_data(target, x, y, correct)
        wrong = [each.message for each in found if (each.rule, each.level) == ("JR006", "error")]
        if wrong:
            raise DataError(f"{self.examples.name}: JR006 input-contract: {'; '.join(wrong)}")


def alone(model: Model) -> tuple[Model | None, tuple[str, ...]]:
    """Returns the original that a model carries, if any; or what was changed in it since."""
    try:
        edits = rewrite.edits_of(model)
        if not edits and rewrite.jumps_of(model):
            return rewrite.original_of(model), ()
    except NotRetrofittedError as error:
        return None, (str(error),)
    return None, edits
