"""Options about data, and opening it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from jr_onnx.cli.console import warn
from jr_onnx.data import Dataset, load_data
from jr_onnx.errors import ParameterError
from jr_onnx.model import Model
from jr_onnx.preprocess import (
    Preprocessing,
    normalized,
    parse_numbers,
    parse_size,
    preprocessing_for,
)

Array = np.ndarray[Any, Any]

Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Examples and labels: .npz with x and y, .parquet, a folder of class folders, or a "
        ".csv of files and labels (docs/data.md).",
        show_default=False,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        "--samples", min=1, help="Use so many examples, drawn by --seed.", show_default=False
    ),
]
Preprocess = Annotated[
    list[str] | None,
    typer.Option(
        "--preprocess",
        help="How pictures become examples: a TOML file, or resize=256, crop=224, channels=bgr, "
        "bounds=0,255, ... (docs/data.md).",
        show_default=False,
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(
        "--mean",
        help="What is subtracted before the model, in units of x, one number or one a channel: "
        "attacks then work on the pixels themselves.",
        show_default=False,
    ),
]
Std = Annotated[
    str | None,
    typer.Option("--std", help="What is divided by then, as --mean.", show_default=False),
]
_PARSERS = {
    "resize": parse_size,
    "crop": parse_size,
    "bounds": parse_numbers,
    "mean": parse_numbers,
    "std": parse_numbers,
}


@dataclass(frozen=True)
class Examples:
    """Data for a model, and what comes between the two.

    Attributes:
        data: examples in pixel units, and labels.
        steps: how they were made; mean and std are still to come.
    """

    data: Dataset
    steps: Preprocessing

    def __len__(self) -> int:
        return len(self.data)

    @property
    def x(self) -> Array:
        """The examples."""
        return self.data.x

    @property
    def y(self) -> Array:
        """The labels."""
        return self.data.y

    def normalized(self, model: Model) -> Model:
        """Returns the model with mean and std in front of it."""
        return normalized(model, self.steps.mean, self.steps.std, layout=self.steps.layout)


def open_data(
    path: Path,
    model: Model,
    *,
    samples: int | None,
    preprocess: Sequence[str] | None,
    mean: str | None,
    std: str | None,
    seed: int,
) -> Examples:
    """Opens the data as the model needs it, and says what looks odd about it, on stderr.

    Raises:
        ParameterError: an option makes no sense.
        DataError: the data cannot be used.
    """
    steps = steps_for(model, preprocess, mean, std)
    data = load_data(path, preprocessing=steps, limit=samples, seed=seed)
    if samples is not None and samples > len(data):
        warn(f"--samples {samples}: {path} has {len(data)}, and all are used")
    for note in data.notes:
        warn(note)
    return Examples(data, steps)


def steps_for(
    model: Model, preprocess: Sequence[str] | None, mean: str | None, std: str | None
) -> Preprocessing:
    """Returns what comes between data and model, by the options and the model itself.

    Raises:
        ParameterError: an option makes no sense.
    """
    preprocess = preprocess or ()
    files = [text for text in preprocess if "=" not in text]
    if len(files) > 1:
        raise ParameterError(f"--preprocess takes one file, got {', '.join(files)}")
    given: dict[str, Any] = {}
    for text in preprocess:
        name, equals, value = text.partition("=")
        if equals:
            given[name] = _value(name, value)
    for name, numbers in (("mean", mean), ("std", std)):
        if numbers is not None:
            given[name] = parse_numbers(numbers)
    return preprocessing_for(model, files[0] if files else None, **given)


def _value(name: str, text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    return _PARSERS.get(name, str)(text)
