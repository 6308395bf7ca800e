"""An evaluation that goes on where it was; adversarial examples on disk."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import jr_onnx as jr
from jr_onnx.attacks import PGD, Attack
from jr_onnx.checkpoint import Checkpoint
from jr_onnx.errors import DataError, OutputError, ParameterError
from jr_onnx.evaluate import EvaluationInterrupted
from jr_onnx.examples import AdversarialExamples, check_images
from jr_onnx.suites import Suite, Trial

THREAT = jr.ThreatModel(epsilon=0.1)
THREE = Suite(
    "three",
    tuple(Trial(name=f"pgd-{steps}", attack=PGD(steps=steps)) for steps in (1, 2, 3)),
)


def _figures(evaluation: jr.Evaluation) -> Any:
    document = evaluation.to_json()
    for model in document["models"]:
        for attack in model["attacks"]:
            del attack["seconds"]
    return document


@pytest.mark.parametrize("stopped_at", range(7))
def test_a_killed_run_goes_on_and_gives_the_same(
    lenet: jr.Model,
    mnist: jr.Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopped_at: int,
) -> None:
    hardened = jr.retrofit(lenet, jump=1.0).model
    checkpoint = Checkpoint(tmp_path / "runs")

    def run(folder: Checkpoint | None) -> jr.Evaluation:
        return jr.evaluate(
            hardened,
            mnist.x[:20],
            mnist.y[:20],
            threat=THREAT,
            suite=THREE,
            baseline=lenet,
            device="cpu",
            checkpoint=folder,
        )

    expected = _figures(run(None))
    attack, ran = Attack.run, [0]

    def counted(self: Attack, *args: Any, **options: Any) -> Any:
        ran[0] += 1
        if ran[0] == stopped_at + 1:
            raise KeyboardInterrupt
        return attack(self, *args, **options)

    # The package's function of that name hides the module.
    monkeypatch.setattr(sys.modules["jr_onnx.runs"], "diagnose", lambda *args: ())
    without = {**expected, "findings": []}
    with monkeypatch.context() as patch:
        patch.setattr(Attack, "run", counted)
        if stopped_at < 6:
            with pytest.raises(EvaluationInterrupted) as caught:
                run(checkpoint)
            partial = caught.value.partial
            assert not partial.to_json()["complete"]
            assert sum(len(model.outcomes) for model in partial.models) == stopped_at
    ran[0] = 0
    with monkeypatch.context() as patch:
        patch.setattr(
            Attack, "run", lambda *a, **k: ran.__setitem__(0, ran[0] + 1) or attack(*a, **k)
        )
        assert _figures(run(checkpoint)) == without
    assert ran[0] == (6 - stopped_at if stopped_at < 6 else 6), "what was finished is not run again"


def test_a_run_killed_in_the_midst_of_a_trial_loses_one_batch(
    lenet: jr.Model, mnist: jr.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(tmp_path)

    def run(folder: Checkpoint | None) -> jr.Evaluation:
        return jr.evaluate(
            lenet,
            mnist.x[:20],
            mnist.y[:20],
            threat=THREAT,
            suite=Suite("one", THREE.trials[:1]),
            device="cpu",
            batch_size=8,
            checkpoint=folder,
        )

    whole = run(None)
    attack, sizes = Attack.run, []

    def counted(self: Attack, target: Any, x: Any, *args: Any, **options: Any) -> Any:
        sizes.append(len(x))
        if len(sizes) == 3:
            raise KeyboardInterrupt
        return attack(self, target, x, *args, **options)

    monkeypatch.setattr(Attack, "run", counted)
    with pytest.raises(EvaluationInterrupted) as caught:
        run(checkpoint)
    (partial,) = caught.value.partial.models[0].outcomes.values()
    assert len(partial.indices) == 16
    assert partial.robust[16:].tolist() == whole.models[0].correct[16:].tolist()
    resumed = run(checkpoint)
    assert sizes[:4] == [8, 8, 4, 4], "what follows is the diagnosis"
    assert _figures(resumed) == _figures(whole)
    (ours,), (theirs,) = (found.models[0].outcomes.values() for found in (resumed, whole))
    assert np.array_equal(ours.result.x_adv, theirs.result.x_adv)


def test_other_weights_beside_the_model_are_another_run(
    mnist: jr.Dataset, tmp_path: Path, lenet: jr.Model
) -> None:
    path, found = tmp_path / "model.onnx", []
    x, y = mnist.x[:30], mnist.y[:30]
    for factor in (1, 0.7):
        proto = onnx.load_from_string(lenet.content)
        for tensor in proto.graph.initializer:
            array = onnx.numpy_helper.to_array(tensor)
            if array.dtype == np.float32 and array.nbytes >= 1000:
                tensor.CopyFrom(
                    onnx.numpy_helper.from_array(np.float32(factor) * array, tensor.name)
                )
        for file in (path, path.with_suffix(".bin")):
            file.unlink(missing_ok=True)
        outside: Any = {"location": "model.bin", "size_threshold": 1000}
        onnx.save(proto, path, save_as_external_data=True, **outside)
        model = jr.load(path)
        options: Any = {"threat": THREAT, "suite": THREE, "device": "cpu"}
        kept = jr.evaluate(model, x, y, checkpoint=Checkpoint(tmp_path / "runs"), **options)
        assert _figures(kept) == _figures(jr.evaluate(model, x, y, **options))
        assert kept.models[0].correct.all(), "the same examples are attacked"
        found.append((model.sha256, kept.models[0].robust.tolist()))
    assert found[0][0] == found[1][0], "the weights are in the other file"
    assert found[0][1] != found[1][1], "the test needs weights that matter"
    assert len(list((tmp_path / "runs").iterdir())) == 6


def test_another_seed_is_another_run(lenet: jr.Model, mnist: jr.Dataset, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    for seed in (0, 1, 0):
        jr.evaluate(
            lenet,
            mnist.x[:5],
            mnist.y[:5],
            threat=THREAT,
            suite=THREE,
            device="cpu",
            seed=seed,
            checkpoint=checkpoint,
        )
    assert len(list(tmp_path.iterdir())) == 6


def test_a_damaged_checkpoint_is_named(lenet: jr.Model, mnist: jr.Dataset, tmp_path: Path) -> None:
    def run() -> jr.Evaluation:
        return jr.evaluate(
            lenet,
            mnist.x[:5],
            mnist.y[:5],
            threat=THREAT,
            suite=THREE,
            device="cpu",
            checkpoint=Checkpoint(tmp_path),
        )

    run()
    damaged = next(tmp_path.iterdir())
    whole = damaged.read_bytes()
    deflated = bytearray(whole)
    deflated[len("x_adv.npy") + 50 : 200] = bytes(200 - 50 - len("x_adv.npy"))
    for content in (whole[:100], bytes(deflated)):
        damaged.write_bytes(content)
        with pytest.raises(DataError, match="this checkpoint cannot be read"):
            run()


@pytest.mark.filterwarnings("ignore::UserWarning")  # numpy, of a header that it can repair
def test_a_flipped_bit_is_named_or_harmless(examples: AdversarialExamples, tmp_path: Path) -> None:
    """Zip, deflate and numpy's header each have their own ways to say it."""
    path = tmp_path / "adv.npz"
    examples.save(path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    spoiled = 0
    for at in [*range(120), *rng.integers(0, len(whole), 200)]:
        content = bytearray(whole)
        content[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        try:
            AdversarialExamples.load(path)
        except DataError:
            spoiled += 1
    assert spoiled > 200


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(DataError, match="cannot be used as a folder"):
        Checkpoint(file)


@pytest.fixture(scope="module")
def examples(lenet: jr.Model, mnist: jr.Dataset) -> AdversarialExamples:
    found = jr.evaluate(lenet, mnist.x[:30], mnist.y[:30], threat=THREAT, suite=THREE, device="cpu")
    return AdversarialExamples.of(found, mnist.y[:30])


def test_adversarial_examples_are_those_that_broke_the_model(
    examples: AdversarialExamples, lenet: jr.Model
) -> None:
    target = jr.Target(lenet, device="cpu")
    clean = target.logits(examples.x).argmax(1) == examples.y
    attacked = target.logits(examples.x_adv).argmax(1) == examples.y
    assert examples.broken.any()
    assert np.array_equal(examples.broken, clean & ~attacked)
    assert THREAT.contains(examples.x_adv, examples.x).all()


def test_adversarial_examples_are_read_as_they_were_written(
    examples: AdversarialExamples, tmp_path: Path
) -> None:
    path = tmp_path / "adv.npz"
    examples.save(path)
    again = AdversarialExamples.load(path)
    for name in ("x_adv", "x", "y", "broken"):
        assert np.array_equal(getattr(again, name), getattr(examples, name))
    assert again.about == json.loads(json.dumps(examples.about))
    with pytest.raises(OutputError):
        examples.save(path)


def test_examples_that_were_not_kept_are_told(lenet: jr.Model, mnist: jr.Dataset) -> None:
    found = jr.evaluate(
        lenet,
        mnist.x[:2],
        mnist.y[:2],
        threat=THREAT,
        suite=THREE,
        device="cpu",
        keep_examples=False,
    )
    with pytest.raises(ParameterError, match="ran with keep_examples=False"):
        AdversarialExamples.of(found, mnist.y[:2])


def test_what_is_no_file_of_adversarial_examples_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    np.savez(path, x=np.zeros(3))
    with pytest.raises(DataError, match="holds no adversarial examples"):
        AdversarialExamples.load(path)
    with pytest.raises(DataError, match="cannot be read"):
        AdversarialExamples.load(tmp_path / "missing.npz")


def test_images_are_the_rounded_examples(examples: AdversarialExamples, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    assert examples.save_images(tmp_path, (0.0, 1.0)) == examples.broken.sum()
    at = int(np.flatnonzero(examples.broken)[0])
    pixels = np.asarray(image.open(tmp_path / f"{at:05d}_label{examples.y[at]}.png"))
    assert np.array_equal(pixels, np.rint(255 * examples.x_adv[at, 0]))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("channels", ["rgb", "bgr"])
def test_images_are_written_as_rgb_whatever_the_model_takes(
    tmp_path: Path, channels: str, layout: str
) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (1, 5, 4, 3)).astype(np.uint8)
    x = (pixels[..., ::-1] if channels == "bgr" else pixels) / np.float32(255)
    x = x if layout == "nhwc" else np.moveaxis(x, -1, 1)
    found = AdversarialExamples(x, x, np.array([7]), np.array([True]), {})
    assert found.save_images(tmp_path, (0.0, 1.0), channels=channels, layout=layout) == 1
    assert np.array_equal(np.asarray(image.open(tmp_path / "00000_label7.png")), pixels[0])


def test_one_channel_at_the_end_is_an_image(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    x = np.linspace(0, 1, 12, dtype=np.float32).reshape(1, 4, 3, 1)
    found = AdversarialExamples(x, x, np.array([0]), np.array([True]), {})
    found.save_images(tmp_path, (0.0, 1.0), channels="gray", layout="nhwc")
    pixels = np.asarray(image.open(tmp_path / "00000_label0.png"))
    assert np.array_equal(pixels, np.rint(255 * x[0, :, :, 0]))


def test_what_is_no_image_is_told(examples: AdversarialExamples, tmp_path: Path) -> None:
    flat = AdversarialExamples(
        examples.x_adv.reshape(30, -1), examples.x.reshape(30, -1), examples.y, examples.broken, {}
    )
    with pytest.raises(DataError, match="are no images"):
        flat.save_images(tmp_path, (0.0, 1.0))
    with pytest.raises(DataError, match=r"layout nchw, which is \(1 or 3, height, width\)"):
        check_images((8, 8, 3))
    with pytest.raises(DataError, match=r"layout nhwc, which is \(height, width, 1 or 3\)"):
        check_images((3, 8, 8), layout="nhwc")


def test_a_folder_of_images_that_cannot_be_made_is_told(
    examples: AdversarialExamples, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot be made a folder"):
        examples.save_images(tmp_path / "file" / "png", (0.0, 1.0))
