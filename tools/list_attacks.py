"""Writes the tables of attacks and suites into docs/attacks.md; a test compares it with the code.

python tools/list_attacks.py
"""

from __future__ import annotations

import re
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from tables import markdown, put

from jr_onnx.attacks import ATTACKS
from jr_onnx.suites import SUITES, Trial

PAGE = Path(__file__).resolve().parents[1] / "docs" / "attacks.md"
# Runs of an example with the default options and 10 classes, at most: forward alone, and forward
# and backward. Some more are spent on finding rivals and on judging.
RUNS: dict[str, tuple[int, int]] = {
    "fgsm": (0, 1),
    "pgd": (0, 40),
    "ifgsm": (0, 40),
    "mifgsm": (0, 10),
    "apgd": (0, 100),
    "apgd-dlr": (0, 100),
    "apgd-t": (0, 900),
    "deepfool": (60, 450),
    "trust_region": (10, 1010),
    "trust_region_adaptive": (10, 1010),
    "carlini_wagner": (0, 9000),
    "ead": (9000, 9000),
    "fab": (110, 900),
    "fab_t": (910, 900),
    "square": (5000, 0),
    "hopskipjump": (35000, 0),
    "simba": (20000, 0),
    "uniform-noise": (1000, 0),
    "gaussian-noise": (1000, 0),
    "salt-and-pepper-noise": (100, 0),
    "corruptions": (50, 0),
}
# Where the docstring has no paper of the attack.
NO_PAPER = ("uniform-noise", "gaussian-noise", "salt-and-pepper-noise", "corruptions")


def attacks() -> str:
    """Returns a row for each attack."""
    rows = []
    for name, kind in ATTACKS.items():
        options = [f"`{each.name}={_default(each)}`" for each in fields(kind)]  # type: ignore[arg-type]
        forward, gradient = RUNS[name]
        counts = [f"{count:,}" if count else "" for count in (forward, gradient)]
        norms = ", ".join(kind.norms) if name != "corruptions" else "none"
        rows.append([f"`{name}`", norms, " ".join(options), _source(name, kind), *counts])
    titles = ["attack", "norms", "options", "source", "forward", "gradient"]
    return markdown(titles, rows, text=4)


def suites() -> str:
    """Returns a row for each trial of each suite."""
    rows = []
    for name, suite in SUITES.items():
        for trial in suite().trials:
            rows.append([f"`{name}`", f"`{trial.name}`", _attack(trial), _sees(trial)])
    return markdown(["suite", "trial", "attack", "follows"], rows, text=4)


def _default(each: Any) -> str:
    value = each.default if each.default is not MISSING else each.default_factory()
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _source(name: str, kind: type) -> str:
    """The first paper that the attack's docstring refers to, or its base's."""
    if name in NO_PAPER:
        return ""
    for each in kind.__mro__:
        _, _, references = (each.__doc__ or "").partition("References:")
        found = re.search(r"arXiv:(\d{4}\.\d{4,5})", references)
        if found:
            return f"[{found[1]}](https://arxiv.org/abs/{found[1]})"
    raise ValueError(f"{name}: its docstring refers to no paper")


def _attack(trial: Trial) -> str:
    kind = type(trial.attack)
    usual = {each.name: each.default for each in fields(kind)}  # type: ignore[arg-type]
    changed = [
        f"{option}={value}"
        for option, value in vars(trial.attack).items()
        if value != usual[option]
    ]
    norm = f", {trial.norm}, no ball" if trial.norm else ""
    return f"`{' '.join([trial.attack.name, *changed])}`{norm}"


def _sees(trial: Trial) -> str:
    if not trial.attack.uses_gradients:
        return "outputs alone"
    of = "" if trial.surrogate == "exact" else f", slope `{trial.surrogate}`"
    if trial.source is None:
        return f"the model's gradient{of}"
    whose = "the original's" if not trial.source else f"that of {trial.source:g} times the jumps"
    return f"{whose}{of}"


def main() -> int:
    """Writes both tables."""
    put(PAGE, "attacks", attacks())
    put(PAGE, "suites", suites())
    return 0


if __name__ == "__main__":
    sys.exit(main())
