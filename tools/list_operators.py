"""Writes the table of operators and their gradients, docs/operators.md.

    python tools/check_gradients.py --json results.json
    python tools/list_operators.py results.json

What is covered comes from the registries of jr_onnx.autodiff and the schemas of onnx; where it is
checked, from the operators that the test files name; the counts of the node tests, from the results
above, or without any from the table as it is.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import onnx
from onnx.defs import OpSchema

from jr_onnx.autodiff.expand import _INTEGER, _WITH_BODIES, ANY_VERSION, _expansions
from jr_onnx.autodiff.registry import ZERO_GRADIENT, registered

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "operators.md"
DOMAINS = ("", "ai.onnx.ml", "com.microsoft")  # others are not ours: tests register rules, too
_NAMED = {*_INTEGER, *_WITH_BODIES}  # refused by name, whatever their types are
LIFTED_TO = 9  # opsets 7 and 8 are read as this
HEADER = (
    "| operator | by | for | since-versions | not covered | tests | node tests |\n"
    "|---|---|---|---|---|---|---|\n"
)
INTRODUCTION = """\
# Operators that have a gradient

Written by `tools/list_operators.py`; a test compares this page with the code.

- **by**: `rule`, a vector-Jacobian product of ours; `expansion`, a formula of ours in operators
  that have rules; `function`, the function body that onnx gives the operator.
- **for**: the inputs that may depend on the model's input. A path through another input is
  refused, by name.
- **since-versions**: those that are covered, of the ones in force from opset 9 on. Opsets 7 and 8
  are read as 9.
- **tests**: files `tests/test_gradients_*.py` that use the operator. They compare with finite
  differences of the onnx reference evaluator in float64, and with torch where that errs.
- **node tests**: how many gradients of the onnx package's backend node tests
  `tools/check_gradients.py` found equal to finite differences, in brackets the since-versions; how
  many are zero, as they should be; and how many are refused with a reason.
"""


class Row(NamedTuple):
    """One operator, but for the node tests.

    Attributes:
        operator: with its domain, unless that is the standard one.
        by: rule, expansion, function or "".
        inputs: that may depend on the model's input.
        covered: since-versions.
        missing: since-versions.
        tests: that use it.
    """

    operator: str
    by: str
    inputs: str
    covered: list[int]
    missing: list[int]
    tests: list[str]


@cache
def _history() -> dict[str, list[OpSchema]]:
    found: dict[str, list[OpSchema]] = defaultdict(list)
    for schema in onnx.defs.get_all_schemas_with_history():
        if not schema.domain:
            found[schema.name].append(schema)
    return {name: sorted(all_, key=lambda one: one.since_version) for name, all_ in found.items()}


def in_force(op_type: str) -> list[OpSchema]:
    """Returns the schemas of a standard operator that some opset from 9 on means."""
    schemas = _history().get(op_type, [])
    ends = [schema.since_version for schema in schemas[1:]]
    return [
        schema
        for schema, end in zip(schemas, [*ends, sys.maxsize], strict=False)
        if end > LIFTED_TO and not schema.deprecated
    ]


def rows() -> Iterator[Row]:
    """Yields the operators that are covered, in the order of their names."""
    rules, named = registered(), _named_in_tests()
    operators = {key[:2] for key in (*rules, *_expansions) if key[0] in DOMAINS}
    operators |= {("", name) for name in _history() if _by_function(name)}
    for domain, op_type in sorted(operators, key=lambda key: (key[0], key[1].lower())):
        if not domain and op_type in ZERO_GRADIENT:
            continue
        known = {key[2] for key in rules if key[:2] == (domain, op_type)}
        written = {key[2] for key in _expansions if key[:2] == (domain, op_type)}
        wanted = {schema.since_version for schema in in_force(op_type)} if not domain else known
        bodies = set() if domain else _by_function(op_type)
        covered = known | written | bodies
        by = "rule" if known else "expansion" if written else "function"
        if known and (written or not bodies <= known):
            by = f"rule, {'expansion' if written else 'function'}"
        yield Row(
            f"{domain}::{op_type}" if domain else op_type,
            by,
            _inputs(domain, op_type, max(known)) if known else "all",
            sorted(covered & wanted if wanted else covered),
            sorted(wanted - covered),
            sorted(named.get(op_type, [])),
        )


def _by_function(op_type: str) -> set[int]:
    """Returns the since-versions at which onnx has a body for the operator, and we have no rule."""
    rules, result = registered(), set()
    if op_type in (*_INTEGER, *_WITH_BODIES):  # which expand.py refuses
        return set()
    for schema in in_force(op_type):
        body = schema.has_function or schema.has_context_dependent_function  # type: ignore[attr-defined]
        known = ("", op_type, schema.since_version) in rules
        if body and not known and _takes_floats(schema):
            result.add(schema.since_version)
    return result if op_type not in ZERO_GRADIENT else set()


def _inputs(domain: str, op_type: str, since: int) -> str:
    indices = registered()[domain, op_type, since]
    schemas = [one for one in _history().get(op_type, []) if one.since_version == since]
    if indices is None or domain or not schemas:
        return "all" if indices is None else ", ".join(map(str, sorted(indices)))
    names = [formal.name for formal in schemas[0].inputs]
    if indices >= set(range(len(names))):
        return "all"
    return ", ".join(names[index] for index in sorted(indices) if index < len(names))


@cache
def _named_in_tests() -> dict[str, set[str]]:
    """Returns the tests that name an operator: in ONNX text, or as a string of its own."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted((REPOSITORY / "tests").glob("test_gradients*.py")):
        label = path.stem.removeprefix("test_gradients").removeprefix("_") or "gradients"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                called = re.findall(r"\b([A-Z]\w+) ?[(<]", node.value)
                for name in (*called, node.value, f"Reduce{node.value}"):
                    found[name].add(label)
    return found


