"""What is timed of each op, at which sizes and against which plain forms: the cases that `bench.gpu` and
`bench.cpu_ops` share.

A case makes sets of tensors, and has forms that all do the same to a set: `ours`, the best plain PyTorch (`eager ...`),
and Inductor's code for the reference expression (`inductor`). The plain forms are given their slots and coefficients as
they like them best: views made beforehand, Python numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import torch

from fastercache import ops
from fastercache.triton_kernels import cfg_reconstruct, cfg_split, packed, prediction_blend, ring_blend, ring_push

Tensors = SimpleNamespace
Form = Callable[[Tensors], object]

SITES = {"CogVideoX-2B": (17776, 1920), "Open-Sora": (90630, 1152), "HunyuanVideo": (119056, 3072)}
"""Tokens and channels of one branch's output of a site: 49 frames at 480 x 720, 57 latent frames at 480 x 848, 129
frames at 720 x 1280."""
LATENTS = {"CogVideoX": (13, 16, 60, 90), "Latte": (16, 4, 64, 64), "Open-Sora": (57, 4, 60, 106)}
"""Frames, channels, height and width of one branch's prediction."""
AS_RELEASED = "as released: fft2, fftshift, mask, ifftshift, ifft2"
FORMATS = {"int8": 8, "int8-int4": 4}
W, LOW, HIGH = 0.4, 1.2, 1.0
"""w of Eq. 5, w1 and w2 of Eq. 9 and 10."""
PREVIOUS, NOW, NEWEST, FRESH = -0.5, 0.3, -0.2, 0.9
"""Weights of the third CFG map, of the latents, and of a fresh prediction."""


@dataclass(frozen=True)
class Case:
    """An op at one size.

    moved: bytes that one call must move, whatever the form.
    buffers: makes a set; outputs are NaN.
    forms: what is timed; each does to a set what the others do.
    expected: the results of a call on a set, from the set before it.
    results: the same, from the set after it.
    tolerances: for each result, the largest error of `ours` as a share of the largest expected magnitude.
    slack: how much larger the plain forms' may be, which round more often.
    """

    op: str
    name: str
    moved: int
    buffers: Callable[[], Tensors]
    forms: dict[str, Form]
    expected: Callable[[Tensors], Sequence[torch.Tensor]]
    results: Callable[[Tensors], Sequence[torch.Tensor]]
    tolerances: Sequence[float]
    slack: float = 4.0

    @property
    def served_by(self) -> str:
        """The op behind `ours`."""
        return "cfg_reconstruct" if self.op == "cfg_skipped_step" else self.op

    def implementation(self, form: str, device: str) -> str:
        """What runs in a form, such as "C++" or "PyTorch"."""
        plain = "Inductor" if form == "inductor" else "PyTorch"
        if form != "ours" or self.served_by not in ops.implementations():
            return plain
        return ops.implementation(self.served_by, torch.device(device))

    def error(self, form: str) -> tuple[float, bool]:
        """The largest error of a form as a share of the largest expected magnitude, and whether it is within
        tolerance."""
        tensors = self.buffers()
        expected = self.expected(tensors)
        self.forms[form](tensors)
        errors = [share_of_largest(*pair) for pair in zip(self.results(tensors), expected, strict=True)]
        slack = 1.0 if form == "ours" else self.slack
        return max(errors), all(error <= slack * limit for error, limit in zip(errors, self.tolerances, strict=True))


