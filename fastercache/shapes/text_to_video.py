"""diffusers' `LattePipeline` and `WanPipeline` with the defaults of the embedded pipelines: `pipe(prompt)` samples what
the weights were trained for, where their classes ask for 512 x 512 or 832 x 480 pixels."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import diffusers

from fastercache import shapes


def trained_for(original: type, embedded: shapes.Embedded) -> type:
    """A class of pipelines whose call has the defaults of an embedded one.

    Its name is the original's, which save_pretrained writes down and from_pretrained looks up.
    """
    defaults = {
        **embedded.call,
        "guidance_scale": embedded.guidance_scale,
        "num_inference_steps": embedded.steps,
    }
    signature = inspect.signature(original.__call__)
    signature = signature.replace(
        parameters=[
            each.replace(default=defaults.get(name, each.default)) for name, each in signature.parameters.items()
        ]
    )

    @functools.wraps(original.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        return original.__call__(*given.args, **given.kwargs)

    call.__signature__ = signature  # type: ignore[attr-defined]
    return type(original.__name__, (original,), {"__call__": call, "__module__": __name__})


LattePipeline = trained_for(diffusers.LattePipeline, shapes.PIPELINES["shapes"])
WanPipeline = trained_for(diffusers.WanPipeline, shapes.PIPELINES["wan"])
CLASSES = {"shapes": LattePipeline, "wan": WanPipeline}
"""By the names of the embedded pipelines. Pickle looks a class up by its name in this module."""
