"""Broken defences are flagged, honest models are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from onnx import helper, numpy_helper

import jr_onnx as jr
from jr_onnx.attacks import APGD, FGSM, IFGSM, PGD, Attack, CarliniWagner, Square, Transfer
from jr_onnx.data import load_data
from jr_onnx.findings import is_inconclusive, of_the_data, of_the_model
from jr_onnx.preprocess import Preprocessing
from jr_onnx.suites import Suite, Trial

Array = np.ndarray[Any, Any]
SAMPLES = Path(__file__).resolve().parents[1] / "sample_models"
MakeModel = Callable[..., jr.Model]
THREAT = jr.ThreatModel(epsilon=0.1)
BALLS = [THREAT, jr.ThreatModel(norm="l2", epsilon=1.5)]
BOTH = Suite(
    "both",
    (
        Trial(name="pgd", attack=PGD(steps=10)),
        Trial(name="square", attack=Square(queries=200)),
    ),
)


def _with_tail(model: jr.Model, tail: list[Any], **constants: float) -> jr.Model:
    """Appends nodes that read the model's logits as `z` and give `out`."""
    proto = model.parse()
    graph = proto.graph
    logits = graph.output[0].name
    for node in tail:
        node.input[:] = [logits if name == "z" else name for name in node.input]
    graph.node.extend(tail)
    for name, value in constants.items():
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
    graph.output[0].name = "out"
    return jr.Model(proto.SerializeToString())


def _rules(model: jr.Model, mnist: jr.Dataset, threat: jr.ThreatModel = THREAT) -> set[str]:
    found = jr.evaluate(model, mnist.x[:60], mnist.y[:60], threat=threat, suite=BOTH, device="cpu")
    return {finding.rule for finding in found.findings if finding.level == "error"}


@pytest.mark.parametrize("threat", BALLS, ids=lambda threat: str(threat.norm))
def test_an_honest_model_is_not_flagged(
    lenet: jr.Model, mnist: jr.Dataset, threat: jr.ThreatModel
) -> None:
    assert _rules(lenet, mnist, threat) == set()


def _rounded(model: jr.Model) -> jr.Model:
    """A gradient that is there, and 0."""
    return _with_tail(
        model,
        [
            helper.make_node("Round", ["z"], ["r"]),
            helper.make_node("Mul", ["z", "none"], ["n"]),
            helper.make_node("Add", ["r", "n"], ["out"]),
        ],
        none=0.0,
    )


def test_an_honest_model_is_not_flagged_in_l1(lenet: jr.Model) -> None:
    """PGD gets stuck there now and then, at one of these at any epsilon: APGD judges the model."""
    data = load_data(SAMPLES / "mnist_test.npz", limit=20, seed=0)
    threat = jr.ThreatModel(norm="l1", epsilon=5.0)
    suite = Suite("apgd", (Trial(name="apgd", attack=APGD(steps=20)),))
    found = jr.evaluate(lenet, data.x, data.y, threat=threat, suite=suite, device="cpu")
    assert found.findings == ()


@pytest.mark.parametrize("threat", BALLS, ids=lambda threat: str(threat.norm))
def test_rounded_logits_are_flagged(
    lenet: jr.Model, mnist: jr.Dataset, threat: jr.ThreatModel
) -> None:
    blind = {"JR004"} if threat.norm == "linf" else set()
    assert {"JR005", "JR008"} | blind <= _rules(_rounded(lenet), mnist, threat)


@pytest.mark.parametrize("threat", BALLS, ids=lambda threat: str(threat.norm))
def test_a_saturated_softmax_is_flagged(
    lenet: jr.Model, mnist: jr.Dataset, threat: jr.ThreatModel
) -> None:
    broken = _with_tail(
        lenet,
        [
            helper.make_node("Mul", ["z", "hot"], ["h"]),
            helper.make_node("Softmax", ["h"], ["p"], axis=1),
            helper.make_node("Mul", ["p", "one"], ["out"]),
        ],
        hot=1e4,
        one=1.0,
    )
    assert "JR008" in _rules(broken, mnist, threat)
    told = of_the_model(jr.Target(broken, device="cpu"), mnist.x[:5])
    assert [each.rule for each in told] == ["JR006"]
    assert "outputs are probabilities, and no softmax was recognised" in told[0].message
    hardened = jr.retrofit(broken, jump=0.5).model
    (told_of_it,) = of_the_model(jr.Target(hardened, device="cpu"), mnist.x[:5])
    assert told_of_it.message.startswith(f"the retrofitted {told[0].message.split(':')[0]}: ")


