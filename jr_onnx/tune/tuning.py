"""model, data, budget -> the jumps that buy most robustness, and what they buy on other data.

data --split--> tune part --search--> points --best within the budget--> jumps
                report part --evaluate the retrofitted model--> figures with intervals
"""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from jr_onnx.activations import Activations, observe
from jr_onnx.attacks import ThreatModel
from jr_onnx.attacks.attack import check_examples
from jr_onnx.checkpoint import Checkpoint
from jr_onnx.errors import ParameterError, TuningError
from jr_onnx.evaluate import check_fit, evaluate
from jr_onnx.model import Model
from jr_onnx.model.external import identity
from jr_onnx.preprocess import Preprocessing, normalized
from jr_onnx.rewrite import Site, Skipped, find_sites, original_of, retrofit
from jr_onnx.suites import Suite, find_suite
from jr_onnx.target import DEFAULT_BATCH_SIZE
from jr_onnx.tune.inputs import tunable
from jr_onnx.tune.judge import Judge
from jr_onnx.tune.ledger import Ledger, StoredLedger, optuna
from jr_onnx.tune.objective import find_objective
from jr_onnx.tune.points import best_of
from jr_onnx.tune.result import Tuning
from jr_onnx.tune.search import SCOPES, Progress, Search, check_scope
from jr_onnx.tune.split import Part, check_disjoint, split
from jr_onnx.tune.target import JumpTarget

Array = np.ndarray[Any, Any]


