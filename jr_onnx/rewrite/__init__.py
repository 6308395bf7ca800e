"""Finding activations and giving them a jump: y = x if x > jump else 0 (arXiv:1904.03750)."""

from jr_onnx.rewrite.forms import DEFAULT_FORM, FORMS, effective_jump, jump_relu
from jr_onnx.rewrite.restore import jumps_of, restore
from jr_onnx.rewrite.retrofit import JumpSite, Retrofit, original_of, retrofit
from jr_onnx.rewrite.sites import Site, Skipped, find_sites
from jr_onnx.rewrite.verify import Difference, Verification, verify

__all__ = [
    "DEFAULT_FORM",
    "FORMS",
    "Difference",
    "JumpSite",
    "Retrofit",
    "Site",
    "Skipped",
    "Verification",
    "effective_jump",
    "find_sites",
    "jump_relu",
    "jumps_of",
    "original_of",
    "restore",
    "retrofit",
    "verify",
]
