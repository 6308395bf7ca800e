"""Making nodes whose names clash with nothing in the model, in whatever scope."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from jr_onnx.model.graphs import scopes


class Names:
    """Hands out names that nobody uses."""

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = set(taken)
        self._counts: dict[str, int] = {}

    @classmethod
    def of(cls, proto: onnx.ModelProto) -> Names:
        """Collects the names of values and nodes of every scope.

        A value of a subgraph may shadow none of the outer graphs, so all scopes share one set.
        """
        taken: set[str] = set()
        for scope in scopes(proto):
            graph = scope.graph
            for node in graph.node:
                taken.update((node.name, *node.input, *node.output))
            if isinstance(graph, onnx.FunctionProto):
                taken.update((*graph.input, *graph.output))
            else:
                taken.update(value.name for value in (*graph.input, *graph.output))
                taken.update(tensor.name for tensor in graph.initializer)
                taken.update(tensor.values.name for tensor in graph.sparse_initializer)
        return cls(taken)

    def fresh(self, wish: str) -> str:
        """Returns `wish`, or `wish_1`, `wish_2`, ... where that is taken."""
        name, count = wish, self._counts.get(wish, 0)
        while name in self._taken:
            count += 1
            name = f"{wish}_{count}"
        self._counts[wish] = count
        self._taken.add(name)
        return name


class NodeBuilder:
    """Collects nodes, each named `prefix/what it is`."""

    def __init__(self, names: Names, prefix: str) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._names = names
        self._prefix = prefix

    def name(self, wish: str) -> str:
        """Returns a fresh name under the prefix."""
        return self._names.fresh(f"{self._prefix}/{wish}")

    def op(self, op_type: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Appends a node with one output.

        Args:
            op_type: an operator of the standard domain.
            inputs: names of values, "" for an optional one left out.
            output: its name; a fresh one if None.
            attributes: as `onnx.helper.make_node` takes them; None leaves one out.

        Returns:
            The name of the output.
        """
        return self.node(op_type, inputs, (output,), **attributes)[0]

    def node(
        self,
        op_type: str,
        inputs: Iterable[str],
        outputs: Iterable[str | None],
        **attributes: Any,
    ) -> tuple[str, ...]:
        """Appends a node with several outputs; None stands for a fresh name."""
        name = self.name(op_type.lower())
        named = tuple(
            self._names.fresh(f"{name}:{number}") if output is None else output
            for number, output in enumerate(outputs)
        )
        given = {key: value for key, value in attributes.items() if value is not None}
        self.nodes.append(helper.make_node(op_type, list(inputs), named, name=name, **given))
        return named

    def constant(self, array: np.ndarray[Any, Any] | np.generic) -> str:
        """Appends a Constant: unlike an initializer it is allowed in functions and at IR 3."""
        array = np.asarray(array)
        value = _small_tensor(array.tobytes(), array.dtype, array.shape)
        return self.op("Constant", value=value)


@lru_cache(maxsize=256)
def _small_tensor(content: bytes, dtype: np.dtype[Any], shape: tuple[int, ...]) -> TensorProto:
    return numpy_helper.from_array(np.frombuffer(content, dtype).reshape(shape))
