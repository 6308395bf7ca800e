"""Our attacks next to other libraries': the same weights, points and budgets.

    x, y --jr_onnx on the ONNX file--------------------------------> x_adv
         --AutoAttack, foolbox, torchattacks, ART on torch's copy--> x_adv
    x_adv --inside ball and bounds, and misclassified by onnxruntime?--> robust accuracy

Nobody's claim counts: each point is measured in float64 and run again. Others may be out of the
ball by 1e-5 of epsilon, which float32 costs them; ours may not. Every seed that is finished is kept
in --results, a file for each attack and library: a run goes on where it was, and several at a time
share the work. A library that is not installed is left out.

Examples:
    python tools/compare_attacks.py --results attacks --write docs/benchmarks/attacks.md
    python tools/compare_attacks.py --results attacks --only pgd --again
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import itertools
import json
import random
import sys
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tables import content, markdown, put
from train_samples import load_weights

import jr_onnx as jr
from jr_onnx import attacks
from jr_onnx.attacks import Attack, ThreatModel
from jr_onnx.model import write_atomically

Array = np.ndarray[Any, Any]
Options = Mapping[str, Any]

SAMPLES = Path(__file__).resolve().parents[1] / "sample_models"
OURS = "jr_onnx"
# How far others' points may be outside: their arithmetic is float32.
SLACK = 1e-5
STEP = 2.5 / 40  # of PGD's step, in units of epsilon
LINF, L2, L1 = 0.1, 1.0, 5.0
ORDER = {"linf": np.inf, "l2": 2, "l1": 1}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attack, in every library that has it.

    Attributes:
        name: of the attack.
        norm: of the ball, or in which the smallest perturbation is looked for.
        epsilon: of the ball; for a smallest perturbation, where it is judged.
        budget: in words.
        ours: the attack; None for the standard suite.
        others: by library, the name of the attack there and its options.
        examples: the first so many of the sample.
        seeds: runs, for attacks with random numbers.
        minimal: whether it looks for the smallest perturbation, without a ball.
    """

    name: str
    norm: str
    epsilon: float
    budget: str
    ours: Attack | None
    others: Mapping[str, tuple[str, Options]]
    examples: int
    seeds: int = 1
    minimal: bool = False

    @property
    def key(self) -> str:
        """Unique among the cases."""
        return f"{self.name} {self.norm} {self.epsilon:g}"


def cases() -> list[Case]:
    """All comparisons, the cheap ones first."""
    return [
        *(_fgsm(norm, epsilon) for norm, epsilon in (("linf", LINF), ("l2", L2))),
        *(_pgd(norm, epsilon) for norm, epsilon in (("linf", LINF), ("l2", L2), ("l1", L1))),
        _mifgsm(),
        *_deepfool(),
        *_apgd(),
        *_square(),
        _carlini_wagner(),
        _ead(),
        *_hopskipjump(),
        _simba(),
        *_fab(),
        *(_standard(norm, epsilon) for norm, epsilon in (("linf", LINF), ("l2", L2))),
    ]


def _fgsm(norm: str, epsilon: float) -> Case:
    others: dict[str, tuple[str, Options]] = {
        "foolbox": (f"{norm.capitalize()}FastGradientAttack", {}),
        "ART": ("FastGradientMethod", {"norm": ORDER[norm], "eps": epsilon}),
    }
    if norm == "linf":
        others["torchattacks"] = ("FGSM", {"eps": epsilon})
    return Case(
        name="FGSM",
        norm=norm,
        epsilon=epsilon,
        budget="one step",
        ours=attacks.FGSM(),
        others=others,
        examples=1000,
    )


