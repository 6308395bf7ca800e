"""onnxruntime, the only module that imports it: model + device -> a session that runs arrays."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jr_onnx.errors import DataError, ModelError, ParameterError, SessionError
from jr_onnx.model import Model

Array = np.ndarray[Any, Any]
DEVICES = ("auto", "cpu", "cuda")
_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_FLOATS = {"tensor(float)": "f4", "tensor(double)": "f8", "tensor(float16)": "f2"}


@dataclass(frozen=True)
class Port:
    """An input or output as onnxruntime declares it.

    Attributes:
        name: of the value.
        type: as onnxruntime spells it, `tensor(float)`.
        shape: numbers, symbols or None.
    """

    name: str
    type: str
    shape: tuple[int | str | None, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy dtype of a float tensor.

        Raises:
            ModelError: it is none.
        """
        if not self.is_float:
            raise ModelError(f"{self.name!r} is {self.type}, a float tensor is needed")
        return np.dtype(_FLOATS[self.type])

    @property
    def is_float(self) -> bool:
        """Whether it is a float tensor."""
        return self.type in _FLOATS

    @property
    def fixed_batch(self) -> int | None:
        """The size of the first axis where the model fixes it."""
        first = self.shape[0] if self.shape else None
        return first if isinstance(first, int) and first > 0 else None

    def check(self, x: Array) -> None:
        """Compares examples with the shape.

        Raises:
            DataError: they do not fit.
        """
        expected = self.shape[1:]
        fits = x.ndim == len(self.shape) and all(
            not isinstance(size, int) or size == got
            for size, got in zip(expected, x.shape[1:], strict=True)
        )
        if not fits:
            spelled = ", ".join(str(size or "any") for size in expected)
            raise DataError(
                f"examples of shape {tuple(x.shape[1:])} do not fit the model: its input "
                f"{self.name!r} takes ({spelled}). Resize or transpose the data"
            )


class Session:
    """A model loaded into onnxruntime.

    Args:
        model: what to run.
        device: `auto` takes CUDA where it works, else the CPU; `cpu` and `cuda` take nothing else.
        threads: how many work on one operator on the CPU; None for one on each core.
        batch: makes a symbolic batch this number: onnxruntime then keeps more of a convolutional
            network, and most of its gradient, in its blocked layout. Ignored where the axis is a
            number, or shares its symbol with an axis that is no batch.
        of: the input whose first axis is the batch; the first input if None.

    Attributes:
        provider: the execution provider that really took the model (it may leave operators
            without a kernel to the CPU).
        threads: as asked.
        inputs: its inputs.
        outputs: its outputs.

    Raises:
        SessionError: onnxruntime is not installed, has no such provider, or refuses the model.
        ParameterError: no such device.
    """

    def __init__(
        self,
        model: Model,
        *,
        device: str = "auto",
        threads: int | None = None,
        batch: int | None = None,
        of: str | None = None,
    ) -> None:
        self._where, self.threads = model.name, threads
        wanted = _providers(device)
        options = _onnxruntime().SessionOptions()
        options.log_severity_level = 4  # what matters is raised; warnings would tear progress bars
        if threads is not None:
            options.intra_op_num_threads = threads
        symbol = _batch_symbol(model, of) if batch is not None else None
        if symbol is not None:
            options.add_free_dimension_override_by_name(symbol, batch)
        if model.folder is not None:
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path",
                os.fspath(model.folder.resolve()),
            )
        if model.attachments:
            _attach(options, model)
        try:
            self._session = _onnxruntime().InferenceSession(
                model.content, options, providers=wanted
            )
        except Exception as error:  # onnxruntime raises a dozen types without a common base
            raise SessionError(
                f"{self._where}: onnxruntime {_onnxruntime().__version__} cannot load it on "
                f"{wanted[0]}: {_one_line(error)}"
            ) from error
        # On an error at run time onnxruntime would build another session on the CPU, unasked.
        self._session.disable_fallback()
        self.provider: str = self._session.get_providers()[0]
        # onnxruntime falls back to the CPU with a mere warning when CUDA's libraries are missing.
        if device == "cuda" and self.provider != _CUDA:
            raise SessionError(
                f"{self._where}: asked for {_CUDA}, onnxruntime fell back to {self.provider}. "
                "Check the CUDA and cuDNN libraries, or pass --device cpu"
            )
        self.inputs = tuple(map(_port, self._session.get_inputs()))
        self.outputs = tuple(map(_port, self._session.get_outputs()))

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> list[Array]:
        """Runs the model once.

        Args:
            feeds: an array for each input, of its dtype.
            outputs: the outputs wanted, all if None.

        Returns:
            An array for each output, of its dtype.

        Raises:
            SessionError: with what onnxruntime said.
        """
        try:
            return list(self._session.run(outputs, dict(feeds)))
        except Exception as error:
            raise SessionError(f"{self._where}: onnxruntime: {_one_line(error)}") from error


