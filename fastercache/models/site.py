"""Where the sites of a model are: the modules behind a tree of sites."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fastercache.models.streams import Block
from fastercache.schedule.sites import SiteNode


@dataclass(frozen=True)
class Part:
    """A module inside a block whose output can be kept: `path` from the model, `kind` and `layer` as schedules name
    it."""

    path: str
    kind: str
    layer: int
    module: nn.Module


@dataclass(frozen=True)
class Site:
    """A site of a model: its place in the tree, and where it is.

    module: whose output is kept; `None` for the stack. block: for a block; for the stack, its last one.
    """

    node: SiteNode
    module: nn.Module | None = None
    block: Block | None = None

    @property
    def path(self) -> str:
        return self.node.path

    @property
    def exit_path(self) -> str:
        """Path of the module at whose end the site ends."""
        return self.block.path if self.block is not None else self.node.path

    @property
    def kind(self) -> str:
        return self.node.kind

    @property
    def layer(self) -> int:
        return self.node.layer
