"""The command line as a user meets it: commands, messages, exit codes, and what is not written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import jr_onnx as jr
from jr_onnx import rewrite
from jr_onnx.cli import Exit, run

SAMPLES = Path(__file__).resolve().parents[1] / "sample_models"
MakeModel = Callable[..., jr.Model]


RETROFIT = ["retrofit", "net.onnx", "--jump", "1"]
BAD = ["retrofit", "bad.onnx", "--jump", "1"]
WITH = [*RETROFIT, "--device", "cpu", "--steps", "1", "--data"]


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_main_job(here: Path, capsys: pytest.CaptureFixture[str], lenet: jr.Model) -> None:
    arguments = ["--data", "test.npz", "--epsilon", "0.1", "--device", "cpu"]
    assert run(["retrofit", "net.onnx", "--jump", "1", *arguments, "--json", "r.json"]) == Exit.OK
    out, err = capsys.readouterr()
    assert err == ""
    assert "net.onnx: 4 of 4 activations replaced, jump 1 (sub-greater-where)" in out
    assert "net.jr.onnx: written" in out
    assert "by CPUExecutionProvider" in out
    assert "clean accuracy" in out
    assert "pgd, linf 0.1" in out
    assert "Naive gain" in out or "No difference that 50 examples" in out
    assert (here / "net.onnx").read_bytes() == lenet.content
    document = json.loads((here / "r.json").read_text())
    assert document["schema"] == "jr-onnx/retrofit/1"
    assert document["tool"] == {"name": "jr-onnx", "version": jr.__version__}
    assert [site["path"] for site in document["sites"]] == ["relu", "relu_1", "relu_2", "relu_3"]
    assert document["skipped"] == []
    assert document["output"]["sha256"] == jr.load(here / "net.jr.onnx").sha256
    assert document["evaluation"]["samples"] == 50


def test_restore_inspect_verify(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["retrofit", "net.onnx", "--jump", "0.5"]) == Exit.OK
    assert run(["verify", "net.onnx", "net.jr.onnx", "--json", "v.json"]) == Exit.OK
    assert "net.jr.onnx: equivalent to net.onnx with the jump" in capsys.readouterr().out
    assert json.loads((here / "v.json").read_text())["jumps"]["relu"] == 0.5
    assert run(["inspect", "net.jr.onnx", "--json", "i.json"]) == Exit.OK
    out = capsys.readouterr().out
    assert "4 sites (4 of them hardened), 0 other activations left alone" in out
    assert "batch, 10, 12, 12" in out
    assert json.loads((here / "i.json").read_text())["sites"][0]["effective_jump"] == 0.5
    assert run(["restore", "net.jr.onnx", "-o", "back.onnx"]) == Exit.OK
    assert (here / "back.onnx").read_bytes() == (here / "net.onnx").read_bytes()


def test_verify_on_data(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(RETROFIT) == Exit.OK
    arguments = ["--data", "test.npz", "--device", "cpu", "--json", "v.json"]
    assert run(["verify", "net.onnx", "net.jr.onnx", *arguments]) == Exit.OK
    assert "against the form greater-where: " in capsys.readouterr().out
    found = json.loads((here / "v.json").read_text())["end_to_end"]
    assert found["samples"] == 50
    assert found["units"] == 50 * (10 * 12 * 12 + 20 * 4 * 4 + 120 + 90)
    assert found["flips"] <= 1e-4 * found["units"]
    assert found["agreement"] == 1.0


def test_verify_says_no_with_1(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", "net.onnx", "net.onnx"]) == Exit.REFUSED
    out = capsys.readouterr().out
    assert "DIFFERENT relu: still a plain Relu: not retrofitted" in out
    assert "NOT equivalent" in out


def test_running_twice_changes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert run(["retrofit", "net.onnx", "--jump", "0.5"]) == Exit.OK
    assert "net.jr.onnx: is up to date" in capsys.readouterr().out
    assert run(["restore", "net.jr.onnx"]) == Exit.OK
    assert "net.onnx: is up to date" in capsys.readouterr().out


def test_nothing_is_overwritten_without_force(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "net.jr.onnx").write_bytes(b"precious")
    before = _files(here)
    assert run(["retrofit", "net.onnx", "--jump", "0.5"]) == Exit.ERROR
    assert "net.jr.onnx: is there already. Pass --force" in capsys.readouterr().err
    assert run(["inspect", "net.onnx", "--json", "net.jr.onnx"]) == Exit.ERROR
    assert _files(here) == before
    assert run(["retrofit", "net.onnx", "--jump", "0.5", "--force"]) == Exit.OK
    assert jr.load(here / "net.jr.onnx")


def _plain_relu_free(here: Path) -> None:
    proto = jr.load(here / "net.onnx").parse()
    for node in proto.graph.node:
        if node.op_type == "Relu":
            node.op_type = "Tanh"
    (here / "bad.onnx").write_bytes(proto.SerializeToString())


def _data(name: str, **change: object) -> Callable[[Path], None]:
    def make(here: Path) -> None:
        with np.load(here / "test.npz") as arrays:
            np.savez(here / name, **{**arrays, **change})

    return make


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    def make(here: Path) -> None:
        (here / name).write_bytes(content)

    return make


def _truncate(here: Path) -> None:
    (here / "bad.onnx").write_bytes((here / "net.onnx").read_bytes()[:100_000])


def _nothing(here: Path) -> None:
    pass


HAZARDS: dict[str, tuple[Callable[[Path], None], list[str], Exit, str]] = {
    "missing model": (_nothing, BAD, Exit.ERROR, "bad.onnx: cannot be read (No such file"),
    "not ONNX": (_write("bad.onnx", b"hello"), BAD, Exit.ERROR, "bad.onnx: not an ONNX model"),
    "empty": (_write("bad.onnx", b""), BAD, Exit.ERROR, "bad.onnx: not an ONNX model"),
    "truncated": (_truncate, BAD, Exit.ERROR, "a truncated one"),
    "no Relu": (_plain_relu_free, BAD, Exit.ERROR, "bad.onnx: nothing to rewrite, it has no Relu"),
    "negative jump": (
        _nothing,
        ["retrofit", "net.onnx", "--jump", "-1"],
        Exit.USAGE,
        "jump must be a finite number >= 0, got -1.0",
    ),
    "jump NaN": (
        _nothing,
        ["retrofit", "net.onnx", "--jump", "nan"],
        Exit.USAGE,
        "jump must be a finite number >= 0, got nan",
    ),
    "jump no number": (
        _nothing,
        ["retrofit", "net.onnx", "--jump", "big"],
        Exit.USAGE,
        "Invalid value for '--jump'",
    ),
    "no jump": (
        _nothing,
        ["retrofit", "net.onnx"],
        Exit.USAGE,
        "no jump is given: pass --jump, --jumps or --jump-quantile",
    ),
    "form and target": (
        _nothing,
        [*RETROFIT, "--form", "mul-cast", "--target", "portable"],
        Exit.USAGE,
        "--target picks the form: give either --form or --target",
    ),
    "skip the load and run": (
        _nothing,
        [*WITH, "test.npz", "--skip-load"],
        Exit.USAGE,
        "--skip-load and --data exclude each other",
    ),
    "inspect a jump without data": (
        _nothing,
        ["inspect", "net.onnx", "--jump", "1"],
        Exit.USAGE,
        "--jump shows what a jump would set to 0 on examples: give --data",
    ),
    "a jump for an excluded site": (
        _write("j.toml", b"relu = 1\nrelu_2 = 1\n"),
        ["retrofit", "net.onnx", "--jumps", "j.toml", "--exclude", "relu_[2-9]"],
        Exit.USAGE,
        "j.toml has a jump for 'relu_2', and --exclude 'relu_[2-9]' leaves it out",
    ),
    "a model to stdout": (_nothing, [*RETROFIT, "-o", "-"], Exit.USAGE, "--output takes the path"),
    "no such option": (_nothing, [*RETROFIT, "--jmp"], Exit.USAGE, "(see jr-onnx retrofit --help)"),
    "no such command": (_nothing, ["retro"], Exit.USAGE, "No such command 'retro'"),
    "epsilon": (_nothing, [*RETROFIT, "--epsilon", "8"], Exit.USAGE, "wider than the bounds"),
    "device": (_nothing, [*RETROFIT, "--device", "tpu"], Exit.USAGE, "device must be one of"),
    "missing data": (_nothing, [*WITH, "no.npz"], Exit.ERROR, "no.npz: cannot be read"),
    "labels": (
        _data("d.npz", y=np.full(50, 10)),
        [*WITH, "d.npz"],
        Exit.ERROR,
        "label 10 at index 0 is out of range: net.onnx has 10 classes (0..9)",
    ),
    "image shape": (
        _data("d.npz", x=np.zeros((50, 28, 28, 1), np.uint8)),
        [*WITH, "d.npz"],
        Exit.ERROR,
        "examples of shape (28, 28, 1) do not fit the model: its input 'input' takes (1, 28, 28)",
    ),
    "pickled objects": (
        _data("d.npz", x=np.array([{}] * 50, object)),
        [*WITH, "d.npz"],
        Exit.ERROR,
        "holds Python objects",
    ),
    "no such folder": (
        _nothing,
        [*RETROFIT, "-o", "no/where.onnx"],
        Exit.ERROR,
        "no/where.onnx: cannot be written (there is no folder no)",
    ),
    "no such folder for the JSON": (
        _nothing,
        [*WITH, "test.npz", "--json", "no/r.json"],
        Exit.ERROR,
        "no/r.json: cannot be written (there is no folder no)",
    ),
    "restore an original": (
        _nothing,
        ["restore", "net.onnx", "-o", "back.onnx"],
        Exit.ERROR,
        "net.onnx: carries no jr-onnx manifest",
    ),
}


@pytest.mark.parametrize("hazard", HAZARDS)
def test_a_hazard_is_told_in_one_line_and_nothing_is_written(
    here: Path, capsys: pytest.CaptureFixture[str], hazard: str
) -> None:
    make, arguments, code, message = HAZARDS[hazard]
    make(here)
    before = _files(here)
    assert run(arguments) == code
    out, err = capsys.readouterr()
    *warnings, error = err.splitlines()
    assert error.startswith("jr-onnx: error: ")
    assert all(line.startswith("jr-onnx: warning: ") for line in warnings)
    assert message in error
    assert out == ""
    assert _files(here) == before


@pytest.mark.parametrize("option", ["-o", "--json"])
@pytest.mark.parametrize("path", ["/proc/out.onnx", "x" * 300])
def test_a_place_where_no_file_can_be(
    here: Path, capsys: pytest.CaptureFixture[str], option: str, path: str
) -> None:
    before = _files(here)
    assert run([*WITH, "test.npz", option, path]) == Exit.ERROR
    assert f"{path}: cannot be written (" in capsys.readouterr().err
    assert _files(here) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "locked").mkdir(mode=0o500)
    assert run([*RETROFIT, "-o", "locked/out.onnx"]) == Exit.ERROR
    assert "locked/out.onnx: cannot be written (Permission denied)" in capsys.readouterr().err


def test_a_pipe_is_no_output(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(here / "pipe")
    assert run([*RETROFIT, "-o", "pipe", "--force"]) == Exit.ERROR
    assert "pipe: cannot be written (it is no regular file)" in capsys.readouterr().err


def test_a_link_is_followed(here: Path) -> None:
    (here / "real.onnx").write_bytes(b"old")
    (here / "link.onnx").symlink_to("real.onnx")
    assert run([*RETROFIT, "-o", "link.onnx", "--force"]) == Exit.OK
    assert (here / "link.onnx").is_symlink()
    assert jr.load(here / "real.onnx")


@pytest.mark.parametrize(
    "arguments",
    [
        [*RETROFIT, "--json", "net.onnx"],
        [*RETROFIT, "-o", "x.onnx", "--json", "x.onnx"],
        [*RETROFIT, "--data", "test.npz", "--json", "./test.npz"],
        [*RETROFIT, "--data", "test.npz", "-o", "test.npz"],
        ["verify", "net.onnx", "net.onnx", "--json", "net.onnx"],
        ["inspect", "net.onnx", "--json", "net.onnx"],
    ],
)
def test_not_even_force_overwrites_an_input_with_another_output(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    before = _files(here)
    assert run([*arguments, "--force"]) == Exit.USAGE
    assert "would be overwritten" in capsys.readouterr().err
    assert _files(here) == before


def test_the_jump_of_a_hardened_file_is_changed_in_place_with_force(here: Path) -> None:
    assert run(RETROFIT) == Exit.OK
    again = ["retrofit", "net.jr.onnx", "--jump", "0.25"]
    assert run(again) == Exit.ERROR
    assert run([*again, "--force"]) == Exit.OK
    assert set(rewrite.jumps_of(jr.load(here / "net.jr.onnx")).values()) == {0.25}
    assert jr.restore(jr.load(here / "net.jr.onnx")).content == (here / "net.onnx").read_bytes()


def test_a_second_retrofit_says_which_jumps_it_drops(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(RETROFIT) == Exit.OK
    again = ["retrofit", "net.jr.onnx", "--jump", "2", "--include", "relu_1", "-o", "two.onnx"]
    assert run(again) == Exit.OK
    assert "warning: relu, relu_2, relu_3 had a jump in net.jr.onnx, and no longer" in (
        capsys.readouterr().err
    )


def test_jumps_of_a_file_come_before_quantiles_and_those_before_the_jump(here: Path) -> None:
    (here / "jumps.json").write_text('{"relu": 7}')
    arguments = ["--jumps", "jumps.json", "--jump-quantile", "0.5", "--jump", "9"]
    # Jumps of 7 and more leave PGD no gradient.
    code = run([*WITH[:2], *arguments, *WITH[4:], "test.npz", "--json", "r.json"])
    assert code == Exit.INCONCLUSIVE
    sites = json.loads((here / "r.json").read_text())["sites"]
    jumps = {site["path"]: site["jump"] for site in sites}
    assert jumps.pop("relu") == 7
    assert len(jumps) == 3
    assert 9 not in jumps.values()


def test_minus_zero_is_zero(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["retrofit", "net.onnx", "--jump", "-0.0"]) == Exit.OK
    assert "activations replaced, jump 0 (" in capsys.readouterr().out


def test_quiet_gives_no_hint(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*RETROFIT, "--quiet"]) == Exit.OK
    assert "For onnxruntime" not in capsys.readouterr().out


def test_json_on_stdout_is_alone_there(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _files(here)
    assert run(["inspect", "net.onnx", "--json", "-"]) == Exit.OK
    out, err = capsys.readouterr()
    assert json.loads(out)["schema"] == "jr-onnx/inspection/1"
    assert "net.onnx: 4 sites (not hardened)" in err
    assert run(["inspect", "net.onnx"]) == Exit.OK
    assert "net.onnx: 4 sites (not hardened)" in capsys.readouterr().out
    assert _files(here) == before


@pytest.mark.parametrize(
    "graph",
    [
        "g (float[4] x) => (float[4] y) { a = Relu(x) y = acme.Magic(a) }",
        "g (bfloat16[4] x) => (bfloat16[4] y) { y = Relu(x) }",
    ],
)
def test_a_model_that_onnxruntime_cannot_load(
    here: Path, capsys: pytest.CaptureFixture[str], text_model: MakeModel, graph: str
) -> None:
    proto = text_model(graph).parse()
    proto.opset_import.add(domain="acme", version=1)
    (here / "odd.onnx").write_bytes(proto.SerializeToString())
    before = _files(here)
    harden = ["retrofit", "odd.onnx", "--jump", "1"]
    assert run(harden) == Exit.ERROR
    err = capsys.readouterr().err
    assert "odd.onnx: onnxruntime" in err
    assert "--skip-load hardens it unloaded" in err
    assert _files(here) == before
    assert run([*harden, "--skip-load", "--json", "r.json"]) == Exit.OK
    assert "checked by onnx.checker only, onnxruntime has not loaded it" in capsys.readouterr().out
    assert json.loads((here / "r.json").read_text())["loaded"] is False
    assert jr.verify(jr.load(here / "odd.onnx"), jr.load(here / "odd.jr.onnx")).equivalent


def test_an_attack_that_breaks_nothing_is_no_error(here: Path) -> None:
    arguments = ["--data", "test.npz", "--epsilon", "1e-6", "--steps", "1", "--device", "cpu"]
    assert run([*RETROFIT, *arguments, "--json", "r.json"]) == Exit.OK
    attack = json.loads((here / "r.json").read_text())["evaluation"]["models"][0]["attacks"][0]
    assert attack["mean_distance"] is None


def test_selection_and_jumps_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "jumps.toml").write_text("relu = 0.5\n")
    arguments = ["--jumps", "jumps.toml", "--exclude", "relu_2", "--form", "greater-where"]
    assert run(["retrofit", "net.onnx", *arguments, "--json", "r.json"]) == Exit.OK
    assert "net.onnx: 1 of 4 activations replaced, jump 0.5 (greater-where)" in (
        capsys.readouterr().out
    )
    skipped = json.loads((here / "r.json").read_text())["skipped"]
    assert {entry["path"]: entry["reason"] for entry in skipped} == {
        "relu_2": "excluded by 'relu_2'",
        "relu_1": "no jump is given for it",
        "relu_3": "no jump is given for it",
    }
    assert run(["verify", "net.onnx", "net.jr.onnx"]) == Exit.OK
    assert "relu_1: left without a jump\n" in capsys.readouterr().out


def test_every_form_can_be_validated(here: Path) -> None:
    for form in rewrite.FORMS:
        output = ["-o", f"{form}.onnx", "--json", f"{form}.json"]
        assert (
            run([*WITH, "test.npz", "--epsilon", "0.05", "--steps", "4", "--form", form, *output])
            == Exit.OK
        )
        assert run(["verify", "net.onnx", f"{form}.onnx"]) == Exit.OK
    found = [json.loads((here / f"{form}.json").read_text()) for form in rewrite.FORMS]
    robust = {entry["evaluation"]["models"][1]["robust_accuracy"] for entry in found}
    assert max(robust) - min(robust) <= 0.02  # one of the 50: rounding at the jump


def test_an_output_that_is_a_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "folder").mkdir()
    assert run([*RETROFIT, "-o", "folder", "--force"]) == Exit.ERROR
    assert "folder: cannot be written (it is no regular file)" in capsys.readouterr().err
    assert _files(here).keys() == {"net.onnx", "test.npz"}


def test_cuda_that_is_not_there_is_an_error(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    before = _files(here)
    assert run([*RETROFIT, "--data", "test.npz", "--device", "cuda"]) == Exit.ERROR
    err = capsys.readouterr().err
    assert "asked for CUDAExecutionProvider, this onnxruntime has" in err
    assert "jr-onnx[gpu]" in err
    assert _files(here) == before


def test_an_interrupt_exits_with_130(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jr_onnx.rewrite.retrofit", interrupt)
    assert run(RETROFIT) == Exit.INTERRUPTED
    assert "interrupted" in capsys.readouterr().err


def test_an_interrupt_while_the_package_is_imported() -> None:
    done = _python("""
