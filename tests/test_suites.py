"""What the suites try: under every norm, with few classes, and on models without a gradient."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import jr_onnx as jr
from jr_onnx.attacks import APGD, APGDDLR, IFGSM, PGD, HopSkipJump, Square, ThreatModel
from jr_onnx.errors import DataError, ModelError, ParameterError
from jr_onnx.suites import SUITES, Suite, Trial, find_suite

Array = np.ndarray[Any, Any]
MakeModel = Callable[..., jr.Model]


def _trial(suite: Suite, name: str) -> Trial:
    return next(trial for trial in suite.trials if trial.name == name)


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.1), ("l2", 1.5), ("l1", 15.0)])
def test_ifgsm_of_the_paper_uses_its_ball(
    lenet: jr.Model, mnist: jr.Dataset, norm: str, epsilon: float
) -> None:
    """In l2 a step of 0.01 ends after 0.4 of 1.5, and 100% withstand it."""
    target, x, y = jr.Target(lenet, device="cpu"), mnist.x[:60], mnist.y[:60]
    threat = ThreatModel(norm=norm, epsilon=epsilon)
    suite = find_suite("paper", norm, epsilon=epsilon)
    found = _trial(suite, "ifgsm").attack.run(target, x, y, threat).robust.mean()
    oracle = PGD(steps=40).run(target, x, y, threat).robust.mean()
    assert oracle < 0.6
    assert abs(found - oracle) <= 0.1
    assert bool(suite.changed) == (norm != "linf")


def test_without_a_ball_ifgsm_is_the_published_one() -> None:
    suite = find_suite("paper", "l2")
    trial = _trial(suite, "ifgsm")
    assert (trial.norm, trial.attack) == ("linf", IFGSM())
    assert "steps in linf, as published" in suite.changed[0]


@pytest.mark.parametrize(
    ("classes", "loss"), [(2, "logit_difference"), (3, "logit_difference"), (4, "targeted_dlr")]
)
def test_the_standard_suite_of_few_classes(classes: int, loss: str) -> None:
    suite = find_suite("standard", "linf", epsilon=0.1, classes=classes)
    assert vars(_trial(suite, "apgd-t").attack)["loss"] == loss
    assert bool(suite.changed) == (classes < 4)
    if classes < 4:
        assert suite.changed[0] == (
            "apgd-t ascends logit_difference: its loss targeted_dlr needs 4 classes, there are "
            f"{classes}"
        )


def test_trials_of_ones_own_stay_as_they_are() -> None:
    mine = Suite("mine", (Trial(name="dlr", attack=APGDDLR()), Trial(name="i", attack=IFGSM())))
    found = find_suite(mine, "l2", epsilon=1.0, classes=2)
    assert found.trials == mine.trials
    assert not found.changed


@pytest.fixture
def plane(text_model: MakeModel) -> tuple[jr.Model, Array, Array, Array]:
    """Two classes, z = (0, w (x - 1/2)); labels, and each point's exact distance in linf."""
    w = np.array([[1, -2, 0.5, 0.25]], np.float32)
    model = text_model(
        f"plane (float[n, 4] x) => (float[n, 2] z) <float[4, 1] w = {{{_listed(w)}}}> {{"
        " half = Constant <value_float: float = 0.5> () c = Sub (x, half) a = MatMul (c, w)"
        " b = Sub (a, a) z = Concat <axis: int = 1> (b, a) }"
    )
    x = np.random.default_rng(0).uniform(0.3, 0.7, (60, 4)).astype(np.float32)
    score = (x.astype(np.float64) - 0.5) @ w[0]
    return model, x, (score > 0).astype(np.int64), np.abs(score) / np.abs(w).sum()


def _listed(values: Array) -> str:
    return ", ".join(str(float(value)) for value in values.ravel())


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_attacks_two_classes(
    plane: tuple[jr.Model, Array, Array, Array], suite: str
) -> None:
    model, x, y, distance = plane
    found = jr.evaluate(model, x, y, threat=ThreatModel(epsilon=0.05), suite=suite, device="cpu")
    away = np.abs(distance - 0.05) > 1e-4
    assert np.array_equal(found.models[0].robust[away], (distance > 0.05)[away])
    assert not found.inconclusive


def test_one_output_value_is_refused(text_model: MakeModel) -> None:
    model = text_model(
        "one (float[n, 2] x) => (float[n, 1] z) <float[2, 1] w = {1, 2}> { z = MatMul (x, w) }"
    )
    x, y = np.full((3, 2), 0.5, np.float32), np.zeros(3, np.int64)
    with pytest.raises(DataError, match=r"one output value .* Export two logits: \(0, z\)"):
        jr.evaluate(model, x, y, threat=ThreatModel(epsilon=0.1), device="cpu")


