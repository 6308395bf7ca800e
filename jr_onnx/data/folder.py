"""Image files with labels: a folder for each class, or a CSV that lists files.

root/cat/1.png, root/cat/more/2.png, root/dog/3.png   labels 0, 0, 1: the names' order, or
                                                      that of classes.txt, one name a line
file,label                                            labels.csv, files relative to it
a.png,3
b.png,dog                                             a name needs classes.txt
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jr_onnx.data.dataset import Array, check_labels
from jr_onnx.data.images import SUFFIXES, decode, require_pillow
from jr_onnx.errors import DataError
from jr_onnx.preprocess import Preprocessing


class FileSource:
    """Image files that lie somewhere, each with its label.

    Args:
        root: the folder or file the list comes from.
        files: the images.
        labels: int `(files,)`.
        steps: what is done to each.
        notes: what is odd about the list.
    """

    def __init__(
        self,
        root: Path,
        files: Sequence[Path],
        labels: Array,
        steps: Preprocessing,
        notes: Sequence[str] = (),
    ) -> None:
        require_pillow()
        self.name, self._steps = str(root), steps
        self._files = list(map(str, files))  # a million paths as objects would fill a gigabyte
        self.labels = check_labels(labels, self.name)
        self.notes = tuple(notes)

    def read(self, rows: Array) -> Iterator[Array]:
        """Yields the images, decoded."""
        for row in rows:
            path = self._files[row]
            try:
                with open(path, "rb") as file:
                    yield decode(file, self._steps, path)
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror})") from error

    def place(self, row: int) -> str:
        """Returns the file."""
        return self._files[row]


def class_folders(root: Path, steps: Preprocessing, classes: Path | None) -> FileSource:
    """Lists a folder that has a folder for each class.

    Args:
        root: the folder.
        steps: what is done to each image.
        classes: a file of class names in the order of the labels; None for sorted names.

    Raises:
        DataError: there are no class folders or images, or their labels are not certain.
    """
    folders = sorted(each for each in root.iterdir() if each.is_dir() and _visible(each.name))
    if not folders:
        raise DataError(
            f"{root}: has no class folders. Expected a folder of images for each class, or a "
            "labels.csv with the columns file and label"
        )
    label_of = _class_labels(folders, classes, root)
    files: list[Path] = []
    labels: list[int] = []
    empty, others = [], []
    for folder in folders:
        found = list(_walk(folder))
        images = [path for path in found if path.suffix.lower() in SUFFIXES]
        others += [path for path in found if path.suffix.lower() not in SUFFIXES]
        empty += [] if images else [folder.name]
        files += images
        labels += [label_of[folder.name]] * len(images)
    if not files:
        raise DataError(f"{root}: its class folders hold no images ({', '.join(SUFFIXES)})")
    notes = [
        *_listed("class folders without images, which still count as classes", empty),
        *_listed("files left out, no images by their names", [path.name for path in others]),
    ]
    return FileSource(root, files, np.array(labels, np.int64), steps, notes)


def listed_files(path: Path, steps: Preprocessing, classes: Path | None) -> FileSource:
    """Reads a CSV with the columns `file` and `label`.

    Args:
        path: the CSV; files are relative to its folder.
        steps: what is done to each image.
        classes: a file of class names in the order of the labels, for labels that are names.

    Raises:
        DataError: it cannot be read, or a file or label is missing or unknown.
    """
    names = _class_names(classes) if classes else {}
    files: list[Path] = []
    labels: list[int] = []
    for line, file, label in _lines(path):
        where = f"{path}, line {line}"
        if not file:
            raise DataError(f"{where}: names no file")
        files.append(path.parent / file)
        if not files[-1].is_file():
            raise DataError(f"{where}: there is no file {files[-1]}")
        labels.append(_label(label, names, where, classes))
    return FileSource(path, files, np.array(labels, np.int64), steps)


def _lines(path: Path) -> Iterator[tuple[int, str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            header = reader.fieldnames or []
            if not {"file", "label"} <= set(header):
                raise DataError(
                    f"{path}: its first line is {','.join(header)!r:.80}; expected the columns "
                    "file and label"
                )
            for row in reader:
                yield reader.line_num, (row["file"] or "").strip(), (row["label"] or "").strip()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a CSV in UTF-8 ({error})") from error


def _label(text: str, names: dict[str, int], where: str, classes: Path | None) -> int:
    if text in names:
        return names[text]
    number = text.isascii() and text.removeprefix("-").isdigit()
    # Where classes are called 7, a label 7 that is none of them would be a guess.
    if number and not any(map(str.isdigit, names)) and (not names or int(text) < len(names)):
        return int(text)
    if classes:
        raise DataError(f"{where}: the label {text!r} is not in {classes}")
    raise DataError(
        f"{where}: the label {text!r} is no whole number. Put the class names into classes.txt "
        "beside the CSV, one a line, in the order of the model's outputs"
    )


def _class_labels(folders: Sequence[Path], classes: Path | None, root: Path) -> dict[str, int]:
    if classes:
        names = _class_names(classes)
        unknown = [folder.name for folder in folders if folder.name not in names]
        if unknown:
            raise DataError(f"{root}: the class folder {unknown[0]!r} is not in {classes}")
        return names
    found = {folder.name: label for label, folder in enumerate(folders)}
    numbers = all(name.isascii() and name.isdigit() for name in found)
    wrong = [name for name, label in found.items() if numbers and int(name) != label]
    if wrong:
        raise DataError(
            f"{root}: the class folders are numbers, yet {wrong[0]!r} is number {found[wrong[0]]} "
            "in the order of their names, so its label is not certain. Put the names into "
            "classes.txt in this folder, one a line, in the order of the model's outputs"
        )
    return found


def _class_names(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    names = [line.strip() for line in lines]
    while names and not names[-1]:
        names.pop()
    for label, name in enumerate(names):
        if not name or names.index(name) != label:
            problem = f"{name!r} twice" if name else "an empty line"
            raise DataError(f"{path}, line {label + 1}: {problem}. Expected one class name a line")
    return {name: label for label, name in enumerate(names)}


def _walk(folder: Path) -> Iterator[Path]:
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(filter(_visible, folders))
        yield from (Path(here, name) for name in sorted(filter(_visible, files)))


def _visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _listed(what: str, names: Sequence[str]) -> Iterator[str]:
    if names:
        more = ", ..." if len(names) > 3 else ""
        yield f"{len(names)} {what}: {', '.join(names[:3])}{more}"
