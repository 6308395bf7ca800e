"""Every gate, in the order of the rules: what was measured -> checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from jr_onnx.gate.figures import (
    attack_validity,
    clean_drop,
    gradients,
    input_contract,
    masking,
    no_gain,
    parity,
    regression,
    robust_floor,
)
from jr_onnx.gate.measure import Measured
from jr_onnx.gate.properties import equivalence, latency, left_out, opset, size
from jr_onnx.gate.verdict import Check

GATES: tuple[Callable[[Measured], Iterator[Check]], ...] = (
    clean_drop,
    robust_floor,
    no_gain,
    masking,
    attack_validity,
    input_contract,
    parity,
    gradients,
    equivalence,
    left_out,
    latency,
    opset,
    size,
    regression,
)


def checks_of(measured: Measured) -> tuple[Check, ...]:
    """Returns the outcome of every gate, in the order of the rules."""
    return tuple(check for gate in GATES for check in gate(measured))