def _pgd(norm: str, epsilon: float) -> Case:
    step, steps = STEP * epsilon, 40
    art = {"norm": ORDER[norm], "eps": epsilon, "eps_step": step, "max_iter": steps}
    others: dict[str, tuple[str, Options]] = {
        "foolbox": (
            f"{norm.capitalize()}ProjectedGradientDescentAttack",
            {"steps": steps, "abs_stepsize": step},
        ),
        "ART": ("ProjectedGradientDescent", {**art, "num_random_init": 1}),
    }
    if norm != "l1":
        kind = {"linf": "PGD", "l2": "PGDL2"}[norm]
        others["torchattacks"] = (kind, {"eps": epsilon, "alpha": step, "steps": steps})
    return Case(
        name="PGD",
        norm=norm,
        epsilon=epsilon,
        budget="40 steps of epsilon / 16, a random start",
        ours=attacks.PGD(steps=steps, step_size=step),
        others=others,
        examples=1000 if norm == "linf" else 500,
        seeds=5,
    )


def _mifgsm() -> Case:
    step, steps = LINF / 10, 10
    art = {"norm": np.inf, "eps": LINF, "eps_step": step, "max_iter": steps, "decay": 1.0}
    return Case(
        name="MI-FGSM",
        norm="linf",
        epsilon=LINF,
        budget="10 steps of epsilon / 10, momentum 1",
        ours=attacks.MIFGSM(steps=steps, step_size=step),
        others={
            "foolbox": (
                "mi_fgsm.LinfMomentumIterativeFastGradientMethod",
                {"momentum": 1.0, "abs_stepsize": step, "steps": steps},
            ),
            "torchattacks": ("MIFGSM", {"eps": LINF, "alpha": step, "steps": steps}),
            "ART": ("MomentumIterativeMethod", art),
        },
        examples=1000,
    )


def _deepfool() -> list[Case]:
    common: dict[str, Any] = {
        "name": "DeepFool",
        "budget": "50 steps, overshoot 1.02, 9 rivals",
        "ours": attacks.DeepFool(steps=50),
        "examples": 300,
        "minimal": True,
    }
    options = {"steps": 50, "candidates": 10, "overshoot": 0.02}
    return [
        Case(
            norm="linf",
            epsilon=LINF,
            others={"foolbox": ("LinfDeepFoolAttack", options)},
            **common,
        ),
        Case(
            norm="l2",
            epsilon=L2,
            others={
                "foolbox": ("L2DeepFoolAttack", options),
                "torchattacks": ("DeepFool", {"steps": 50, "overshoot": 0.02}),
                "ART": ("DeepFool", {"max_iter": 50, "epsilon": 0.02, "nb_grads": 10}),
            },
            **common,
        ),
    ]


def _apgd() -> list[Case]:
    """L1 has AutoAttack's 5 restarts and 5 targets there."""
    found = []
    for norm, epsilon in (("linf", LINF), ("l2", L2), ("l1", L1)):
        name, restarts = norm.capitalize(), 5 if norm == "l1" else 1
        common: dict[str, Any] = {
            "norm": norm,
            "epsilon": epsilon,
            "examples": 300 if norm == "l1" else 1000,
            "seeds": 5,
        }
        seen = {"norm": name, "eps": epsilon, "steps": 100}
        art = {
            "norm": ORDER[norm],
            "eps": epsilon,
            "eps_step": 2 * epsilon,
            "max_iter": 100,
            "nb_random_init": 1,
        }
        budget = "100 steps" + (", 5 restarts" if restarts > 1 else "")
        for loss, ours, kind, art_loss in (
            ("CE", attacks.APGD(restarts=restarts), "ce", "cross_entropy"),
            ("DLR", attacks.APGDDLR(restarts=restarts), "dlr", "difference_logits_ratio"),
        ):
            others: dict[str, tuple[str, Options]] = {
                "AutoAttack": (f"apgd-{kind}", {"norm": name, "eps": epsilon})
            }
            if norm != "l1":
                others["torchattacks"] = ("APGD", {**seen, "loss": kind})
                others["ART"] = ("AutoProjectedGradientDescent", {**art, "loss_type": art_loss})
            found.append(
                Case(name=f"APGD-{loss}", budget=budget, ours=ours, others=others, **common)
            )
        targets = 5 if norm == "l1" else 9
        others = {"AutoAttack": ("apgd-t", {"norm": name, "eps": epsilon})}
        if norm != "l1":
            others["torchattacks"] = ("APGDT", seen)
        found.append(
            Case(
                name="APGD-T",
                budget=f"100 steps for each of {targets} targets",
                ours=attacks.APGDTargeted(targets=targets),
                others=others,
                **{**common, "examples": 300},
            )
        )
    return found


