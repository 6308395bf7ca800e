"""The commands attack and evaluate, as a user calls them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import jr_onnx as jr
from jr_onnx.attacks import ATTACKS, PGD, Attack, Corruptions, parse_attack
from jr_onnx.cli import run
from jr_onnx.errors import ParameterError
from jr_onnx.examples import AdversarialExamples
from jr_onnx.suites import SUITES, Suite, Trial

REPOSITORY = Path(__file__).resolve().parents[1]
LENET = REPOSITORY / "sample_models" / "lenet_mnist.onnx"


@pytest.fixture
def folder(mnist: jr.Dataset, tmp_path: Path) -> Path:
    """Holds the hardened sample and thirty digits."""
    np.savez(tmp_path / "digits.npz", x=mnist.x[:30], y=mnist.y[:30])
    jr.save(jr.retrofit(jr.load(LENET), jump=1.0).model, tmp_path / "hardened.onnx")
    return tmp_path


def _run(*arguments: Any) -> int:
    return run([*map(str, arguments), "--device", "cpu", "--quiet"])


def test_adversarial_examples_are_saved_and_tried_on_another_model(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adv, out = folder / "adv.npz", folder / "replay.json"
    data, hardened = folder / "digits.npz", folder / "hardened.onnx"
    assert _run("attack", LENET, "--data", data, "-o", adv, "--images", folder / "png") == 0
    said = capsys.readouterr().out
    assert "pgd, linf 0.1" in said
    assert "adversarial examples written" in said
    assert _run("attack", hardened, "--replay", adv, "--json", out) == 0
    replayed = json.loads(out.read_bytes())
    assert replayed["schema"] == "jr-onnx/replay/1"
    x_adv, y = (np.load(adv)[name] for name in ("x_adv", "y"))
    right = jr.Target(jr.load(hardened), device="cpu").logits(x_adv).argmax(1) == y
    assert replayed["accuracy_under_replay"] == pytest.approx(right.mean(), abs=1 / 30)
    assert len(list((folder / "png").glob("*.png"))) == replayed["broken_before"]


def test_an_attack_that_was_stopped_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, ran = Attack.run, [0]

    def counted(self: Attack, *args: Any, **options: Any) -> Any:
        ran[0] += 1
        if ran[0] == 2:
            raise KeyboardInterrupt
        return run(self, *args, **options)

    monkeypatch.setattr(Attack, "run", counted)
    monkeypatch.setattr(sys.modules["jr_onnx.runs"], "diagnose", lambda *args: ())
    adv = folder / "adv.npz"
    arguments = ("attack", LENET, "--data", folder / "digits.npz", "--batch-size", 10, "-o", adv)
    assert _run(*arguments, "--resume", folder / "runs") == 130
    assert not adv.exists()
    assert _run(*arguments, "--resume", folder / "runs") == 0
    assert ran[0] == 2 + 2, "the first of three batches is not attacked again"
    found = AdversarialExamples.load(adv)
    assert _run(*arguments, "--force") == 0
    assert np.array_equal(AdversarialExamples.load(adv).x_adv, found.x_adv)
    ran[0] = 0
    assert _run(*arguments, "--force") == 130
    partial = AdversarialExamples.load(adv)
    assert np.array_equal(partial.x_adv[:10], found.x_adv[:10])
    assert np.array_equal(partial.broken, found.broken & (np.arange(30) < 10))


def test_options_reach_the_attack(folder: Path) -> None:
    out = folder / "result.json"
    arguments = ("--attack", "pgd", "--set", "steps=3", "--norm", "l2", "--epsilon", "1/2")
    data = folder / "digits.npz"
    assert (
        _run("attack", folder / "hardened.onnx", "--data", data, *arguments, "--json", out,
             "--surrogate", "soft:30%") == 0
    )  # fmt: skip
    attack = json.loads(out.read_bytes())["models"][0]["attacks"][0]
    assert (attack["norm"], attack["epsilon"]) == ("l2", 0.5)
    assert attack["options"]["steps"] == 3
    assert attack["gradient"] == "bpda-soft"
    assert attack["gradient_passes"] <= 3 * 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either --data"),
        (("--data", "digits.npz", "--replay", "adv.npz"), "give either --data"),
        (
            ("--replay", "adv.npz", "-o", "b.npz", "--samples", 5, "--images", "png"),
            "attacks nothing: leave out --samples, --output, --images\n",
        ),
        (
            ("--replay", "adv.npz", "--set", "steps=3", "--resume", "runs", "--epsilon", "0.1"),
            "leave out --set, --epsilon, --resume\n",
        ),
        (("--data", "digits.npz", "--attack", "magic"), "attack must be one of fgsm, pgd"),
        (("--data", "digits.npz", "--set", "speed=9"), "no option; options are steps"),
        (("--data", "digits.npz", "--set", "steps=many"), "steps must be a number"),
        (("--data", "digits.npz", "--epsilon", "8"), "wider than the bounds"),
        (("--data", "digits.npz", "--norm", "l7"), "norm must be one of linf, l2, l1"),
        (("--data", "digits.npz", "--surrogate", "hope"), "surrogate must be one of"),
    ],
)
def test_what_makes_no_sense_is_refused(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: Any,
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    assert _run("attack", LENET, *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_gives_a_result_that_follows_the_schema(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, suite: str
) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    monkeypatch.setitem(SUITES, suite, _shortened(SUITES[suite]()))
    out, data = folder / "result.json", folder / "digits.npz"
    arguments = ("--data", data, "--samples", 10, "--suite", suite, "--json", out)
    # Two steps settle nothing: what is tested is the form of the result.
    assert _run("evaluate", folder / "hardened.onnx", *arguments) in (0, 5)
    document = json.loads(out.read_bytes())
    schema = json.loads((REPOSITORY / "docs/schemas/evaluation-1.json").read_bytes())
    jsonschema.Draft202012Validator(schema).validate(document)
    assert [model["role"] for model in document["models"]] == ["original", "retrofitted"]
    assert (document["gain"]["adaptive"] is not None) == (suite == "adaptive")
    said = capsys.readouterr().out
    assert ("relative perturbation" in said) == (suite == "paper")


def _shortened(suite: Suite) -> Callable[[], Suite]:
    """The suite with few steps: what is tested is how it is run."""
    from dataclasses import fields, replace

    few = {"steps": 2, "queries": 20, "draws": 5, "searches": 1, "restarts": 1}
    trials = []
    for trial in suite.trials:
        names = {field.name for field in fields(trial.attack)}  # type: ignore[arg-type]
        options = {name: value for name, value in few.items() if name in names}
        trials.append(replace(trial, attack=replace(trial.attack, **options)))  # type: ignore[type-var]
    return lambda: replace(suite, trials=tuple(trials))


def test_mean_and_std_stand_before_the_model(
    folder: Path, lenet: jr.Model, mnist: jr.Dataset
) -> None:
    """The sample in units of 0..255 is the sample: epsilon counts in these units, too."""
    out, data = folder / "result.json", folder / "bytes.npz"
    np.savez(data, x=np.rint(255 * mnist.x[:30]).astype(np.uint8), y=mnist.y[:30])
    scaled = ("--preprocess", "bounds=0,255", "--std", "255", "--epsilon", "25.5")
    figures = []
    for options in ((), scaled):
        arguments = ("--data", data, "--suite", "naive", "--json", out, "--force", *options)
        assert _run("evaluate", LENET, *arguments) == 0
        document = json.loads(out.read_bytes())
        figures.append(document["models"][0]["robust_accuracy"])
        assert document["models"][0]["sha256"] == lenet.sha256
    assert document["threat"]["bounds"] == [0, 255]
    # The same attack in other units: rounding may tip an example on the edge.
    assert figures[0] == pytest.approx(figures[1], abs=1.5 / 30)


def test_a_replay_is_preprocessed_as_the_attack_was(folder: Path, mnist: jr.Dataset) -> None:
    out, adv, data = folder / "replay.json", folder / "adv.npz", folder / "bytes.npz"
    np.savez(data, x=np.rint(255 * mnist.x[:20]).astype(np.uint8), y=mnist.y[:20])
    units = ("--preprocess", "bounds=0,255", "--std", "255")
    made = ("--data", data, "-o", adv, "--epsilon", "25.5")
    assert _run("attack", LENET, *made, *units) == 0
    assert _run("attack", LENET, "--replay", adv, *units, "--json", out) == 0
    replayed = json.loads(out.read_bytes())
    assert replayed["clean_accuracy"] == 1
    assert replayed["broken"] == replayed["broken_before"] > 0


def test_a_replay_with_another_mean_or_std_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adv, old = folder / "adv.npz", folder / "old.npz"
    made = ("--data", folder / "digits.npz", "--samples", 5, "-o", adv)
    assert _run("attack", LENET, *made, "--mean", "0.1", "--set", "steps=20") in (0, 5)
    capsys.readouterr()
    with np.load(adv) as stored:
        arrays = dict(stored)
    about = json.loads(str(arrays.pop("about")))
    assert (about["mean"], about["std"]) == ([0.1], None)
    assert _run("attack", LENET, "--replay", adv, "--mean", "0.1", "--std", "1") == 0
    assert "warning" not in capsys.readouterr().err
    assert _run("attack", LENET, "--replay", adv, "--std", "0.5") == 0
    said = capsys.readouterr().err
    assert "attacked with mean 0.1 and std none, and now has mean none and std 0.5" in said
    assert _run("attack", folder / "hardened.onnx", "--replay", adv) == 0, "has its own, maybe"
    del about["mean"], about["std"]
    np.savez(old, **arrays, about=np.array(json.dumps(about)))
    assert _run("attack", LENET, "--replay", old) == 0, "files were written without these once"
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_is_made_by_its_name(name: str) -> None:
    assert parse_attack(name).name == name


def test_names_of_a_list_are_given_between_commas() -> None:
    assert parse_attack("corruptions", ["kinds=blur, shift"]) == Corruptions(
        kinds=("blur", "shift")
    )
    with pytest.raises(ParameterError, match=r"kinds must be some of brightness, .*'fog'"):
        parse_attack("corruptions", ["kinds=blur,fog"])


def test_what_text_cannot_say_is_told() -> None:
    with pytest.raises(ParameterError, match=r"pgd: target_classes is .*: set it in Python"):
        parse_attack("pgd", ["target_classes=3"])
    with pytest.raises(ParameterError, match="random_start must be true or false, got 'yes'"):
        parse_attack("pgd", ["random_start=yes"])


def test_corruptions_need_no_epsilon(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, kinds = folder / "digits.npz", ("--set", "kinds=brightness,blur")
    arguments = ("--data", data, "--samples", 5, "--attack", "corruptions", *kinds)
    out = folder / "result.json"
    assert _run("attack", LENET, *arguments, "--json", out) == 0
    assert json.loads(out.read_bytes())["threat"]["epsilon"] is None
    assert _run("attack", LENET, *arguments, "--epsilon", "0.1") == 2
    assert "give epsilon inf" in capsys.readouterr().err


def test_an_attack_says_which_norms_it_knows(lenet: jr.Model, mnist: jr.Dataset) -> None:
    threat = jr.ThreatModel(norm="l1", epsilon=1.0)
    square = Suite("square", (Trial(name="square", attack=parse_attack("square")),))
    with pytest.raises(ParameterError, match="no attack of the suite square knows the norm l1"):
        jr.evaluate(lenet, mnist.x[:5], mnist.y[:5], threat=threat, suite=square, device="cpu")
    both = Suite("both", (Trial(name="pgd", attack=PGD(steps=2)), *square.trials))
    found = jr.evaluate(lenet, mnist.x[:5], mnist.y[:5], threat=threat, suite=both, device="cpu")
    assert any("square of the suite both do not know l1" in each.message for each in found.findings)


@pytest.mark.parametrize("curve", [(), ("--curve", "0.01,0.02")])
def test_a_wrong_baseline_ends_with_the_code_for_inconclusive(
    folder: Path, capsys: pytest.CaptureFixture[str], curve: tuple[str, ...]
) -> None:
    half = folder / "half.onnx"
    jr.save(jr.retrofit(jr.load(LENET), jump=0.5).model, half)
    arguments = ("--data", folder / "digits.npz", "--samples", 5, "--suite", "naive")
    assert _run("evaluate", folder / "hardened.onnx", *arguments, "--baseline", half, *curve) == 5
    said = capsys.readouterr()
    assert "hardened.onnx, and is not its original" in said.out
    assert "Inconclusive: " in said.out
    assert said.err.count("jr-onnx: JR006 error: ") == 1, "told before the attacks, too"


def test_an_attack_that_says_nothing_ends_with_the_code_for_inconclusive(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels that are one too low: the accuracy under attack would be that of guessing."""
    with np.load(folder / "digits.npz") as stored:
        kept = stored["y"] > 0
        np.savez(folder / "shifted.npz", x=stored["x"][kept], y=stored["y"][kept] - 1)
    out = folder / "result.json"
    arguments = ("--data", folder / "shifted.npz", "--set", "steps=2", "--json", out)
    assert _run("attack", LENET, *arguments) == 5
    assert "shifted by one" in capsys.readouterr().out
    assert json.loads(out.read_bytes())["inconclusive"] is True


