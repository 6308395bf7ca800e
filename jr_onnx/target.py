"""A classifier under attack: x -> logits, and (x, y) -> logits, loss, d loss / d x."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np

from jr_onnx.autodiff import InputGradient, Surrogates, input_gradient
from jr_onnx.autodiff.losses import LABELS, REFERENCE, TARGETS, classes_of
from jr_onnx.errors import DataError, ModelError, ParameterError
from jr_onnx.model import Model, load
from jr_onnx.session import Port, Session, batches

Array = np.ndarray[Any, Any]
DEFAULT_BATCH_SIZE = 64
# Activations of so many examples stay in the CPU's cache on the way back, and a batch can be shared
# evenly among cores; fewer than the second are not worth a run of their own.
_MICRO, _LEAST_MICRO = 8, 2


class Derivative(NamedTuple):
    """One forward and backward pass.

    Attributes:
        logits: `(batch, classes)`; of a model that ends in a softmax, what that is given.
        loss: `(batch,)`.
        gradient: shaped like x, d loss[i] / d x[i]; of x's dtype, float32 for float16.
    """

    logits: Array
    loss: Array
    gradient: Array


class Target:
    """An ONNX classifier on onnxruntime.

    Logits always come from the model exactly as it is; its gradient graph is a graph of its own.

    Args:
        model: a path, serialized bytes, or a `Model`; one input `(batch, ...)`, an output
            `(batch, classes)`.
        device: `auto`, `cpu` or `cuda`.
        batch_size: most examples in one run. A model with a fixed batch runs with its own.
        output: the name of that output, None for the only one.
        given: the values of the model's other inputs, which are no examples.

    Raises:
        ModelError: the model is no such classifier.
        ParameterError: batch_size is below 1, or there is no such device.
        SessionError: onnxruntime is not there or refuses the model.
    """

    def __init__(
        self,
        model: Model | bytes | str | os.PathLike[str],
        *,
        device: str = "auto",
        batch_size: int = DEFAULT_BATCH_SIZE,
        output: str | None = None,
        given: Mapping[str, Array] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ParameterError(f"batch_size must be at least 1, got {batch_size}")
        if isinstance(model, bytes):
            model = Model(model)
        self.model = model if isinstance(model, Model) else load(model)
        self._device = device
        self._forward = Session(self.model, device=device)
        self._given = dict(given or {})
        inputs = tuple(port for port in self._forward.inputs if port.name not in self._given)
        self._input = _one(inputs, "input", self.model)
        self._output = _one(self._forward.outputs, "output", self.model, output)
        self._batch_size = batch_size
        self._gradients: dict[Any, _Backward] = {}

    def of(self, model: Model) -> Target:
        """Returns a target of another model, on the same device."""
        return Target(model, device=self._device, batch_size=self._batch_size, output=self.output)

    @property
    def output(self) -> str:
        """The name of the output with the logits."""
        return self._output.name

    def with_given(self, given: Mapping[str, Array]) -> Target:
        """Returns a target with other values of the other inputs, in the same sessions.

        Args:
            given: an array for each of them, as at first.
        """
        other = copy.copy(self)
        other._given = dict(given)
        return other

    @property
    def provider(self) -> str:
        """The execution provider that really runs the model."""
        return self._forward.provider

    @property
    def input_shape(self) -> tuple[int | str | None, ...]:
        """Shape of one example; symbols and None where any size fits."""
        return self._input.shape[1:]

    @property
    def fixed_batch(self) -> int | None:
        """The batch that the model asks for, None if any will do."""
        return self._input.fixed_batch

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
            feeds = {**self._given, self._input.name: part}
            return tuple(self._forward.run(feeds, [self.output]))

        return _in_batches(run, self._input, self._batch_size, x)[0]

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
            DataError: x does not have the input's shape, or y or the targets do not fit x.
            ParameterError: targets are missing, or there is no such loss or surrogate.
            SessionError: with what onnxruntime said.
        """
        backward = self._backward(loss, surrogate)
        graph = backward.graph
        session = backward.session(len(x))
        if TARGETS in graph.compared and targets is None:
            raise ParameterError(f"the loss {loss} needs targets, int (batch,)")
        given = {LABELS: y, REFERENCE: y, TARGETS: targets}
        for what in graph.compared:
            if what != REFERENCE:
                self._check_labels(np.asarray(given[what]), len(x))
            elif np.shape(y)[:1] != (len(x),):
                raise DataError(
                    f"expected one reference output for each of {len(x)} examples, got shape "
                    f"{np.shape(y)}"
                )
        ports = {port.name: port for port in session.inputs}
        names = (graph.x, *graph.compared.values())
        more = [
            np.asarray(given[what], ports[name].dtype if what == REFERENCE else np.int64)
            for what, name in graph.compared.items()
        ]
        wanted = (graph.logits, graph.loss, graph.gradient)

        def run(*parts: Array) -> tuple[Array, ...]:
            feeds = {**self._given, **dict(zip(names, parts, strict=True))}
            return tuple(session.run(feeds, wanted))

        mapped = _workers().map if session.threads == 1 else map
        return Derivative(*_in_batches(run, ports[graph.x], backward.micro, x, *more, over=mapped))

    def loss_and_gradient(
        self,
        x: Array,
        y: Array,
        *,
        loss: str = "cross_entropy",
        surrogate: Surrogates = "exact",
        targets: Array | None = None,
    ) -> tuple[Array, Array]:
        """Returns loss `(batch,)` and gradient (shaped like x) of `differentiate`."""
        found = self.differentiate(x, y, loss=loss, surrogate=surrogate, targets=targets)
        return found.loss, found.gradient

    def gradient(
        self, loss: str = "cross_entropy", surrogate: Surrogates = "exact"
    ) -> InputGradient:
        """Returns the gradient graph, built once.

        Raises:
            UnsupportedOpError: nodes without a gradient rule.
            ParameterError: there is no such loss or surrogate.
        """
        return self._backward(loss, surrogate).graph

    def _backward(self, loss: str, surrogate: Surrogates) -> _Backward:
        key = (loss, surrogate if isinstance(surrogate, str) else tuple(surrogate.items()))
        if key not in self._gradients:
            graph = input_gradient(
                self.model,
                loss=loss,
                surrogate=surrogate,
                x=self._input.name,
                output=self.output,
            )
            micro, threads = self._batch_size, None
            if self.provider == "CPUExecutionProvider":
                share = max(self._batch_size // _cores(), _LEAST_MICRO)
                micro = min(_MICRO, share, self._batch_size)
                # A large batch that the model fixes is one run, for all cores.
                threads = 1 if (self.fixed_batch or 1) <= micro else None
            self._gradients[key] = _Backward(graph, self._device, micro, threads)
        return self._gradients[key]

    def _check_labels(self, y: Array, examples: int) -> None:
        if y.shape != (examples,) or y.dtype.kind not in "iu":
            raise DataError(
                f"expected one integer label for each of {examples} examples, got {y.dtype} of "
                f"shape {y.shape}"
            )
        check_classes(y, classes_of(self._output.shape), self.model.name)


def _in_batches(
    run: Callable[..., tuple[Array, ...]],
    port: Port,
    size: int,
    x: Array,
    *more: Array,
    over: Callable[..., Iterator[list[Array]]] = map,
) -> tuple[Array, ...]:
    if not len(x):
        raise DataError("there are no examples to run")

    def run_part(part: tuple[list[Array], int]) -> list[Array]:
        arrays, real = part
        return [value[:real] for value in run(*arrays)]

    results = over(run_part, batches(port, size, x, *more))
    return tuple(map(np.concatenate, zip(*results, strict=True)))


def _cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_cores(), thread_name_prefix="jr_onnx")


