"""Where preprocessing is written down: in flags, before a TOML file, before the model's metadata.

The model says it in `metadata_props["jr_onnx/preprocessing"]`, JSON with the fields of
`Preprocessing`; or, where that is missing, in the two image entries of ONNX's own MetadataProps:

    Image.BitmapPixelFormat   Gray8, Rgb8, Bgr8
    Image.NominalPixelRange   NominalRange_0_255, Normalized_0_1, Normalized_1_1, as the mean and
                              std that take pixels in [0, 1] there
"""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

from jr_onnx.errors import ModelError, ParameterError
from jr_onnx.model import Model
from jr_onnx.preprocess.normalized import is_normalized, only_input
from jr_onnx.preprocess.preprocessing import Preprocessing

METADATA_KEY = "jr_onnx/preprocessing"
_KNOWN = tuple(field.name for field in fields(Preprocessing))
_FORMATS = {"gray8": "gray", "rgb8": "rgb", "bgr8": "bgr"}
_RANGES: dict[str, dict[str, Any]] = {
    "nominalrange_0_255": {"mean": 0.0, "std": 1 / 255},
    "normalized_0_1": {},
    "normalized_1_1": {"mean": 0.5, "std": 0.5},
}


def preprocessing_for(
    model: Model, file: str | os.PathLike[str] | None = None, **given: Any
) -> Preprocessing:
    """Collects what is known of a model's preprocessing.

    Args:
        model: its metadata are read, and layout and channels are taken from its input's shape.
        file: a TOML file, which goes before the metadata.
        given: fields of `Preprocessing`, which go before both; None leaves one out.

    Raises:
        ParameterError: a value makes no sense, or there is no such field.
        ModelError: the metadata cannot be read, or say what is not supported.
    """
    noted = _of_metadata(model)
    if is_normalized(model):
        noted = {name: value for name, value in noted.items() if name not in ("mean", "std")}
    chosen = {name: value for name, value in given.items() if value is not None}
    written = _of_toml(Path(file)) if file is not None else {}
    merged = {**noted, **written, **chosen}
    _refuse_unknown(merged, "an option")
    steps = Preprocessing(**merged)
    return steps.fitted(only_input(model).shape[1:])


def load_preprocessing(file: str | os.PathLike[str]) -> Preprocessing:
    """Reads a TOML file: the fields of `Preprocessing`, in a table `[preprocessing]` or bare.

    Raises:
        ParameterError: the file cannot be read, names an unknown field, or a value makes no sense.
    """
    return Preprocessing(**_of_toml(Path(file)))


def _of_toml(path: Path) -> dict[str, Any]:
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ParameterError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ParameterError(f"{path}: not valid TOML ({error})") from error
    found = found.get("preprocessing", found)
    if not isinstance(found, dict):
        raise ParameterError(f"{path}: preprocessing must be a table, got {found!r:.80}")
    _refuse_unknown(found, str(path))
    return found


def _of_metadata(model: Model) -> dict[str, Any]:
    entries = {entry.key: entry.value for entry in model.proto.metadata_props}
    if METADATA_KEY not in entries:
        return _of_onnx_metadata(model, entries)
    where = f"{model.name}: metadata {METADATA_KEY!r}"
    try:
        found = json.loads(entries[METADATA_KEY])
    except ValueError as error:
        raise ModelError(f"{where}: not valid JSON ({error}). Write it again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{where}: expected a JSON object, got {found!r:.80}")
    _refuse_unknown(found, where)
    return found


def _of_onnx_metadata(model: Model, entries: dict[str, str]) -> dict[str, Any]:
    """Reads the entries of ONNX's MetadataProps, whose keys and values ignore case."""
    noted = {key.lower(): value for key, value in entries.items()}
    found: dict[str, Any] = {}
    for key, known in (
        ("Image.BitmapPixelFormat", {name: {"channels": to} for name, to in _FORMATS.items()}),
        ("Image.NominalPixelRange", _RANGES),
        ("Image.ColorSpaceGamma", {"srgb": {}}),
    ):
        value = noted.get(key.lower())
        if value is None:
            continue
        if value.lower() not in known:
            raise ModelError(
                f"{model.name}: metadata {key} is {value!r}, only {', '.join(known)} are "
                "supported. Make the data ready as .npz, without this entry in the model"
            )
        found |= known[value.lower()]
    return found


def _refuse_unknown(found: dict[str, Any], where: str) -> None:
    unknown = sorted(found.keys() - set(_KNOWN))
    if unknown:
        raise ParameterError(
            f"{where}: preprocessing has no {unknown[0]!r}, only {', '.join(_KNOWN)}"
        )
