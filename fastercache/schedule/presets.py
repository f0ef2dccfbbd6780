"""The schedules that the paper's authors released, system by system, as numbers. `policies.released` makes schedules of
them.

Each script counts its denoiser calls and compares the counter with constants; these are the constants, under one set of
names. A preset `NAME/paper` is the paper's own rule (`policies.paper`), `NAME/released` is the script's. Source of all:
github.com/Vchitect/FasterCache, `scripts/`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Released:
    """One script's constants. All counters are the script's own, at its published number of calls.

    source: the script. calls: denoiser calls of its published run. first: the counter at the first of them.
    reuse_from: attention is reused from this counter on, unless `counter % compute_every == compute_at`.
    single_from: the conditional branch runs alone from this counter on, unless `counter % full_every == 0`;
        `last_full`: or on the last call.
    w_floor, w_slope, w_origin: a reused output is A + w (A - B) with w = max(w_floor, w_slope (counter - w_origin));
        `None`: A itself.
    low_gain, low_until, high_gain, high_from: each single-branch call multiplies the stored low-frequency difference by
        `low_gain`, up to and with counter `low_until`, and the high-frequency one by `high_gain`, from counter
        `high_from` on, until the next full call stores it anew.
    plain_site: sites whose newest output is repeated as it is, on the calls that reuse attention.
    radius_divisor: the low-pass keeps frequencies within min(H, W) // radius_divisor.
    """

    source: str
    calls: int
    reuse_from: int
    compute_every: int
    compute_at: int
    single_from: int
    w_floor: float | None
    low_gain: float
    low_until: int
    high_gain: float
    high_from: int
    full_every: int = 5
    first: int = 1
    last_full: bool = False
    w_slope: float = 0.0
    w_origin: int = 0
    plain_site: str | None = None
    radius_divisor: int = 5


OPEN_SORA = Released(
    source="scripts/opensora/fastercache_sample_opensora.py",
    calls=30, reuse_from=8, compute_every=2, compute_at=1, single_from=12, w_floor=0.0, w_slope=0.9 / 20, w_origin=7,
    low_gain=1.15, low_until=25, high_gain=1.15, high_from=20,
)  # fmt: skip
OPEN_SORA_MLP = replace(
    OPEN_SORA, source="scripts/opensora/fastercache_sample_multi_device_opensora.py", plain_site="mlp[14:43]"
)
LATTE = Released(
    source="scripts/latte/fastercache_sample_latte.py",
    calls=50, reuse_from=16, compute_every=2, compute_at=1, single_from=18, w_floor=0.5,
    low_gain=1.1, low_until=44, high_gain=1.1, high_from=45,
)  # fmt: skip
OPEN_SORA_PLAN = Released(
    source="scripts/opensora_plan/fastercache_sample_opensoraplan.py",
    calls=159, reuse_from=45, compute_every=3, compute_at=0, single_from=40, full_every=6, w_floor=0.3,
    low_gain=1.1, low_until=130, high_gain=1.2, high_from=131,
)  # fmt: skip
COGVIDEOX = Released(
    source="scripts/cogvideox/fastercache_sample_cogvideox_sp.py",
    calls=50, reuse_from=18, compute_every=3, compute_at=0, single_from=18, w_floor=0.3,
    low_gain=1.1, low_until=40, high_gain=1.1, high_from=30,
)  # fmt: skip
VCHITECT = Released(
    source="scripts/vchitect/fastercache_sample_vchitect.py",
    calls=100, reuse_from=31, compute_every=2, compute_at=1, single_from=31, w_floor=None,
    low_gain=1.05, low_until=79, high_gain=1.1, high_from=61, radius_divisor=200,
)  # fmt: skip
MOCHI = Released(
    source="scripts/mochi/fastercache_sample_mochi.py",
    calls=64, first=0, reuse_from=20, compute_every=2, compute_at=1, single_from=22, last_full=True,
    w_floor=0.5, w_slope=1 / 63,
    low_gain=1.15, low_until=50, high_gain=1.25, high_from=30,
)  # fmt: skip

RELEASED: dict[str, Released] = {
    "open-sora-1.2": OPEN_SORA,
    "open-sora-plan-1.1": OPEN_SORA_PLAN,
    "latte": LATTE,
    "cogvideox-2b": COGVIDEOX,
    "vchitect-2.0": VCHITECT,
    "cogvideox-5b": COGVIDEOX,
    "mochi": MOCHI,
}
"""By the name of the system (`fastercache.report.published`)."""