@pytest.mark.parametrize(
    ("dims", "options"),
    [("3, 8, 8", ("--preprocess", "channels=bgr")), ("8, 8, 3", ())],
    ids=["bgr", "nhwc"],
)
def test_images_have_the_colours_of_the_pictures_they_are_made_from(
    tmp_path: Path, dims: str, options: tuple[str, ...]
) -> None:
    """The classes are more red and more green; the first model takes bgr, the second rgb."""
    image = pytest.importorskip("PIL.Image")
    text = (
        '<ir_version: 8, opset_import: ["" : 13]> '
        f"sums (float[n, {dims}] x) => (float[n, 2] z) "
        "<float[192, 2] w> { flat = Flatten(x) z = Gemm(flat, w) }"
    )
    proto = onnx.parser.parse_model(text)
    weights = np.zeros((8, 8, 3, 2), np.float32)
    weights[..., 0, 0] = weights[..., 1, 1] = 1
    if options:
        weights = np.moveaxis(weights[:, :, ::-1], 2, 0)
    del proto.graph.initializer[:]
    proto.graph.initializer.append(
        onnx.numpy_helper.from_array(np.ascontiguousarray(weights).reshape(192, 2), "w")
    )
    jr.save(jr.Model.of(proto), tmp_path / "sums.onnx")
    for label, colour in enumerate([(110, 100, 250), (100, 110, 250)]):
        (tmp_path / "pictures" / str(label)).mkdir(parents=True)
        picture = image.new("RGB", (8, 8), colour)
        picture.save(tmp_path / "pictures" / str(label) / "one.png")
    made = ("--data", tmp_path / "pictures", "--epsilon", "10/255", "--images", tmp_path / "png")
    assert _run("attack", tmp_path / "sums.onnx", *made, *options) in (0, 5)
    written = sorted((tmp_path / "png").glob("*.png"))
    assert len(written) == 2
    for label, path in enumerate(written):
        before = np.asarray(image.open(tmp_path / "pictures" / str(label) / "one.png")).astype(int)
        assert np.abs(np.asarray(image.open(path)) - before).max() <= 10


