"""What is done to a picture before the model sees it, as a value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jr_onnx.errors import ParameterError

Size = int | tuple[int, int]
Dimensions = Sequence[int | str | None]
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
_CHOICES = {
    "interpolation": INTERPOLATIONS,
    "channels": ("rgb", "bgr", "gray"),
    "layout": ("nchw", "nhwc"),
    "transparency": ("refuse", "drop"),
}


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The steps, in their order: decode, turn, resize, crop, order, layout, scale; then mean, std.

    All but the last two make the data, and belong to image files: arrays of an `.npz` are taken as
    they are, only uint8 is scaled. Mean and std belong to the model (`normalized`), so attacks
    work in pixels.

    >>> Preprocessing(resize=256, crop=224).crop
    224

    Attributes:
        exif: turn pictures upright as their EXIF orientation says.
        transparency: of pixels that are not opaque: `refuse`, or `drop` the alpha channel.
        resize: the shorter side, or (height, width).
        interpolation: of the resize, as Pillow names and computes it.
        crop: side of the square cut from the centre, or (height, width).
        channels: `rgb`, `bgr` or `gray`; None for the model's, or rgb.
        layout: `nchw` or `nhwc`; None for the model's, or nchw.
        bounds: what the bytes 0 and 255 become; the units of x, epsilon, mean and std.
        mean: subtracted by the model, one number or one a channel.
        std: what the model divides by then, one number or one a channel.

    Raises:
        ParameterError: a value makes no sense.
    """

    exif: bool = True
    transparency: str = "refuse"
    resize: Size | None = None
    interpolation: str = "bilinear"
    crop: Size | None = None
    channels: str | None = None
    layout: str | None = None
    bounds: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed and not (value is None and name in ("channels", "layout")):
                raise ParameterError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if not isinstance(self.exif, bool):
            raise ParameterError(f"exif must be true or false, got {self.exif!r}")
        for name in ("resize", "crop"):
            object.__setattr__(self, name, _size(name, getattr(self, name)))
        for name in ("bounds", "mean", "std"):
            object.__setattr__(self, name, _numbers(name, getattr(self, name)))
        self._check_scale()

    def _check_scale(self) -> None:
        if len(self.bounds) != 2 or not self.bounds[0] < self.bounds[1]:
            raise ParameterError(f"bounds must be two ascending numbers, got {self.bounds}")
        check_normalization(self.mean, self.std)
        low, high = self.bounds
        for number in self.mean or ():
            if not low <= number <= high:
                raise ParameterError(
                    f"mean {number:g} is outside the bounds [{low:g}, {high:g}]: mean and std are "
                    "in units of x. Divide them by 255, or give the bounds 0 and 255"
                )
        if self.mean and low >= 0 and high > 100 and 0 < max(self.mean) <= 1:
            raise ParameterError(
                f"mean {self.mean} looks like one for pixels in [0, 1], the bounds are [{low:g}, "
                f"{high:g}]: mean and std are in units of x. Give the bounds 0 and 1"
            )

    def fitted(self, shape: Dimensions) -> Preprocessing:
        """Returns the steps with layout and channels filled in from the shape of one example.

        >>> Preprocessing().fitted((1, 28, 28)).channels
        'gray'

        Args:
            shape: as the model declares it, symbols and None where any size fits.

        Raises:
            ParameterError: the model does not take the channels asked for.
        """
        if len(shape) != 3:
            return self
        layout = self.layout or ("nhwc" if _last_is_channels(shape) else "nchw")
        count = shape[-1] if layout == "nhwc" else shape[0]
        channels = self.channels
        if isinstance(count, int):
            made = {None: count, "gray": 1}.get(channels, 3)
            if count not in (1, 3) or count != made:
                spelled = ", ".join(str(size or "any") for size in shape)
                raise ParameterError(
                    f"the model takes ({spelled}), {count} channel(s) in the layout {layout}; "
                    f"expected {made if channels else '1 or 3'} (channels {channels or 'unset'}). "
                    "Set layout or channels"
                )
            channels = channels or ("gray" if count == 1 else "rgb")
        return replace(self, layout=layout, channels=channels)


def parse_size(text: str) -> Size:
    """Reads `224`, or `HEIGHTxWIDTH`.

    >>> parse_size("224"), parse_size("240x320")
    (224, (240, 320))

    Raises:
        ParameterError: it is neither.
    """
    try:
        sides = [int(side) for side in text.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ParameterError(f"a size is a number, or HEIGHTxWIDTH such as 240x320, got {text!r}")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def parse_numbers(text: str) -> tuple[float, ...]:
    """Reads numbers or fractions between commas.

    >>> parse_numbers("0.5,127.5/255")
    (0.5, 0.5)

    Raises:
        ParameterError: it is something else.
    """
    try:
        pairs = [part.partition("/") for part in text.split(",")]
        return tuple(float(above) / float(below or 1) for above, _, below in pairs)
    except (ValueError, ZeroDivisionError) as error:
        raise ParameterError(
            f"expected numbers between commas, such as 0.485,0.456,0.406, got {text!r}"
        ) from error


def check_normalization(mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> None:
    """Checks what the model subtracts and divides by.

    Raises:
        ParameterError: a number is missing, not finite or not positive, or their counts differ.
    """
    for name, numbers in (("mean", mean), ("std", std)):
        if numbers is not None and not (numbers and all(map(math.isfinite, numbers))):
            raise ParameterError(f"{name} must be finite numbers, got {numbers}")
    if std and min(std) <= 0:
        raise ParameterError(f"std must be greater than 0, got {std}")
    if mean and std and len(mean) != len(std) and 1 not in (len(mean), len(std)):
        raise ParameterError(f"mean has {len(mean)} numbers and std {len(std)}; they must match")


def _last_is_channels(shape: Dimensions) -> bool:
    return shape[-1] in (1, 3) and shape[0] not in (1, 3)


def _size(name: str, value: Any) -> Size | None:
    if value is None:
        return None
    sides = list(value) if isinstance(value, (list, tuple)) else [value]
    integers = all(type(side) is int and side > 0 for side in sides)
    if not integers or (len(sides) != 2 and isinstance(value, (list, tuple))):
        raise ParameterError(
            f"{name} must be one positive whole number, or height and width, got {value!r}"
        )
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _numbers(name: str, value: Any) -> tuple[float, ...] | None:
    if value is None and name != "bounds":
        return None
    numbers = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in numbers):
        raise ParameterError(f"{name} must be numbers, got {value!r}")
    return tuple(map(float, numbers))