@pytest.mark.parametrize(("op", "name"), [("Softmax", "softmax"), ("LogSoftmax", "log_softmax")])
def test_a_recognised_softmax_is_said_and_no_doubt(
    lenet: jr.Model, mnist: jr.Dataset, op: str, name: str
) -> None:
    ending = _with_tail(lenet, [helper.make_node(op, ["z"], ["out"], axis=1)])
    (told,) = of_the_model(jr.Target(ending, device="cpu"), mnist.x[:5])
    assert (told.rule, told.level) == ("JR006", "note")
    assert f"the model ends in a {name}: attacks follow the logits" in told.message
    assert not is_inconclusive([told])
    for schema in ("evaluation-1", "curve-1"):
        found = json.loads((SAMPLES.parent / f"docs/schemas/{schema}.json").read_bytes())
        jsonschema.validate(told.to_json(), found["properties"]["findings"]["items"])


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
def test_a_softmax_of_probabilities_is_flagged(lenet: jr.Model, mnist: jr.Dataset, op: str) -> None:
    twice = _with_tail(
        lenet,
        [
            helper.make_node("Softmax", ["z"], ["p"], axis=1),
            helper.make_node(op, ["p"], ["out"], axis=1),
        ],
    )
    (told,) = of_the_model(jr.Target(twice, device="cpu"), mnist.x[:5])
    assert (told.rule, told.level) == ("JR006", "warning")
    assert "at the end of the model is given probabilities, not logits" in told.message


@pytest.mark.parametrize("threat", BALLS, ids=lambda threat: str(threat.norm))
def test_a_random_layer_is_flagged(
    lenet: jr.Model, mnist: jr.Dataset, threat: jr.ThreatModel
) -> None:
    broken = _with_tail(
        lenet,
        [
            helper.make_node("RandomNormalLike", ["z"], ["noise"], scale=3.0),
            helper.make_node("Add", ["z", "noise"], ["out"]),
        ],
    )
    assert "JR005" in _rules(broken, mnist, threat)
    (told,) = of_the_model(jr.Target(broken, device="cpu"), mnist.x[:20])
    assert "different outputs for the same input" in told.message


def test_a_model_that_couples_its_batch_is_flagged(lenet: jr.Model, mnist: jr.Dataset) -> None:
    broken = _with_tail(lenet, [helper.make_node("Softmax", ["z"], ["out"], axis=0)])
    assert "JR005" in _rules(broken, mnist)


@pytest.mark.parametrize("steps", [1, 20])
def test_too_few_steps_are_flagged(lenet: jr.Model, mnist: jr.Dataset, steps: int) -> None:
    suite = Suite("few", (Trial(name="pgd", attack=PGD(steps=steps)),))
    found = jr.evaluate(
        lenet, mnist.x[:100], mnist.y[:100], threat=THREAT, suite=suite, device="cpu"
    )
    said = [each.message for each in found.findings if "twice the steps" in each.message]
    assert bool(said) == (steps == 1)
    assert found.inconclusive == (steps == 1)


