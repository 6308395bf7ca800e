"""Adversarial examples on disk: made on one model, tried again on any other.

One .npz: x_adv, x, y, broken, and `about`, what made them, as JSON.
"""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jr_onnx.data.npz import UNREADABLE
from jr_onnx.errors import DataError, ParameterError
from jr_onnx.evaluate import Evaluation
from jr_onnx.model import write_atomically

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
        about: attack, threat model, seed, and the model's hash.
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
            "attacks": [outcome.trial.to_json() for outcome in model.outcomes.values()],
        }
        return cls(x_adv, evaluation.x, y, broken, about)

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
        force: bool = False,
    ) -> int:
        """Writes the broken examples as PNG, `00012_label7.png`; returns how many.

        Rounding to 8 bits moves a pixel by up to 1/510 of the range: an image may be classified
        correctly again. The .npz has the exact examples.

        Args:
            folder: made if it is not there.
            bounds: of the pixels.
            force: replace images that are there already.

        Raises:
            DataError: these are no images (samples, 1 or 3 channels, height, width).
            OutputError: an image is there already.
        """
        check_images(self.x_adv.shape[1:])
        low, high = bounds
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        scaled = np.rint((self.x_adv - low) * (255 / (high - low))).astype(np.uint8)
        chosen = np.flatnonzero(self.broken)
        for at in chosen:
            _write_png(place / f"{at:05d}_label{self.y[at]}.png", scaled[at], force)
        return len(chosen)


def check_images(shape: tuple[int, ...]) -> None:
    """Refuses examples that `save_images` cannot write.

    Args:
        shape: of one example.

    Raises:
        DataError: it is no image (1 or 3 channels, height, width).
    """
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise DataError(
            f"examples of shape {shape} are no images (1 or 3 channels, height, width): save them "
            "as .npz only"
        )


def _write_png(path: Path, image: Array, force: bool) -> None:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            "PNG files need Pillow: pip install 'jr-onnx[images]', or save as .npz only"
        ) from error
    pixels = image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    write_atomically(path, file.getvalue(), force=force)
