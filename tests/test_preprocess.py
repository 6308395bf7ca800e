"""Preprocessing as a value, where it is written down, and mean and std inside the graph."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import jr_onnx as jr
from jr_onnx.errors import JrOnnxError, ModelError, ParameterError, UnsupportedOpsetError
from jr_onnx.model import check
from jr_onnx.preprocess import (
    METADATA_KEY,
    Preprocessing,
    load_preprocessing,
    normalized,
    parse_numbers,
    parse_size,
    preprocessing_for,
)
from jr_onnx.session import Session

Array = np.ndarray[Any, Any]
MakeModel = Callable[..., jr.Model]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DTYPES = {"float": np.float32, "float16": np.float16, "double": np.float64}


def run(model: jr.Model, x: Array) -> Array:
    session = Session(model, device="cpu")
    return session.run({session.inputs[0].name: x})[0]


def identity(
    text_model: MakeModel, shape: str, element: str = "float", opset: int = 13
) -> jr.Model:
    """Returns a model that gives back what it sees."""
    inout = f"({element}[{shape}] x) => ({element}[{shape}] y)"
    return text_model(f"seen {inout} {{ y = Identity(x) }}", opset=opset, ir_version=7)


CASES = [
    ("n, 3, 4, 5", None, (3, 1, 1)),
    ("n, 4, 5, 3", None, (3,)),
    ("n, 3, 4, 3", "nhwc", (3,)),
    ("n, 3, 4, 3", "nchw", (3, 1, 1)),
    ("n, c, h, w", None, (3, 1, 1)),
    ("n, h, w, 3", None, (3,)),
    ("n, 3", None, (3,)),
    ("2, 3, 7", None, (3, 1)),
]


@pytest.mark.parametrize("element", DTYPES)
@pytest.mark.parametrize(("shape", "layout", "broadcast"), CASES)
def test_the_model_sees_x_minus_mean_over_std(
    text_model: MakeModel, shape: str, layout: str | None, broadcast: Any, element: str
) -> None:
    dtype = DTYPES[element]
    sizes = [{"n": 2, "c": 3, "h": 4, "w": 5}.get(size) or int(size) for size in shape.split(", ")]
    x = np.random.default_rng(0).random(sizes).astype(dtype)
    model = identity(text_model, shape, element)
    result = normalized(model, MEAN, STD, layout=layout)
    check(result)
    mean, std = (np.array(numbers, dtype).reshape(broadcast) for numbers in (MEAN, STD))
    # onnxruntime keeps float32 between two operators of float16
    rtol = 2e-3 if element == "float16" else 0
    np.testing.assert_allclose(run(result, x), (x - mean) / std, rtol)
    assert result.proto.graph.input == model.proto.graph.input
    assert result.proto.graph.output == model.proto.graph.output


@pytest.mark.parametrize("opset", [7, 8, 11, 13, 18, 21])
def test_any_opset(text_model: MakeModel, opset: int) -> None:
    graph = "g (float[n, 2] x) => (float[n, 2] y) { y = Relu(x) }"
    result = normalized(text_model(graph, opset=opset, ir_version=3), (0.5,), (0.25,))
    check(result)
    assert run(result, np.array([[0, 1]], np.float32)).tolist() == [[0, 2]]


def test_either_alone_and_neither(text_model: MakeModel) -> None:
    model, x = identity(text_model, "n, 2"), np.array([[0.5, 1]], np.float32)
    assert run(normalized(model, mean=(0.5,)), x).tolist() == [[0, 0.5]]
    assert run(normalized(model, std=(0.5, 0.25)), x).tolist() == [[1, 4]]
    assert run(normalized(model, mean=(0.5,), std=(0.5, 0.25)), x).tolist() == [[0, 2]]
    assert normalized(model) is model


def test_users_in_branches_see_it_too_and_weights_are_no_input(text_model: MakeModel) -> None:
    graph = """g (float[n, 2] x, bool c, float[2] w) => (float[n, 2] y)
        <bool c = {1}, float[2] w = {3, 3}> {
        y = If (c) <then_branch = a () => (float[n, 2] p) { p = Mul(x, w) },
                    else_branch = b () => (float[n, 2] q) { q = Identity(x) }>
    }"""
    result = normalized(text_model(graph), (0.5,), (0.25,))
    check(result)
    assert run(result, np.array([[0.5, 1]], np.float32)).tolist() == [[0, 6]]


def test_gradients_are_in_pixels(lenet: jr.Model, mnist: jr.Dataset) -> None:
    mean, std = 0.1307, 0.3081
    x, y = mnist.x[:4], mnist.y[:4]
    seen = ((x - np.float32(mean)) / np.float32(std)).astype(np.float32)
    inner = jr.Target(lenet, device="cpu").differentiate(seen, y)
    outer = jr.Target(normalized(lenet, (mean,), (std,)), device="cpu").differentiate(x, y)
    np.testing.assert_array_equal(outer.logits, inner.logits)
    np.testing.assert_allclose(outer.gradient, inner.gradient / std, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("form", ["sub-greater-where", "function", "thresholded-relu", "mul-cast"])
def test_a_hardened_model_stays_one(lenet: jr.Model, form: str) -> None:
    hardened = jr.retrofit(lenet, jump=0.3, form=form).model
    before, after = (normalized(model, (0.1,), (0.3,)) for model in (lenet, hardened))
    check(after)
    assert jr.restore(after).content == before.content
    verified = jr.verify(before, after)
    assert verified.equivalent
    assert verified.jumps == jr.verify(lenet, hardened).jumps
    x = np.random.default_rng(0).random((3, 1, 28, 28)).astype(np.float32)
    again = jr.retrofit(before, jump=0.3, form=form).model
    np.testing.assert_array_equal(run(after, x), run(again, x))


def test_sites_right_behind_the_input_and_in_branches(text_model: MakeModel) -> None:
    graph = """g (float[n, 2] x) => (float[n, 2] y) <bool c = {1}> {
        r = Relu(x)
        z = If (c) <then_branch = a () => (float[n, 2] p) { p = Relu(x) },
                    else_branch = b () => (float[n, 2] q) { q = Identity(x) }>
        y = Sub(r, z)
    }"""
    model = text_model(graph)
    hardened = jr.retrofit(model, jump=0.3).model
    before, after = (normalized(each, (0.5,), (0.25,)) for each in (model, hardened))
    assert jr.restore(after).content == before.content
    assert jr.verify(before, after).equivalent


REFUSED: dict[str, tuple[str, dict[str, Any], type[JrOnnxError], str]] = {
    "count": ("n, 4, 5, 5", {"mean": MEAN}, ParameterError, r"3 numbers, .* \(n, 4, 5, 5\): no su"),
    "two axes": ("n, 3, 5, 3", {"mean": MEAN}, ParameterError, "several axes have that size: set"),
    "layout": ("n, 3, 5, 4", {"mean": MEAN, "layout": "nhwc"}, ParameterError, "no such axis"),
    "lengths": ("n, 3", {"mean": MEAN, "std": (1, 2)}, ParameterError, "mean has 3 numbers and st"),
    "zero": ("n, 3", {"std": (0.1, 0, 1)}, ParameterError, "std must be greater than 0"),
    "NaN": ("n, 3", {"mean": (np.nan,)}, ParameterError, "mean must be finite numbers"),
    "none": ("n, 3", {"mean": ()}, ParameterError, "mean must be finite numbers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_numbers_that_do_not_fit_are_refused(text_model: MakeModel, case: str) -> None:
    shape, given, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        normalized(identity(text_model, shape), **given)


MODELS: dict[str, tuple[str, int, type[JrOnnxError], str]] = {
    "opset": ("(float[n, 2] x) => (float[n, 2] y)", 6, UnsupportedOpsetError, "need opset 7, .* 6"),
    "integers": (
        "(uint8[n, 2] x) => (uint8[n, 2] y)",
        13,
        ModelError,
        "'x' is uint8; mean and std",
    ),
    "no shape": ("(float x) => (float y)", 13, ModelError, "'x' has no shape; expected .batch"),
    "inputs": ("(float[n] x, float[n] z) => (float[n] y)", 13, ModelError, r"got \['x', 'z'\]"),
}


@pytest.mark.parametrize("case", MODELS)
def test_models_that_do_not_fit_are_refused(text_model: MakeModel, case: str) -> None:
    inout, opset, error, message = MODELS[case]
    model = text_model(f"g {inout} {{ y = Identity(x) }}", opset=opset)
    with pytest.raises(error, match=message):
        normalized(model, (0.5,))


def test_a_std_that_the_type_rounds_to_zero(text_model: MakeModel) -> None:
    with pytest.raises(ParameterError, match="is 0 in float16, the type of the input 'x'"):
        normalized(identity(text_model, "n, 3", "float16"), std=(1e-9,))


def test_twice_is_refused_and_metadata_are_not_taken_twice(text_model: MakeModel) -> None:
    model = noted(identity(text_model, "n, 2"), {METADATA_KEY: '{"mean": 0.5, "std": 0.25}'})
    steps = preprocessing_for(model)
    result = normalized(model, steps.mean, steps.std)
    assert preprocessing_for(result).mean is None
    with pytest.raises(ParameterError, match="has mean and std in front already"):
        normalized(result, (0.5,))


def test_a_model_edited_after_its_retrofit_is_refused(lenet: jr.Model) -> None:
    proto = jr.retrofit(lenet, jump=0.3).model.parse()
    proto.graph.doc_string = "edited"
    with pytest.raises(JrOnnxError, match="was edited after it was hardened"):
        normalized(jr.Model.of(proto), (0.5,))


def noted(model: jr.Model, entries: dict[str, str]) -> jr.Model:
    proto = model.parse()
    onnx.helper.set_model_props(proto, entries)
    return jr.Model.of(proto)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "interpolation": ({"interpolation": "area"}, "interpolation must be one of nearest, .*'area'"),
    "channels": ({"channels": "RGB"}, "channels must be one of rgb, bgr, gray, got 'RGB'"),
    "layout": ({"layout": "nwhc"}, "layout must be one of nchw, nhwc"),
    "transparency": ({"transparency": None}, "transparency must be one of refuse, drop, got None"),
    "exif": ({"exif": "yes"}, "exif must be true or false, got 'yes'"),
    "resize": ({"resize": 0}, "resize must be one positive whole number, or height and width"),
    "three": ({"crop": [1, 2, 3]}, "crop must be one positive whole number"),
    "float": ({"crop": 1.5}, "crop must be one positive whole number"),
    "bool": ({"crop": True}, "crop must be one positive whole number"),
    "bounds": ({"bounds": (1, 0)}, "bounds must be two ascending numbers"),
    "one bound": ({"bounds": 1}, "bounds must be two ascending numbers"),
    "text": ({"mean": "0.5"}, "mean must be numbers, got '0.5'"),
    "bytes": ({"mean": 123.7}, r"mean 123.7 is outside the bounds \[0, 1\].* Divide them by 255"),
    "pixels": (
        {"mean": 0.5, "bounds": (0, 255)},
        "looks like one for pixels in .0, 1., the bounds",
    ),
    "std": ({"std": (1, -1)}, "std must be greater than 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_values_that_make_no_sense(case: str) -> None:
    given, message = WRONG[case]
    with pytest.raises(ParameterError, match=message):
        Preprocessing(**given)


def test_numbers_and_lists_are_taken_alike() -> None:
    steps = Preprocessing(resize=[8, 9], mean=0.5, std=[1, 2])  # type: ignore[arg-type]
    assert (steps.resize, steps.mean, steps.std) == ((8, 9), (0.5,), (1.0, 2.0))
    assert Preprocessing(mean=(123.7,), bounds=(0, 255)).bounds == (0.0, 255.0)


FITTED: list[tuple[dict[str, Any], tuple[Any, ...], tuple[str | None, str | None]]] = [
    ({}, (3, 224, 224), ("nchw", "rgb")),
    ({}, (224, 224, 3), ("nhwc", "rgb")),
    ({}, (1, 28, 28), ("nchw", "gray")),
    ({}, ("c", "h", "w"), ("nchw", None)),
    ({"channels": "bgr"}, (None, None, 3), ("nhwc", "bgr")),
    ({"layout": "nhwc"}, (3, 8, 3), ("nhwc", "rgb")),
    ({}, (784,), (None, None)),
]


@pytest.mark.parametrize(("given", "shape", "expected"), FITTED)
def test_layout_and_channels_follow_from_the_model(
    given: dict[str, Any], shape: tuple[Any, ...], expected: Any
) -> None:
    steps = Preprocessing(**given).fitted(shape)
    assert (steps.layout, steps.channels) == expected


@pytest.mark.parametrize(
    ("given", "shape", "message"),
    [
        (
            {"channels": "gray"},
            (3, 8, 8),
            "3 channel.s. in the layout nchw; expected 1 .channels gr",
        ),
        ({}, (4, 8, 8), r"takes \(4, 8, 8\), 4 channel.s. .*; expected 1 or 3 .channels unset"),
        ({"layout": "nchw"}, (8, 8, 3), "8 channel.s. in the layout nchw"),
    ],
)
def test_channels_that_the_model_does_not_take(
    given: dict[str, Any], shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ParameterError, match=message):
        Preprocessing(**given).fitted(shape)


def test_flags_go_before_the_file_and_that_before_the_metadata(
    text_model: MakeModel, tmp_path: Path
) -> None:
    written = {"resize": 1, "crop": 1, "interpolation": "nearest", "exif": False}
    model = noted(identity(text_model, "n, 3, 8, 8"), {METADATA_KEY: json.dumps(written)})
    file = tmp_path / "steps.toml"
    file.write_text("[preprocessing]\nresize = 2\ncrop = [2, 3]\n")
    steps = preprocessing_for(model, file, resize=3, mean=None)
    assert (steps.resize, steps.crop, steps.interpolation) == (3, (2, 3), "nearest")
    assert (steps.exif, steps.layout, steps.channels) == (False, "nchw", "rgb")
    with pytest.raises(ParameterError, match="an option: preprocessing has no 'size', only exif"):
        preprocessing_for(model, size=3)


TOML = {
    "unknown": ("resise = 3", "steps.toml: preprocessing has no 'resise', only exif, transparency"),
    "invalid": ("resize 3", "steps.toml: not valid TOML"),
    "no table": ("preprocessing = 3", "steps.toml: preprocessing must be a table, got 3"),
    "value": ("[preprocessing]\nresize = '3'", "resize must be one positive whole number"),
}


@pytest.mark.parametrize("case", TOML)
def test_a_file_is_refused(tmp_path: Path, case: str) -> None:
    text, message = TOML[case]
    (tmp_path / "steps.toml").write_text(text)
    with pytest.raises(ParameterError, match=message):
        load_preprocessing(tmp_path / "steps.toml")


def test_a_file_may_leave_out_the_table(tmp_path: Path) -> None:
    (tmp_path / "steps.toml").write_text("bounds = [-1, 1]")
    assert load_preprocessing(tmp_path / "steps.toml").bounds == (-1, 1)
    with pytest.raises(ParameterError, match=r"none.toml: cannot be read \(No such file"):
        load_preprocessing(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "metadata 'jr_onnx/preprocessing': not valid JSON"),
        ("[]", r"expected a JSON object, got \[\]"),
        ('{"size": 3}', "metadata 'jr_onnx/preprocessing': preprocessing has no 'size'"),
    ],
)
def test_metadata_are_refused(text_model: MakeModel, value: str, message: str) -> None:
    model = noted(identity(text_model, "n, 3, 8, 8"), {METADATA_KEY: value})
    with pytest.raises((ModelError, ParameterError), match=message):
        preprocessing_for(model)


def test_the_image_entries_of_onnx_are_read(text_model: MakeModel) -> None:
    plain = identity(text_model, "n, 3, 8, 8")
    entries = {
        "image.bitmappixelformat": "BGR8",
        "Image.NominalPixelRange": "NominalRange_0_255",
        "Image.ColorSpaceGamma": "SRGB",
    }
    steps = preprocessing_for(noted(plain, entries))
    assert (steps.channels, steps.mean, steps.std) == ("bgr", (0,), (1 / 255,))
    steps = preprocessing_for(noted(plain, {"Image.NominalPixelRange": "Normalized_1_1"}))
    assert (steps.mean, steps.std) == ((0.5,), (0.5,))
    steps = preprocessing_for(noted(plain, {"Image.NominalPixelRange": "Normalized_0_1"}))
    assert steps.mean is steps.std is None
    for key, value in (
        ("Image.NominalPixelRange", "NominalRange_16_235"),
        ("Image.BitmapPixelFormat", "Rgba8"),
        ("Image.ColorSpaceGamma", "Linear"),
    ):
        with pytest.raises(ModelError, match=f"metadata {key} is '{value}', only"):
            preprocessing_for(noted(plain, {key: value}))


def test_own_metadata_go_before_those_of_onnx(text_model: MakeModel) -> None:
    entries = {METADATA_KEY: "{}", "Image.NominalPixelRange": "Normalized_1_1"}
    assert preprocessing_for(noted(identity(text_model, "n, 3, 8, 8"), entries)).mean is None


def test_text_of_flags_is_read() -> None:
    assert parse_size("224") == 224
    assert parse_size("240x320") == parse_size("240X320") == (240, 320)
    assert parse_numbers("0.5, 1/4,2") == (0.5, 0.25, 2)
    for text in ("", "0", "2x", "1x2x3", "a", "-3"):
        with pytest.raises(ParameterError, match="a size is a number, or HEIGHTxWIDTH"):
            parse_size(text)
    for text in ("", "a", "1,", "1/0", "1/2/3"):
        with pytest.raises(ParameterError, match="expected numbers between commas, such as"):
            parse_numbers(text)