if hasattr(os, "register_at_fork"):  # a forked child has the pool, but none of its threads
    os.register_at_fork(after_in_child=_workers.cache_clear)


@dataclass(frozen=True)
class _Backward:
    """A gradient graph, and a session for few examples and one for many.

    Attributes:
        graph: the gradient graph.
        device: for its sessions.
        micro: examples in one run of the session for many.
        threads: of one run of that session; with one, its runs are made side by side.
    """

    graph: InputGradient
    device: str
    micro: int
    threads: int | None

    @cached_property
    def few(self) -> Session:
        """Takes any number of examples."""
        return Session(self.graph.model, device=self.device)

    @cached_property
    def many(self) -> Session:
        """Takes `micro` examples: a known batch is faster (docs/benchmarks/gradients.md)."""
        return Session(
            self.graph.model,
            device=self.device,
            threads=self.threads,
            batch=self.micro,
            of=self.graph.x,
        )

    def session(self, examples: int) -> Session:
        """Returns the faster session; the last batch of the second is filled up."""
        if self.threads is None:
            return self.many if examples >= self.micro else self.few
        # In units of an example on one core. Side by side, batches are filled up, cores may idle;
        # all on one run are not quite as many times as fast, and the batch is not known.
        side_by_side = -(-examples // (self.micro * _cores())) * self.micro
        together = 1.1 * examples / _cores() ** 0.85
        return self.many if side_by_side <= together else self.few


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


def check_classes(y: Array, classes: int | None, name: str) -> None:
    """Compares labels with the number of classes.

    Args:
        y: int, from 0.
        classes: how many there are, None if that is not known.
        name: of the model, for the message.

    Raises:
        DataError: a label is negative or too large.
    """
    wrong = y < 0 if classes is None else (y < 0) | (y >= classes)
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        known = (
            "labels start at 0"
            if classes is None
            else (f"{name} has {classes} classes (0..{classes - 1}). Do the labels start at 1?")
        )
        raise DataError(f"label {int(y[at])} at index {at} is out of range: {known}")


def _one(ports: tuple[Port, ...], what: str, model: Model, asked: str | None = None) -> Port:
    named = {port.name: port for port in ports}
    if asked is not None and asked not in named:
        raise ModelError(f"{model.name}: has no {what} {asked!r}, only {', '.join(named)}")
    if asked is None and len(ports) != 1:
        hint = ". Say which one has the logits (--output-name)" if what == "output" else ""
        raise ModelError(
            f"{model.name}: a classifier with one {what} is needed, got {list(named)}{hint}"
        )
    port = named[asked] if asked is not None else ports[0]
    if what == "output" and not port.is_float:
        raise ModelError(
            f"{model.name}: the output {port.name!r} is {port.type}; expected the logits or the "
            "softmax, a float tensor (batch, classes). Export these, not the label"
        )
    return port
