"""Finding activations and giving them a jump: y = x if x > jump else 0 (arXiv:1904.03750)."""

from jr_onnx.model.differences import Difference
from jr_onnx.rewrite.edits import edits_of
from jr_onnx.rewrite.end_to_end import EndToEnd, compare_on_data
from jr_onnx.rewrite.forms import FORMS, TARGETS, Jump, choose, effective_jump, jump_relu
from jr_onnx.rewrite.restore import jumps_of, restore
from jr_onnx.rewrite.retrofit import JumpSite, Retrofit, original_of, retrofit
from jr_onnx.rewrite.select import Selection, load_jumps
from jr_onnx.rewrite.sites import Site, Skipped, find_sites
from jr_onnx.rewrite.verify import Verification, verify

__all__ = [
    "FORMS",
    "TARGETS",
    "Difference",
    "EndToEnd",
    "Jump",
    "JumpSite",
    "Retrofit",
    "Selection",
    "Site",
    "Skipped",
    "Verification",
    "choose",
    "compare_on_data",
    "edits_of",
    "effective_jump",
    "find_sites",
    "jump_relu",
    "jumps_of",
    "load_jumps",
    "original_of",
    "restore",
    "retrofit",
    "verify",
]
