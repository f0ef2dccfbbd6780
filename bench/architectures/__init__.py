"""Denoisers that are not in diffusers, in plain PyTorch: upstream's modules, parameter names and `forward`, so that its
state dict loads by name.

Written from the published shapes. They sample as upstream's classes do, with its custom kernels and parallelism left
out.
"""

from bench.architectures.latte_t2v import LatteT2V
from bench.architectures.stdit3 import STDiT3
from bench.architectures.vchitect import VchitectXLTransformerModel

__all__ = ["LatteT2V", "STDiT3", "VchitectXLTransformerModel"]
