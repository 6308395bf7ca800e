"""Arguments and options that mean the same in every command."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated

import typer

from jr_onnx import __version__
from jr_onnx import session as sessions
from jr_onnx.cli.console import say
from jr_onnx.rewrite import FORMS, TARGETS

ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="The ONNX file.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Where to write.", show_default=False)
]
Force = Annotated[bool, typer.Option("--force", help="Replace files that are there already.")]
Json = Annotated[
    Path | None, typer.Option("--json", help="Also write the result as JSON.", show_default=False)
]
Jump = Annotated[
    float | None,
    typer.Option(
        "--jump", help="Jump size, in units of the activations, >= 0.", show_default=False
    ),
]
Jumps = Annotated[
    Path | None,
    typer.Option(
        "--jumps",
        help="TOML or JSON file: site path = jump, or a list with one jump a channel. Sites not "
        "named take --jump, or are left alone.",
        show_default=False,
    ),
]
Quantile = Annotated[
    float | None,
    typer.Option(
        "--jump-quantile",
        help="Jump of each site: this quantile (0..1) of its positive pre-activations on --data.",
        show_default=False,
    ),
]
Form = Annotated[
    str | None,
    typer.Option("--form", help=f"Node pattern: {', '.join(FORMS)}.", show_default=False),
]
Runtime = Annotated[
    str,
    typer.Option("--target", help=f"Runtime to pick the form for: {', '.join(TARGETS)}."),
]
Include = Annotated[
    list[str] | None,
    typer.Option("--include", help="Only sites whose path matches this glob.", show_default=False),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option("--exclude", help="No sites whose path matches this glob.", show_default=False),
]
First = Annotated[
    int | None, typer.Option("--first", min=1, help="Only the first N sites.", show_default=False)
]
Last = Annotated[
    int | None, typer.Option("--last", min=1, help="Only the last N sites.", show_default=False)
]
Partial = Annotated[
    bool,
    typer.Option("--partial", help="Go on although some activations are fused or quantised away."),
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help=".npz with x (uint8, or floats in [0, 1]) and y (labels).",
        show_default=False,
    ),
]
Epsilon = Annotated[
    str, typer.Option("--epsilon", help="Radius of the linf ball, in units of x; 8/255 works.")
]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Steps of PGD.")]
Device = Annotated[
    str, typer.Option("--device", help="auto, cpu or cuda. auto takes CUDA where it works.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of all random numbers.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Most examples in one run.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        engine = sessions.version() if sessions.installed() else "not installed"
        say(f"jr-onnx {__version__} (Python {platform.python_version()}, onnxruntime {engine})")
        raise typer.Exit


def show_version(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show versions."),
    ] = False,
) -> None:
    """Retrofit JumpReLU (y = x if x > jump else 0) into exported ONNX models.

    No retraining, no PyTorch: the Relu nodes are replaced, everything else stays byte for byte,
    and the result is validated by attacking it on onnxruntime.

    Example: jr-onnx retrofit model.onnx --jump 0.3 --data test.npz
    """
