"""A suite on one model, trial by trial: what is finished stays, whatever stops the rest.

clean pass --> trial, trial, ... --> diagnosis        correct >= naive >= robust, for each example
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jr_onnx import rewrite
from jr_onnx.attacks import NORMS, Attack, AttackResult, ThreatModel, Transfer
from jr_onnx.attacks.attack import Counts
from jr_onnx.checkpoint import Checkpoint
from jr_onnx.data import digest
from jr_onnx.errors import ModelError, RewriteError
from jr_onnx.findings import Finding, diagnose, of_the_data, of_the_model, without_a_gradient
from jr_onnx.model import Model
from jr_onnx.model.external import identity
from jr_onnx.suites import Outcome, Suite, Trial
from jr_onnx.target import Target

Array = np.ndarray[Any, Any]
# told the role of the model, the trial, and how many examples more are finished
Progress = Callable[[str, str, int], None]


@dataclass(frozen=True)
class Job:
    """What is the same for every model of an evaluation; attributes as `evaluate` takes them."""

    x: Array
    y: Array
    threat: ThreatModel
    suite: Suite
    seed: int
    batch_size: int
    checkpoint: Checkpoint | None
    keep_examples: bool
    progress: Progress

    def parts(self, chosen: Array) -> Iterator[Array]:
        """Cuts indices of examples into batches: what is finished stays, and fits the memory."""
        size = self.batch_size
        return (chosen[at : at + size] for at in range(0, len(chosen), size))


class ModelRun:
    """One model on its way through a suite.

    Args:
        job: what is asked.
        model: the model as it was given.
        target: the same, as it is attacked.
        judges: whether the data is judged by what this model makes of it.

    Attributes:
        role: `original` or `retrofitted`.
        correct: bool `(samples,)`, without attack.
        naive: bool `(samples,)`, robust to the attacks on its own gradient so far.
        robust: bool `(samples,)`, robust to all attacks so far.
        outcomes: by name of the trial.
        left_out: names of the trials that could not be run: no gradient, nothing to transfer from.
        findings: what makes its figures doubtful.
        complete: whether the whole suite was tried, and the diagnosis made.
    """

    def __init__(self, job: Job, model: Model, target: Target, *, judges: bool) -> None:
        self._job = job
        self.model, self.target = model, target
        self.jumps = rewrite.jumps_of(model)
        self.role = "retrofitted" if self.jumps else "original"
        everything = np.arange(len(job.x))
        right = [
            target.logits(job.x[at]).argmax(axis=1) == job.y[at] for at in job.parts(everything)
        ]
        self.correct: Array = np.concatenate(right)
        self.naive, self.robust = self.correct.copy(), self.correct.copy()
        self.outcomes: dict[str, Outcome] = {}
        self.left_out: tuple[str, ...] = ()
        self.findings = of_the_model(target, job.x)
        if judges:
            self.findings += of_the_data(target, job.x, job.y, self.correct)
        self.complete = False
        self._identity = identity(target.model) if job.checkpoint else ""
        self._need_a_gradient()
        if self.jumps and any(trial.source is not None for trial in job.suite.trials):
            self._need_an_original()

    def _need_an_original(self) -> None:
        """Leaves out what transfers from a hardened model's original, where that is lost."""
        try:
            rewrite.original_of(self.target.model)
        except RewriteError as error:
            names = tuple(each.name for each in self._job.suite.trials if each.source is not None)
            self.left_out += tuple(name for name in names if name not in self.left_out)
            message = f"{', '.join(names)} were left out, there is no original to attack: {error}"
            self.findings += (Finding("JR005", "warning", message),)

    def _need_a_gradient(self) -> None:
        """Leaves out the trials that need a gradient where the model has none, and says so.

        Raises:
            ModelError: no trial is left.
        """
        try:
            self.target.gradient()
        except ModelError as error:
            # A model of which no path has a gradient is one that does not depend on its input.
            trials, suite = self._job.suite.trials, self._job.suite.name
            self.left_out = tuple(each.name for each in trials if each.attack.uses_gradients)
            if not self.left_out:
                self.findings += (without_a_gradient(self.target, error),)
                return
            kept = [each.name for each in trials if not each.attack.uses_gradients]
            if not kept:
                raise ModelError(
                    f"{self.model.name}: has no input gradient, which {suite} needs. Try square or "
                    "hopskipjump, which see outputs alone; the suites standard and adaptive have "
                    f"the first. {error}"
                ) from error
            self.findings += (
                Finding(
                    "JR005",
                    "error",
                    f"{self.model.name}: has no input gradient, so {len(self.left_out)} of "
                    f"{len(trials)} trials of the suite {suite} could not be run "
                    f"({', '.join(self.left_out)}). The others ({', '.join(kept)}) see outputs "
                    f"alone, and what withstands them may fall to more. {error}",
                ),
            )

    def attempt(self, number: int, trial: Trial) -> None:
        """Runs one trial on the examples that are left, in a cascade, or on all that are correct.

        Args:
            number: of the trial in the suite, for its seed.
            trial: what to run.
        """
        job = self._job
        before = self.robust if job.suite.cascade else self.correct
        chosen = np.flatnonzero(before)
        job.progress(self.role, trial.name, len(job.x) - len(chosen))
        if trial.name in self.left_out or not len(chosen):
            return
        threat, attack = trial.threat_model(job.threat), trial.attack
        if trial.source is not None:
            attack = Transfer(attack=attack, source=_source(self.target, trial.source))
        robust, results, sizes = before.copy(), [], []
        try:
            for part in job.parts(chosen):
                found = self._result(trial, attack, threat, job.seed + number, part)
                # A trial may look further than the threat model; only what is inside counts. The
                # model sees the examples rounded to its dtype, and the ball is around these.
                x = job.x[part]
                inside = job.threat.contains(found.x_adv, x.astype(found.x_adv.dtype))
                robust[part[found.correct & ~found.robust & inside]] = False
                sizes.append(NORMS[threat.norm].distance(x.astype(np.float64)))
                if not job.keep_examples:
                    found = replace(found, x_adv=found.x_adv[:0])
                results.append(found)
        finally:  # an interruption leaves the batches before it
            if results:
                size = np.concatenate(sizes)
                self.outcomes[trial.name] = Outcome(
                    trial, threat, chosen[: len(size)], _joined(results), size, robust
                )
                self.robust = self.robust & robust
                if trial.gradient == "exact":
                    self.naive = self.naive & robust

    def diagnose(self) -> None:
        """Looks for signs that the figures are too good."""
        job = self._job
        self.findings += diagnose(
            self.target, job.x, job.y, job.threat, self.correct, self.outcomes, job.seed
        )
        self.complete = True

    def _result(
        self, trial: Trial, attack: Attack, threat: ThreatModel, seed: int, part: Array
    ) -> AttackResult:
        """Runs a trial on a batch, or gives back what is finished already."""
        job = self._job
        x, y = job.x[part], job.y[part]

        def run() -> AttackResult:
            return attack.run(
                trial.sees(self.target),
                x,
                y,
                threat,
                seed=seed,
                indices=part,
                batch_size=job.batch_size,
                progress=lambda done: job.progress(self.role, trial.name, done),
            )

        if job.checkpoint is None:
            return run()
        key = (
            *(self._identity, self.target.output),
            *(trial.to_json(), threat.to_json(), seed, digest(x, y, part)),
        )
        return job.checkpoint.recall(key, run)


def _joined(results: list[AttackResult]) -> AttackResult:
    """Returns the results of parts as one."""
    arrays = {
        name: np.concatenate([getattr(each, name) for each in results])
        for name in ("x_adv", "correct", "robust", "distance")
    }
    counts = Counts(*map(sum, zip(*(each.counts for each in results), strict=True)))
    return AttackResult(**arrays, seconds=sum(each.seconds for each in results), counts=counts)


def _source(target: Target, scale: float) -> Target:
    """Returns the model to transfer from; for one without jumps the model itself."""
    jumps = rewrite.jumps_of(target.model)
    if not jumps:
        return target
    original = rewrite.original_of(target.model)
    if scale == 0:
        return target.of(original)
    scaled = {
        path: [scale * each for each in jump] if isinstance(jump, tuple) else scale * jump
        for path, jump in jumps.items()
    }
    return target.of(rewrite.retrofit(original, jumps=scaled, partial=True).model)
