"""Attacks by name, with options as text: what a command line or a configuration file gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from jr_onnx.attacks.apgd import APGD, APGDDLR, APGDTargeted
from jr_onnx.attacks.attack import Attack
from jr_onnx.attacks.carlini_wagner import CarliniWagner
from jr_onnx.attacks.corruptions import Corruptions
from jr_onnx.attacks.deepfool import DeepFool
from jr_onnx.attacks.ead import EAD
from jr_onnx.attacks.fab import FAB, TargetedFAB
from jr_onnx.attacks.fgsm import FGSM
from jr_onnx.attacks.hopskipjump import HopSkipJump
from jr_onnx.attacks.ifgsm import IFGSM
from jr_onnx.attacks.mifgsm import MIFGSM
from jr_onnx.attacks.noise import GaussianNoise, SaltAndPepperNoise, UniformNoise
from jr_onnx.attacks.pgd import PGD
from jr_onnx.attacks.simba import SimBA
from jr_onnx.attacks.square import Square
from jr_onnx.attacks.threat import parse_epsilon
from jr_onnx.attacks.trust_region import AdaptiveTrustRegion, TrustRegion
from jr_onnx.errors import ParameterError

_ALL: tuple[type[Attack], ...] = (
    FGSM,
    PGD,
    IFGSM,
    MIFGSM,
    APGD,
    APGDDLR,
    APGDTargeted,
    DeepFool,
    TrustRegion,
    AdaptiveTrustRegion,
    CarliniWagner,
    EAD,
    FAB,
    TargetedFAB,
    Square,
    HopSkipJump,
    SimBA,
    UniformNoise,
    GaussianNoise,
    SaltAndPepperNoise,
    Corruptions,
)
ATTACKS: dict[str, type[Attack]] = {kind.name: kind for kind in _ALL}


def parse_attack(name: str, settings: Sequence[str] = ()) -> Attack:
    """Makes an attack.

    >>> parse_attack("pgd", ["steps=100", "step_size=2/255"])
    PGD(steps=100, step_size=0.00784313725490196, random_start=True, restarts=1, ...)

    Args:
        name: in `ATTACKS`.
        settings: its options, `steps=100`; numbers may be fractions, names of a list stand
            between commas: `kinds=blur,shift`.

    Raises:
        ParameterError: no such attack or option, or a value that makes no sense.
    """
    if name not in ATTACKS:
        raise ParameterError(f"attack must be one of {', '.join(ATTACKS)}, got {name!r}")
    kind = ATTACKS[name]
    hints = get_type_hints(kind)
    known = {field.name: hints[field.name] for field in fields(kind)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for setting in settings:
        option, equals, text = setting.partition("=")
        if not equals or option not in known:
            listed = ", ".join(known) or "none"
            raise ParameterError(f"{name}: {setting!r} is no option; options are {listed}")
        given[option] = _value(f"{name}: {option}", text, known[option])
    return kind(**given)


def _value(what: str, text: str, hint: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        if text == "none":
            return None
        hint = next(each for each in get_args(hint) if each is not type(None))
    if hint is bool:
        if text not in ("true", "false"):
            raise ParameterError(f"{what} must be true or false, got {text!r}")
        return text == "true"
    if hint is str:
        return text
    if hint == tuple[str, ...]:
        return tuple(part.strip() for part in text.split(","))
    if hint in (int, float):
        try:
            return int(text) if hint is int else parse_epsilon(text)
        except ValueError as error:
            raise ParameterError(f"{what} must be a number, got {text!r}") from error
    raise ParameterError(f"{what} is an option of the class alone: set it in Python, not as text")
