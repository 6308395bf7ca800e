"""Models as tf2onnx writes them, against the Keras network with a jump.

As in test_exporters.py the weights are -1, 0 and 1 and the inputs multiples of 1/8, so every sum is
exact and the outputs must be equal bit for bit. TensorFlow is no part of the extra `test`, so this
file is skipped where the extra `exporters` is not installed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

import jr_onnx as jr
from jr_onnx.errors import NothingToRewriteError

tf = pytest.importorskip("tensorflow", reason="tf2onnx needs it: pip install '.[exporters]'")
tf2onnx = pytest.importorskip("tf2onnx", reason="pip install '.[exporters]'")
keras: Any = pytest.importorskip("keras", reason="it comes with TensorFlow")
layers, ops = keras.layers, keras.ops

Array = np.ndarray[Any, Any]
Activation = Callable[[Any], Any]
JUMP = 0.375
OPSETS = [9, 11, 13, 15, 18]  # 18 is the newest that tf2onnx 1.17 writes


def jumping(plain: Activation) -> Activation:
    """The oracle: what an activation gives above the jump, else 0."""
    return lambda x: ops.where(x > JUMP, plain(x), 0.0)


def inputs(*shape: int) -> Array:
    """Returns multiples of 1/8 in [-2, 2]."""
    return np.random.default_rng(1).integers(-16, 17, shape).astype(np.float32) / 8


def exact(model: Any) -> Any:
    """Fills the layers of a network with -1, 0 and 1."""
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if not isinstance(layer, layers.PReLU):
            weights = (rng.integers(-1, 2, each.shape) for each in layer.get_weights())
            layer.set_weights([each.astype(np.float32) for each in weights])
    return model


def perceptron(activation: Activation) -> Any:
    x = keras.Input((6,), name="x")
    return exact(keras.Model(x, layers.Dense(3)(activation(layers.Dense(16)(x)))))


def network(*activations: Activation) -> Any:
    """A convolution for each activation, pooling after the first."""
    x = h = keras.Input((8, 8, 3), name="x")
    for index, activation in enumerate(activations):
        h = activation(layers.Conv2D(4, 3, padding="same")(h))
        h = layers.MaxPooling2D()(h) if index == 0 else h
    return exact(keras.Model(x, layers.Dense(3)(layers.GlobalMaxPooling2D()(h))))


def export(model: Any, opset: int) -> jr.Model:
    signature = (tf.TensorSpec((None, *model.input_shape[1:]), tf.float32, name="x"),)
    proto, _ = tf2onnx.convert.from_keras(model, input_signature=signature, opset=opset)
    return jr.Model(proto.SerializeToString())


def run(model: jr.Model, x: Array) -> Array:
    session = ort.InferenceSession(model.content, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])


def check(model: jr.Model, expected: list[str], before: Any, after: Any, x: Array) -> None:
    """Compares sites, and a retrofit for each target with the networks before and after."""
    assert [site.op_type for site in jr.find_sites(model)[0]] == expected
    plain, wanted = before(x).numpy(), after(x).numpy()
    assert not np.array_equal(plain, wanted), "the jump must matter, or nothing is tested"
    assert np.array_equal(run(model, x), plain)
    for target in ("portable", "onnxruntime"):
        hardened = jr.retrofit(model, jump=JUMP, target=target).model
        assert jr.verify(model, hardened).equivalent
        assert jr.restore(hardened).content == model.content
        assert np.array_equal(run(hardened, x), wanted)


# By name: the activation, and the operator that tf2onnx makes of it.
ACTIVATIONS: dict[str, tuple[Activation, str]] = {
    "ReLU": (layers.ReLU(), "Relu"),
    "activation='relu'": (layers.Activation("relu"), "Relu"),
    "ops.relu": (ops.relu, "Relu"),
    "ReLU(max_value=6)": (layers.ReLU(max_value=6.0), "Clip"),
    "activation='relu6'": (layers.Activation("relu6"), "Clip"),
    "LeakyReLU(0)": (layers.LeakyReLU(negative_slope=0.0), "LeakyRelu"),
    "maximum(x, 0)": (lambda x: ops.maximum(x, 0.0), "Max"),
    "clip(x, 0, 4)": (lambda x: ops.clip(x, 0.0, 4.0), "Max"),
}


@pytest.mark.parametrize("opset", OPSETS)
def test_a_convolutional_network(opset: int) -> None:
    kinds = [ACTIVATIONS[name] for name in ("ReLU", "ReLU(max_value=6)", "LeakyReLU(0)")]
    before = network(*(plain for plain, _ in kinds))
    after = network(*(jumping(plain) for plain, _ in kinds))
    model = export(before, opset)
    assert {each.domain: each.version for each in model.proto.opset_import}[""] == opset
    check(model, [op_type for _, op_type in kinds], before, after, inputs(16, 8, 8, 3))


def test_a_prelu_of_slope_0_is_two_halves() -> None:
    """The one of max(-x, 0) is multiplied by 0, and gets a jump that changes nothing."""
    model = export(perceptron(layers.PReLU("zeros")), 15)
    before, after = perceptron(ops.relu), perceptron(jumping(ops.relu))
    check(model, ["Relu", "Relu"], before, after, inputs(32, 6))


@pytest.mark.parametrize("opset", [9, 18])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation(name: str, opset: int) -> None:
    plain, op_type = ACTIVATIONS[name]
    before, after = perceptron(plain), perceptron(jumping(plain))
    check(export(before, opset), [op_type], before, after, inputs(32, 6))


def test_a_threshold_that_tf2onnx_makes_a_jump_already_gets_another_one() -> None:
    before = perceptron(lambda x: x * ops.cast(x > 1.5, "float32"))
    check(
        export(before, 15),
        ["ThresholdedRelu"],
        before,
        perceptron(jumping(ops.relu)),
        inputs(32, 6),
    )


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        (layers.Activation("hard_sigmoid"), r"Clip\(x \+ 3, 0, 6\)"),
        (layers.Activation("hard_swish"), r"Clip\(x \+ 3, 0, 6\)"),
        (lambda x: x * layers.ReLU(6.0)(x + 3.0) * (1 / 6), r"Clip\(x \+ 3, 0, 6\)"),
        (layers.LeakyReLU(negative_slope=0.25), r"its slope below 0 is 0\.25"),
        (layers.PReLU("ones"), "half of a decomposed PRelu"),
        (layers.Activation("elu"), "Elu is no ReLU"),
    ],
)
def test_what_is_no_relu_is_left_alone(activation: Activation, reason: str) -> None:
    with pytest.raises(NothingToRewriteError, match=reason):
        jr.retrofit(export(perceptron(activation), 15), jump=JUMP)


WEIGHTS = np.random.default_rng(2).integers(-1, 2, (6, 6)).astype(np.float32)


def exported(function: Callable[[Any], Any], opset: int) -> jr.Model:
    signature = (tf.TensorSpec((None, 6), tf.float32, name="x"),)
    proto, _ = tf2onnx.convert.from_function(tf.function(function), signature, opset=opset)
    return jr.Model(proto.SerializeToString())


def branched(activation: Activation) -> Activation:
    return lambda x: tf.cond(
        tf.reduce_sum(x) > 0,
        lambda: activation(x @ WEIGHTS) * 2,
        lambda: activation(x @ -WEIGHTS),
    )


def looped(activation: Activation) -> Activation:
    def step(count: Any, h: Any) -> Any:
        return count + 1, activation(h @ WEIGHTS) / 2

    return lambda x: tf.while_loop(lambda count, _: count < 3, step, (0, x))[1]


@pytest.mark.parametrize(
    ("function", "label", "sites"), [(branched, "_branch>", 2), (looped, "body>", 1)]
)
@pytest.mark.parametrize("opset", [13, 18])
def test_activations_in_branches_and_loops(
    function: Callable[[Activation], Activation], label: str, sites: int, opset: int
) -> None:
    before, after = function(tf.nn.relu), function(lambda x: tf.where(x > JUMP, x, 0.0))
    model = exported(before, opset)
    paths = [site.path for site in jr.find_sites(model)[0]]
    assert Counter(label in path for path in paths) == {True: sites}
    for sign in (1, -1):
        x = np.abs(inputs(32, 6)) * sign
        check(model, ["Relu"] * sites, lambda x: before(tf.constant(x)), after, x)
