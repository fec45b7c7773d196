"""Does faster sampling change the bias? Aligned images by our sampler and by the authors' loop.

    python benchmarks/aligned.py runs/demo --out docs/aligned --images 300

Both draw from the finished run's generator: ours as the run is configured, theirs with all their
steps, in fp32, with torch's own operators, nothing clipped. The attribute is read off the pixels
(`Listing.bias_of`), by no classifier. On a GPU theirs runs a second time, with TF32 off. Writes a
row a batch to OUT.json; the same command again continues, and prints the shares and the intervals
of their differences.
"""

import argparse
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import checkout  # noqa: F401 - before everything that imports ddb_fast
import sampling_ways
import torch
from finished import open_run, read_rows, start, write_rows

from ddb_fast.config import SamplingConfig
from ddb_fast.context import Context
from ddb_fast.data.pixels import denormalise
from ddb_fast.generator import load_diffusion
from ddb_fast.metrics import wilson_interval
from ddb_fast.models.unet import UNet

THEIRS = {
    "authors": sampling_ways.AUTHORS_WAY,
    "authors, TF32 off": replace(sampling_ways.AUTHORS_WAY, tf32=False),
}


def draw(context: Context, unet: UNet, way: str, y: torch.Tensor, first: int) -> torch.Tensor:
    """Images of the classes y, uint8, number `first` and following, by one of the ways."""
    config, sampling = context.config.diffusion, context.config.sampling
    if way == "ours":
        seeds = torch.arange(first, first + len(y))
        with context.accelerator.autocast():
            return sampling_ways.our_sampling(unet, config, sampling, y, seeds)
    torch.manual_seed(first)
    x = sampling_ways.authors_sampling(unet, THEIRS[way], config, y, None)()
    return denormalise(x, config.pixel_norm)


def difference_interval(a: int, m: int, b: int, n: int) -> tuple[float, float, float]:
    """a/m - b/n and its 95 % interval: Newcombe 1998, method 10, from two Wilson intervals."""
    (low_a, high_a), (low_b, high_b) = wilson_interval(a, m), wilson_interval(b, n)
    p, q = a / m, b / n
    low, high = math.hypot(p - low_a, high_b - q), math.hypot(high_a - p, q - low_b)
    return p - q, p - q - low, p - q + high


def summary(rows: list[dict], sampling: SamplingConfig) -> str:
    """Each share, the intervals of ours minus theirs, and the time that an image took."""
    lines, counts = [], []
    for way in dict.fromkeys(row["way"] for row in rows):
        own = [row for row in rows if row["way"] == way]
        images, aligned = sum(r["images"] for r in own), sum(r["aligned"] for r in own)
        low, high = wilson_interval(aligned, images)
        seconds = sum(r["seconds"] for r in own) / images
        how = f"{sampling.sampler}, {sampling.steps} steps" if way == "ours" else "all their steps"
        lines.append(
            f"{way} ({how}): {aligned} of {images} aligned, {100 * low:.1f} to {100 * high:.1f} %, "
            f"{seconds:.4f} s an image"
        )
        counts.append((way, aligned, images))
    (_, *ours), *others = counts
    for way, *theirs in others:
        found, low, high = difference_interval(*ours, *theirs)
        lines.append(
            f"ours - {way}: {100 * found:+.1f} points, 95 % interval {100 * low:+.1f} to "
            f"{100 * high:+.1f}: {'holds' if low <= 0 <= high else 'does NOT hold'} 0"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run's folder")
    parser.add_argument("--out", type=Path, required=True, help="OUT.json")
    parser.add_argument("--images", type=int, default=300, help="each way")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args(argv)
    try:
        return compare(given)
    except (ValueError, OSError) as error:
        print(f"aligned: {error}", file=sys.stderr)
        return 2


def compare(given: argparse.Namespace) -> int:
    """Draw what is missing both ways and print the summary."""
    context = open_run(given.run, start(given.threads))
    data = context.data
    if data.bias_of is None:
        raise ValueError(f"{given.run}: the attribute of {data.name} cannot be read off pixels")
    unet, _, _ = load_diffusion(given.run / "diffusion")
    unet.to(context.device)
    # Without a GPU there is no TF32 to turn off.
    ways = ("ours", *THEIRS) if context.device.type == "cuda" else ("ours", "authors")
    groups, file = data.groups("train"), given.out.with_suffix(".json")
    for first in range(0, given.images, given.batch):
        y = torch.arange(first, min(first + given.batch, given.images)) % len(data.classes)
        for way in ways:
            told = {"run": given.run.name, "way": way, "first": first, "images": len(y)}
            if any(told.items() <= row.items() for row in read_rows(file)):
                continue
            began = time.perf_counter()
            images = draw(context, unet, way, y.to(context.device), first).cpu()
            seconds = time.perf_counter() - began
            a = data.bias_of(images)
            aligned = int(groups.with_labels(y, a).bias_aligned.sum())
            row = {**told, "aligned": aligned, "seconds": round(seconds, 3)}
            write_rows(file, [*read_rows(file), row])
            print(row, flush=True)
    own = [row for row in read_rows(file) if row["run"] == given.run.name]
    print(summary(own, context.config.sampling))
    return 0


if __name__ == "__main__":
    sys.exit(main())
