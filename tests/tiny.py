"""A small classifier whose jumps can be tuned in a moment, and points that it classifies right."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

import jr_onnx as jr

Array = np.ndarray[Any, Any]


def tiny_model(seed: int = 0) -> jr.Model:
    """Returns 6 inputs -> 16 hidden units, Relu -> 16 hidden units, Relu -> 3 classes."""
    rng = np.random.default_rng(seed)
    nodes, weights, name = [], [], "x"
    for layer, (inner, outer) in enumerate([(6, 16), (16, 16), (16, 3)]):
        w = (rng.normal(size=(inner, outer)) / np.sqrt(inner / 2)).astype(np.float32)
        b = np.zeros(outer, np.float32) if layer else -0.5 * w.sum(axis=0)
        weights += [
            numpy_helper.from_array(w, f"w{layer}"),
            numpy_helper.from_array(b, f"b{layer}"),
        ]
        nodes.append(helper.make_node("Gemm", [name, f"w{layer}", f"b{layer}"], [f"z{layer}"]))
        name = f"z{layer}"
        if layer < 2:
            nodes.append(helper.make_node("Relu", [name], [f"relu{layer}"]))
            name = f"relu{layer}"
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 6])],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 3])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return jr.Model.of(model)


def tiny_data(model: jr.Model, count: int = 120, seed: int = 1) -> tuple[Array, Array]:
    """Returns points of [0, 1]^6 and the labels that the model gives them."""
    x = np.random.default_rng(seed).uniform(0, 1, (count, 6)).astype(np.float32)
    return x, jr.Target(model, device="cpu").logits(x).argmax(axis=1)
