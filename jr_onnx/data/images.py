"""One image file -> uint8, resized, cropped and laid out; Pillow is imported here alone.

ICC profiles are ignored. 16-bit and float pixels are refused: they have no agreed scale to 0..255,
and Pillow would drop half of the bits of some.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from jr_onnx.data.dataset import Array
from jr_onnx.errors import DataError
from jr_onnx.preprocess import Preprocessing

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (
    ".bmp",
    ".gif",
    ".jpeg",
    ".jpg",
    ".pbm",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)
# No other decoder of Pillow is tried: some start programs, and all are a surface for attacks.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def require_pillow() -> None:
    """Checks that images can be decoded.

    Raises:
        DataError: Pillow is not installed.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"image files need Pillow. Install it with pip install 'jr-onnx[images]' ({error})"
        ) from error


def decode(file: IO[bytes], steps: Preprocessing, where: str) -> Array:
    """Returns an image as uint8, `(channels, height, width)` or as the layout says.

    Args:
        file: its bytes.
        steps: what is done to it.
        where: the file's name, for messages.

    Raises:
        DataError: it is no image that is supported, broken, too large, or does not fit the steps.
    """
    with _pillow_may_fail(where):
        from PIL import Image, ImageOps

        with Image.open(file, formats=_FORMATS) as image:
            _check(image, where)
            upright = ImageOps.exif_transpose(image) if steps.exif else image
            flat = _opaque(upright, steps, where)
            picture = flat.convert("L" if steps.channels == "gray" else "RGB")
        return _laid_out(np.asarray(_sized(picture, steps, where)), steps)


def _check(image: Image.Image, where: str) -> None:
    frames = getattr(image, "n_frames", 1)
    # A JPEG with a preview inside counts as two frames.
    if frames > 1 and image.format not in ("JPEG", "MPO"):
        raise DataError(f"{where}: holds {frames} frames, one picture is expected. Save it as one")
    stored = [str(tile) for tile in getattr(image, "tile", ())]  # of 16-bit RGB, the mode is RGB
    if image.mode not in _MODES or any(";16" in each for each in stored):
        kind = image.mode if image.mode not in _MODES else "16 bits a channel"
        raise DataError(
            f"{where}: has pixels of the kind {kind}; expected 8 bits a channel (grey, RGB, "
            "palette, CMYK). Convert it, or save the data as .npz with floats"
        )


def _opaque(image: Image.Image, steps: Preprocessing, where: str) -> Image.Image:
    if steps.transparency == "refuse" and image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
        if alpha.min() < 255:
            raise DataError(
                f"{where}: {(alpha < 255).mean():.0%} of its pixels are transparent. Put it on a "
                'background, or drop the alpha channel (transparency = "drop")'
            )
    return image


def _sized(image: Image.Image, steps: Preprocessing, where: str) -> Image.Image:
    from PIL import Image

    if steps.resize is not None:
        height, width = _resized(steps.resize, image.height, image.width)
        how = Image.Resampling[steps.interpolation.upper()]
        image = image.resize((width, height), how)
    if steps.crop is not None:
        height, width = _pair(steps.crop)
        top, left = (round((image.height - height) / 2), round((image.width - width) / 2))
        if top < 0 or left < 0:
            raise DataError(
                f"{where}: is {image.height}x{image.width} (height x width), smaller than the crop "
                f"of {height}x{width}. Resize it first (--preprocess resize=256)"
            )
        image = image.crop((left, top, left + width, top + height))
    return image


def _resized(size: int | tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """Returns height and width; one number is the shorter side, the other is rounded down."""
    if isinstance(size, tuple):
        return size
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)


def _laid_out(pixels: Array, steps: Preprocessing) -> Array:
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    if steps.channels == "bgr":
        pixels = pixels[:, :, ::-1]
    return pixels if steps.layout == "nhwc" else pixels.transpose(2, 0, 1)


@contextmanager
def _pillow_may_fail(where: str) -> Iterator[None]:
    require_pillow()
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata; what matters is raised
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        except DataError:
            raise
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise DataError(
                f"{where}: too large, decoding it could fill the memory ({_one_line(error)}). "
                "Shrink it, or leave it out"
            ) from error
        except Exception as error:  # Pillow's decoders raise a dozen types without a common base
            raise DataError(
                f"{where}: cannot be decoded as an image ({_one_line(error)}). Replace it, or "
                "leave it out"
            ) from error


def _one_line(error: BaseException) -> Any:
    return " ".join(f"{type(error).__name__}: {error}".split())
