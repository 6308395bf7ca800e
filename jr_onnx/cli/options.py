"""Arguments and options that mean the same in every command."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated

import typer

from jr_onnx import __version__
from jr_onnx import session as sessions
from jr_onnx.cli.console import file_path, json_path, say
from jr_onnx.rewrite import FORMS, TARGETS

ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="The ONNX file.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Where to write.", show_default=False, callback=file_path),
]
OutputName = Annotated[
    str | None,
    typer.Option(
        "--output-name",
        help="The output with the logits, of a model with several.",
        show_default=False,
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace files that are there already.")]
AcceptEdits = Annotated[
    bool,
    typer.Option(
        "--accept-edits",
        help="Go on although the hardened model was edited since, and keep the edits: the result "
        "is NOT the original.",
    ),
]
SkipLoad = Annotated[
    bool,
    typer.Option(
        "--skip-load",
        help="Do not load the result in onnxruntime, for models with operators or types that it "
        "lacks; onnx.checker still runs.",
    ),
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json",
        help="Also write the result as JSON; - is stdout, then all text goes to stderr.",
        show_default=False,
        callback=json_path,
    ),
]


def _unsigned_zero(jump: float | None) -> float | None:
    return None if jump is None else jump + 0.0


Jump = Annotated[
    float | None,
    typer.Option(
        "--jump",
        help="Jump size, in units of the activations, >= 0: of the sites that neither --jumps nor "
        "--jump-quantile gives one.",
        show_default=False,
        callback=_unsigned_zero,
    ),
]
Jumps = Annotated[
    Path | None,
    typer.Option(
        "--jumps",
        help="TOML or JSON file: site path = jump, or a list with one jump a channel. Sites not "
        "named take --jump-quantile or --jump, or are left alone.",
        show_default=False,
    ),
]
Quantile = Annotated[
    float | None,
    typer.Option(
        "--jump-quantile",
        help="Jump of each site that --jumps does not name: this quantile (0..1) of its positive "
        "pre-activations on --data. Sites in branches and functions, and dead ones, have none: "
        "they take --jump, or are left alone.",
        show_default=False,
    ),
]
Form = Annotated[
    str | None,
    typer.Option(
        "--form", help=f"Node pattern: {', '.join(FORMS)}. Not with --target.", show_default=False
    ),
]
Runtime = Annotated[
    str | None,
    typer.Option(
        "--target",
        help=f"Runtime to pick the form for: {', '.join(TARGETS)}.",
        show_default="portable",
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        help="Only sites with this path, or whose path matches this glob.",
        show_default=False,
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        help="No sites with this path, or whose path matches this glob.",
        show_default=False,
    ),
]
First = Annotated[
    int | None,
    typer.Option(
        "--first",
        min=1,
        help="Only the first N of these sites; with --last, both ends.",
        show_default=False,
    ),
]
Last = Annotated[
    int | None,
    typer.Option(
        "--last",
        min=1,
        help="Only the last N of these sites; with --first, both ends.",
        show_default=False,
    ),
]
Partial = Annotated[
    bool,
    typer.Option("--partial", help="Go on although some activations are fused or quantised away."),
]
Epsilon = Annotated[
    str, typer.Option("--epsilon", help="Radius of the ball, in units of x; 8/255 works.")
]
Resume = Annotated[
    Path | None,
    typer.Option(
        help="Folder that keeps what is finished, batch by batch, and gives it back after an "
        "interruption.",
        show_default=False,
    ),
]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Steps of PGD.")]
Device = Annotated[
    str, typer.Option("--device", help="auto, cpu or cuda. auto takes CUDA where it works.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of all random numbers.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Most examples in one run.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, no hints.")]


def given(context: typer.Context, *parameters: str) -> list[str]:
    """Returns those of a command's options that the command line has, as a user writes them.

    Args:
        context: of the command.
        parameters: names of its parameters.
    """
    found = []
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in parameters and source is not None and source.name != "DEFAULT":
            found.append(parameter.opts[0])
    return found


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
