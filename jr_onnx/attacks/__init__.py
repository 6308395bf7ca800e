"""Attacks: (target, x, y, threat model, seed) -> adversarial examples inside the threat model."""

from jr_onnx.attacks.attack import Attack, AttackResult, Classifier
from jr_onnx.attacks.pgd import PGD
from jr_onnx.attacks.threat import NORMS, ThreatModel, parse_epsilon

__all__ = [
    "NORMS",
    "PGD",
    "Attack",
    "AttackResult",
    "Classifier",
    "ThreatModel",
    "parse_epsilon",
]
