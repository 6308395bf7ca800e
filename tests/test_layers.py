"""Dependencies point one way, and the field packages stay where they belong."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "jr_onnx"

# A module imports from rows above its own, or from its own package.
LAYERS = (
    ("errors",),
    ("model",),
    ("session",),
    ("rewrite", "autodiff"),
    ("target", "activations", "preprocess"),
    ("attacks", "data", "health"),
    ("suites", "statistics", "checkpoint"),
    ("findings",),
    ("runs",),
    ("evaluate",),
    ("examples", "curves"),
    ("gate", "tune"),
    ("report",),
    ("cli",),
    ("__init__", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))


def _part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_upwards(path: Path) -> None:
    own = _part(path)
    for name in _imports(path):
        package, _, rest = name.partition(".")
        used = rest.split(".")[0]
        if package == "jr_onnx" and used != own and used != "__version__":
            assert LEVEL[used] < LEVEL[own], f"{own} imports {used}"


@pytest.mark.parametrize(("package", "home"), [("onnxruntime", "session.py"), ("google", "model/")])
def test_a_field_package_has_one_home(package: str, home: str) -> None:
    users = [
        path for path in MODULES if any(name.split(".")[0] == package for name in _imports(path))
    ]
    assert users
    assert all(str(path.relative_to(PACKAGE)).startswith(home) for path in users)


def test_nothing_imports_torch() -> None:
    assert not [path for path in MODULES if any(n.startswith("torch") for n in _imports(path))]
