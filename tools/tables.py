"""Tables that tools write into Markdown files, between marks that name them.

<!-- attacks -->
| ... |
<!-- /attacks -->
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]], *, text: int = 1) -> str:
    """Returns a table; the first `text` columns are text, the others figures."""
    rule = ["---"] * text + ["--:"] * (len(titles) - text)
    return "\n".join(f"| {' | '.join(row)} |" for row in (titles, rule, *rows)) + "\n"


def content(path: Path, name: str) -> str:
    """Returns what is between the marks of a name, empty where there are none."""
    whole = path.read_text(encoding="utf-8") if path.exists() else ""
    _, _, rest = whole.partition(f"<!-- {name} -->\n")
    return rest.partition(f"<!-- /{name} -->\n")[0]


def put(path: Path, name: str, content: str) -> None:
    """Replaces what is between the marks of a name; at the end of the file where there are none.

    Raises:
        ValueError: one mark without the other.
    """
    opening, closing = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    whole = path.read_text(encoding="utf-8") if path.exists() else ""
    if (opening in whole) != (closing in whole):
        raise ValueError(f"{path}: of {opening.strip()} and {closing.strip()} one is missing")
    if opening not in whole:
        whole += f"\n{opening}{closing}"
    before, _, rest = whole.partition(opening)
    _, _, after = rest.partition(closing)
    path.write_text(f"{before}{opening}{content}{closing}{after}", encoding="utf-8")
