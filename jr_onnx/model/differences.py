"""Where two protobuf messages differ, in words: down to the field, and the place in a long one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

UNKNOWN = "fields that this version of ONNX does not know are different"
_SHOWN = 60  # characters of a text, or bytes


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it must be.

    Attributes:
        where: a site's path, a node or a field.
        what: what was expected and what is there.
    """

    where: str
    what: str

    def to_json(self) -> dict[str, str]:
        """Returns the entry of `differences`."""
        return {"where": self.where, "what": self.what}


def compare_messages(left: Message, right: Message, where: str) -> Iterator[Difference]:
    """Yields where two messages that are not equal differ, at least one difference."""
    known = False
    for difference in compare_fields(left, right, where):
        known = True
        yield difference
    if not known:
        yield Difference(where, UNKNOWN)


def compare_fields(
    left: Any, right: Any, where: str, skip: Sequence[str] = ()
) -> Iterator[Difference]:
    """Yields the fields that differ, those named in `skip` left out."""
    for descriptor in left.DESCRIPTOR.fields:
        field = descriptor.name
        if field in skip:
            continue
        mine, yours = getattr(left, field), getattr(right, field)
        name = f"{where}.{field}"
        if hasattr(mine, "extend"):
            yield from compare_repeated(mine, yours, name)
        elif left.HasField(field) != right.HasField(field):
            expected, got = (
                _brief(value) if side.HasField(field) else "nothing"
                for side, value in ((left, mine), (right, yours))
            )
            yield Difference(name, f"expected {expected}, got {got}")
        elif isinstance(mine, Message):
            if mine != yours:
                yield from compare_messages(mine, yours, name)
        elif not _equal(mine, yours):
            yield Difference(name, _told(mine, yours))


def compare_repeated(mine: Any, yours: Any, where: str) -> Iterator[Difference]:
    """Yields the entries that differ; of numbers and texts, the first."""
    if len(mine) != len(yours):
        yield Difference(where, f"expected {len(mine)} entries, got {len(yours)}")
    for index, (one, other) in enumerate(zip(mine, yours, strict=False)):
        if isinstance(one, Message):
            if one != other:
                name = getattr(one, "name", "") or getattr(one, "key", "") or index
                yield from compare_messages(one, other, f"{where}[{name}]")
        elif not _equal(one, other):
            yield Difference(f"{where}[{index}]", _told(one, other))
            return


def unknown_fields(message: Message) -> list[tuple[Any, ...]]:
    """Returns what a message holds that this version of ONNX has no name for, itself only."""
    return _listed(UnknownFieldSet(message))


def has_unknown_fields(message: Message) -> bool:
    """Whether there are any `unknown_fields`."""
    return len(UnknownFieldSet(message)) > 0


def _listed(fields: UnknownFieldSet) -> list[tuple[Any, ...]]:
    return [
        (
            each.field_number,
            each.wire_type,
            _listed(each.data) if isinstance(each.data, UnknownFieldSet) else each.data,
        )
        for each in fields
    ]


def _equal(one: Any, other: Any) -> bool:
    # As they are written: 0.0 is not -0.0, and NaN is NaN.
    return repr(one) == repr(other) if isinstance(one, float) else bool(one == other)


def _told(mine: Any, yours: Any) -> str:
    if not isinstance(mine, (str, bytes)) or max(len(mine), len(yours)) <= _SHOWN:
        return f"expected {mine!r}, got {yours!r}"
    at = _first_difference(mine, yours)
    start = max(at - _SHOWN // 4, 0) if isinstance(mine, str) else at
    expected, got = (_brief(side[start : start + _SHOWN]) for side in (mine, yours))
    unit = "character" if isinstance(mine, str) else "byte"
    sizes = "" if len(mine) == len(yours) else f" ({len(mine):,} and {len(yours):,} in all)"
    return f"from {unit} {at:,} on{sizes}: expected {expected}, got {got}"


def _first_difference(mine: Any, yours: Any) -> int:
    """Returns the first position where two texts or bytes differ, by halves: they may be large."""
    low, high = 0, min(len(mine), len(yours))
    while low < high:
        middle = (low + high + 1) // 2
        if mine[low:middle] == yours[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _brief(value: Any) -> str:
    if isinstance(value, bytes):
        return value[: _SHOWN // 4].hex(" ") or "nothing"
    text = " ".join(str(value).split()) if isinstance(value, Message) else repr(value)
    return text if len(text) <= _SHOWN + 20 else f"{text[: _SHOWN + 17]}..."
