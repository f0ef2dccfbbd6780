"""What is particular to a model family: its sites, its batch, its latents. `family_of` finds the one a model belongs to."""

from __future__ import annotations

from torch import nn

from fastercache.errors import UnsupportedModelError
from fastercache.families.base import BranchOrder, Family, Site
from fastercache.families.cogvideox import CogVideoX, SATCogVideoX
from fastercache.families.full_attention import Allegro, LTXVideo, Wan
from fastercache.families.generic import Generic
from fastercache.families.hunyuan_video import HunyuanVideo
from fastercache.families.latte import Latte
from fastercache.families.mochi import AsymmMochi, Mochi
from fastercache.families.open_sora import OpenSora
from fastercache.families.vchitect import Vchitect

__all__ = ["FAMILIES", "BranchOrder", "Family", "Site", "class_names", "family_of"]

FAMILIES: tuple[Family, ...] = (
    Latte(),
    CogVideoX(),
    OpenSora(),
    Mochi(),
    HunyuanVideo(),
    LTXVideo(),
    Allegro(),
    Wan(),
    Vchitect(),
    SATCogVideoX(),
    AsymmMochi(),
)

GENERIC = Generic()
"""For diffusers' other transformers."""


def class_names(model: nn.Module) -> set[str]:
    """Names of a model's class and its bases."""
    return {cls.__name__ for cls in type(model).__mro__}


def family_of(model: nn.Module) -> Family:
    """The family of a model, by the names of its class and bases; `UnsupportedModelError` lists those known."""
    for family in FAMILIES:
        if class_names(model) & set(family.model_classes):
            return family
    if "ModelMixin" in class_names(model):
        return GENERIC
    known = ", ".join(name for family in FAMILIES for name in family.model_classes)
    raise UnsupportedModelError(f"{type(model).__name__} is of no known model family; known are diffusers' transformers and {known}")
