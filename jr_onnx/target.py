"""A classifier under attack: x -> logits, and (x, y) -> logits, loss, d loss / d x."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jr_onnx.autodiff import InputGradient, Surrogates, input_gradient
from jr_onnx.autodiff.losses import LABELS, REFERENCE, TARGETS
from jr_onnx.errors import ModelError, ParameterError
from jr_onnx.model import Model, load
from jr_onnx.session import Port, Session, batches

Array = np.ndarray[Any, Any]
DEFAULT_BATCH_SIZE = 64


class Derivative(NamedTuple):
    """One forward and backward pass.

    Attributes:
        logits: `(batch, classes)`.
        loss: `(batch,)`.
        gradient: like x, d loss[i] / d x[i].
    """

    logits: Array
    loss: Array
    gradient: Array


class Target:
    """An ONNX classifier on onnxruntime.

    Logits always come from the model exactly as it is; its gradient graph is a graph of its own.

    Args:
        model: a path, serialized bytes, or a `Model`; one input `(batch, ...)`, one output
            `(batch, classes)`.
        device: `auto`, `cpu` or `cuda`.
        batch_size: most examples in one run. A model with a fixed batch runs with its own.

    Raises:
        ModelError: the model is no such classifier.
        SessionError: onnxruntime is not there or refuses the model.
    """

    def __init__(
        self,
        model: Model | bytes | str | os.PathLike[str],
        *,
        device: str = "auto",
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> None:
        if isinstance(model, bytes):
            model = Model(model)
        self.model = model if isinstance(model, Model) else load(model)
        self._device = device
        self._forward = Session(self.model, device=device)
        self._input = _only(self._forward.inputs, "input", self.model)
        _only(self._forward.outputs, "output", self.model)
        self._batch_size = batch_size
        self._gradients: dict[Any, tuple[Session, InputGradient]] = {}

    def of(self, model: Model) -> Target:
        """Returns a target of another model, on the same device."""
        return Target(model, device=self._device, batch_size=self._batch_size)

    @property
    def provider(self) -> str:
        """The execution provider that really runs the model."""
        return self._forward.provider

    @property
    def input_shape(self) -> tuple[int | str | None, ...]:
        """Shape of one example; symbols and None where any size fits."""
        return self._input.shape[1:]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the input.

        Raises:
            ModelError: it is no float.
        """
        return self._input.dtype

    def logits(self, x: Array) -> Array:
        """Runs the model.

        Args:
            x: `(batch, *input_shape)`, cast to the model's dtype.

        Returns:
            `(batch, classes)`, float of the model's own dtype.

        Raises:
            DataError: x does not have the input's shape.
        """

        def run(part: Array) -> tuple[Array, ...]:
            return tuple(self._forward.run({self._input.name: part}))

        return self._in_batches(run, x)[0]

    def differentiate(
        self,
        x: Array,
        y: Array,
        *,
        loss: str = "cross_entropy",
        surrogate: Surrogates = "exact",
        targets: Array | None = None,
    ) -> Derivative:
        """Runs the gradient graph.

        Args:
            x: `(batch, *input_shape)`, cast to the model's dtype.
            y: int `(batch,)`, the labels; for the loss `drift` the outputs to move away from.
            loss: a name in `jr_onnx.autodiff.LOSSES`, or `cw:K`.
            surrogate: the slope of the jumps on the way back, as `input_gradient` takes it.
            targets: int `(batch,)`, for the losses that have a target.

        Raises:
            UnsupportedOpError: nodes without a gradient rule.
            DataError: x does not have the input's shape.
            ParameterError: targets are missing, or there is no such loss or surrogate.
        """
        session, graph = self.gradient(loss, surrogate)
        if TARGETS in graph.compared and targets is None:
            raise ParameterError(f"the loss {loss} needs targets, int (batch,)")
        given = {LABELS: y, REFERENCE: y, TARGETS: targets}
        ports = {port.name: port for port in session.inputs}
        names = (graph.x, *graph.compared.values())
        more = [
            np.asarray(given[what], ports[name].dtype if what == REFERENCE else np.int64)
            for what, name in graph.compared.items()
        ]
        wanted = (graph.logits, graph.loss, graph.gradient)

        def run(*parts: Array) -> tuple[Array, ...]:
            return tuple(session.run(dict(zip(names, parts, strict=True)), wanted))

        return Derivative(*self._in_batches(run, x, *more))

    def loss_and_gradient(
        self,
        x: Array,
        y: Array,
        *,
        loss: str = "cross_entropy",
        surrogate: Surrogates = "exact",
        targets: Array | None = None,
    ) -> tuple[Array, Array]:
        """Returns loss `(batch,)` and gradient (like x) of `differentiate`."""
        found = self.differentiate(x, y, loss=loss, surrogate=surrogate, targets=targets)
        return found.loss, found.gradient

    def gradient(
        self, loss: str = "cross_entropy", surrogate: Surrogates = "exact"
    ) -> tuple[Session, InputGradient]:
        """Returns the gradient graph and its session, built once.

        Raises:
            UnsupportedOpError: nodes without a gradient rule.
            ParameterError: there is no such loss or surrogate.
        """
        key = (loss, surrogate if isinstance(surrogate, str) else tuple(surrogate.items()))
        if key not in self._gradients:
            graph = input_gradient(self.model, loss=loss, surrogate=surrogate)
            self._gradients[key] = (Session(graph.model, device=self._device), graph)
        return self._gradients[key]

    def _in_batches(
        self, run: Callable[..., tuple[Array, ...]], x: Array, *more: Array
    ) -> tuple[Array, ...]:
        results = [
            [value[:real] for value in run(*parts)]
            for parts, real in batches(self._input, self._batch_size, x, *more)
        ]
        return tuple(map(np.concatenate, zip(*results, strict=True)))


@dataclass(frozen=True)
class SurrogateTarget:
    """A target whose gradients are those of a surrogate slope: what an adaptive attack sees.

    Attributes:
        target: the classifier; its logits are given as they are.
        surrogate: the slope of the jumps on the way back, as `input_gradient` takes it.
    """

    target: Target
    surrogate: Surrogates

    @property
    def dtype(self) -> np.dtype[Any]:
        """As the target's."""
        return self.target.dtype

    def logits(self, x: Array) -> Array:
        """As the target's."""
        return self.target.logits(x)

    def differentiate(
        self, x: Array, y: Array, *, loss: str = "cross_entropy", targets: Array | None = None
    ) -> Derivative:
        """As the target's, with the surrogate."""
        return self.target.differentiate(x, y, loss=loss, surrogate=self.surrogate, targets=targets)


def _only(ports: tuple[Port, ...], what: str, model: Model) -> Port:
    if len(ports) != 1:
        names = [port.name for port in ports]
        raise ModelError(f"{model.name}: a classifier with one {what} is needed, got {names}")
    return ports[0]