@pytest.mark.parametrize(
    ("attack", "threat"),
    [
        (PGD(step_size=1e-4), THREAT),
        (IFGSM(steps=10), BALLS[1]),
        (CarliniWagner(steps=20, binary_search_steps=1), BALLS[1]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_an_attack_that_twenty_plain_steps_outdo_is_flagged(
    lenet: jr.Model, mnist: jr.Dataset, attack: Attack, threat: jr.ThreatModel
) -> None:
    weak = Trial(name="weak", attack=attack)
    strong = Trial(name="pgd", attack=PGD(steps=40))
    for trials, said in (((weak,), True), ((weak, strong), False)):
        found = jr.evaluate(
            lenet, mnist.x[:60], mnist.y[:60], threat=threat, suite=Suite("s", trials), device="cpu"
        )
        messages = [each.message for each in found.findings if "too weak" in each.message]
        assert bool(messages) == said
        assert found.inconclusive == said
        assert all("twenty steps of pgd" in each for each in messages)


def test_an_attack_towards_a_class_is_not_called_weak(lenet: jr.Model, mnist: jr.Dataset) -> None:
    y = mnist.y[:40]
    towards = PGD(steps=20, target_classes=tuple(int(each + 1) % 10 for each in y))
    suite = Suite("towards", (Trial(name="pgd", attack=towards),))
    found = jr.evaluate(lenet, mnist.x[:40], y, threat=THREAT, suite=suite, device="cpu")
    assert found.findings == ()


@pytest.mark.parametrize("rounds", [True, False])
def test_search_by_outputs_alone_is_said_to_be_little_where_there_is_no_gradient(
    lenet: jr.Model, mnist: jr.Dataset, rounds: bool
) -> None:
    model = _with_tail(lenet, [helper.make_node("Round", ["z"], ["out"])]) if rounds else lenet
    suite = Suite("blind", (Trial(name="square", attack=Square(queries=20)),))
    found = jr.evaluate(model, mnist.x[:20], mnist.y[:20], threat=THREAT, suite=suite, device="cpu")
    assert not found.inconclusive
    assert [(each.rule, each.level) for each in found.findings] == [("JR005", "warning")] * rounds
    for each in found.findings:
        assert "has no input gradient, so every attack sees outputs alone" in each.message
        assert "Rounding (Round 'out') may be there as a defence" in each.message
    assert list(found.models[0].outcomes) == ["square"]


@pytest.mark.parametrize(("right", "said"), [(6, True), (9, True), (12, False)])
def test_labels_as_good_as_guessed_are_flagged(
    lenet: jr.Model, mnist: jr.Dataset, right: int, said: bool
) -> None:
    """9 of 60 is 15%, 95% interval 8% to 26%."""
    x, predicted = mnist.x[:60], jr.Target(lenet, device="cpu").logits(mnist.x[:60]).argmax(axis=1)
    wrong = (predicted + np.random.default_rng(0).integers(1, 10, 60)) % 10
    y = np.where(np.arange(60) < right, predicted, wrong)
    found = of_the_data(jr.Target(lenet, device="cpu"), x, y, predicted == y)
    assert [each.rule for each in found if "guessing" in each.message] == ["JR006"] * said


def test_data_is_judged_by_the_original_alone(lenet: jr.Model, mnist: jr.Dataset) -> None:
    """Jumps that leave nothing of a model are no fault of the data."""
    hardened = jr.retrofit(lenet, jump=1000.0).model
    options: Any = {"threat": THREAT, "suite": BOTH, "device": "cpu"}
    x, y = mnist.x[:60], mnist.y[:60]
    rules = [
        {each.rule for each in jr.evaluate(hardened, x, y, baseline=before, **options).findings}
        for before in (lenet, None)
    ]
    assert "JR006" not in rules[0]
    assert "JR006" in rules[1]


@pytest.mark.parametrize(
    ("bounds", "epsilon", "said"),
    [((0, 255), 0.1, True), ((0, 255), 8.0, False), ((0, 1), 1e-4, False)],
)
def test_an_epsilon_in_other_units_is_said(
    lenet: jr.Model, mnist: jr.Dataset, bounds: tuple[float, float], epsilon: float, said: bool
) -> None:
    found = jr.evaluate(
        lenet,
        mnist.x[:5] * bounds[1],
        mnist.y[:5],
        threat=jr.ThreatModel(epsilon=epsilon, bounds=bounds),
        suite=Suite("fgsm", (Trial(name="fgsm", attack=FGSM()),)),
        preprocessing=Preprocessing(std=(bounds[1],)),
        device="cpu",
    )
    assert said == any("less than a thousandth of the bounds" in f.message for f in found.findings)


def test_a_model_that_always_says_the_same_is_flagged(lenet: jr.Model, mnist: jr.Dataset) -> None:
    broken = _with_tail(
        lenet,
        [
            helper.make_node("Mul", ["z", "none"], ["n"]),
            helper.make_node("Add", ["n", "none"], ["out"]),
        ],
        none=0.0,
    )
    assert "JR006" in _rules(broken, mnist)


@pytest.mark.parametrize("shift", [-1, 1])
def test_labels_shifted_by_one_are_flagged(lenet: jr.Model, mnist: jr.Dataset, shift: int) -> None:
    inside = (mnist.y + shift >= 0) & (mnist.y + shift < 10)
    x, y = mnist.x[inside][:60], mnist.y[inside][:60] + shift
    found = jr.evaluate(lenet, x, y, threat=THREAT, suite=BOTH, device="cpu")
    messages = [each.message for each in found.findings if each.rule == "JR006"]
    assert any("shifted by one" in message for message in messages)


def test_data_of_the_wrong_scale_is_flagged(lenet: jr.Model, mnist: jr.Dataset) -> None:
    threat = jr.ThreatModel(epsilon=0.001)
    x = (mnist.x[:200] / 255).astype(np.float32)  # scaled twice
    found = jr.evaluate(lenet, x, mnist.y[:200], threat=threat, suite=BOTH, device="cpu")
    assert any(each.rule == "JR006" and "scaled" in each.message for each in found.findings)


def test_a_transfer_that_breaks_what_the_gradient_did_not_is_flagged(
    lenet: jr.Model, mnist: jr.Dataset
) -> None:
    hardened = jr.retrofit(lenet, jump=30.0, selection=jr.Selection(last=1)).model
    suite = Suite(
        "transfer",
        (
            Trial(name="pgd", attack=PGD(steps=10)),
            Trial(name="transfer-original", attack=PGD(steps=10), source=0.0),
        ),
    )
    found = jr.evaluate(
        hardened, mnist.x[:100], mnist.y[:100], threat=THREAT, suite=suite, device="cpu"
    )
    flagged = {each.rule for each in found.findings if each.level == "error"}
    assert flagged & {"JR004", "JR006"}


def test_what_square_breaks_is_flagged_wherever_it_is_in_a_cascade(
    lenet: jr.Model, mnist: jr.Dataset
) -> None:
    """A broken example leaves: an attack on the gradient after Square says nothing of it."""
    square = Trial(name="square", attack=Square(queries=60))
    own = Trial(name="pgd", attack=PGD(steps=2))
    again = Trial(name="soft", attack=PGD(steps=2), surrogate="soft:10%")
    threat = jr.ThreatModel(epsilon=0.3)
    for trials, said in [((own, square, again), True), ((square, own), False)]:
        found = jr.evaluate(
            _rounded(lenet),
            mnist.x[:20],
            mnist.y[:20],
            threat=threat,
            suite=Suite("mine", trials),
            device="cpu",
        )
        messages = [each.message for each in found.findings if each.rule == "JR004"]
        assert bool(messages) == said
        broken = 20 - int(found.models[0].robust.sum())
        assert all(
            f"square, which does not see the model's gradient, breaks {broken} of 20" in each
            for each in messages
        )


def test_without_a_jump_a_transfer_is_an_attack_on_the_model_itself(
    lenet: jr.Model, mnist: jr.Dataset
) -> None:
    suite = Suite(
        "own",
        (
            Trial(name="fgsm", attack=FGSM()),
            Trial(name="transfer", attack=PGD(steps=10), source=0.0),
        ),
    )
    found = jr.evaluate(lenet, mnist.x[:40], mnist.y[:40], threat=THREAT, suite=suite, device="cpu")
    left = [outcome.robust.sum() for outcome in found.models[0].outcomes.values()]
    assert left[0] > left[1] + 1
    assert all(each.rule != "JR004" for each in found.findings)


def test_transfers_from_an_original_that_is_lost_are_left_out(
    lenet: jr.Model, mnist: jr.Dataset
) -> None:
    proto = jr.retrofit(lenet, jump=1.0).model.parse()
    proto.graph.node[0].name = "edited"
    suite = Suite(
        "two",
        (
            Trial(name="pgd", attack=PGD(steps=10)),
            Trial(name="transfer", attack=PGD(steps=10), source=0.5),
        ),
    )
    found = jr.evaluate(
        jr.Model(proto.SerializeToString()),
        mnist.x[:10],
        mnist.y[:10],
        threat=THREAT,
        suite=suite,
        baseline=lenet,
        device="cpu",
    )
    assert [model.left_out for model in found.models] == [(), ("transfer",)]
    assert any("transfer were left out, there is no original" in f.message for f in found.findings)


def test_transfer_searches_on_its_source(lenet: jr.Model, mnist: jr.Dataset) -> None:
    source, target = (jr.Target(lenet, device="cpu") for _ in range(2))
    attack = PGD(steps=5)
    own = attack.run(target, mnist.x[:20], mnist.y[:20], THREAT, seed=1)
    same = Transfer(attack=attack, source=source).run(
        target, mnist.x[:20], mnist.y[:20], THREAT, seed=1
    )
    assert np.array_equal(own.x_adv, same.x_adv)
