"""The pytest plugin: two fixtures, which import the package only when a test asks for them.

    def test_the_model(assert_retrofit_equivalent, assert_robust):
        assert_retrofit_equivalent("net.onnx", "net.jr.onnx")
        assert_robust("net.jr.onnx", "test.npz", epsilon="8/255", at_least=0.3)

Outside a fixture: `from jr_onnx.gate import assert_retrofit_equivalent, assert_robust`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def assert_retrofit_equivalent() -> Callable[..., Any]:
    """`jr_onnx.gate.assert_retrofit_equivalent(original, hardened)`."""
    from jr_onnx.gate import assert_retrofit_equivalent as asserted

    return asserted


@pytest.fixture(scope="session")
def assert_robust() -> Callable[..., Any]:
    """`jr_onnx.gate.assert_robust(model, data, epsilon=..., at_least=...)`."""
    from jr_onnx.gate import assert_robust as asserted

    return asserted
