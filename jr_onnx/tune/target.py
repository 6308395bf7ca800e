"""A classifier whose jumps are set without a new session: jumps -> a `Target` like any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jr_onnx.model import Model
from jr_onnx.rewrite import Jump, Site, effective_jump
from jr_onnx.rewrite.forms import check_jump
from jr_onnx.target import DEFAULT_BATCH_SIZE, Target
from jr_onnx.tune.inputs import open_jumps

Array = np.ndarray[Any, Any]
# By site path; a site that is not named stays as it is.
Jumps = Mapping[str, Jump]


class JumpTarget:
    """The model at any jumps.

    Example:
        >>> import jr_onnx as jr
        >>> from jr_onnx.tune import JumpTarget
        >>> model = jr.load("sample_models/lenet_mnist.onnx")
        >>> target = JumpTarget(model, jr.find_sites(model)[0], device="cpu")
        >>> x = jr.load_npz("sample_models/mnist_test.npz").x[:4]
        >>> hardened = jr.Target(jr.retrofit(model, jump=1.0).model, device="cpu")
        >>> at_one = target.at(dict.fromkeys(["relu", "relu_1", "relu_2", "relu_3"], 1.0))
        >>> bool((abs(at_one.logits(x) - hardened.logits(x)) < 1e-4).all())
        True

    Args:
        model: the original, with one input beside the jumps.
        sites: of the model, all `tunable`.
        per_channel: whether a jump may be one number a channel.
        device: `auto`, `cpu` or `cuda`.
        batch_size: most examples in one run.
        output: the output with the logits; None for the only one.

    Raises:
        ModelError: the model is no such classifier.
        SessionError: onnxruntime is not there or refuses the model.
    """

    def __init__(
        self,
        model: Model,
        sites: Sequence[Site],
        *,
        per_channel: bool = False,
        device: str = "auto",
        batch_size: int = DEFAULT_BATCH_SIZE,
        output: str | None = None,
    ) -> None:
        self.sites = tuple(sites)
        self._open = open_jumps(model, sites, per_channel=per_channel)
        self.original = Target(
            self._open.model,
            device=device,
            batch_size=batch_size,
            output=output,
            given=self._feeds({}),
        )

    def at(self, jumps: Jumps) -> Target:
        """Returns the classifier with these jumps, in the same sessions.

        Args:
            jumps: by site path; a tuple is one number a channel.

        Raises:
            ParameterError: a jump is negative or not finite, reaches the cap of its site, or has
                not one number a channel.
        """
        return self.original.with_given(self._feeds(jumps))

    def _feeds(self, jumps: Jumps) -> dict[str, Array]:
        feeds = {}
        for site in self.sites:
            jump = jumps.get(site.path, site.jump)
            value = effective_jump(check_jump(site, jump), site.tensor.dtype)
            shape = self._open.shapes[site.path]
            if shape:
                value = value.reshape(-1, *shape[1:]) if value.ndim else np.full(shape, value)
            feeds[self._open.names[site.path]] = np.ascontiguousarray(value).reshape(shape)
        return feeds
