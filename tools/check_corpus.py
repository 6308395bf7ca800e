"""Inspects, retrofits and restores every .onnx file of the installed onnx package.

    python tools/check_corpus.py [FOLDER]

Each model must end as restored byte for byte, or refused with a reason; and if it ran before, on
the inputs that come with it, the hardened one must run after. Prints a table of counts; exits with
1 if an exception escaped or a model failed.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

import jr_onnx as jr
from jr_onnx.errors import JrOnnxError, NothingToRewriteError, SessionError
from jr_onnx.model import wire
from jr_onnx.rewrite import manifest
from jr_onnx.session import Session

Array = np.ndarray[Any, Any]
JUMP = 0.3


def outcome(path: Path) -> str:
    """Takes one model through the whole way, and says how it ended."""
    try:
        model = jr.load(path)
        jr.find_sites(model)
        hardened = jr.retrofit(model, jump=JUMP).model
    except NothingToRewriteError:
        marked = manifest.add(model.content, model, [])
        kept = manifest.without(marked) == model.content == wire.splice(model.content, {})
        kept_or_not = "" if kept else "FAILED: not "
        return f"nothing to rewrite, {kept_or_not}marked and unmarked byte for byte"
    except JrOnnxError as error:
        return f"refused: {error}"
    if jr.restore(hardened).content != path.read_bytes():
        return "FAILED: not restored byte for byte"
    if not jr.verify(model, hardened).equivalent:
        return "FAILED: not verified"
    return f"restored byte for byte, {_ran(path, model, hardened)}"


def _ran(path: Path, model: jr.Model, hardened: jr.Model) -> str:
    feeds = list(_inputs(path.parent, model))
    try:
        before = [Session(model, device="cpu").run(feed) for feed in feeds]
    except SessionError:
        return "does not run in onnxruntime as it is"
    try:
        after = [Session(hardened, device="cpu").run(feed) for feed in feeds]
    except SessionError as error:
        return f"FAILED: ran before, not after ({error})"
    if not feeds:
        return "loads before and after"
    changed = any(
        one.dtype.kind == "f" and not np.array_equal(one, other, equal_nan=True)
        for left, right in zip(before, after, strict=True)
        for one, other in zip(left, right, strict=True)
        if isinstance(one, np.ndarray)
    )
    return f"runs before and after, outputs {'change' if changed else 'do not change'}"


def _inputs(folder: Path, model: jr.Model) -> Iterator[dict[str, Array]]:
    names = [value.name for value in model.proto.graph.input]
    for data in sorted(folder.glob("test_data_set_*")):
        files = sorted(data.glob("input_*.pb"), key=lambda file: int(file.stem.split("_")[1]))
        tensors = [onnx.TensorProto.FromString(file.read_bytes()) for file in files]
        try:
            arrays = [numpy_helper.to_array(tensor) for tensor in tensors]
        except (TypeError, ValueError):
            continue  # sequences and optionals
        yield dict(zip(names, arrays, strict=False))


def main() -> int:
    """Prints the table; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path(onnx.__file__).parent, help="where to look"
    )
    counts: Counter[str] = Counter()
    bad = 0
    for path in sorted(parser.parse_args().folder.rglob("*.onnx")):
        try:
            ended = outcome(path)
        except Exception:
            traceback.print_exc()
            ended = "FAILED: an exception escaped"
        if ended.startswith("FAILED") or ", FAILED" in ended:
            bad += 1
            print(f"{path}: {ended}", file=sys.stderr)
        counts[ended] += 1
    print(f"onnx {onnx.__version__}: {counts.total()} models, jump {JUMP}")
    for ended, count in counts.most_common():
        print(f"{count:6}  {ended}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