def tune(
    model: Model,
    x: Array,
    y: Array,
    *,
    threat: ThreatModel,
    max_accuracy_drop: float = 0.01,
    objective: str = "adaptive",
    jump_scope: str = "global",
    trials: int | None = None,
    steps: int = 20,
    held_out: tuple[Array, Array] | None = None,
    report_share: float = 0.5,
    suite: str | Suite = "adaptive",
    resume: str | os.PathLike[str] | None = None,
    preprocessing: Preprocessing | None = None,
    partial: bool = False,
    device: str = "auto",
    seed: int = 0,
    batch_size: int = DEFAULT_BATCH_SIZE,
    output: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Tuning:
    """Searches the jumps that make a model most robust at a bounded loss of clean accuracy.

    The search sees one part of the data, the figures of the result come from the other, and from
    the model as `retrofit` writes it. That no jump helps is a result like any other.

    Args:
        model: the original, or hardened: then its original is tuned.
        x: `(samples, ...)`, inside the threat model's bounds.
        y: int `(samples,)`.
        threat: norm, epsilon and bounds, in units of x.
        max_accuracy_drop: the budget: the share of the examples that clean accuracy may lose.
        objective: `adaptive`, the worst case over attacks that know of the jump; `naive`, PGD on
            the model's own gradient, which a jump can mislead; `distance`, the mean of the
            smallest epsilon found.
        jump_scope: `global`, one jump for all sites; `quantile`, one quantile of their positive
            pre-activations; `per-site`; `per-channel`. The last two need Optuna.
        trials: candidates to attack; 12 on a line, or 48 proposals after both lines, if None.
        steps: of each PGD of the objective.
        held_out: examples and labels to report on; a share of x and y if None.
        report_share: that share, of each class.
        suite: the attacks of the report, a name in `SUITES`, or trials of one's own.
        resume: folder that keeps what is finished, and gives it back; needs Optuna.
        preprocessing: its mean and std come before the model, in units of x.
        partial: go on although the model has activations that cannot be replaced.
        device: `auto`, `cpu` or `cuda`.
        seed: of all random numbers.
        batch_size: most examples in one run.
        output: the output with the logits; None for the only one.
        progress: told what is going on, how much of it is done, and of how much.

    Raises:
        ParameterError: an option makes no sense, or Optuna is needed and not installed.
        DataError: the data does not fit, or the two parts share examples.
        TuningError: no site can be tuned, or `resume` is of another run.
        ModelError: the model is no classifier, or has no gradient.
        RewriteError: the model cannot be retrofitted.
        SessionError: onnxruntime is not there, or refuses the model or the device.

    References:
        Erichson, Yao, Mahoney: JumpReLU (arXiv:1904.03750), section 3: "tuned during the
        validation stage".
    """
    check_scope(jump_scope, trials)
    if not 0 <= max_accuracy_drop < 1:
        raise ParameterError(
            "max_accuracy_drop must be at least 0 and below 1 (0.01 is one point), "
            f"got {max_accuracy_drop}"
        )
    if jump_scope not in SCOPES[:2]:
        optuna()
    aim = find_objective(objective, threat, steps=steps)
    find_suite(suite, threat.norm)
    tuned, reported = _parts(x, y, held_out, threat, report_share, seed)
    steps_before = preprocessing or Preprocessing()
    plain = original_of(model)
    seen_as = normalized(plain, steps_before.mean, steps_before.std, layout=steps_before.layout)
    sites, skipped, seen = _observed(seen_as, tuned, device, batch_size)
    # The real thing first: what a retrofit refuses, it refuses before any long work.
    retrofit(plain, jumps={site.path: site.jump for site in sites}, partial=partial)
    per_channel = jump_scope == "per-channel"
    target = JumpTarget(
        seen_as,
        sites,
        per_channel=per_channel,
        device=device,
        batch_size=batch_size,
        output=output,
    )
    check_fit(target.original, tuned.x, tuned.y)
    judge = Judge(target, tuned, aim, max_accuracy_drop, seed, batch_size)
    about = _about(seen_as, judge, jump_scope) if resume is not None else {}
    with closing(StoredLedger(Path(resume), about) if resume is not None else Ledger()) as ledger:
        curves = Search(judge, ledger, sites, seen, seed, progress).run(jump_scope, trials)
    points = tuple(ledger.points)
    best = best_of(points, judge.least)
    hardened = retrofit(plain, jumps=best.jumps, partial=partial).model if best else plain
    evaluation = evaluate(
        hardened,
        reported.x,
        reported.y,
        threat=threat,
        suite=suite,
        baseline=plain if best else None,
        preprocessing=preprocessing,
        device=device,
        seed=seed,
        batch_size=batch_size,
        output=output,
        checkpoint=Checkpoint(resume) if resume is not None else None,
        progress=_told(progress, len(reported)),
    )
    return Tuning(
        model=plain,
        threat=threat,
        objective=aim,
        jump_scope=jump_scope,
        max_accuracy_drop=max_accuracy_drop,
        least=judge.least,
        seed=seed,
        sites=sites,
        skipped=skipped,
        activations=seen,
        curves=curves,
        points=points,
        report=evaluation,
    )


def _parts(
    x: Array,
    y: Array,
    held_out: tuple[Array, Array] | None,
    threat: ThreatModel,
    share: float,
    seed: int,
) -> tuple[Part, Part]:
    check_examples(x, y, threat)
    if held_out is None:
        return split(x, y, report_share=share, seed=seed)
    check_examples(*held_out, threat)
    tuned, reported = Part(x, y), Part(*held_out)
    check_disjoint(tuned, reported)
    return tuned, reported


def _observed(
    model: Model, part: Part, device: str, batch_size: int
) -> tuple[tuple[Site, ...], tuple[Skipped, ...], dict[str, Activations]]:
    found, left = find_sites(model)
    sites, skipped = tunable(found)
    seen = observe(model, sites, part.x, device=device, batch_size=batch_size)
    dead = [site for site in sites if not seen[site.path].positive]
    skipped += tuple(
        Skipped(site.path, site.op_type, "it is never above 0 on the data") for site in dead
    )
    sites = tuple(site for site in sites if site not in dead)
    if not sites:
        reasons = "; ".join(f"{entry.path}: {entry.reason}" for entry in (*left, *skipped)[:5])
        raise TuningError(
            f"{model.name}: there is no site to tune ({reasons or 'it has no Relu'}). Give a jump "
            "with retrofit --jump"
        )
    return sites, (*left, *skipped), seen


def _about(model: Model, judge: Judge, scope: str) -> dict[str, Any]:
    """Returns all that the points depend on."""
    # The package's __init__ imports this module, so it is asked for its version here only.
    from jr_onnx import __version__

    return {
        "version": __version__,
        "optuna": optuna().__version__,
        "model": identity(model),
        "data": judge.part.digest,
        "threat": judge.objective.threat.to_json(),
        "objective": judge.objective.to_json(),
        "max_accuracy_drop": judge.max_accuracy_drop,
        "jump_scope": scope,
        "seed": judge.seed,
        "batch_size": judge.batch_size,
        "output": judge.target.original.output,
        "provider": judge.target.original.provider,
    }


def _told(progress: Progress, total: int) -> Any:
    done: dict[str, int] = {}

    def told(role: str, trial: str, more: int) -> None:
        what = f"{trial} on the {role} model"
        done[what] = done.get(what, 0) + more
        progress(what, done[what], total)

    return told
