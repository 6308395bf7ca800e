"""Runs the README's commands and compares what they print with what the README shows.

    python tools/check_readme.py N     # run the N-th `$ command` of the README, from 1

Text must be equal; numbers that follow from floating point (a percentage, an interval, a p-value)
may differ by one example in the thousand, as another CPU may round another way.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
_NUMBER = re.compile(r"[-+]?\d+\.\d+(?:e-?\d+)?")
_POINTS = 0.5


def commands(text: str) -> list[tuple[str, str]]:
    """Returns each `$ command` of the console blocks, and the output shown below it."""
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    found = []
    for block in blocks:
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output))
    return found


def same(shown: str, printed: str) -> bool:
    """Whether two outputs agree, line by line, up to one example's worth of percentage points."""
    if _layout(shown) != _layout(printed):
        return False
    pairs = zip(_NUMBER.findall(shown), _NUMBER.findall(printed), strict=True)
    return all(abs(float(one) - float(other)) <= _POINTS for one, other in pairs)


def _layout(text: str) -> list[str]:
    lines = (_NUMBER.sub("#", line) for line in text.splitlines())
    return [" ".join(line.split()) for line in lines if line.strip()]


def main() -> int:
    """Runs one command; 0 if it succeeds and prints what the README shows (if anything)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("number", type=int, help="which command, from 1")
    command, shown = commands(README.read_text(encoding="utf-8"))[parser.parse_args().number - 1]
    print(f"$ {command}", flush=True)
    capture = subprocess.PIPE if shown else None
    done = subprocess.run(
        ["bash", "-c", command], cwd=README.parent, stdout=capture, text=True, check=False
    )
    if shown:
        print(done.stdout)
    if done.returncode:
        return done.returncode
    if shown and not same(shown, done.stdout):
        print(f"the README shows something else:\n{shown}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
