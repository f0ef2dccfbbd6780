"""diffusers' `LattePipeline` with the defaults of the embedded pipeline."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from diffusers import LattePipeline

from fastercache import shapes

DEFAULTS = shapes.CALL | {"guidance_scale": shapes.GUIDANCE_SCALE, "num_inference_steps": shapes.STEPS}
_signature = inspect.signature(LattePipeline.__call__)
_signature = _signature.replace(
    parameters=[each.replace(default=DEFAULTS.get(name, each.default)) for name, each in _signature.parameters.items()]
)


class ShapesPipeline(LattePipeline):
    """`pipe(prompt)` samples what the weights were trained for, 8 frames of 64 x 64, where `LattePipeline` asks for 16
    of 512 x 512."""

    @functools.wraps(LattePipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = _signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        return LattePipeline.__call__(*given.args, **given.kwargs)

    __call__.__signature__ = _signature  # type: ignore[attr-defined]


ShapesPipeline.__name__ = LattePipeline.__name__  # what save_pretrained writes down, and from_pretrained looks up
