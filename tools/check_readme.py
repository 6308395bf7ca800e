"""Runs the README's commands and compares what they print with what the README shows.

    python tools/check_readme.py N     # run the N-th `$ command` of the README, from 1

Text must be equal, but for what floating point decides: another CPU rounds another way, and an
attack of 40 steps may then break a few examples more or fewer. So a percentage, an interval or a
change may differ by 0.3 points (3 examples of the 1,000), the logarithm of a p-value by a fifth.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
# A share with one decimal: before a percent sign, in an interval, signed, or in points.
_SHARE = re.compile(
    r"(?<![\d.])[-+]?\d+\.\d(?=%|\.\.| points)|(?<=\.\.)\d+\.\d|[-+]\d+\.\d(?=\s*$| to |, paired)",
    re.MULTILINE,
)
_P_VALUE = re.compile(r"(?<=p = )[\d.e-]+\d")
_POINTS, _LOGARITHM = 0.3, 0.2


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
    """Whether two outputs agree, but for what floating point decides."""
    if _layout(shown) != _layout(printed):
        return False
    shares = zip(_SHARE.findall(shown), _SHARE.findall(printed), strict=True)
    p_values = zip(_P_VALUE.findall(shown), _P_VALUE.findall(printed), strict=True)
    return all(abs(float(one) - float(other)) <= _POINTS + 1e-9 for one, other in shares) and all(
        math.isclose(math.log(float(one)), math.log(float(other)), rel_tol=_LOGARITHM)
        for one, other in p_values
    )


def _layout(text: str) -> list[str]:
    masked = _P_VALUE.sub("#", _SHARE.sub("#", text))
    return [" ".join(line.split()) for line in masked.splitlines() if line.strip()]


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
