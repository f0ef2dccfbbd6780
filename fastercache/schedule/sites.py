"""Sites: the parts of a model whose result a schedule can reuse, as a tree without tensors, and the selectors that name
them.

A site is an interval of the model, from an entry to an exit. An attention or an MLP is one module: its output is what
is kept. A block and the stack of all repeated blocks sit on the residual stream: kept is what they added to it, exit
less entry. Sites nest: the stack holds the blocks, a block its attentions and its MLP. While a site is reused, the
sites inside it idle.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from fastercache.errors import ScheduleError

ATTENTION_KINDS = ("spatial", "temporal", "joint")
"""Attention among the video's own tokens (and the text's, in `joint`): what the selector `attention` stands for."""
RESIDUAL_KINDS = ("block", "stack")
"""Sites on the residual stream, of which the difference between exit and entry is kept."""
SITE_KINDS = (*ATTENTION_KINDS, "cross", "mlp", *RESIDUAL_KINDS)
"""All kinds of site; `cross` is the attention from the video to the text alone."""


@dataclass(frozen=True)
class SiteNode:
    """One site of a model. `path`: of its module, "" for the stack. `parent`: the index of the site that holds it,
    `None` for the outermost."""

    path: str
    kind: str
    layer: int
    parent: int | None = None

    def __str__(self) -> str:
        return f"{self.kind} of layer {self.layer}" if self.kind != "stack" else "stack"


SiteTree = Sequence[SiteNode]
"""The sites of a model, every one after the one that holds it."""


@dataclass(frozen=True)
class Selector:
    """Names sites by kind, and optionally by layer: `attention`, `mlp`, `mlp[14:43]` (layers 14 to 42), `block[4:]`."""

    kind: str
    first: int = 0
    stop: int | None = None

    @staticmethod
    def parse(text: str) -> Selector:
        """The selector that `text` stands for; `ScheduleError` lists what is known."""
        return _parse(text) if isinstance(text, str) else _parse(repr(text))

    def matches(self, site: SiteNode) -> bool:
        kinds = ATTENTION_KINDS if self.kind == "attention" else (self.kind,)
        return site.kind in kinds and site.layer >= self.first and (self.stop is None or site.layer < self.stop)


@lru_cache(maxsize=1024)
def _parse(text: str) -> Selector:
    match = re.fullmatch(r"([a-z]+)(?:\[(\d{0,6}):(\d{0,6})\])?", text)
    if match is None or match[1] not in ("attention", *SITE_KINDS):
        known = ", ".join(("attention", *SITE_KINDS))
        raise ScheduleError(
            f"unknown site {text!r}; known are {known}, each optionally with a range of layers as in 'mlp[14:43]'"
        )
    return Selector(match[1], int(match[2] or 0), int(match[3]) if match[3] else None)
