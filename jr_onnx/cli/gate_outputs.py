"""Where the gate's verdict is written beside the terminal; also that a run broke off."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jr_onnx import report
from jr_onnx.cli.console import require_distinct, require_json, write_json
from jr_onnx.cli.exits import Exit
from jr_onnx.errors import JrOnnxError, OutputError, ParameterError, PostconditionError
from jr_onnx.gate import GateResult, ModelResult, named_files
from jr_onnx.model import require_writable, write_atomically
from jr_onnx.report.junit import junit
from jr_onnx.report.markdown import markdown
from jr_onnx.report.sarif import sarif

SUMMARY = "GITHUB_STEP_SUMMARY"


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """The files asked for, each None where it is not.

    Attributes:
        json: the result for programs; `-` is stdout.
        junit: JUnit XML.
        sarif: SARIF 2.1.0.
        markdown: a summary, which is appended to the file in `SUMMARY`, too.
        force: replace what is there.
    """

    json: Path | None
    junit: Path | None
    sarif: Path | None
    markdown: Path | None
    force: bool

    def require(self, config: Path) -> None:
        """Refuses what cannot be written, before any work is done.

        Raises:
            ParameterError: two of the files are the same, or one is the configuration, or a
                model or data that it names.
            OutputError: one cannot be written, or is there and `force` is not given.
        """
        others = (self.junit, self.sarif, self.markdown)
        require_distinct(inputs=named_files(config), outputs=(self.json, *others))
        require_json(self.json, force=self.force)
        for path in others:
            require_writable(path, force=self.force)

    @contextmanager
    def also_of_errors(self, config: Path, finished: list[ModelResult]) -> Iterator[None]:
        """Writes what was finished, and why the rest was not, where the body raises.

        Args:
            config: the configuration.
            finished: the models that were finished by then.
        """
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            told = str(error) or ("interrupted" if isinstance(error, KeyboardInterrupt) else "")
            result = GateResult(
                config=config,
                config_sha256=None,
                models=tuple(finished),
                error=told or type(error).__name__,
            )
            self.write(result, _code(error))
            raise

    def write(self, result: GateResult, code: Exit) -> None:
        """Writes all files.

        Raises:
            OutputError: one cannot be written.
        """
        write_json(self.json, report.to_json(**result.to_json()), force=self.force)
        summary = markdown(result)
        for path, content in (
            (self.junit, junit(result)),
            (self.sarif, sarif(result, exit_code=code)),
            (self.markdown, summary.encode(errors="replace")),
        ):
            if path is not None:
                write_atomically(path, content, force=self.force)
        if os.environ.get(SUMMARY):
            _append(Path(os.environ[SUMMARY]), summary)


def _append(path: Path, summary: str) -> None:
    try:
        with path.open("a", encoding="utf-8", errors="replace") as file:
            file.write(summary)
    except OSError as error:
        raise OutputError(f"{path}: ${SUMMARY} cannot be written ({error.strerror})") from error


def _code(error: BaseException) -> Exit:
    """Returns what the command will end with."""
    if isinstance(error, KeyboardInterrupt):
        return Exit.INTERRUPTED
    if isinstance(error, ParameterError):
        return Exit.USAGE
    if isinstance(error, (JrOnnxError, OSError)) and not isinstance(error, PostconditionError):
        return Exit.ERROR
    return Exit.BUG