def _fab() -> list[Case]:
    found = []
    for norm, epsilon in (("linf", LINF), ("l2", L2), ("l1", L1)):
        seen = {"norm": norm.capitalize(), "eps": epsilon}
        for targeted in (False, True):
            more = {"steps": 100, "n_restarts": 1, "multi_targeted": targeted}
            found.append(
                Case(
                    name="FAB-T" if targeted else "FAB",
                    norm=norm,
                    epsilon=epsilon,
                    budget="100 steps" + (" for each of 9 targets" if targeted else ""),
                    ours=attacks.TargetedFAB() if targeted else attacks.FAB(),
                    others={
                        "AutoAttack": ("fab-t" if targeted else "fab", seen),
                        "torchattacks": ("FAB", {**seen, **more}),
                    },
                    examples=60,
                )
            )
    return found


def _square() -> list[Case]:
    return [
        Case(
            name="Square",
            norm=norm,
            epsilon=epsilon,
            budget="5,000 queries",
            ours=attacks.Square(),
            others={
                "AutoAttack": ("square", {"norm": norm.capitalize(), "eps": epsilon}),
                "torchattacks": (
                    "Square",
                    {"norm": norm.capitalize(), "eps": epsilon, "n_queries": 5000},
                ),
                "ART": ("SquareAttack", {"norm": ORDER[norm], "eps": epsilon, "max_iter": 5000}),
            },
            examples=50 if norm == "linf" else 30,
            seeds=2 if norm == "linf" else 1,
        )
        for norm, epsilon in (("linf", LINF), ("l2", L2))
    ]


def _carlini_wagner() -> Case:
    return Case(
        name="C&W",
        norm="l2",
        epsilon=L2,
        budget="9 x 1,000 steps of Adam, 0.01; torchattacks: c = 1, 9,000 steps",
        ours=attacks.CarliniWagner(),
        others={
            "foolbox": ("L2CarliniWagnerAttack", {"binary_search_steps": 9, "steps": 1000}),
            "torchattacks": ("CW", {"c": 1, "steps": 9000, "lr": 0.01}),
            "ART": (
                "CarliniL2Method",
                {"binary_search_steps": 9, "max_iter": 1000, "initial_const": 1e-3},
            ),
        },
        examples=10,
        minimal=True,
    )


def _ead() -> Case:
    return Case(
        name="EAD",
        norm="l1",
        epsilon=L1,
        budget="9 x 1,000 steps of 0.01, beta 0.01, judged by l1",
        ours=attacks.EAD(),
        others={
            "foolbox": (
                "EADAttack",
                {"binary_search_steps": 9, "steps": 1000, "decision_rule": "L1"},
            ),
            "torchattacks": ("EADL1", {"max_iterations": 1000, "beta": 0.01}),
            "ART": ("ElasticNet", {"max_iter": 1000, "beta": 0.01, "decision_rule": "L1"}),
        },
        examples=10,
        minimal=True,
    )


def _hopskipjump() -> list[Case]:
    return [
        Case(
            name="HopSkipJump",
            norm=norm,
            epsilon=epsilon,
            budget="30 steps, some 12,000 queries",
            ours=attacks.HopSkipJump(steps=30),
            others={
                "foolbox": ("HopSkipJumpAttack", {"steps": 30, "constraint": norm}),
                "ART": ("HopSkipJump", {"norm": ORDER[norm], "max_iter": 30}),
            },
            examples=10,
            minimal=True,
        )
        for norm, epsilon in (("l2", 2 * L2), ("linf", 2 * LINF))
    ]


def _simba() -> Case:
    """ART's knows no ball, and is judged where it ends."""
    art = {"attack": "px", "epsilon": 0.2, "batch_size": 1}
    return Case(
        name="SimBA",
        norm="l2",
        epsilon=3 * L2,
        budget="pixels by 0.2, 3,000 queries",
        ours=attacks.SimBA(queries=3000),
        others={"ART": ("SimBA", {**art, "max_iter": 1500})},
        examples=20,
        seeds=3,
    )


