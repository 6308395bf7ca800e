"""Attacks: (target, x, y, threat model, seed) -> adversarial examples inside the threat model."""

from jr_onnx.attacks.apgd import APGD, APGDDLR, APGDTargeted
from jr_onnx.attacks.attack import Attack, AttackResult, Classifier
from jr_onnx.attacks.carlini_wagner import CarliniWagner
from jr_onnx.attacks.corruptions import Corruptions
from jr_onnx.attacks.deepfool import DeepFool
from jr_onnx.attacks.ead import EAD
from jr_onnx.attacks.fab import FAB, TargetedFAB
from jr_onnx.attacks.fgsm import FGSM
from jr_onnx.attacks.hopskipjump import HopSkipJump
from jr_onnx.attacks.ifgsm import IFGSM
from jr_onnx.attacks.mifgsm import MIFGSM
from jr_onnx.attacks.noise import GaussianNoise, SaltAndPepperNoise, UniformNoise
from jr_onnx.attacks.options import ATTACKS, parse_attack
from jr_onnx.attacks.pgd import PGD
from jr_onnx.attacks.simba import SimBA
from jr_onnx.attacks.square import Square
from jr_onnx.attacks.threat import NORMS, ThreatModel, parse_epsilon
from jr_onnx.attacks.transfer import Transfer
from jr_onnx.attacks.trust_region import AdaptiveTrustRegion, TrustRegion

__all__ = [
    "APGD",
    "APGDDLR",
    "ATTACKS",
    "EAD",
    "FAB",
    "FGSM",
    "IFGSM",
    "MIFGSM",
    "NORMS",
    "PGD",
    "APGDTargeted",
    "AdaptiveTrustRegion",
    "Attack",
    "AttackResult",
    "CarliniWagner",
    "Classifier",
    "Corruptions",
    "DeepFool",
    "GaussianNoise",
    "HopSkipJump",
    "SaltAndPepperNoise",
    "SimBA",
    "Square",
    "TargetedFAB",
    "ThreatModel",
    "Transfer",
    "TrustRegion",
    "UniformNoise",
    "parse_attack",
    "parse_epsilon",
]