@pytest.fixture
def stump() -> jr.Model:
    """A tree as skl2onnx exports it, label and probabilities: class 1 where x[0] > 0.5."""
    node = helper.make_node(
        "TreeEnsembleClassifier",
        ["x"],
        ["label", "probabilities"],
        domain="ai.onnx.ml",
        nodes_treeids=[0, 0, 0],
        nodes_nodeids=[0, 1, 2],
        nodes_featureids=[0, 0, 0],
        nodes_values=[0.5, 0.0, 0.0],
        nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"],
        nodes_truenodeids=[1, 0, 0],
        nodes_falsenodeids=[2, 0, 0],
        class_treeids=[0, 0, 0, 0],
        class_nodeids=[1, 1, 2, 2],
        class_ids=[0, 1, 0, 1],
        class_weights=[0.9, 0.1, 0.2, 0.8],
        classlabels_int64s=[0, 1],
        post_transform="NONE",
    )
    graph = helper.make_graph(
        [node],
        "stump",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [
            helper.make_tensor_value_info("label", TensorProto.INT64, ["n"]),
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", 2]),
        ],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    made = onnx.helper.make_model(graph, opset_imports=imports, ir_version=8)
    return jr.Model(made.SerializeToString())


@pytest.fixture
def uniform() -> tuple[Array, Array]:
    x = np.random.default_rng(0).uniform(size=(40, 4)).astype(np.float32)
    return x, (x[:, 0] > 0.5).astype(np.int64)


def test_a_model_without_a_gradient_is_attacked_by_what_needs_none(
    stump: jr.Model, uniform: tuple[Array, Array]
) -> None:
    x, y = uniform
    found = jr.evaluate(
        stump,
        x,
        y,
        threat=ThreatModel(epsilon=0.2),
        suite="standard",
        device="cpu",
        output="probabilities",
    )
    (model,) = found.models
    assert model.left_out == ("apgd-ce", "apgd-t", "fab-t")
    assert list(model.outcomes) == ["square"]
    far = np.abs(x[:, 0] - 0.5) > 0.2
    assert np.array_equal(model.robust, far), "Square moves the one feature that counts"
    assert found.inconclusive
    (said,) = (each.message for each in found.findings if each.level == "error")
    assert "has no input gradient, so 3 of 4 trials of the suite standard could not be run" in said
    assert "TreeEnsembleClassifier" in said


def test_rounding_everything_is_no_gradient_either(lenet: jr.Model, mnist: jr.Dataset) -> None:
    proto = lenet.parse()
    proto.graph.node.append(helper.make_node("Round", [proto.graph.output[0].name], ["rounded"]))
    proto.graph.output[0].name = "rounded"
    rounded = jr.Model(proto.SerializeToString())
    squares = (Trial(name="square", attack=Square(queries=20)), Trial(name="apgd", attack=APGD()))
    x, y, threat = mnist.x[:10], mnist.y[:10], ThreatModel(epsilon=0.1)
    found = jr.evaluate(
        rounded, x, y, threat=threat, suite=Suite("two", squares), baseline=lenet, device="cpu"
    )
    assert [model.left_out for model in found.models] == [(), ("apgd",)]
    assert found.naive_gain is None, "one of the two was not attacked with its gradient"
    assert found.inconclusive
    with pytest.raises(ModelError, match=r"has no input gradient, which naive needs\. Try square"):
        jr.evaluate(rounded, x, y, threat=threat, suite="naive", device="cpu")


def test_of_several_outputs_one_must_be_chosen(
    stump: jr.Model, uniform: tuple[Array, Array]
) -> None:
    x, _ = uniform
    with pytest.raises(ModelError, match=r"\['label', 'probabilities'\]. Say which .*--output-nam"):
        jr.Target(stump, device="cpu")
    with pytest.raises(ModelError, match="has no output 'logits', only label, probabilities"):
        jr.Target(stump, device="cpu", output="logits")
    with pytest.raises(ModelError, match=r"'label' is tensor\(int64\); expected the logits"):
        jr.Target(stump, device="cpu", output="label")
    target = jr.Target(stump, device="cpu", output="probabilities")
    assert target.logits(x).shape == (40, 2)


def test_the_chosen_output_is_the_one_attacked(lenet: jr.Model, mnist: jr.Dataset) -> None:
    """Another output beside the logits changes nothing: also where models are hardened."""
    proto = lenet.parse()
    logits = proto.graph.output[0].name
    proto.graph.node.append(helper.make_node("Neg", [logits], ["other"]))
    proto.graph.output.insert(
        0, helper.make_tensor_value_info("other", TensorProto.FLOAT, ["n", 10])
    )
    two = jr.Model(proto.SerializeToString())
    options: Any = {"threat": ThreatModel(epsilon=0.1), "device": "cpu", "suite": _transfer()}
    x, y = mnist.x[:20], mnist.y[:20]
    robust = [
        [each.robust for each in jr.evaluate(
            jr.retrofit(model, jump=1.0).model, x, y, baseline=model, **options, **more
        ).models]
        for model, more in ((lenet, {}), (two, {"output": logits}))
    ]  # fmt: skip
    assert np.array_equal(robust[0], robust[1])


def _transfer() -> Suite:
    pgd = PGD(steps=5)
    own, other = Trial(name="pgd", attack=pgd), Trial(name="transfer", attack=pgd, source=0.0)
    return Suite("transfer", (own, other))


def test_what_no_trial_can_do_is_refused() -> None:
    square = Suite("square", (Trial(name="square", attack=Square()),))
    with pytest.raises(ParameterError, match="no attack of the suite square knows the norm l1"):
        find_suite(square, "l1")


def test_starting_points_are_told_apart_in_the_result() -> None:
    told = [
        json.dumps(Trial(name="walk", attack=HopSkipJump(starting_points=points)).to_json())
        for points in (np.zeros((2, 3)), np.zeros((2, 3)), np.ones((2, 3)))
    ]
    assert told[0] == told[1] != told[2]
    assert '"starting_points": "sha256:' in told[0]