def _standard(norm: str, epsilon: float) -> Case:
    seen = {"norm": norm.capitalize(), "eps": epsilon}
    return Case(
        name="standard suite",
        norm=norm,
        epsilon=epsilon,
        budget="AutoAttack's standard; torchattacks' with its steps set from 10 to 100",
        ours=None,
        others={"AutoAttack": ("standard", seen), "torchattacks": ("standard", seen)},
        examples=200 if norm == "linf" else 60,
    )


@dataclass(frozen=True)
class World:
    """What is attacked.

    Attributes:
        module: torch's copy of the model.
        x: `(examples, 1, 28, 28)`, all classified correctly.
        y: int64 `(examples,)`.
    """

    module: torch.nn.Module
    x: Array
    y: Array

    @cached_property
    def images(self) -> Any:
        """As torch has them."""
        return torch.from_numpy(self.x)

    @cached_property
    def labels(self) -> Any:
        """As torch has them."""
        return torch.from_numpy(self.y)


def use_foolbox(world: World, name: str, options: Options, case: Case, seed: int) -> Array:
    """A name with a dot is of a module that foolbox.attacks does not export."""
    foolbox = importlib.import_module("foolbox")
    module, _, kind = f"foolbox.attacks.{name}".rpartition(".")
    attack = getattr(importlib.import_module(module), kind)(**options)
    model = foolbox.PyTorchModel(world.module, bounds=(0, 1), device="cpu")
    epsilon = None if case.minimal else case.epsilon
    raw, clipped, _ = attack(model, world.images, world.labels, epsilons=epsilon)
    found: Array = (raw if case.minimal else clipped).detach().numpy()
    return found


def use_torchattacks(world: World, name: str, options: Options, case: Case, seed: int) -> Array:
    """Their AutoAttack has 10 steps: its parts are made here, with 100."""
    library = importlib.import_module("torchattacks")

    def make(kind: str, **given: Any) -> Any:
        wanted = getattr(library, kind)
        if "seed" in inspect.signature(wanted).parameters:
            given["seed"] = seed
        return wanted(world.module, **given)

    if name == "standard":
        attack = library.MultiAttack(
            [
                make("APGD", **options, steps=100),
                make("APGDT", **options, steps=100),
                make("FAB", **options, steps=100, multi_targeted=True),
                make("Square", **options, n_queries=5000),
            ]
        )
    else:
        attack = make(name, **options)
    found: Array = attack(world.images, world.labels).detach().numpy()
    return found


