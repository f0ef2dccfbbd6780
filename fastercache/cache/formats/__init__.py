"""The formats in which caches are kept, one a file, and their registry."""

from __future__ import annotations

from fastercache.cache.formats.model import ModelFormat
from fastercache.cache.formats.packed import PackedFormat
from fastercache.cache.ring import CacheFormat
from fastercache.errors import CacheError

BUILT_IN: tuple[CacheFormat, ...] = (ModelFormat(), PackedFormat("int8", 8), PackedFormat("int8-int4", 4))
"""Best first: of those that fit a budget, the first is taken."""
_BY_NAME: dict[str, CacheFormat] = {format.name: format for format in BUILT_IN}


def register(format: CacheFormat) -> None:
    """Make a format known by its name. It is used where a user names it, never by itself.

    Raises:
        CacheError: it is no `CacheFormat`, or the name is taken.
    """
    if not isinstance(format, CacheFormat):
        raise CacheError(f"{format!r} is not a CacheFormat; pass an instance of a subclass of fastercache.CacheFormat")
    name = getattr(format, "name", None)
    if not isinstance(name, str) or not name or name in _BY_NAME:
        raise CacheError(
            f"a cache format's name is {name!r}; it must be text that is not one of {', '.join(map(repr, _BY_NAME))}"
        )
    _BY_NAME[name] = format


def known() -> tuple[str, ...]:
    """The names of all formats."""
    return tuple(_BY_NAME)


def format_of(name: str) -> CacheFormat:
    """The format of that name; `CacheError` lists the names."""
    if not isinstance(name, str) or name not in _BY_NAME:
        raise CacheError(
            f"cache_format is {name!r}; it must be one of {', '.join(map(repr, _BY_NAME))}, or None to choose"
        )
    return _BY_NAME[name]
