"""A cache format from outside the package: results are kept in bfloat16, whatever the model's dtype."""

import math

import torch

import fastercache
from fastercache.cache.ring import half
from fastercache.triton_kernels.coefficients import MAX_TAPS, Coefficient


class BFloat16Ring(fastercache.Ring):
    def __init__(self, spec, device):
        self.slots, self.dtype = torch.zeros((spec.slots, *spec.shape), dtype=torch.bfloat16, device=device), spec.dtype
        self.output_shape = torch.Size(spec.shape)

    def push(self, x, coefficients, which):
        half(self.slots, which, 1)[coefficients[Coefficient.WRITE_SLOT, None].long()] = x.to(torch.bfloat16)

    def blend(self, coefficients, which, out=None):
        slots = coefficients[Coefficient.READ_SLOT :][:MAX_TAPS].long()
        taps = half(self.slots, which, 1)[slots]
        out = torch.empty(taps.shape[1:], dtype=self.dtype) if out is None else out
        return out.copy_(torch.tensordot(coefficients[:MAX_TAPS], taps.float(), 1))

    def tensors(self):
        return (self.slots,)


class BFloat16(fastercache.CacheFormat):
    name = "bfloat16"

    allocate = staticmethod(BFloat16Ring)

    def bytes(self, spec):
        return 2 * spec.slots * math.prod(spec.shape)


fastercache.register_cache_format(BFloat16())
