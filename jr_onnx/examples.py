"""Adversarial examples on disk: made on one model, tried again on any other.

One .npz: x_adv, x, y, broken, and `about`, what made them, as JSON.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jr_onnx.data.images import require_pillow
from jr_onnx.data.npz import UNREADABLE
from jr_onnx.errors import DataError, OutputError, ParameterError
from jr_onnx.evaluate import Evaluation
from jr_onnx.model import Model, write_atomically
from jr_onnx.preprocess import Preprocessing

Array = np.ndarray[Any, Any]
_ARRAYS = ("x_adv", "x", "y", "broken")


@dataclass(frozen=True)
class AdversarialExamples:
    """What an attack returned, with what it started from.

    Attributes:
        x_adv: `(samples, ...)`; x itself where the attack failed.
        x: like x_adv, the examples.
        y: int64 `(samples,)`, their labels.
        broken: bool `(samples,)`, where the model that was attacked is wrong on x_adv and was
            right on x.
        about: attack, threat model, seed, the model's hash, and the mean and std before it, which
            files of older versions lack.
    """

    x_adv: Array = field(repr=False)
    x: Array = field(repr=False)
    y: Array = field(repr=False)
    broken: Array = field(repr=False)
    about: dict[str, Any]

    @classmethod
    def of(cls, evaluation: Evaluation, y: Array) -> AdversarialExamples:
        """Takes the examples that the last model's trials broke, the first of each.

        Args:
            evaluation: what was tried.
            y: int `(samples,)`, the labels.

        Raises:
            ParameterError: the evaluation was told not to keep them.
        """
        model = evaluation.models[-1]
        x_adv, broken = evaluation.x.copy(), np.zeros(len(y), bool)
        for outcome in model.outcomes.values():
            if len(outcome.result.x_adv) < len(outcome.indices):
                raise ParameterError("the evaluation has none: it ran with keep_examples=False")
            new = outcome.result.correct & ~outcome.robust[outcome.indices]
            new &= ~broken[outcome.indices]
            x_adv[outcome.indices[new]] = outcome.result.x_adv[new]
            broken[outcome.indices[new]] = True
        about = {
            "threat": evaluation.threat.to_json(),
            "seed": evaluation.seed,
            "sha256": model.model.sha256,
            "mean": evaluation.preprocessing.mean,
            "std": evaluation.preprocessing.std,
            "attacks": [outcome.trial.to_json() for outcome in model.outcomes.values()],
        }
        return cls(x_adv, evaluation.x, y, broken, about)

    def normalized_otherwise(self, model: Model, steps: Preprocessing) -> bool:
        """Whether this very model was attacked with another mean or std in front of it.

        Of other models, and where a file does not say, nothing is known: False.

        Args:
            model: which the examples are about to be tried on.
            steps: its mean and std count.
        """
        if self.about.get("sha256") != model.sha256:
            return False
        return any(
            name in self.about
            and _numbers(self.about[name], neutral) != _numbers(getattr(steps, name), neutral)
            for name, neutral in (("mean", 0.0), ("std", 1.0))
        )

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Writes them as .npz.

        Raises:
            OutputError: the file is there already, or cannot be written.
        """
        file = io.BytesIO()
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        np.savez_compressed(file, **arrays, about=np.array(json.dumps(self.about)))
        write_atomically(Path(path), file.getvalue(), force=force)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AdversarialExamples:
        """Reads a file that `save` wrote.

        Raises:
            DataError: it is none.
        """
        try:
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in _ARRAYS}
                about = json.loads(str(stored["about"]))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
        except (TypeError, *UNREADABLE) as error:
            raise DataError(
                f"{path}: holds no adversarial examples that jr-onnx attack -o wrote ({error})"
            ) from error
        lengths = {len(array) for array in arrays.values()}
        if len(lengths) != 1 or arrays["x_adv"].shape != arrays["x"].shape:
            raise DataError(f"{path}: its arrays do not belong together, it was changed")
        return cls(**arrays, about=about)

    def save_images(
        self,
        folder: str | os.PathLike[str],
        bounds: tuple[float, float],
        *,
        channels: str | None = None,
        layout: str | None = None,
        force: bool = False,
    ) -> int:
        """Writes the broken examples as PNG, `00012_label7.png`; returns how many.

        Rounding to 8 bits moves a pixel by up to 1/510 of the range: an image may be classified
        correctly again. The .npz has the exact examples.

        Args:
            folder: made if it is not there.
            bounds: of the pixels.
            channels: their order in x, as in `Preprocessing`: `rgb`, `bgr` or `gray`; None is rgb.
            layout: of x, as there: `nchw` or `nhwc`; None is nchw.
            force: replace images that are there already.

        Raises:
            DataError: these are no images of 1 or 3 channels in that layout, or Pillow is missing.
            OutputError: an image is there already, or the folder cannot be made.
        """
        check_images(self.x_adv.shape[1:], layout=layout)
        low, high = bounds
        place = Path(folder)
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{folder}: cannot be made a folder ({error.strerror})") from error
        pixels = np.rint((self.x_adv - low) * (255 / (high - low))).astype(np.uint8)
        if layout != "nhwc":
            pixels = np.moveaxis(pixels, 1, -1)
        if channels == "bgr":
            pixels = pixels[..., ::-1]
        chosen = np.flatnonzero(self.broken)
        for at in chosen:
            _write_png(place / f"{at:05d}_label{self.y[at]}.png", pixels[at], force)
        return len(chosen)


def _numbers(given: Sequence[float] | None, neutral: float) -> tuple[float, ...]:
    """Returns a mean or std in one spelling: None is neutral, equal numbers are one."""
    numbers = tuple(given or (neutral,))
    return numbers[:1] if len(set(numbers)) == 1 else numbers


def check_images(shape: tuple[int, ...], *, layout: str | None = None) -> None:
    """Refuses examples that `save_images` cannot write.

    Args:
        shape: of one example.
        layout: `nchw` or `nhwc`; None is nchw.

    Raises:
        DataError: it is no image of 1 or 3 channels in that layout, or Pillow is missing.
    """
    if len(shape) != 3 or shape[-1 if layout == "nhwc" else 0] not in (1, 3):
        expected = "height, width, 1 or 3" if layout == "nhwc" else "1 or 3, height, width"
        raise DataError(
            f"examples of shape {shape} are no images in the layout {layout or 'nchw'}, which is "
            f"({expected}): set layout, or save them as .npz only"
        )
    require_pillow()


def _write_png(path: Path, pixels: Array, force: bool) -> None:
    from PIL import Image

    file = io.BytesIO()
    image = pixels[..., 0] if pixels.shape[-1] == 1 else np.ascontiguousarray(pixels)
    Image.fromarray(image).save(file, format="PNG")
    write_atomically(path, file.getvalue(), force=force)
