"""JumpReLU for exported ONNX models: rewrite, undo, verify, attack.

Example:
    >>> import jr_onnx as jr
    >>> model = jr.load("sample_models/lenet_mnist.onnx")
    >>> hardened = jr.retrofit(model, jump=0.3)
    >>> [site.site.path for site in hardened.sites]
    ['relu', 'relu_1', 'relu_2', 'relu_3']
    >>> jr.verify(model, hardened.model).equivalent
    True
    >>> jr.restore(hardened.model).content == model.content
    True

References:
    Erichson, Yao, Mahoney: JumpReLU: A Retrofit Defense Strategy for Adversarial Attacks
    (arXiv:1904.03750).
"""

from jr_onnx import attacks, autodiff, errors
from jr_onnx.activations import observe, quantile_jumps
from jr_onnx.attacks import ThreatModel
from jr_onnx.autodiff import input_gradient
from jr_onnx.data import Dataset, load_npz
from jr_onnx.evaluate import Evaluation, evaluate
from jr_onnx.gate import GateResult, gate
from jr_onnx.health import GradientHealth, gradient_health
from jr_onnx.model import Model, load, save
from jr_onnx.rewrite import (
    Retrofit,
    Selection,
    Verification,
    compare_on_data,
    find_sites,
    jump_relu,
    load_jumps,
    restore,
    retrofit,
    verify,
)
from jr_onnx.target import Target
from jr_onnx.tune import Tuning, tune

__version__ = "0.1.0"

__all__ = [
    "Dataset",
    "Evaluation",
    "GateResult",
    "GradientHealth",
    "Model",
    "Retrofit",
    "Selection",
    "Target",
    "ThreatModel",
    "Tuning",
    "Verification",
    "__version__",
    "attacks",
    "autodiff",
    "compare_on_data",
    "errors",
    "evaluate",
    "find_sites",
    "gate",
    "gradient_health",
    "input_gradient",
    "jump_relu",
    "load",
    "load_jumps",
    "load_npz",
    "observe",
    "quantile_jumps",
    "restore",
    "retrofit",
    "save",
    "tune",
    "verify",
]
