"""Pre-activation statistics against numpy on the whole data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import jr_onnx as jr
from jr_onnx.activations import Activations, observe
from jr_onnx.cli import Exit, run
from jr_onnx.errors import DataError, ParameterError

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


def test_channel_means_are_those_of_the_positive_values(seen, exact) -> None:  # type: ignore[no-untyped-def]
    for path, values in exact.items():
        channels = np.moveaxis(values.astype(np.float64), 1, 0).reshape(values.shape[1], -1)
        means = [channel[channel > 0].mean() if (channel > 0).any() else 0 for channel in channels]
        np.testing.assert_allclose(seen[path].channel_means, means, rtol=1e-6)


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
    more = ["--epsilon", "0.001", "--steps", "1", "--device", "cpu", "--json", str(result)]
    assert run(["retrofit", model, *arguments, "-o", str(out), *more]) == Exit.OK
    jumps = {site["path"]: site["jump"] for site in json.loads(result.read_text())["sites"]}
    assert jumps == pytest.approx({path: each.quantile(0.2) for path, each in seen.items()})
    assert seen["relu"].silenced(jumps["relu"]) == pytest.approx(0.2, abs=2e-3)


def test_the_quantiles_0_and_1_are_the_ends(seen, exact) -> None:  # type: ignore[no-untyped-def]
    for path, values in exact.items():
        low, high = seen[path].quantile(0), seen[path].quantile(1)
        assert low <= values[values > 0].min() <= low * (1 + 1 / 256)
        assert high * (1 - 1 / 256) <= values.max() <= high
        assert seen[path].silenced(low) == 0


@pytest.mark.parametrize("q", [-0.1, 1.1, float("nan")])
def test_a_quantile_out_of_range(lenet: jr.Model, mnist: jr.Dataset, q: float) -> None:
    with pytest.raises(ParameterError, match=r"a quantile is a number from 0 to 1, got"):
        jr.quantile_jumps(lenet, mnist.x, q)


def test_quantiles_of_a_hardened_model_are_those_of_its_original(
    lenet: jr.Model, mnist: jr.Dataset
) -> None:
    hardened = jr.retrofit(lenet, jump=1).model
    found = jr.quantile_jumps(hardened, mnist.x[:50], 0.5, device="cpu")
    assert found == jr.quantile_jumps(lenet, mnist.x[:50], 0.5, device="cpu")


BRANCHES = """g (float[n, 2] x) => (float[n, 2] y) {
    a = Relu(x)
    s = ReduceMax <keepdims = 0> (x)
    z = Sub (s, s)
    c = GreaterOrEqual (s, z)
    d = Neg(a)
    e = Relu(d)
    f = Add(a, e)
    y = If (c) <then_branch = t () => (float[n, 2] p) { p = Relu(f) },
                else_branch = u () => (float[n, 2] q) { q = Neg(f) }>
}"""


def test_sites_without_a_quantile_are_told(
    tmp_path: Path,
    text_model: Callable[..., jr.Model],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.onnx").write_bytes(text_model(BRANCHES).content)
    x = np.random.default_rng(0).random((8, 2), np.float32)
    np.savez("d.npz", x=x, y=np.zeros(8, np.int64))
    assert list(jr.quantile_jumps(jr.load("m.onnx"), x, 0.5, device="cpu")) == ["a"]
    arguments = ["retrofit", "m.onnx", "--jump-quantile", "0.5", "--data", "d.npz"]
    told = "--jump-quantile finds no jump for e, y.then_branch>p: values in branches and functions"
    run(arguments)
    assert told in capsys.readouterr().err
    assert run([*arguments, "--include", "y.*"]) == Exit.USAGE
    assert "finds no jump for y.then_branch>p" in capsys.readouterr().err
    run([*arguments, "--jump", "1"])
    assert "finds no jump" not in capsys.readouterr().err


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