class _Single(torch.nn.Module):
    """ART's HopSkipJump hands out float64."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()


def use_art(world: World, name: str, options: Options, case: Case, seed: int) -> Array:
    """Adversarial Robustness Toolbox; its SimBA wants probabilities, and labels one-hot."""
    evasion = importlib.import_module("art.attacks.evasion")
    estimators = importlib.import_module("art.estimators.classification")
    soft = name == "SimBA"
    model = torch.nn.Sequential(_Single(), world.module, *[torch.nn.Softmax(1)] * soft)
    classifier = estimators.PyTorchClassifier(
        model=model,
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=world.x.shape[1:],
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    kind = getattr(evasion, name)
    known = inspect.signature(kind).parameters
    usual = {"batch_size": 100, "verbose": False}
    given = {**{name: value for name, value in usual.items() if name in known}, **options}
    attack = kind(classifier, **given)
    found: Array = attack.generate(world.x.copy(), y=np.eye(10)[world.y] if soft else world.y)
    return found


def use_autoattack(world: World, name: str, options: Options, case: Case, seed: int) -> Array:
    """The reference code, as the wheel pyautoattack has it."""
    library = importlib.import_module("pyautoattack")
    attack = library.AutoAttack(world.module, seed=seed, **options)
    if name != "standard":
        attack.attacks_to_run = [name]
    x_adv, _ = attack.run_standard_evaluation(world.images, world.labels, batch_size=500)
    found: Array = x_adv.detach().numpy()
    return found


# As package managers know them.
PACKAGES = {
    "onnxruntime": "onnxruntime",
    "torch": "torch",
    "AutoAttack": "pyautoattack",
    "foolbox": "foolbox",
    "torchattacks": "torchattacks",
    "ART": "adversarial-robustness-toolbox",
}
LIBRARIES: dict[str, tuple[str, Callable[[World, str, Options, Case, int], Array]]] = {
    "AutoAttack": ("pyautoattack", use_autoattack),
    "foolbox": ("foolbox", use_foolbox),
    "torchattacks": ("torchattacks", use_torchattacks),
    "ART": ("art", use_art),
}


@dataclass(frozen=True)
class Found:
    """What one library found in one case.

    Attributes:
        robust: for each seed, for each example, 1 or 0 as text.
        day: of the last seed, in ISO's format.
        distances: for each seed, the median over the examples that are classified correctly, inf
            where fewer than half were broken.
        seconds: of all seeds.
        failed: why there is nothing else.
    """

    robust: list[str] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
    seconds: float = 0.0
    failed: str | None = None
    day: str = ""

    @property
    def table(self) -> Array:
        """bool `(seeds, examples)`."""
        return np.array([[each == "1" for each in row] for row in self.robust])

    def more(self, robust: Array, distance: float, seconds: float) -> Found:
        """Returns it with one seed more."""
        row = "".join("01"[int(each)] for each in robust)
        return Found(
            [*self.robust, row],
            [*self.distances, distance],
            round(self.seconds + seconds, 1),
            day=date.today().isoformat(),
        )


class Contest:
    """The sample model, on onnxruntime and in torch."""

    def __init__(self) -> None:
        self.model = jr.load(SAMPLES / "lenet_mnist.onnx")
        self.target = jr.Target(self.model, device="cpu")
        self.data = jr.load_npz(SAMPLES / "mnist_test.npz")
        self.module = load_weights(SAMPLES / "lenet_mnist.onnx")
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)

    def run(self, case: Case, library: str, seed: int) -> tuple[Array, float]:
        """Lets one library attack, and judges what it returns.

        Returns:
            bool `(examples,)`, who is robust; and the median distance.
        """
        x, y = self.data.x[: case.examples], self.data.y[: case.examples]
        if library == OURS and case.ours is None:
            return self._suite(case, x, y, seed), np.inf
        robust = self.target.logits(x).argmax(axis=1) == y
        x, y = x[robust], y[robust]
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        points = self._points(case, library, x, y, seed)
        robust[robust], distance = self._judge(case, points, x, y, library)
        return robust, float(np.median(distance))

    def _suite(self, case: Case, x: Array, y: Array, seed: int) -> Array:
        threat = ThreatModel(norm=case.norm, epsilon=case.epsilon)
        found = jr.evaluate(
            self.model, x, y, threat=threat, suite="standard", device="cpu", seed=seed
        )
        return found.models[0].robust

    def _points(self, case: Case, library: str, x: Array, y: Array, seed: int) -> Array:
        if library != OURS:
            name, options = case.others[library]
            return LIBRARIES[library][1](World(self.module, x, y), name, options, case, seed)
        assert case.ours is not None
        epsilon = np.inf if case.minimal else case.epsilon
        threat = ThreatModel(norm=case.norm, epsilon=epsilon)
        return case.ours.run(self.target, x, y, threat, seed=seed, batch_size=256).x_adv

    def _judge(
        self, case: Case, points: Array, x: Array, y: Array, library: str
    ) -> tuple[Array, Array]:
        """Returns who is robust at epsilon, and how far the misclassified points are."""
        slack = 0.0 if library == OURS else SLACK
        inside = np.abs(points - np.clip(points, 0, 1)).max(axis=(1, 2, 3)) <= slack
        points = np.clip(points, 0, 1).astype(np.float32)
        threat = ThreatModel(norm=case.norm, epsilon=case.epsilon)
        distance = threat.distance(points, x)
        wrong = (self.target.logits(points).argmax(axis=1) != y) & inside
        allowed = case.epsilon * (1 + slack)
        near = distance <= allowed if slack else threat.contains(points, x)
        return ~(wrong & near), np.where(wrong, distance, np.inf)


def compare(
    folder: Path,
    chosen: Sequence[Case],
    *,
    libraries: Collection[str] | None = None,
    again: bool = False,
) -> dict[str, dict[str, Found]]:
    """Runs the seeds that the folder of results does not have yet, and writes each.

    Args:
        folder: a file for each case and library.
        chosen: the cases to run.
        libraries: that run; all if None.
        again: run ours again.

    Returns:
        By case and library, what the folder has of all cases that have two libraries or more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contest = Contest() if chosen else None
    for case in chosen:
        assert contest is not None
        there = {library: stored(folder, case, library) for library in (OURS, *case.others)}
        for library, found in there.items():
            if found.failed or (again and library == OURS):
                there[library] = Found()
        for seed, library in itertools.product(range(case.seeds), there):
            found = there[library]
            wanted = libraries is None or library in libraries
            if not wanted or found.failed or len(found.robust) != seed:
                continue
            there[library] = found = _tried(contest, case, library, found)
            _keep(folder, case, library, found)
            said = found.failed or f"{found.table.mean():.1%}, {found.seconds:.1f} s"
            print(f"{case.key:28} {library:12} {said}", flush=True)
    results = {
        case.key: {
            library: found
            for library in (OURS, *case.others)
            if (found := stored(folder, case, library)).robust or found.failed
        }
        for case in cases()
    }
    return {key: found for key, found in results.items() if OURS in found and len(found) > 1}


