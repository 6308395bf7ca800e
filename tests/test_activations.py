"""Pre-activation statistics against numpy on the whole data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import jr_onnx as jr
from jr_onnx.activations import Activations, observe
from jr_onnx.cli import Exit, run
from jr_onnx.errors import DataError

SAMPLES = Path(__file__).resolve().parents[1] / "sample_models"


@pytest.fixture(scope="module")
def seen(lenet: jr.Model, mnist: jr.Dataset) -> dict[str, Activations]:
    return observe(lenet, jr.find_sites(lenet)[0], mnist.x, device="cpu", batch_size=96)


@pytest.fixture(scope="module")
def exact(lenet: jr.Model, mnist: jr.Dataset) -> dict[str, np.ndarray]:
    proto = lenet.parse()
    sites = jr.find_sites(lenet)[0]
    for site in sites:
        proto.graph.output.add(name=site.x)
    session = ort.InferenceSession(proto.SerializeToString())
    values = session.run([site.x for site in sites], {"input": mnist.x})
    return {site.path: value for site, value in zip(sites, values, strict=True)}


def test_counts_are_exact(seen, exact) -> None:  # type: ignore[no-untyped-def]
    for path, values in exact.items():
        assert seen[path].total == values.size
        assert seen[path].positive == (values > 0).sum()


@pytest.mark.parametrize("q", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_quantiles_are_those_of_numpy_up_to_a_bin(seen, exact, q: float) -> None:  # type: ignore[no-untyped-def]
    for path, values in exact.items():
        positive = values[values > 0].astype(np.float64)
        # A bin is 1/512 of its value wide; between two values anything is a quantile.
        low = np.quantile(positive, q, method="lower") * (1 - 1 / 256)
        high = np.quantile(positive, q, method="higher") * (1 + 1 / 256)
        assert low <= seen[path].quantile(q) <= high


@pytest.mark.parametrize("jump", [0.0, 0.01, 0.5, 1.5, 1e6])
def test_the_silenced_share(seen, exact, jump: float) -> None:  # type: ignore[no-untyped-def]
    for path, values in exact.items():
        positive = values[values > 0]
        assert seen[path].silenced(jump) == pytest.approx((positive <= jump).mean(), abs=5e-3)


def test_a_fixed_batch_counts_no_example_twice() -> None:
    text = '<ir_version: 8, opset_import: ["": 18]> g (float[4,2] x) => (float[4,2] y) {y=Relu(x)}'
    model = jr.Model(onnx.parser.parse_model(text).SerializeToString())
    found = observe(model, jr.find_sites(model)[0], np.ones((6, 2)), device="cpu")["y"]
    assert (found.total, found.positive) == (12, 12)


def test_a_dead_site_has_no_quantile() -> None:
    with pytest.raises(DataError, match="no pre-activation was above 0"):
        Activations(5, 0, np.zeros(8, np.int64)).quantile(0.5)


def test_a_jump_by_quantile(tmp_path: Path, seen: dict[str, Activations]) -> None:
    out, result = tmp_path / "h.onnx", tmp_path / "r.json"
    arguments = ["--jump-quantile", "0.2", "--data", str(SAMPLES / "mnist_test.npz")]
    model = str(SAMPLES / "lenet_mnist.onnx")
    more = ["--steps", "1", "--device", "cpu", "--json", str(result)]
    assert run(["retrofit", model, *arguments, "-o", str(out), *more]) == Exit.OK
    jumps = {site["path"]: site["jump"] for site in json.loads(result.read_text())["sites"]}
    assert jumps == pytest.approx({path: each.quantile(0.2) for path, each in seen.items()})
    assert seen["relu"].silenced(jumps["relu"]) == pytest.approx(0.2, abs=2e-3)


def test_a_quantile_needs_data(capsys: pytest.CaptureFixture[str]) -> None:
    model = str(SAMPLES / "lenet_mnist.onnx")
    assert run(["retrofit", model, "--jump-quantile", "0.2"]) == Exit.USAGE
    assert "needs --data" in capsys.readouterr().err


def test_inspect_shows_quantiles(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", str(SAMPLES / "mnist_test.npz"), "--jump", "1", "--device", "cpu"]
    assert run(["inspect", str(SAMPLES / "lenet_mnist.onnx"), *arguments]) == Exit.OK
    out = capsys.readouterr().out
    assert "50% below" in out
    assert "silenced" in out
