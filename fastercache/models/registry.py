"""The families that are known. `family_of` finds the one a model belongs to."""

from __future__ import annotations

from torch import nn

from fastercache.errors import UnsupportedModelError
from fastercache.models.cogvideox import CogVideoX, SATCogVideoX
from fastercache.models.family import Family
from fastercache.models.full_attention import Allegro, LTXVideo, Wan
from fastercache.models.generic import Generic
from fastercache.models.hunyuan_video import HunyuanVideo
from fastercache.models.hunyuan_video15 import HunyuanVideo15
from fastercache.models.latte import Latte
from fastercache.models.mochi import AsymmMochi, Mochi
from fastercache.models.open_sora import OpenSora
from fastercache.models.vchitect import Vchitect
from fastercache.schedule.branches import LAYOUTS

FAMILIES: list[Family] = [
    Latte(),
    CogVideoX(),
    OpenSora(),
    Mochi(),
    HunyuanVideo(),
    HunyuanVideo15(),
    LTXVideo(),
    Allegro(),
    Wan(),
    Vchitect(),
    SATCogVideoX(),
    AsymmMochi(),
]

GENERIC = Generic()
"""For diffusers' other transformers."""


def class_names(model: nn.Module) -> set[str]:
    """Names of a model's class and its bases."""
    return {cls.__name__ for cls in type(model).__mro__}


def family_of(model: nn.Module) -> Family:
    """The family of a model, by the names of its class and bases; `UnsupportedModelError` lists those known."""
    for cls in type(model).__mro__:  # a family of a derived class goes before that of its base
        for family in FAMILIES:
            if cls.__name__ in family.model_classes:
                return family
    if "ModelMixin" in class_names(model):
        return GENERIC
    known = ", ".join(name for family in FAMILIES for name in family.model_classes)
    raise UnsupportedModelError(
        f"{type(model).__name__} is of no known model family; known are diffusers' transformers and {known}"
    )


def register(family: Family) -> None:
    """Make a family known: models of its classes, or of classes derived from them, then belong to it.

    Raises:
        UnsupportedModelError: it is no `Family`, or lacks a name or class names, or a known family has one of them, or
            its layout of guidance is none.
    """
    if not isinstance(family, Family):
        raise UnsupportedModelError(f"{family!r} is not a Family; pass an instance of a subclass of fastercache.Family")
    name, classes = getattr(family, "name", None), getattr(family, "model_classes", None)
    named = isinstance(name, str) and bool(name)
    if (
        not named
        or not isinstance(classes, tuple)
        or not classes
        or not all(isinstance(one, str) and one for one in classes)
    ):
        raise UnsupportedModelError(
            f"{type(family).__name__} has name {name!r} and model_classes {classes!r}; give a name, and a tuple of the "
            "names of classes"
        )
    if family.layout not in LAYOUTS:
        raise UnsupportedModelError(
            f"{type(family).__name__} has layout {family.layout!r}; it must be one of {', '.join(map(repr, LAYOUTS))}"
        )
    for known in FAMILIES:
        if known.name == name:
            raise UnsupportedModelError(f"a family named {name!r} is known already; choose another name")
        for one in classes:
            if one in known.model_classes:
                raise UnsupportedModelError(
                    f"{one} belongs to the family {known.name} already; derive a class from it and name that in "
                    "model_classes"
                )
    FAMILIES.append(family)
