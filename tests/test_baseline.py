"""A baseline that is not the hardened model's original gives no gain, and is told."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import jr_onnx as jr
from jr_onnx import report
from jr_onnx.findings import of_the_baseline
from jr_onnx.suites import naive


@pytest.fixture(scope="module")
def hardened(lenet: jr.Model) -> jr.Model:
    return jr.retrofit(lenet, jump=1.0).model


def _noisy(model: jr.Model) -> jr.Model:
    """Another network of the same architecture: a worse one."""
    proto, rng = model.parse(), np.random.default_rng(0)
    for tensor in proto.graph.initializer:
        weights = numpy_helper.to_array(tensor)
        if weights.ndim > 1 and weights.dtype == np.float32:
            noise = 0.02 * rng.standard_normal(weights.shape)
            moved = (weights + noise).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(moved, tensor.name))
    return jr.Model(proto.SerializeToString())


def test_another_network_gives_no_gain(
    lenet: jr.Model, hardened: jr.Model, mnist: jr.Dataset
) -> None:
    found = jr.evaluate(
        hardened,
        mnist.x[:40],
        mnist.y[:40],
        threat=jr.ThreatModel(epsilon=0.1),
        suite=naive(steps=10),
        baseline=_noisy(lenet),
        device="cpu",
    )
    assert found.models[1].robust.sum() > found.models[0].robust.sum(), "it would pass for a gain"
    assert found.naive_gain is None
    assert found.to_json()["gain"] == {"naive": None, "adaptive": None}
    assert found.inconclusive
    assert re.match("Inconclusive: by (JR005 and )?JR006 these", report.verdict(found))
    error = next(each for each in found.findings if each.level == "error")
    assert error.rule == "JR006"
    assert "is not its original (graph.initializer[conv1.weight]" in error.message


def test_the_original_written_anew_is_the_original(lenet: jr.Model, hardened: jr.Model) -> None:
    proto = lenet.parse()
    proto.producer_name, proto.graph.name = "another exporter", "another name"
    again = jr.Model(proto.SerializeToString())
    assert again.sha256 != lenet.sha256
    assert of_the_baseline(again, hardened) == ()
    assert of_the_baseline(lenet, hardened) == ()


def test_another_jump_is_no_original(lenet: jr.Model, hardened: jr.Model) -> None:
    (found,) = of_the_baseline(jr.retrofit(lenet, jump=0.5).model, hardened)
    assert (found.rule, found.level) == ("JR006", "error")


def test_without_a_record_it_cannot_be_checked(lenet: jr.Model) -> None:
    (found,) = of_the_baseline(lenet, _noisy(lenet))
    assert (found.rule, found.level) == ("JR006", "warning")
    assert "carries no record of a retrofit" in found.message


def test_a_hardened_model_that_was_edited_since(lenet: jr.Model, hardened: jr.Model) -> None:
    proto = hardened.parse()
    proto.graph.node[0].name = "edited"
    (found,) = of_the_baseline(lenet, jr.Model(proto.SerializeToString()))
    assert (found.rule, found.level) == ("JR006", "error")
    assert "was edited after it was hardened" in found.message


def test_weights_in_another_file_are_compared(lenet: jr.Model, tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        onnx.save_model(
            lenet.parse(),
            tmp_path / name / "net.onnx",
            save_as_external_data=True,
            location="weights",
            size_threshold=0,
        )
    one, other = (jr.load(tmp_path / name / "net.onnx") for name in ("one", "other"))
    jr.save(jr.retrofit(one, jump=1.0).model, tmp_path / "one" / "hard.onnx")
    made = jr.load(tmp_path / "one" / "hard.onnx")
    assert of_the_baseline(other, made) == ()
    weights = tmp_path / "other" / "weights"
    changed = bytearray(weights.read_bytes())
    changed[100] ^= 255
    weights.write_bytes(changed)
    (found,) = of_the_baseline(other, made)
    assert "weights: the weights differ from byte 100 of the file on" in found.message