import sys
class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == "jr_onnx.attacks":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
from jr_onnx_script import main
main()
""")
    assert done.returncode == Exit.INTERRUPTED
    assert done.stderr == "jr-onnx: error: interrupted\n"


def test_a_reader_that_leaves_is_not_taken_for_a_verdict(here: Path) -> None:
    code = "from jr_onnx.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "inspect", "net.onnx"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == Exit.INTERRUPTED


def test_a_bug_says_that_it_is_ours(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("jr_onnx.rewrite.retrofit", fail)
    assert run(RETROFIT) == Exit.BUG
    assert "bug of jr-onnx, please report it: ZeroDivisionError: oops" in capsys.readouterr().err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == Exit.OK
    assert capsys.readouterr().out.startswith(f"jr-onnx {jr.__version__} (Python 3.")
    for command in ("inspect", "retrofit", "restore", "verify"):
        assert run([command, "--help"]) == Exit.OK
        assert f"Example: jr-onnx {command} " in " ".join(capsys.readouterr().out.split())


def _python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


WITHOUT = """
import sys
sys.modules["{module}"] = None
from jr_onnx.cli import run
sys.exit(run(sys.argv[1:]))
"""


def test_the_whole_command_line_runs_without_torch(here: Path) -> None:
    code = WITHOUT.format(module="torch")
    for arguments in (
        ["inspect", "net.onnx"],
        [*RETROFIT, "--data", "test.npz", "--epsilon", "0.01", "--device", "cpu"],
        ["verify", "net.onnx", "net.jr.onnx"],
        ["restore", "net.jr.onnx", "-o", "back.onnx"],
    ):
        done = _python(code, *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""


def test_without_onnxruntime_the_rewriter_works_and_the_rest_says_what_to_install(
    here: Path,
) -> None:
    code = WITHOUT.format(module="onnxruntime")
    done = _python(code, *RETROFIT)
    assert done.returncode == Exit.OK, done.stderr
    assert "onnxruntime is not installed: the model is checked by onnx.checker only" in done.stdout
    assert _python(code, "restore", "net.jr.onnx", "-o", "back.onnx").returncode == Exit.OK
    for arguments in (
        ["verify", "net.onnx", "net.jr.onnx"],
        [*RETROFIT, "--data", "test.npz", "-o", "x.onnx"],
    ):
        done = _python(code, *arguments)
        assert done.returncode == Exit.ERROR
        assert "pip install 'jr-onnx[cpu]', or 'jr-onnx[gpu]' for CUDA" in done.stderr
    assert not (here / "x.onnx").exists()


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jr_onnx", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"jr-onnx {jr.__version__}")


def test_shell_completion() -> None:
    done = _python(
        "from jr_onnx.cli import main; main()",
        _JR_ONNX_COMPLETE="complete_bash",
        COMP_WORDS="jr-onnx ret",
        COMP_CWORD="1",
    )
    assert done.stdout.split() == ["retrofit"]
    assert done.returncode == Exit.OK


@pytest.mark.gpu
def test_the_main_job_on_cuda(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs a CUDA device and onnxruntime-gpu")
    arguments = ["--data", "test.npz", "--epsilon", "0.1", "--device", "cuda"]
    assert run([*RETROFIT, *arguments, "--json", "cuda.json"]) == Exit.OK
    assert "by CUDAExecutionProvider" in capsys.readouterr().out
    assert run([*RETROFIT, *arguments[:-1], "cpu", "--json", "cpu.json"]) == Exit.OK
    cuda, cpu = (
        json.loads((here / f).read_text())["evaluation"] for f in ("cuda.json", "cpu.json")
    )
    for one, other in zip(cuda["models"], cpu["models"], strict=True):
        # 50 images: rounding may decide for one of them.
        assert abs(one["robust_accuracy"] - other["robust_accuracy"]) <= 0.02 + 1e-9
