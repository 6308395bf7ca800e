"""Image files: decoded, resized and cropped as Pillow does it; folders and lists of them."""

from __future__ import annotations

import io
import struct
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jr_onnx.data import load_data
from jr_onnx.data.images import decode
from jr_onnx.errors import DataError
from jr_onnx.preprocess import INTERPOLATIONS, Preprocessing

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (30, 40, 3), np.uint8)
RGB = Image.fromarray(PIXELS)


def decoded(image: Image.Image, *, save: dict[str, Any] | None = None, **steps: Any) -> Array:
    """Returns what comes back of an image saved as PNG, or as `save` says."""
    file = io.BytesIO()
    image.save(file, **({"format": "PNG"} | (save or {})))
    file.seek(0)
    return decode(file, Preprocessing(**steps), "a.png")


def test_a_png_comes_back_bit_for_bit() -> None:
    np.testing.assert_array_equal(decoded(RGB), PIXELS.transpose(2, 0, 1))
    np.testing.assert_array_equal(decoded(RGB, layout="nhwc"), PIXELS)
    np.testing.assert_array_equal(decoded(RGB, layout="nhwc", channels="bgr"), PIXELS[..., ::-1])


def test_grey_is_made_of_colours_and_colours_of_grey() -> None:
    grey = RGB.convert("L")
    np.testing.assert_array_equal(decoded(RGB, channels="gray"), np.asarray(grey)[None])
    np.testing.assert_array_equal(decoded(grey, channels="gray"), np.asarray(grey)[None])
    np.testing.assert_array_equal(decoded(grey), np.stack([np.asarray(grey)] * 3))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_kinds_of_pixels_are_converted_as_pillow_does(mode: str) -> None:
    image = RGB.convert(mode)
    save = {"format": "PNG" if mode in "1LP" else "TIFF"}
    expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(decoded(image, save=save), expected)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(
    ("resize", "size"), [(15, (15, 20)), (45, (45, 60)), (17, (17, 22)), ((20, 9), (20, 9))]
)
def test_resize_is_pillows(interpolation: str, resize: Any, size: tuple[int, int]) -> None:
    how = Image.Resampling[interpolation.upper()]
    expected = np.asarray(RGB.resize(size[::-1], how))
    found = decoded(RGB, resize=resize, interpolation=interpolation, layout="nhwc")
    np.testing.assert_array_equal(found, expected)


def test_the_shorter_side_may_be_the_width() -> None:
    assert decoded(RGB.rotate(90, expand=True), resize=15).shape == (3, 20, 15)


@pytest.mark.parametrize(
    ("crop", "rows", "columns"),
    [
        (10, slice(10, 20), slice(15, 25)),
        ((30, 40), slice(0, 30), slice(0, 40)),
        ((7, 4), slice(12, 19), slice(18, 22)),  # 11.5 is rounded to the even 12, as torchvision's
    ],
)
def test_crop_is_of_the_centre(crop: Any, rows: slice, columns: slice) -> None:
    np.testing.assert_array_equal(decoded(RGB, crop=crop, layout="nhwc"), PIXELS[rows, columns])


def test_resize_comes_before_crop() -> None:
    half = np.asarray(RGB.resize((20, 15), Image.Resampling.BILINEAR))
    found = decoded(RGB, resize=15, crop=15, layout="nhwc")
    np.testing.assert_array_equal(found, half[:, 2:17])


def test_exif_orientation_is_applied_unless_it_is_not_wanted() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    turned = decoded(RGB, save={"exif": exif}, layout="nhwc")
    np.testing.assert_array_equal(turned, np.rot90(PIXELS, -1))
    left = decoded(RGB, save={"exif": exif}, exif=False, layout="nhwc")
    np.testing.assert_array_equal(left, PIXELS)


def test_alpha_is_dropped_where_it_is_opaque_or_asked_for() -> None:
    opaque = RGB.copy()
    opaque.putalpha(255)
    np.testing.assert_array_equal(decoded(opaque), decoded(RGB))
    opaque.putpixel((0, 0), (1, 2, 3, 254))
    assert decoded(opaque, transparency="drop")[:, 0, 0].tolist() == [1, 2, 3]
    with pytest.raises(DataError, match=r"a.png: 0% of its pixels are transparent. Put it on"):
        decoded(opaque)


def test_transparency_of_a_palette_counts() -> None:
    image = Image.new("P", (4, 4))
    with pytest.raises(DataError, match="100% of its pixels are transparent"):
        decoded(image, save={"transparency": 0})


