"""Does guidance amplify the bias? The share of aligned images among generated ones, measured.

    python benchmarks/amplification.py runs/cmnist-* --out docs/amplification

For each finished run and each guidance scale, images are drawn from the run's diffusion model with
the same seeds and steps; their attribute is read off the pixels (`Listing.bias_of`: the nearest
mean colour), by no classifier. Writes OUT.json, OUT.md and OUT.png; a repeated call continues.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from finished import aligned_share, open_run, read_rows, start, write_rows

from ddb_fast.diffusion.generate import generate_batch, plan, sampling_options
from ddb_fast.generator import load_diffusion

SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)


def measure(context, run: Path, *, scale: float, count: int) -> dict:
    """The aligned share among `count` generated images of all classes in turn, and its interval."""
    config, data = context.config, context.data
    if data.bias_of is None:
        raise ValueError(f"{run}: the attribute of {data.name} cannot be read off pixels")
    unet, diffusion, _ = load_diffusion(run / "diffusion")
    unet.to(context.device)
    labels, seeds = plan(len(data.classes), -(-count // len(data.classes)), config.seed)
    images, size = [], config.sampling.batch_size
    options = sampling_options(diffusion, replace(config.sampling, guidance_scale=scale))
    for part in torch.arange(count).split(size):
        with context.accelerator.autocast():
            images.append(generate_batch(unet, labels[part], seeds[part], pad_to=size, **options))
    real = data.groups("train").bias_aligned.double().mean().item()
    return {
        "dataset": data.name,
        "rho": config.data.rho,
        "real_aligned_share": real,
        "guidance_scale": scale,
        "images": count,
        **aligned_share(data, torch.cat(images), labels[:count]),
        "diffusion_images": diffusion.images,
        "sampler": f"{config.sampling.sampler}, {config.sampling.steps} steps",
    }


def table(rows: list[dict]) -> str:
    """Aligned share, % and its 95 % interval: a row a data set and rho, a column a scale."""
    scales = sorted({row["guidance_scale"] for row in rows})
    keys = sorted({(row["dataset"], row["real_aligned_share"]) for row in rows})
    found = {(r["dataset"], r["real_aligned_share"], r["guidance_scale"]): r for r in rows}
    lines = [
        "| data | real images | " + " | ".join(f"scale {scale:g}" for scale in scales) + " |",
        "|---" * (2 + len(scales)) + "|",
    ]
    for dataset, real in keys:
        cells = []
        for scale in scales:
            row = found.get((dataset, real, scale))
            cells.append(
                f"{100 * row['aligned_share']:.1f} ({100 * row['low']:.1f}-{100 * row['high']:.1f})"
                if row
                else "-"
            )
        lines.append(f"| {dataset} | {100 * real:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """A panel a data set: aligned share against scale, a line a rho, its own level dotted."""
    from matplotlib.figure import Figure

    names = sorted({row["dataset"] for row in rows})
    figure = Figure(figsize=(5 * len(names), 3.6), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        levels = sorted({r["real_aligned_share"] for r in rows if r["dataset"] == name})
        for number, real in enumerate(levels):
            own = [r for r in rows if (r["dataset"], r["real_aligned_share"]) == (name, real)]
            own.sort(key=lambda row: row["guidance_scale"])
            x, y = ([100 ** (k == "aligned_share") * r[k] for r in own]
                    for k in ("guidance_scale", "aligned_share"))  # fmt: skip
            spread = [[100 * (r["aligned_share"] - r["low"]) for r in own],
                      [100 * (r["high"] - r["aligned_share"]) for r in own]]  # fmt: skip
            colour = f"C{number}"
            panel.errorbar(x, y, spread, color=colour, marker="o", ms=3, capsize=2,
                           label=f"{100 * real:.1f} % of real images")  # fmt: skip
            panel.axhline(100 * real, color=colour, lw=0.8, ls=":")
        panel.set(title=name, xlabel="guidance scale (1 = off)", ylabel="aligned, % of generated")
        panel.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--out", type=Path, required=True, help="OUT.json, OUT.md, OUT.png")
    parser.add_argument("--scales", nargs="+", type=float, default=SCALES)
    parser.add_argument("--count", type=int, default=1000, help="images a run and scale (1000)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args(argv)
    accelerator = start(arguments.threads)
    rows = read_rows(arguments.out.with_suffix(".json"))
    try:
        for run in arguments.runs:
            context = open_run(run, accelerator)
            for scale in arguments.scales:
                told = {"run": run.name, "guidance_scale": scale, "images": arguments.count}
                if any(told.items() <= row.items() for row in rows):
                    continue
                rows.append(told | measure(context, run, scale=scale, count=arguments.count))
                write_rows(arguments.out.with_suffix(".json"), rows)
                print(rows[-1], flush=True)
    except (ValueError, OSError) as error:
        print(f"amplification: {error}", file=sys.stderr)
        return 2
    arguments.out.with_suffix(".md").write_text(table(rows), "utf-8")
    plot(rows, arguments.out.with_suffix(".png"))
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
