"""What is particular to a model family: its sites, its batch, its latents. `family_of` finds the one a model belongs to."""

from __future__ import annotations

from torch import nn

from fastercache.errors import UnsupportedModelError
from fastercache.families.base import BranchOrder, Family, Site
from fastercache.families.cogvideox import CogVideoX
from fastercache.families.latte import Latte

__all__ = ["FAMILIES", "BranchOrder", "Family", "Site", "class_names", "family_of"]

FAMILIES: tuple[Family, ...] = (Latte(), CogVideoX())


def class_names(model: nn.Module) -> set[str]:
    """Names of a model's class and its bases."""
    return {cls.__name__ for cls in type(model).__mro__}


def family_of(model: nn.Module) -> Family:
    """The family of a model, by the names of its class and bases; `UnsupportedModelError` lists those known."""
    for family in FAMILIES:
        if class_names(model) & set(family.model_classes):
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_classes)
    raise UnsupportedModelError(f"{type(model).__name__} is of no known model family; known classes are {known}")
