"""What is read from JSON documents, checked: nothing in one is left out without a word."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from fastercache.errors import ScheduleError
from fastercache.schedule.step import shown


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which no key may stand twice: the first would be lost without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return found


def only_known(row: dict[str, Any], known: Iterable[str], where: str) -> None:
    """`ScheduleError` that names a key which is not known."""
    unknown = sorted(set(row) - set(known))
    if unknown:
        raise ScheduleError(f"{where} has unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")


def checked_text(value: Any, where: str, most: int = 200) -> str:
    """The value, if it is printable text of 1 to `most` characters."""
    if not isinstance(value, str) or not value or len(value) > most or not value.isprintable():
        raise ScheduleError(f"{where} is {shown(value)}; it must be printable text of 1 to {most} characters")
    return value


def checked_number(value: Any, where: str, least: float = -math.inf) -> float:
    """The value, if it is a finite number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= least):
        bound = "" if least == -math.inf else f" of at least {least:g}"
        raise ScheduleError(f"{where} is {shown(value)}; it must be a finite number{bound}")
    return value


def checked_count(value: Any, where: str) -> int:
    """The value, if it is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ScheduleError(f"{where} is {shown(value)}; it must be a whole number of at least 1")
    return value


def checked_list(value: Any, where: str) -> tuple[Any, ...]:
    """The value as a tuple, if it is a list or a tuple."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ScheduleError(f"{where} is {shown(value)}; it must be a list")
    return tuple(value)
