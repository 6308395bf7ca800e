"""What the tests of the gate share: a project with models, data and thresholds, and its reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import jsonschema
import numpy as np
import onnx
import xmlschema
from onnx import helper, numpy_helper

import jr_onnx as jr
from jr_onnx.attacks import PGD
from jr_onnx.cli import run
from jr_onnx.suites import Suite, Trial

HERE = Path(__file__).resolve().parent
SCHEMAS = HERE.parent / "docs" / "schemas"
CONFIG = """\
[[models]]
name = "digits"
original = "net.onnx"
hardened = "net.jr.onnx"

[data]
path = "test.npz"

[threat]
epsilon = 0.1

[evaluation]
device = "cpu"

[gates]
max_clean_accuracy_drop = 0.2
min_robust_accuracy = 0.1
min_adaptive_gain = -0.3
max_size = "1 MB"
max_size_ratio = 1.1
min_opset = 13
max_opset = 30
"""


def short_adaptive() -> Suite:
    """Few steps, but all that masking takes to be seen: the own gradient, and a soft slope."""
    return Suite(
        "adaptive",
        (
            Trial(name="pgd", attack=PGD(steps=10)),
            Trial(name="bpda-soft-30", attack=PGD(steps=10), surrogate="soft:30%"),
        ),
        adaptive=True,
    )


@dataclass(frozen=True)
class Reports:
    """What a run of the gate left behind.

    Attributes:
        code: its exit code.
        json: the result.
        cases: name of a testcase to the tag inside it, `pass` where there is none.
        results: the SARIF results.
        sarif: the whole SARIF document.
        markdown: the summary.
        text: what was said.
    """

    code: int
    json: dict[str, Any]
    cases: dict[str, str]
    results: list[dict[str, Any]]
    sarif: dict[str, Any]
    markdown: str
    text: str

    def shown(self, rule: str) -> tuple[str, bool, bool]:
        """Returns the tag in JUnit, whether SARIF has a result, whether the Markdown is loud."""
        tags = [tag for name, tag in self.cases.items() if name.startswith(rule)]
        loud = self.markdown.partition("<details>")[0]
        rules = [result["ruleId"] for result in self.results]
        return (
            max(tags, key=["skipped", "pass", "failure", "error"].index),
            rule in rules,
            rule in loud,
        )


def run_gate(folder: Path, say: Callable[[], str], *arguments: str) -> Reports:
    """Runs the command in a folder with jr-onnx.toml, checks its reports against their schemas."""
    names = ("json", "junit", "sarif", "markdown")
    asked = [part for name in names for part in (f"--{name}", str(folder / f"gate.{name}"))]
    code = run(["gate", "--quiet", "--force", *asked, *arguments])
    xml = folder / "gate.junit"
    xmlschema.XMLSchema(HERE / "data" / "junit-10.xsd").validate(xml)
    sarif = json.loads((folder / "gate.sarif").read_bytes())
    published = json.loads((HERE / "data" / "sarif-2.1.0-rtm.5.json").read_bytes())
    jsonschema.Draft4Validator(published).validate(sarif)
    result = json.loads((folder / "gate.json").read_bytes())
    schema = json.loads((SCHEMAS / "gate-1.json").read_bytes())
    jsonschema.Draft202012Validator(schema).validate(result)
    evaluated = json.loads((SCHEMAS / "evaluation-1.json").read_bytes())
    for model in result["models"]:
        if model["evaluation"] is not None:
            document = {**model["evaluation"], "tool": result["tool"]}
            jsonschema.Draft202012Validator(evaluated).validate(document)
    cases = ET.parse(xml).getroot().iter("testcase")
    return Reports(
        code=code,
        json=result,
        cases={case.get("name", ""): _tag(case) for case in cases},
        results=sarif["runs"][0]["results"],
        sarif=sarif,
        markdown=(folder / "gate.markdown").read_text(encoding="utf-8"),
        text=say(),
    )


def _tag(case: ET.Element) -> str:
    tags = [child.tag for child in case]
    return tags[0] if tags else "pass"


def harden(folder: Path, **options: Any) -> jr.Model:
    """Writes net.jr.onnx from net.onnx."""
    hardened = jr.retrofit(jr.load(folder / "net.onnx"), **options).model
    jr.save(hardened, folder / "net.jr.onnx", force=True)
    return jr.load(folder / "net.jr.onnx")


def edit(path: Path, *, where: str, change: float) -> str:
    """Adds to the first value of an initializer, or of a jump; returns its name."""
    proto = onnx.load(path)
    if where == "weights":
        tensor = proto.graph.initializer[0]
    else:
        jump = next(node for node in proto.graph.node if node.op_type == "Constant")
        tensor = jump.attribute[0].t
    values = numpy_helper.to_array(tensor).copy()
    values.reshape(-1)[:1] += np.asarray(change, values.dtype)
    name = str(tensor.name)
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    onnx.save(proto, path)
    return name


def saturate(path: Path) -> None:
    """Ends a model in a softmax so hot that no gradient of it is left, and hides that it does."""
    proto = onnx.load(path)
    graph = proto.graph
    logits = graph.output[0].name
    constants = {"hot": 1e4, "one": 1.0}
    graph.node.extend(
        [
            helper.make_node("Mul", [logits, "hot"], ["h"]),
            helper.make_node("Softmax", ["h"], ["p"], axis=1),
            helper.make_node("Mul", ["p", "one"], ["out"]),
        ]
    )
    for name, value in constants.items():
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
    graph.output[0].name = "out"
    onnx.save(proto, path)