def stored(folder: Path, case: Case, library: str) -> Found:
    """Returns what is finished of as many examples, empty where nothing is.

    What failed or was not installed is tried again.
    """
    path = _path(folder, case, library)
    found = Found(**json.loads(path.read_text())) if path.exists() else Found()
    fits = all(len(row) == case.examples for row in found.robust)
    return found if fits else Found()


def _keep(folder: Path, case: Case, library: str, found: Found) -> None:
    content = json.dumps(vars(found)) + "\n"
    write_atomically(_path(folder, case, library), content.encode(), force=True)


def _path(folder: Path, case: Case, library: str) -> Path:
    return folder / f"{case.key} {library}.json".replace(" ", "-")


def _tried(contest: Contest, case: Case, library: str, found: Found) -> Found:
    """Adds the next seed, or says why there is none."""
    if library != OURS and not _installed(LIBRARIES[library][0]):
        return Found(failed="not installed")
    start = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            robust, distance = contest.run(case, library, len(found.robust))
    except Exception as error:
        if library == OURS:
            raise
        # A bug of another library is a cell of the table, not the end of the run.
        return Found(failed=f"{type(error).__name__}: {error}"[:200])
    return found.more(robust, distance, time.process_time() - start)


def _installed(module: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module(module)
        except ImportError:
            return False
    return True


def table(results: Mapping[str, Mapping[str, Found]], old: str = "") -> str:
    """Returns robust accuracies, and ours less the strongest other.

    Rows of an old table stay where there is no newer result.
    """
    libraries = list(LIBRARIES)
    titles = ["attack", "ball", "examples x seeds", OURS, *libraries, "ours - strongest", "day"]
    rows = []
    for case in (case for case in cases() if case.key in results):
        found = results[case.key]
        cells = [
            f"{case.name} ({case.budget})",
            f"{case.norm} {case.epsilon:g}",
            f"{case.examples} x {len(found[OURS].robust)}",
            *(_share(found.get(library), case.seeds) for library in (OURS, *libraries)),
            _difference(found),
            found[OURS].day,
        ]
        rows.append(cells)
    return _merged(titles, rows, old)


def distances(results: Mapping[str, Mapping[str, Found]], old: str = "") -> str:
    """Returns median distances, the mean of the seeds', of attacks that look for the smallest."""
    titles = ["attack", "norm", OURS, *LIBRARIES]
    rows = []
    for case in (case for case in cases() if case.minimal and case.key in results):
        found = results[case.key]
        sizes = [found[each].distances if each in found else [] for each in (OURS, *LIBRARIES)]
        cells = [f"{np.mean(size):.4f}" if size else "" for size in sizes]
        rows.append([case.name, case.norm, *cells])
    return _merged(titles, rows, old)


def _merged(titles: Sequence[str], rows: list[list[str]], old: str) -> str:
    """Adds the rows of an old table whose first two cells no new row has."""
    known = {(row[0].partition(" (")[0], row[1]) for row in rows}
    for line in old.splitlines()[2:]:
        row = [cell.strip() for cell in line.strip("|").split("|")]
        if (row[0].partition(" (")[0], row[1]) not in known:
            rows.append(row)
    order = {(case.name, part): at for at, case in enumerate(cases()) for part in _balls(case)}
    rows.sort(key=lambda row: order.get((row[0].partition(" (")[0], row[1]), len(order)))
    return markdown(titles, rows, text=2)


def _balls(case: Case) -> tuple[str, str]:
    """Returns how the two tables name a ball."""
    return f"{case.norm} {case.epsilon:g}", case.norm


def measured() -> str:
    """Returns the date and the versions of what is installed."""
    versions = []
    for name, package in PACKAGES.items():
        try:
            versions.append(f"{name} {metadata.version(package).partition('+')[0]}")
        except metadata.PackageNotFoundError:
            versions.append(f"{name} (not installed)")
    return f"Measured on {date.today()} with {', '.join(versions)}.\n"


def _share(found: Found | None, seeds: int) -> str:
    """In percent, the mean of the seeds, and the lowest and highest of them."""
    if found is None:
        return ""
    if found.failed:
        return found.failed if found.failed == "not installed" else "failed"
    shares = 100 * found.table.mean(axis=1)
    spread = f" [{shares.min():.1f}..{shares.max():.1f}]" if len(shares) > 1 else ""
    part = f" ({len(shares)} of {seeds} seeds)" if len(shares) < seeds else ""
    return f"{shares.mean():.1f}%{spread}{part}"


def _difference(found: Mapping[str, Found]) -> str:
    """In points, with the 95% interval of the paired difference where there is any.

    Only those count that have as many seeds: one seed alone is low or high by chance.
    """
    ours = found[OURS].table
    others = [each.table for name, each in found.items() if name != OURS and not each.failed]
    others = [each for each in others if len(each) == len(ours)]
    if not others:
        return ""
    lowest = min(others, key=lambda each: float(each.mean()))
    each = ours.mean(axis=0) - lowest.mean(axis=0)
    half = 1.96 * each.std(ddof=1) / np.sqrt(len(each))
    spread = f" [{100 * (each.mean() - half):+.1f}..{100 * (each.mean() + half):+.1f}]"
    return f"{100 * each.mean():+.1f}" + (spread if half else "")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare attacks with other libraries'.")
    parser.add_argument("--results", type=Path, required=True, help="folder of what is finished")
    parser.add_argument("--only", default="", help="cases whose key has this text, case ignored")
    parser.add_argument(
        "--libraries", nargs="+", choices=[OURS, *LIBRARIES], help="that run; all by default"
    )
    parser.add_argument("--again", action="store_true", help="run ours again")
    parser.add_argument("--no-run", action="store_true", help="only the tables of what is there")
    parser.add_argument("--write", type=Path, help="Markdown file whose tables are replaced")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    arguments = _parse(argv)
    torch.set_num_threads(1)
    wanted = [] if arguments.no_run else cases()
    chosen = [case for case in wanted if arguments.only.lower() in case.key.lower()]
    results = compare(
        arguments.results, chosen, libraries=arguments.libraries, again=arguments.again
    )
    if arguments.write:
        put(arguments.write, "measured", measured())
        for name, made in (("attacks", table), ("distances", distances)):
            put(arguments.write, name, made(results, content(arguments.write, name)))
    else:
        print(table(results), distances(results), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
