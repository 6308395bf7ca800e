"""A pattern filled in gives the very bytes of the nodes built for that site."""

from __future__ import annotations

import onnx
import pytest
from onnx import helper

from jr_onnx.model import wire
from jr_onnx.rewrite.pattern import Pattern


def _nodes(x: str, y: str, prefix: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Constant", [], [f"{prefix}/c:0"], name=f"{prefix}/c", value_float=37.0),
        helper.make_node(
            "Sub", [x, f"{prefix}/c:0"], [f"{prefix}/s:0"], name=f"{prefix}/s", a="%b"
        ),
        helper.make_node("Where", [f"{prefix}/s:0", x, "elsewhere"], [y], name=f"{prefix}/where"),
    ]


@pytest.mark.parametrize("number", [1, 7, 16])
@pytest.mark.parametrize(
    ("x", "y", "prefix"),
    [
        ("a", "b", "p"),
        ("%b%d%%", "100%", "%"),
        ("x" * 37, "y" * 127, "p" * 120),  # 37 is the code of the percent sign, 128 a longer length
        ("x" * 128, "y" * 300, "p" * 20_000),
        ("ünïcode", "名前", "→"),
    ],
)
def test_a_filled_pattern_is_the_nodes(number: int, x: str, y: str, prefix: str) -> None:
    pattern = Pattern.of(_nodes("in", "out", "pre/fix"), "in", "out", "pre/fix")
    expected = b"".join(
        wire.encode(number, node.SerializeToString()) for node in _nodes(x, y, prefix)
    )
    for _ in range(2):
        assert pattern.fill(number, x, y, prefix) == expected