def test_images_are_not_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "png").mkdir()
    (folder / "png" / "mine.png").write_bytes(b"")
    arguments = ("--data", folder / "digits.npz", "--images", folder / "png")
    assert _run("attack", LENET, *arguments, "--set", "steps=1") == 3
    assert "has files already. Pass --force" in capsys.readouterr().err
    assert _run("attack", LENET, *arguments, "--set", "steps=40", "--force") == 0
    assert _run("attack", LENET, *arguments[:2], "--images", folder / "digits.npz") == 3
    assert "is a file; expected a folder" in capsys.readouterr().err


def test_a_folder_of_images_that_cannot_be_made_is_told_before_the_attack(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Attack, "run", lambda *args, **options: pytest.fail("it attacks"))
    arguments = ("--data", folder / "digits.npz", "--images")
    assert _run("attack", LENET, *arguments, folder / "digits.npz" / "new" / "png") == 3
    assert "cannot be made a folder" in capsys.readouterr().err
    if Path("/proc").is_dir():
        assert _run("attack", LENET, *arguments, "/proc/png") == 3
        assert "/proc/png: cannot be made a folder" in capsys.readouterr().err


def test_more_samples_than_there_are_are_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--data", folder / "digits.npz", "--samples", 31, "--epsilon", "0.01")
    assert _run("attack", LENET, *arguments, "--set", "steps=4") == 0
    assert "--samples 31: " in capsys.readouterr().err


def test_ctrl_c_shows_and_writes_what_is_finished(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    run, ran = Attack.run, [0]

    def counted(self: Attack, *args: Any, **options: Any) -> Any:
        ran[0] += 1
        if ran[0] > 2:
            raise KeyboardInterrupt
        return run(self, *args, **options)

    monkeypatch.setattr(Attack, "run", counted)
    out, data = folder / "result.json", folder / "digits.npz"
    arguments = ("--data", data, "--samples", 10, "--suite", "standard", "--json", out)
    assert _run("evaluate", folder / "hardened.onnx", *arguments) == 130
    said = capsys.readouterr().out
    assert "apgd-ce, linf 0.1" in said
    assert "apgd-t" not in said
    document = json.loads(out.read_bytes())
    schema = json.loads((REPOSITORY / "docs/schemas/evaluation-1.json").read_bytes())
    jsonschema.Draft202012Validator(schema).validate(document)
    assert [len(model["attacks"]) for model in document["models"]] == [1, 1]
