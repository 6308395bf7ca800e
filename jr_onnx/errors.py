"""The error tree: everything the package raises on purpose.

```
JrOnnxError
├── ModelError       InvalidModelError, UnsupportedOpsetError, UnsupportedOpError, ExternalDataError
├── RewriteError     NothingToRewriteError, HiddenActivationError, AlreadyRetrofittedError,
│                    NotRetrofittedError, PostconditionError
├── DataError
├── ParameterError   (also a ValueError)   ConfigError
├── OutputError
├── SessionError
└── TuningError
```

A message says what, where, expected and got, and what to do next.
"""

from __future__ import annotations

from collections.abc import Sequence


class JrOnnxError(Exception):
    """Anything the package refuses, with its reason."""


class ModelError(JrOnnxError):
    """The ONNX model cannot be used."""


class InvalidModelError(ModelError):
    """The file is missing, is not ONNX, is truncated, or violates the ONNX specification."""


class UnsupportedOpsetError(ModelError):
    """The model's opset lacks an operator that is needed."""


class UnsupportedOpError(ModelError):
    """Nodes without a gradient rule; the message lists every one of them.

    Attributes:
        problems: one line per node that cannot be differentiated.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        listed = "; ".join(self.problems)
        super().__init__(
            f"no input gradient for {len(self.problems)} node(s): {listed}. "
            "Attack it without gradients (jr_onnx.attacks.Square, HopSkipJump), or register a rule "
            "with jr_onnx.autodiff.vjp"
        )


class ExternalDataError(ModelError):
    """Weights outside the model file are missing, or lie where they must not."""


class RewriteError(JrOnnxError):
    """The rewrite cannot be done."""


class NothingToRewriteError(RewriteError):
    """The model has no activation to replace."""


class HiddenActivationError(RewriteError):
    """Activations are inside fused or quantised operators, where no node can be replaced."""


class AlreadyRetrofittedError(RewriteError):
    """The model carries a jump already."""


class NotRetrofittedError(RewriteError):
    """The model carries no manifest, or was changed since it was retrofitted."""


class PostconditionError(RewriteError):
    """A rewrite did not have the result it promises: a bug of ours, nothing was written."""


class DataError(JrOnnxError):
    """The data's shape, dtype, range or labels do not fit."""


class ParameterError(JrOnnxError, ValueError):
    """An option has a value that makes no sense."""


class ConfigError(ParameterError):
    """A configuration file cannot be used as it is written.

    Attributes:
        problems: one line for each, `file:line: key: what is wrong`.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


class OutputError(JrOnnxError):
    """A file cannot be written, or is there already."""


class SessionError(JrOnnxError):
    """What onnxruntime said, or that it is not there."""


class TuningError(JrOnnxError):
    """There is nothing to tune, or a search cannot be taken up again."""
