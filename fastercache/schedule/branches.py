"""The two branches of classifier-free guidance, and how a sampler's calls of the denoiser are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from fastercache.errors import RunError

Branch = Literal["cond", "uncond"]
"""The conditional branch reads the prompt, the unconditional one does not."""
LayoutName = Literal["uncond-first", "cond-first", "uncond-then-cond", "cond-then-uncond", "none"]


@dataclass(frozen=True)
class BranchLayout:
    """How one step of a sampler is made of calls of the denoiser, and a call's batch of branches.

    name: as users write it (`cfg=...`). order: the branches, in the order of a batch's halves where a step is one call,
    of the calls where it is two; the conditional branch alone in a run without guidance.
    """

    name: LayoutName
    order: tuple[Branch, ...]
    two_calls: bool = False

    @property
    def guided(self) -> bool:
        return len(self.order) == 2

    def half(self, have: Sequence[Branch], wanted: Sequence[Branch]) -> int | None:
        """Which half of a batch that holds `have` belongs to `wanted`: 0 or 1, or `None` where all of it does."""
        if len(wanted) == len(have):
            return None
        return self.order.index(wanted[0])

    def rows(self, count: int, branches: Sequence[Branch]) -> slice:
        """Which of `count` rows, of a whole batch of both branches or a multiple of it, belong to `branches`."""
        which = self.half(self.order, branches)
        return slice(0, count) if which is None else slice(which * (count // 2), (which + 1) * (count // 2))


LAYOUTS: dict[str, BranchLayout] = {
    layout.name: layout
    for layout in (
        BranchLayout("uncond-first", ("uncond", "cond")),
        BranchLayout("cond-first", ("cond", "uncond")),
        BranchLayout("uncond-then-cond", ("uncond", "cond"), two_calls=True),
        BranchLayout("cond-then-uncond", ("cond", "uncond"), two_calls=True),
        BranchLayout("none", ("cond",)),
    )
}
assert tuple(LAYOUTS) == get_args(LayoutName)


def layout_of(name: str) -> BranchLayout:
    """The layout of that name; `RunError` lists the names."""
    if not isinstance(name, str) or name not in LAYOUTS:
        raise RunError(f"cfg is {name!r}; it must be one of {', '.join(map(repr, LAYOUTS))}")
    return LAYOUTS[name]