def batches(port: Port, size: int, x: Array, *more: Array) -> Iterator[tuple[list[Array], int]]:
    """Cuts examples into batches, x cast to the port's dtype.

    A model with a fixed batch gets its own size; the last batch is filled up with its last example.

    Args:
        port: the model's input.
        size: most examples in a batch.
        x: `(samples, ...)`.
        more: arrays to cut in the same way.

    Yields:
        The parts of all arrays, and how many of their examples are real.

    Raises:
        DataError: x does not fit the port.
        ModelError: the port is no float tensor.
    """
    port.check(x)
    arrays = [np.ascontiguousarray(x, port.dtype), *more]
    size = port.fixed_batch or size
    for start in range(0, len(x), size):
        parts = [array[start : start + size] for array in arrays]
        real = len(parts[0])
        if port.fixed_batch and real < size:
            parts = [np.concatenate([part, part[-1:].repeat(size - real, 0)]) for part in parts]
        yield parts, real


def installed() -> bool:
    """Whether onnxruntime can be imported."""
    try:
        _onnxruntime()
    except SessionError:
        return False
    return True


def version() -> str:
    """The version of onnxruntime."""
    return str(_onnxruntime().__version__)


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise SessionError(
            "onnxruntime is not installed. Install it with pip install 'jr-onnx[cpu]', or "
            f"'jr-onnx[gpu]' for CUDA ({_one_line(error)})"
        ) from error
    return onnxruntime


def _providers(device: str) -> list[str]:
    if device not in DEVICES:
        raise ParameterError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
    available = _onnxruntime().get_available_providers()
    if device == "cuda" and _CUDA not in available:
        raise SessionError(
            f"asked for {_CUDA}, this onnxruntime has {', '.join(available)}. Install "
            "'jr-onnx[gpu]' in place of 'jr-onnx[cpu]', or pass --device cpu"
        )
    if device == "cpu" or _CUDA not in available:
        return [_CPU]
    # CUDA's libraries often live in the nvidia wheels, where the loader cannot see them.
    if hasattr(_onnxruntime(), "preload_dlls"):
        _onnxruntime().preload_dlls()
    return [_CUDA, _CPU]


def _attach(options: Any, model: Model) -> None:
    """Gives onnxruntime the external data that is in no file yet, of whatever type."""
    add = getattr(options, "add_external_initializers_from_files_in_memory", None)
    if add is None:
        raise SessionError(
            f"{model.name}: has weights that are in no file yet, which onnxruntime {version()} "
            "cannot take (1.24 can). Save the model, and load it from its file"
        )
    names, contents = list(model.attachments), list(model.attachments.values())
    add(names, contents, list(map(len, contents)))


def _batch_symbol(model: Model, of: str | None) -> str | None:
    """Returns the symbol of the first axis of an input, if no other than a first axis has it."""
    shapes = {value.name: value.type.tensor_type.shape.dim for value in model.proto.graph.input}
    shape = shapes.get(of) if of is not None else next(iter(shapes.values()), None)
    if not shape:
        return None
    symbol = str(shape[0].dim_param)
    others = {dim.dim_param for shape in shapes.values() for dim in shape[1:]}
    return symbol if symbol and symbol not in others else None


def _port(argument: Any) -> Port:
    return Port(argument.name, argument.type, tuple(argument.shape))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
