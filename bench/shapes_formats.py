"""What storing the caches in fewer bits costs, on an embedded pipeline: `python -m bench.shapes_formats [--pipeline
wan]`.

PSNR and SSIM of the paper's schedule in each cache format, against the uncached clips of the same pairs, and what a
packed format loses to the lossless one, pair by pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bench import report, shapes, stats
from fastercache import policies
from fastercache.cache.budget import FORMATS
from fastercache.shapes import PIPELINES

BARS = {"int8": 0.1}
"""Most PSNR lost to the lossless format, in dB; what is not named here is reported."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = shapes.parser(__doc__, 32, "shapes_formats.json")
    options.add_argument("--pipeline", choices=PIPELINES, default="shapes", help="the embedded pipeline")
    args = options.parse_args(arguments)
    command, title = "python -m bench.shapes_formats", "Shapes: cache formats"
    command, title, out = shapes.named(command, title, options.get_default("out"), args.pipeline, None)
    args.out = out if args.out == options.get_default("out") else args.out
    plain = [shapes.UNCACHED, *(shapes.cached(name, policies.paper, args.steps, name) for name in FORMATS)]
    variants = [replace(variant, pipeline=args.pipeline) for variant in plain]
    pairs = shapes.held_out(args.pairs, args.pipeline)
    n, clips = shapes.collect(
        variants, pairs, args.steps, work=args.work, processes=args.processes, minutes=args.minutes
    )

    psnr, ssim = {}, {}
    for name in FORMATS:
        psnr[name], ssim[name] = shapes.similarity(clips[name], clips["uncached"])
    rows, cells = [], []
    for name in FORMATS:
        lost, interval = stats.mean_interval(psnr["model"] - psnr[name])
        row = {
            "format": name,
            "cache_bytes": clips[name].facts["cache_bytes"],
            "psnr_db": float(psnr[name].mean()),
            "ssim": float(ssim[name].mean()),
            "psnr_lost_db": lost,
            "psnr_lost_interval_db": interval,
            "verdict": "reported" if name not in BARS else "holds" if lost <= BARS[name] else "does not hold",
        }
        rows.append(row)
        against = ["", "", "compared with"]
        if name != "model":
            against = [f"{lost:+.3f}", report.between(interval, "+.3f"), row["verdict"]]
        cells.append([name, f"{row['cache_bytes'] / 1e6:.2f}", f"{row['psnr_db']:.2f}", f"{row['ssim']:.4f}", *against])

    body = [
        shapes.described(args.steps, args.pairs, n, args.pipeline),
        "PSNR and SSIM are means over clips of the paper's schedule, each against the uncached clip of the same pair. "
        "PSNR lost is the mean over pairs of the lossless format's PSNR (float32 here) less the row's, with a 95 % t "
        "interval; the bar is 0.1 dB for int8. Bytes are the whole run's, with the maps of CFG-Cache, which are "
        "float32 in every format.",
        report.table(
            ("format", "cache (MB)", "PSNR (dB)", "SSIM", "PSNR lost (dB)", "95 % interval", "verdict"), cells
        ),
    ]
    data = {
        "settings": shapes.settings(args.steps, args.pairs, n, args.pipeline),
        "rows": rows,
        "per_pair": {name: {"psnr_db": psnr[name].tolist(), "ssim": ssim[name].tolist()} for name in FORMATS},
        "seconds_median": {name: float(np.median(one.seconds)) for name, one in clips.items()},
    }
    report.write(args.out, title, command, data, body)


if __name__ == "__main__":
    main()