def png16(colour: int, channels: int) -> bytes:
    """Returns a PNG of 16 bits a channel, which Pillow cannot write in colour."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 2, 2, 16, colour, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(2 * channels * 2)) * 2)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


FRAMES = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
BROKEN: dict[str, tuple[bytes, str]] = {
    "no image": (b"hello", "cannot be decoded as an image .UnidentifiedImageError"),
    "nothing": (b"", "cannot be decoded as an image"),
    "cut off": (encoded(RGB, "PNG")[:900], "cannot be decoded as an image .OSError"),
    "cut-off JPEG": (encoded(RGB, "JPEG")[:700], "cannot be decoded as an image .OSError: .*trunc"),
    "16-bit colour": (png16(2, 3), "pixels of the kind 16 bits a channel; expected 8 bits"),
    "16-bit grey": (png16(0, 1), "pixels of the kind I;16; expected 8 bits"),
    "float": (encoded(Image.new("F", (2, 2)), "TIFF"), "pixels of the kind F; expected 8 bits"),
    "animation": (
        encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
        "holds 2 frames, one picture is expected",
    ),
    "another format": (encoded(RGB, "ICO"), "UnidentifiedImageError"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_refused(case: str) -> None:
    content, message = BROKEN[case]
    with pytest.raises(DataError, match=f"a.png: .*{message}"):
        decode(io.BytesIO(content), Preprocessing(), "a.png")


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_an_image_that_would_fill_the_memory(side: int) -> None:
    content = encoded(Image.new("1", (side, side)), "PNG")
    with pytest.raises(DataError, match=r"a.png: too large, decoding it could fill the memory"):
        decode(io.BytesIO(content), Preprocessing(), "a.png")


def test_a_crop_wider_than_the_image() -> None:
    with pytest.raises(DataError, match=r"is 30x40 .height x width., smaller than the crop of 35x"):
        decoded(RGB, crop=(35, 35))


def write(root: Path, *names: str, size: tuple[int, int] = (8, 8)) -> None:
    """Writes images, of a colour that depends on their place in the list."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (number, number + 1, number + 2)).save(root / name)


def reds(root: Path, **options: Any) -> list[int]:
    """Returns the first byte of each image in the order of the data."""
    return [round(255 * float(x[0, 0, 0])) for x in load_data(root, **options).x]


def test_class_folders_are_sorted_and_files_too(tmp_path: Path) -> None:
    write(tmp_path, "dog/b.png", "dog/a.png", "cat/2.png", "cat/10.png", "cat/deep/1.png")
    write(tmp_path, "cat/.hidden.png", ".git/x.png", "__MACOSX/y.png")
    data = load_data(tmp_path)
    assert data.y.tolist() == [0, 0, 0, 1, 1]
    assert reds(tmp_path) == [3, 2, 4, 1, 0]
    assert data.notes[:-1] == ()  # the last says that all pixels are the same
    assert data.x.dtype == np.float32