def share_of_largest(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error over largest expected magnitude; infinite where an element is NaN."""
    if bool(actual.isnan().any()):
        return math.inf
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


def one_rounding(dtype: torch.dtype) -> float:
    """The relative error of one rounding to `dtype`, and of the few operations in float32 before it."""
    return torch.finfo(dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps


def make_coefficients(device: str, taps: Sequence[float]) -> torch.Tensor:
    """Taps from the newest in slot 1 to older ones in slot 0; a push writes slot 2."""
    coefficients = torch.zeros(ops.COEFFICIENT_COUNT)
    coefficients[ops.Coefficient.OF_TAP : ops.Coefficient.OF_TAP + len(taps)] = torch.tensor(taps)
    (
        coefficients[ops.Coefficient.READ_SLOT],
        coefficients[ops.Coefficient.WRITE_SLOT],
        coefficients[ops.Coefficient.TAPS],
    ) = 1, 2, len(taps)
    coefficients[ops.Coefficient.LOW], coefficients[ops.Coefficient.HIGH], coefficients[ops.Coefficient.PREVIOUS] = (
        LOW,
        HIGH,
        PREVIOUS,
    )
    coefficients[ops.Coefficient.NOW], coefficients[ops.Coefficient.NEWEST], coefficients[ops.Coefficient.FRESH] = (
        NOW,
        NEWEST,
        FRESH,
    )
    return coefficients.to(device)


# What Inductor compiles. Coefficients come from the device, as a graph that serves all steps needs; the sum is rounded
# once, as ours is.


def push_expression(slot: torch.Tensor, x: torch.Tensor) -> None:
    slot.copy_(x)


def push_residual_expression(slot: torch.Tensor, x: torch.Tensor, entry: torch.Tensor) -> None:
    slot.copy_(x.float() - entry.float())


def reuse_expression(out: torch.Tensor, coefficients: torch.Tensor, newest: torch.Tensor) -> None:
    out.copy_(coefficients[0] * newest.float())


def blend_expression(out: torch.Tensor, coefficients: torch.Tensor, newest: torch.Tensor, older: torch.Tensor) -> None:
    out.copy_(coefficients[0] * newest.float() + coefficients[1] * older.float())


def blend_add_expression(
    x: torch.Tensor, gate: torch.Tensor, coefficients: torch.Tensor, newest: torch.Tensor, older: torch.Tensor
) -> None:
    x.copy_(x.float() + gate.float() * (coefficients[0] * newest.float() + coefficients[1] * older.float()))


def reconstruct_expression(
    copied: torch.Tensor,
    rebuilt: torch.Tensor,
    cond: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    coefficients: torch.Tensor,
) -> None:
    rebuilt.copy_(cond.float() + coefficients[ops.Coefficient.LOW] * low + coefficients[ops.Coefficient.HIGH] * high)
    copied.copy_(cond)


def predict_expression(
    out: torch.Tensor,
    coefficients: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    newest: torch.Tensor,
    now: torch.Tensor,
) -> None:
    taps = coefficients[0] * first.float() + coefficients[1] * second.float()
    out.copy_(
        taps + coefficients[ops.Coefficient.NOW] * now.float() + coefficients[ops.Coefficient.NEWEST] * newest.float()
    )


def correct_expression(
    fresh: torch.Tensor, coefficients: torch.Tensor, tap: torch.Tensor, newest: torch.Tensor, now: torch.Tensor
) -> None:
    latents = coefficients[ops.Coefficient.NOW] * now.float() + coefficients[ops.Coefficient.NEWEST] * newest.float()
    fresh.copy_(coefficients[0] * tap.float() + latents + coefficients[ops.Coefficient.FRESH] * fresh.float())


@cache
def compiled(function: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def ring_cases(name: str, shape: tuple[int, int], dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Push, blend of one and of two taps, and blend-add in the model's dtype; `shape` is tokens and channels."""
    elements, itemsize, rounding = math.prod(shape), dtype.itemsize, one_rounding(dtype)
    one, two = make_coefficients(device, [1.0]), make_coefficients(device, [1 + W, -W])

    def buffers() -> Tensors:
        ring = torch.randn((3, 1, *shape), dtype=dtype, device=device)
        ring[2] = torch.nan
        x = torch.randn((1, *shape), dtype=dtype, device=device)
        entry = torch.randn_like(x)
        gate = torch.full((1, 1, shape[1]), 0.01, dtype=dtype, device=device)
        older, newest, slot = ring
        return Tensors(
            ring=ring,
            older=older,
            newest=newest,
            slot=slot,
            x=x,
            entry=entry,
            gate=gate,
            out=torch.full_like(x, torch.nan),
        )

    def blended(t: Tensors) -> torch.Tensor:
        return two[0].double() * t.newest.double() + two[1].double() * t.older.double()

    yield Case(
        "ring_push",
        name,
        ring_push.bytes_moved(elements, itemsize),
        buffers,
        {
            "ours": lambda t: ops.ring_push(t.ring, t.x, one),
            "eager copy_": lambda t: t.slot.copy_(t.x),
            "inductor": lambda t: compiled(push_expression)(t.slot, t.x),
        },
        lambda t: [t.x.clone()],
        lambda t: [t.slot],
        [0.0],
    )
    yield Case(
        "ring_push_residual",
        name,
        ring_push.bytes_moved(elements, itemsize, residual=True),
        buffers,
        {
            "ours": lambda t: ops.ring_push_residual(t.ring, t.x, t.entry, one),
            "eager sub": lambda t: torch.sub(t.x, t.entry, out=t.slot),
            "inductor": lambda t: compiled(push_residual_expression)(t.slot, t.x, t.entry),
        },
        lambda t: [t.x - t.entry],
        lambda t: [t.slot],
        [0.0],
    )
    yield Case(
        "ring_blend",
        f"{name}, 1 tap",
        ring_blend.bytes_moved(elements, itemsize, 1),
        buffers,
        {
            "ours": lambda t: ops.ring_blend(t.ring, one, out=t.out),
            "eager copy_": lambda t: t.out.copy_(t.newest),
            "inductor": lambda t: compiled(reuse_expression)(t.out, one, t.newest),
        },
        lambda t: [t.newest],
        lambda t: [t.out],
        [0.0],
    )
    yield Case(
        "ring_blend",
        f"{name}, 2 taps",
        ring_blend.bytes_moved(elements, itemsize, 2),
        buffers,
        {
            "ours": lambda t: ops.ring_blend(t.ring, two, out=t.out),
            "eager lerp": lambda t: torch.lerp(t.newest, t.older, -W, out=t.out),
            "inductor": lambda t: compiled(blend_expression)(t.out, two, t.newest, t.older),
        },
        lambda t: [blended(t)],
        lambda t: [t.out],
        [rounding],
    )
    yield Case(
        "ring_blend_add",
        f"{name}, 2 taps",
        ring_blend.bytes_moved(elements, itemsize, 2, shape[1] * itemsize),
        buffers,
        {
            "ours": lambda t: ops.ring_blend_add(t.x, t.gate, t.ring, two),
            "eager lerp, addcmul_": lambda t: t.x.addcmul_(t.gate, torch.lerp(t.newest, t.older, -W, out=t.out)),
            "eager addcmul_ twice": lambda t: t.x.addcmul_(t.gate, t.newest, value=1 + W).addcmul_(
                t.gate, t.older, value=-W
            ),
            "inductor": lambda t: compiled(blend_add_expression)(t.x, t.gate, two, t.newest, t.older),
        },
        lambda t: [t.x.double() + t.gate.double() * blended(t)],
        lambda t: [t.x],
        [rounding],
    )


def packed_cases(name: str, shape: tuple[int, int], dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Push, blend and blend-add of the packed formats, against the reference in plain PyTorch and Inductor's code for
    it."""
    lines, channels = shape
    rounding = one_rounding(dtype)
    one, two, difference = (
        make_coefficients(device, [1.0]),
        make_coefficients(device, [1 + W, -W]),
        make_coefficients(device, [1.0, -1.0]),
    )

    def cases(label: str, bits: int) -> Iterator[Case]:
        def buffers() -> Tensors:
            ring = torch.zeros((1, lines, packed.PackedLine(channels, bits).bytes), dtype=torch.uint8, device=device)
            older = torch.randn((1, *shape), dtype=dtype, device=device)
            x = older + 0.2 * torch.randn_like(older)
            for pushed in (older, x):
                packed.reference_packed_push(ring, pushed, bits)
            gate = torch.full((1, 1, channels), 0.01, dtype=dtype, device=device)
            entry = 0.1 * torch.randn_like(x)
            return Tensors(ring=ring, x=x + 0.2 * older, entry=entry, gate=gate, out=torch.full_like(x, torch.nan))

        def read(ring: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
            out = torch.empty((1, *shape), device=device)
            packed.reference_packed_blend(out, ring, coefficients, bits)
            return out

        def pushed_parts(t: Tensors) -> list[torch.Tensor]:
            ring = t.ring.clone()
            packed.reference_packed_push(ring, t.x, bits)
            return parts(Tensors(ring=ring))

        def residual_parts(t: Tensors) -> list[torch.Tensor]:
            ring = t.ring.clone()
            packed.reference_packed_push_residual(ring, t.x, t.entry, bits)
            return parts(Tensors(ring=ring))

        def parts(t: Tensors) -> list[torch.Tensor]:
            return [read(t.ring, one), read(t.ring, difference)]

        where = f"{name}, {label}"
        yield Case(
            "packed_push",
            where,
            packed.push_bytes_moved(lines, channels, bits, dtype.itemsize),
            buffers,
            {
                "ours": lambda t: ops.packed_push(t.ring, t.x, bits),
                "eager reference": lambda t: packed.reference_packed_push(t.ring, t.x, bits),
                "inductor": lambda t: compiled(packed.reference_packed_push)(t.ring, t.x, bits),
            },
            pushed_parts,
            parts,
            [1.01 / 127, 1.01 / (7 if bits == 4 else 127)],  # a value half-way between two codes may take either
            slack=1.0,
        )
        yield Case(
            "packed_push_residual",
            where,
            packed.push_bytes_moved(lines, channels, bits, dtype.itemsize, residual=True),
            buffers,
            {
                "ours": lambda t: ops.packed_push_residual(t.ring, t.x, t.entry, bits),
                "eager reference": lambda t: packed.reference_packed_push_residual(t.ring, t.x, t.entry, bits),
                "inductor": lambda t: compiled(packed.reference_packed_push_residual)(t.ring, t.x, t.entry, bits),
            },
            residual_parts,
            parts,
            [1.01 / 127, 1.01 / (7 if bits == 4 else 127)],
            slack=1.0,
        )
        yield Case(
            "packed_blend",
            f"{where}, 2 taps",
            packed.blend_bytes_moved(lines, channels, bits, dtype.itemsize),
            buffers,
            {
                "ours": lambda t: ops.packed_blend(t.ring, two, t.out, bits),
                "eager reference": lambda t: packed.reference_packed_blend(t.out, t.ring, two, bits),
                "inductor": lambda t: compiled(packed.reference_packed_blend)(t.out, t.ring, two, bits),
            },
            lambda t: [read(t.ring, two)],
            lambda t: [t.out],
            [rounding],
        )
        yield Case(
            "packed_blend_add",
            f"{where}, 2 taps",
            packed.blend_bytes_moved(lines, channels, bits, dtype.itemsize, channels * dtype.itemsize),
            buffers,
            {
                "ours": lambda t: ops.packed_blend_add(t.x, t.gate, t.ring, two, bits),
                "eager reference": lambda t: packed.reference_packed_blend_add(t.x, t.gate, t.ring, two, bits),
                "inductor": lambda t: compiled(packed.reference_packed_blend_add)(t.x, t.gate, t.ring, two, bits),
            },
            lambda t: [t.x.double() + t.gate.double() * read(t.ring, two).double()],
            lambda t: [t.x],
            [rounding],
        )

    for label, bits in FORMATS.items():
        yield from cases(label, bits)


def low_band(shape: Sequence[int], device: str) -> torch.Tensor:
    """Which of the unshifted frequencies that `fft2` gives of `[..., H, W]` lie in the disc, in exact integers."""
    height, width = shape[-2:]
    ky, kx = (torch.minimum(torch.arange(n), n - torch.arange(n)) for n in (height, width))
    return (ky[:, None] ** 2 + kx**2 <= (min(height, width) // 5) ** 2).to(device)


def cfg_cases(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Split and reconstruction of one prompt's prediction `[frames, channels, H, W]`."""
    elements, rounding, coefficients = math.prod(shape), one_rounding(dtype), make_coefficients(device, [])
    mask, radius = low_band(shape, device), min(shape[-2:]) // 5
    w_low, w_high = (coefficients[field].double() for field in (ops.Coefficient.LOW, ops.Coefficient.HIGH))
    where = f"{name} {'x'.join(map(str, shape))}"

    def project(x: torch.Tensor) -> torch.Tensor:
        return torch.fft.ifft2(torch.fft.fft2(x) * mask).real

    def buffers() -> Tensors:
        cond, uncond = (torch.randn((1, *shape), dtype=dtype, device=device) for _ in range(2))
        difference = uncond.double() - cond.double()
        low = project(difference)
        low, high, previous = low.float(), (difference - low).float(), torch.randn_like(low, dtype=torch.float32)
        out = torch.full((2, *shape), torch.nan, dtype=dtype, device=device)
        new_low, new_high = torch.full_like(low, torch.nan), torch.full_like(high, torch.nan)
        maps = Tensors(low=low, high=high, previous=previous, new_low=new_low, new_high=new_high)
        return Tensors(cond=cond, uncond=uncond, out=out, **vars(maps))

    def rebuilt(t: Tensors) -> torch.Tensor:
        return t.cond.double() + w_low * t.low.double() + w_high * t.high.double()

    def eager_rebuild(t: Tensors, out: torch.Tensor) -> torch.Tensor:
        torch.add(t.cond, t.low, alpha=LOW, out=out)
        return out.add_(t.high, alpha=HIGH)

    def eager_reconstruct(t: Tensors) -> None:
        eager_rebuild(t, t.out[:1])
        t.out[1:].copy_(t.cond)

    def eager_three(t: Tensors) -> None:
        eager_rebuild(t, t.out[:1]).add_(t.previous, alpha=PREVIOUS)
        t.out[1:].copy_(t.cond)

    def fft_split(t: Tensors) -> None:
        difference = t.uncond.float() - t.cond.float()
        t.new_low.copy_(project(difference))
        torch.sub(difference, t.new_low, out=t.new_high)

    def exact_maps(t: Tensors) -> list[torch.Tensor]:
        difference = t.uncond.double() - t.cond.double()
        low = project(difference)
        return [low, difference - low]

    yield Case(
        "cfg_reconstruct",
        where,
        cfg_reconstruct.bytes_moved(elements, dtype.itemsize),
        buffers,
        {
            "ours": lambda t: ops.cfg_reconstruct(t.out, t.cond, t.low, t.high, coefficients, 1),
            "eager add, add_, copy_": eager_reconstruct,
            "inductor": lambda t: compiled(reconstruct_expression)(
                t.out[1:], t.out[:1], t.cond, t.low, t.high, coefficients
            ),
        },
        lambda t: [torch.cat([rebuilt(t), t.cond.double()])],
        lambda t: [t.out],
        [rounding],
    )
    yield Case(
        "cfg_reconstruct",
        f"{where}, three maps",
        cfg_reconstruct.bytes_moved(elements, dtype.itemsize, maps=3),
        buffers,
        {
            "ours": lambda t: ops.cfg_reconstruct(t.out, t.cond, t.low, t.high, coefficients, 1, t.previous),
            "eager add, add_ twice, copy_": eager_three,
            "inductor": lambda t: compiled(cfg_reconstruct.reference_cfg_reconstruct)(
                t.out, t.cond, t.low, t.high, coefficients, 1, t.previous
            ),
        },
        lambda t: [
            torch.cat(
                [rebuilt(t) + coefficients[ops.Coefficient.PREVIOUS].double() * t.previous.double(), t.cond.double()]
            )
        ],
        lambda t: [t.out],
        [rounding],
    )
    yield Case(
        "cfg_split",
        where,
        cfg_split.bytes_moved(elements, dtype.itemsize),
        buffers,
        {
            "ours": lambda t: ops.cfg_split(t.new_low, t.new_high, t.uncond, t.cond, radius),
            "eager fft2, mask, ifft2": fft_split,
        },
        exact_maps,
        lambda t: [t.new_low, t.new_high],
        [16 * torch.finfo(torch.float32).eps] * 2,
    )


def prediction_cases(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Iterator[Case]:
    """A prediction from two cached ones and the latents, and a fresh one corrected in place; `shape` is one prompt's
    prediction."""
    elements, itemsize, rounding = math.prod(shape), dtype.itemsize, one_rounding(dtype)
    one, two = make_coefficients(device, [W]), make_coefficients(device, [1 + W, -W])
    where = f"{name} {'x'.join(map(str, shape))}"

    def buffers() -> Tensors:
        ring, (newest, now, fresh) = (torch.randn((count, 1, *shape), dtype=dtype, device=device) for count in (2, 3))
        return Tensors(
            ring=ring,
            older=ring[0],
            tap=ring[1],
            newest=newest,
            now=now,
            fresh=fresh,
            out=torch.full_like(now, torch.nan),
        )

    def latents(t: Tensors) -> torch.Tensor:
        return (
            two[ops.Coefficient.NOW].double() * t.now.double()
            + two[ops.Coefficient.NEWEST].double() * t.newest.double()
        )

    def eager_predict(t: Tensors) -> None:
        torch.lerp(t.tap, t.older, -W, out=t.out).add_(t.now, alpha=NOW).add_(t.newest, alpha=NEWEST)

    def eager_correct(t: Tensors) -> None:
        t.fresh.mul_(FRESH).add_(t.tap, alpha=W).add_(t.now, alpha=NOW).add_(t.newest, alpha=NEWEST)

    yield Case(
        "prediction_blend",
        f"{where}, 2 taps",
        prediction_blend.bytes_moved(elements, itemsize, 4),
        buffers,
        {
            "ours": lambda t: ops.prediction_blend(t.out, t.ring, t.newest, t.now, two),
            "eager lerp, add_ twice": eager_predict,
            "inductor": lambda t: compiled(predict_expression)(t.out, two, t.tap, t.older, t.newest, t.now),
        },
        lambda t: [two[0].double() * t.tap.double() + two[1].double() * t.older.double() + latents(t)],
        lambda t: [t.out],
        [rounding],
    )
    yield Case(
        "prediction_blend",
        f"{where}, 1 tap, fresh in place",
        prediction_blend.bytes_moved(elements, itemsize, 4),
        buffers,
        {
            "ours": lambda t: ops.prediction_blend(t.fresh, t.ring, t.newest, t.now, one, t.fresh),
            "eager mul_, add_ three times": eager_correct,
            "inductor": lambda t: compiled(correct_expression)(t.fresh, one, t.tap, t.newest, t.now),
        },
        lambda t: [
            one[0].double() * t.tap.double() + latents(t) + one[ops.Coefficient.FRESH].double() * t.fresh.double()
        ],
        lambda t: [t.fresh],
        [rounding],
        # the plain form rounds the changed prediction after each term; under repeated calls it shrinks towards the
        # others
        slack=16.0,
    )


def skipped_step_case(device: str, dtype: torch.dtype, shape: tuple[int, ...] = LATENTS["CogVideoX"]) -> Case:
    """All the CFG work of a step without an unconditional branch: ours against the paper's formulation with an FFT each
    way.

    Both FFT forms compute in float32 and are given the two stored spectra. `as released` does what the authors' code
    and diffusers' do at every such step: it shifts the spectrum, makes the mask anew and shifts back. The eager form is
    the best plain one: no shifts, and a mask made beforehand.
    """
    template = next(cfg_cases(f"CogVideoX {str(dtype).removeprefix('torch.')}", shape, dtype, device))
    mask, planes = low_band(shape, device), (-2, -1)

    def buffers() -> Tensors:
        t = template.buffers()
        t.low_spectrum, t.high_spectrum = torch.fft.fft2(t.low), torch.fft.fft2(t.high)
        t.low_shifted, t.high_shifted = (torch.fft.fftshift(x, dim=planes) for x in (t.low_spectrum, t.high_spectrum))
        return t

    def fft(t: Tensors) -> None:
        spectrum = torch.fft.fft2(t.cond.float())
        low, high = spectrum * mask + LOW * t.low_spectrum, spectrum * ~mask + HIGH * t.high_spectrum
        t.out[:1] = torch.fft.ifft2(low + high).real
        t.out[1:] = t.cond

    def as_released(t: Tensors) -> None:
        height, width = t.cond.shape[-2:]
        y, x = torch.meshgrid(torch.arange(height) - height // 2, torch.arange(width) - width // 2, indexing="ij")
        inside = (x**2 + y**2 <= (min(height, width) // 5) ** 2).to(t.cond.device)
        spectrum = torch.fft.fftshift(torch.fft.fft2(t.cond.float()), dim=planes)
        low, high = spectrum * inside + LOW * t.low_shifted, spectrum * ~inside + HIGH * t.high_shifted
        rebuilt = torch.fft.ifft2(torch.fft.ifftshift(low + high, dim=planes)).real
        torch.cat([rebuilt.to(t.cond.dtype), t.cond], out=t.out)

    forms = {"ours": template.forms["ours"], "eager fft2, mask, ifft2": fft, AS_RELEASED: as_released}
    expected, results = template.expected, template.results
    return Case(
        "cfg_skipped_step", template.name, template.moved, buffers, forms, expected, results, template.tolerances
    )