def without() -> list[str]:
    """Returns the standard operators that have no gradient, and compute something from floats."""
    covered = {row.operator for row in rows()} | ZERO_GRADIENT
    names = []
    for name in _history():
        schemas = in_force(name)
        if schemas and name not in covered and (name in _NAMED or _takes_floats(schemas[-1])):
            names.append(name)
    return sorted(names, key=str.lower)


def _takes_floats(schema: OpSchema) -> bool:
    def floats(formals: list[OpSchema.FormalParameter]) -> bool:
        return any("float" in type_ for formal in formals for type_ in formal.types)

    return floats(list(schema.inputs)) and floats(list(schema.outputs))


def render(counts: dict[str, str]) -> str:
    """Returns the page.

    Args:
        counts: the last column, by operator.
    """
    lines = []
    for row in rows():
        covered, missing = _spelled(row.covered), _spelled(row.missing)
        cells = (f"`{row.operator}`", row.by, row.inputs, covered, missing, ", ".join(row.tests))
        lines.append(f"| {' | '.join((*cells, counts.get(row.operator, '')))} |\n")
    zeros = [f"`{name}`" for name in sorted(ZERO_GRADIENT, key=str.lower)]
    refused = [f"`{name}`" for name in without()]
    return "\n".join((
        INTRODUCTION, HEADER + "".join(lines), "## Zero by definition\n",
        "Piecewise constant, or about shapes. Nothing flows back through them:\n",
        _wrapped(zeros), "## No gradient\n",
        "A model in which one of these depends on the input is refused, with the node's name:\n",
        _wrapped(refused),
    ))  # fmt: skip


def _spelled(versions: list[int]) -> str:
    return "all" if versions == [ANY_VERSION] else ", ".join(map(str, versions))


def _wrapped(names: list[str]) -> str:
    lines, line = [], ""
    for index, name in enumerate(names):
        word = name + ("," if index + 1 < len(names) else ".")
        if len(line) + len(word) >= 100:
            lines.append(line)
            line = ""
        line = f"{line} {word}" if line else word
    return "\n".join((*lines, line)) + "\n"


def counted(results: Path) -> dict[str, str]:
    """Returns the last column from the results of tools/check_gradients.py."""
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    versions: dict[str, set[int]] = defaultdict(set)
    for op_type, since, _, _, kind, _ in json.loads(results.read_text()):
        kinds[op_type][kind] += 1
        if kind == "checked":
            versions[op_type].add(since)
    cells = {}
    for op_type, counts in kinds.items():
        parts = []
        if counts["checked"]:
            at = ", ".join(map(str, sorted(versions[op_type])))
            parts.append(f"{counts['checked']} ({at})")
        parts += [f"{counts[kind]} {kind}" for kind in ("zero", "refused", "WRONG") if counts[kind]]
        cells[op_type] = ", ".join(parts)
    return cells


def recorded(page: str) -> dict[str, str]:
    """Returns the last column of a page."""
    found = re.findall(r"^\| `([\w.:]+)` \|.*\| ?(.*) \|$", page, re.MULTILINE)
    return {operator: cell.strip() for operator, cell in found}


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("results", type=Path, nargs="?", help="of tools/check_gradients.py --json")
    results = parser.parse_args().results
    counts = counted(results) if results else recorded(PAGE.read_text())
    PAGE.write_text(render(counts))


if __name__ == "__main__":
    main()