def test_an_empty_class_keeps_its_label_and_is_noted(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png", "c/1.JPEG")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "readme.txt").write_text("none yet")
    data = load_data(tmp_path)
    assert data.y.tolist() == [0, 2]
    assert data.notes[0].endswith("which still count as classes: b")
    assert data.notes[1] == "1 files left out, no images by their names: readme.txt"


def test_classes_txt_gives_the_labels(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "classes.txt").write_text("b\nunused\na\n")
    assert load_data(tmp_path).y.tolist() == [2, 0]
    (tmp_path / "classes.txt").write_text("b\n")
    with pytest.raises(DataError, match=r"the class folder 'a' is not in .*classes.txt"):
        load_data(tmp_path)
    for text, problem in (("a\nb\na", "line 3: 'a' twice"), ("a\n\nb", "line 2: an empty line")):
        (tmp_path / "classes.txt").write_text(text)
        with pytest.raises(DataError, match=problem):
            load_data(tmp_path)


@pytest.mark.parametrize(
    ("names", "wrong"),
    [([*map(str, range(11))], "'10' is number 2"), (["1", "2"], "'1' is number 0")],
)
def test_numbered_class_folders_must_be_certain(
    tmp_path: Path, names: list[str], wrong: str
) -> None:
    write(tmp_path, *(f"{name}/1.png" for name in names))
    with pytest.raises(DataError, match=f"are numbers, yet {wrong} in the order of their names"):
        load_data(tmp_path)
    (tmp_path / "classes.txt").write_text("\n".join(map(str, range(11))))
    assert sorted(load_data(tmp_path).y) == sorted(map(int, names))


def test_numbered_class_folders_from_0_to_9(tmp_path: Path) -> None:
    write(tmp_path, *(f"{number}/1.png" for number in range(10)))
    assert load_data(tmp_path).y.tolist() == list(range(10))


def test_a_folder_without_classes_or_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no class folders. Expected .* or a labels.csv"):
        load_data(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match="its class folders hold no images"):
        load_data(tmp_path)


def test_a_csv_lists_files_and_labels(tmp_path: Path) -> None:
    write(tmp_path, "b.png", "sub/a, b.png", "unlisted.png")
    (tmp_path / "labels.csv").write_text('label,file,more\n7,b.png,x\n3,"sub/a, b.png",y\n')
    for path in (tmp_path, tmp_path / "labels.csv"):
        data = load_data(path)
        assert data.y.tolist() == [7, 3]
        assert reds(path) == [0, 1]


def test_a_csv_may_have_numbers_beside_classes_txt(tmp_path: Path) -> None:
    write(tmp_path, "1.png", "2.png")
    (tmp_path / "labels.csv").write_text("file,label\n1.png,1\n2.png,cat\n")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert load_data(tmp_path).y.tolist() == [1, 0]
    for names in ("cat\n", "cat\n7\n"):
        (tmp_path / "classes.txt").write_text(names)
        with pytest.raises(DataError, match=r"line 2: the label '1' is not in .*classes.txt"):
            load_data(tmp_path)


def test_a_csv_with_names_needs_classes_txt(tmp_path: Path) -> None:
    write(tmp_path, "1.png", "2.png")
    (tmp_path / "labels.csv").write_text("file,label\n1.png,dog\n2.png,cat\n")
    with pytest.raises(DataError, match=r"line 2: the label 'dog' is no whole number. Put"):
        load_data(tmp_path)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert load_data(tmp_path).y.tolist() == [1, 0]
    (tmp_path / "classes.txt").write_text("cat\n")
    with pytest.raises(DataError, match=r"line 2: the label 'dog' is not in .*classes.txt"):
        load_data(tmp_path)


LISTS = {
    "no header": ("1.png,3\n", "its first line is '1.png,3'; expected the columns file and label"),
    "empty": ("", "its first line is ''"),
    "no rows": ("file,label\n", "holds no examples"),
    "no file": ("file,label\n,3\n", "line 2: names no file"),
    "missing": ("file,label\n1.png,0\nnone.png,0\n", "line 3: there is no file .*none.png"),
    "float": ("file,label\n1.png,1.0\n", "line 2: the label '1.0' is no whole number"),
    "no label": ("file,label\n1.png\n", "line 2: the label '' is no whole number"),
    "negative": ("file,label\n1.png,-1\n", "label -1 at index 0 is negative"),
    "latin-1": ("file,label\nä.png,1\n", "not a CSV in UTF-8"),
}


@pytest.mark.parametrize("case", LISTS)
def test_a_csv_is_refused(tmp_path: Path, case: str) -> None:
    text, message = LISTS[case]
    write(tmp_path, "1.png")
    (tmp_path / "labels.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        load_data(tmp_path)


def test_a_broken_file_is_named_when_it_is_read(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png", "a/2.png")
    (tmp_path / "a" / "2.png").write_bytes(b"no image")
    data = load_data(tmp_path)
    assert len(data) == 2
    with pytest.raises(DataError, match=r"a.2.png: cannot be decoded as an image"):
        _ = data.x
    (tmp_path / "a" / "2.png").unlink()
    with pytest.raises(DataError, match=r"a.2.png: cannot be read .No such file"):
        _ = data.x


def test_sizes_that_differ(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png", "a/2.png")
    write(tmp_path, "a/3.png", size=(8, 9))
    message = r"a.3.png has shape \(3, 9, 8\), those before \(3, 8, 8\). Resize and crop all"
    for size in (1, 2, 3):
        with pytest.raises(DataError, match=message):
            list(load_data(tmp_path).batches(size))
    assert load_data(tmp_path, preprocessing=Preprocessing(crop=8)).x.shape == (3, 3, 8, 8)


def test_2000_files_are_read_in_batches(tmp_path: Path) -> None:
    write(tmp_path, *(f"{number % 2}/{number:04}.png" for number in range(250)), size=(64, 64))
    for number in range(250, 2000):  # links are as good, and quick to make
        (tmp_path / f"{number % 2}/{number:04}.png").hardlink_to(tmp_path / "0/0000.png")
    list(load_data(tmp_path, limit=1).batches())  # what Pillow imports is not counted
    tracemalloc.start()
    data = load_data(tmp_path)
    assert sum(len(x) for x, _ in data.batches(16)) == len(data) == 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2000 * 3 * 64 * 64 / 4, (
        "a quarter of the bytes; as float32 they would be four times"
    )


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a/1.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(DataError, match=r"need Pillow. Install it with pip install 'jr-onnx\[ima"):
        load_data(tmp_path)
