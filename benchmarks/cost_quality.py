"""What does a better synthetic set cost? Sampler, steps, guidance and training length, measured.

    python benchmarks/cost_quality.py digits --work runs/map --out docs/cost-quality-map
    python benchmarks/cost_quality.py colored-mnist --data DIR --points few --work ... --out ...

One thing at a time is changed in a preset, and what matters crosswise. For each point images are
drawn from a generator of that training length, an amplifier is trained on them for each seed, and
the training images are scored. Bias labels are compared with at the end, they choose nothing.
Seconds are the process's CPU time, which other work on the machine does not change; wall time is
beside it in the rows. Writes OUT.json, OUT.md and OUT.png; a repeated call continues.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

from finished import aligned_share, judge_amplifier, open_context, read_rows, start, write_rows

from ddb_fast import checkpoint
from ddb_fast.classification import load_classifier, train_amplifier
from ddb_fast.config import with_fields
from ddb_fast.context import Context
from ddb_fast.generator import synthesise, train_diffusion
from ddb_fast.metrics import null
from ddb_fast.presets import load_config

Changes = dict[str, str | int | float]
"""Of a preset: sampler, steps, guidance_scale; length: of the generator's, in the preset's."""


def vary(fixed: Changes | None = None, **levels: tuple) -> list[Changes]:
    """One factor at a time through its levels, beside what is fixed: a point a level."""
    return [(fixed or {}) | {name: level} for name, values in levels.items() for level in values]


SCALES = (1.0, 1.5, 3.0, 5.0)
MAPS: dict[str, list[Changes]] = {
    "full": [
        {},
        *vary(steps=(5, 10), guidance_scale=SCALES, length=(0.125, 0.25, 0.5)),
        *vary({"length": 0.125}, guidance_scale=SCALES),
        *vary({"steps": 5}, guidance_scale=SCALES),
        *vary({"sampler": "unipc"}, steps=(5, 10, 20)),
        *vary({"sampler": "ddim"}, steps=(5, 10, 20, 50)),
        *vary({"length": 0.25}, guidance_scale=(1.0, 3.0), steps=(10,)),
        *vary({"length": 0.5}, guidance_scale=(1.0, 1.5), steps=(10,)),
        *vary(length=(0.0625,)),
        *vary({"sampler": "ddpm"}, steps=(50, 250)),
        *vary(steps=(15, 50)),
        *vary({"sampler": "unipc"}, steps=(15,)),
        *vary(length=(2.0,)),
    ],
    "few": [
        {},
        *vary(steps=(10,), length=(0.25,), guidance_scale=(1.0,)),
        *vary({"length": 0.25}, steps=(10,), guidance_scale=(1.0,)),
        *vary(length=(0.5,), steps=(5,), guidance_scale=(3.0,)),
        *vary({"length": 0.5}, steps=(10,), guidance_scale=(1.0,)),
        *vary({"sampler": "unipc"}, steps=(10,)),
        *vary(length=(0.125,)),
    ],
    "lengths": vary(length=(0.0625, 0.125, 0.25, 0.5)),
}
"""The most telling points come first; lengths: of another objective, as a configuration's file."""
FIGURES = ("auroc", "precision", "recall")
TICKS = [n * 10**power for power in range(4) for n in (1, 2, 3, 5, 7)]


@contextmanager
def timed(seconds: dict[str, dict[str, float]], stage: str) -> Iterator[None]:
    """Put the CPU and wall seconds of a stage into `seconds`."""
    began = time.process_time(), time.perf_counter()
    yield
    cpu, wall = time.process_time() - began[0], time.perf_counter() - began[1]
    seconds[stage] = {"cpu": round(cpu, 2), "wall": round(wall, 2)}


def trained_generator(context: Context, images: int) -> tuple[Path, dict[str, float]]:
    """The folder of a generator trained for so many images, and the seconds of its training."""
    folder = Path(context.config.out) / f"generator-{images}"
    file = folder / "seconds.json"
    if not file.exists():
        diffusion, seconds = context.config.diffusion, {}
        # Untimed first, a batch: whatever a process loads and sets up once. Interrupted it begins
        # anew: what a resumed training took in all would not be known.
        for length, stage in ((diffusion.batch_size, "one batch"), (images, "training")):
            config = replace(context.config, diffusion=replace(diffusion, images=length))
            with tempfile.TemporaryDirectory() as resume, timed(seconds, stage):
                train_diffusion(replace(context, config=config), folder, Path(resume))
        checkpoint.write_atomically(file, json.dumps(seconds["training"]) + "\n")
    return folder, json.loads(file.read_text("utf-8"))


def measure(context: Context, generator: Path, point: Changes, seeds: list[int]) -> dict:
    """Figures and seconds of one point; a figure, and the amplifier's seconds, for each seed."""
    names = ("sampler", "steps", "guidance_scale")
    sampling = replace(context.config.sampling, **{name: point[name] for name in names})
    context = replace(context, config=replace(context.config, sampling=sampling))
    sampled, figures, seconds = {}, [], []
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        with timed(sampled, "sampling"):
            synthesise(context, generator, folder, folder / "shards")
        images = folder / "images.safetensors"
        tensors, _ = checkpoint.load_tensors(images)
        for seed in seeds:
            own = replace(context, config=replace(context.config, seed=seed))
            at, spent = folder / f"{seed}", {}
            with timed(spent, "amplifier"):
                train_amplifier(own, images, at, at / "checkpoint.safetensors")
            network, _, _ = load_classifier(at / "model.safetensors")
            with timed(spent, "scoring"):
                figures.append(judge_amplifier(own, network.to(context.device)))
            seconds.append(spent)
    return {
        "synthetic_images": len(tensors["labels"]),
        **aligned_share(context.data, tensors["images"], tensors["labels"]),
        "seeds": seeds,
        **{name: [null(row[name]) for row in figures] for name in FIGURES},
        "seconds": sampled | {stage: [row[stage] for row in seconds] for stage in seconds[0]},
    }


# --- what is shown -----------------------------------------------------------------------------


def core_seconds(row: dict) -> tuple[float, float, float]:
    """CPU seconds of the generator's training, of sampling, of one amplifier."""
    spent = row["seconds"]
    amplifier = fmean(one["cpu"] for one in spent["amplifier"])
    return spent["training"]["cpu"], spent["sampling"]["cpu"], amplifier


def known(row: dict, figure: str) -> list[float]:
    """A figure's values, a seed each, where it is defined; the aligned share has one."""
    values = row[figure] if isinstance(row[figure], list) else [row[figure]]
    return [value for value in values if value is not None]


def table(rows: list[dict]) -> str:
    """Markdown: a row a point, in the order of measurement; mean ± deviation over seeds."""
    lines = [
        "| data | sampler | steps | scale | generator's images | aligned, % | AUROC | precision |"
        " recall | training, s | sampling, s | amplifier, s |",
        "|---" * 12 + "|",
    ]

    def shown(values: list[float], digits: int) -> str:
        spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{fmean(values):.{digits}f}{spread}" if values else "undefined"

    for row in rows:
        share, low, high = (100 * row[name] for name in ("aligned_share", "low", "high"))
        cells = [row["preset"], row["sampler"], row["steps"], f"{row['guidance_scale']:g}",
                 f"{row['images']:,}", f"{share:.1f} ({low:.1f}-{high:.1f})"]  # fmt: skip
        cells += [shown(known(row, name), 4 if name == "auroc" else 3) for name in FIGURES]
        cells += [f"{seconds:.0f}" for seconds in core_seconds(row)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


MARKERS = {"dpm-solver-pp-2m": "o", "unipc": "^", "ddim": "s", "ddpm": "D"}


def plot(rows: list[dict], path: Path) -> None:
    """A row a data set, a column a figure, over core seconds; bars: 95 %, or the seeds' range."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    presets = list(dict.fromkeys(row["preset"] for row in rows))
    scales = sorted({row["guidance_scale"] for row in rows})
    figure = Figure(figsize=(14, 3.6 * len(presets) + 0.5), layout="constrained")
    grid = figure.subplots(len(presets), 1 + len(FIGURES), squeeze=False)
    for preset, panels in zip(presets, grid, strict=True):
        own = [row for row in rows if row["preset"] == preset]
        for panel, name in zip(panels, ("aligned_share", *FIGURES), strict=True):
            for row in own:
                values = known(row, name)
                if not values:
                    continue
                low, y, high = min(values), fmean(values), max(values)
                if name == "aligned_share":
                    low, high = row["low"], row["high"]
                # The mean of equal values may be rounded past them.
                low, high = min(low, y), max(high, y)
                x, colour = sum(core_seconds(row)), f"C{scales.index(row['guidance_scale'])}"
                panel.errorbar(x, y, [[y - low], [high - y]], color=colour, lw=0.8, capsize=2,
                               marker=MARKERS[row["sampler"]], ms=5, alpha=0.8)  # fmt: skip
                if not row["changed"]:
                    panel.plot(x, y, "*", color="black", ms=13, zorder=3)
            if name == "aligned_share":
                panel.axhline(own[0]["real_aligned_share"], color="grey", lw=0.8, ls=":")
            label = "AUROC" if name == "auroc" else name.replace("_", " ")
            panel.set(title=preset, xlabel="core seconds", ylabel=label, xscale="log")
            low, high = panel.get_xlim()
            panel.set_xticks([seconds for seconds in TICKS if low < seconds < high])
            panel.minorticks_off()
            panel.xaxis.set_major_formatter("{x:g}")
    shown = [Line2D([], [], color="black", marker="*", ms=13, ls="", label="preset's setting")]
    shown += [Line2D([], [], color=f"C{number}", lw=4, label=f"scale {scale:g}")
              for number, scale in enumerate(scales)]  # fmt: skip
    shown += [Line2D([], [], color="grey", marker=MARKERS[name], ls="", label=name)
              for name in dict.fromkeys(row["sampler"] for row in rows)]  # fmt: skip
    figure.legend(handles=shown, loc="outside lower center", ncols=len(shown))
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset", help="a preset, or a configuration's JSON file")
    parser.add_argument("--data", help="the data's path, where the preset needs one")
    parser.add_argument("--work", type=Path, required=True, help="folder for trained generators")
    parser.add_argument("--out", type=Path, required=True, help="OUT.json, OUT.md, OUT.png")
    parser.add_argument("--points", choices=MAPS, default="full")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the amplifier")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    accelerator, file = start(arguments.threads), arguments.out.with_suffix(".json")
    rows = read_rows(file)
    try:
        config = load_config(arguments.preset)
        fields = {"out": str(arguments.work / config.preset)}
        if arguments.data is not None:
            fields["data.path"] = arguments.data
        context = open_context(with_fields(config, fields), accelerator)
        if context.data.bias_of is None:
            raise ValueError(f"the attribute of {context.data.name} cannot be read off pixels")
        sampling = config.sampling
        for changes in MAPS[arguments.points]:
            point = {"length": 1.0, "sampler": sampling.sampler, "steps": sampling.steps,
                     "guidance_scale": sampling.guidance_scale}  # fmt: skip
            changed = sorted(name for name, value in changes.items() if value != point[name])
            point |= changes
            images = round(point["length"] * config.diffusion.images)
            told = {"preset": config.preset, **point, "images": images}
            if any(told.items() <= row.items() for row in rows):
                continue
            generator, training = trained_generator(context, images)
            row = measure(context, generator, point, arguments.seeds)
            row["seconds"] = {"training": training} | row["seconds"]
            real = context.data.groups("train").bias_aligned.double().mean().item()
            told |= {"changed": changed, "rho": config.data.rho, "real_aligned_share": real}
            rows.append(told | row)
            write_rows(file, rows)
            print(json.dumps(rows[-1]), flush=True)
    except (ValueError, OSError) as error:
        print(f"cost_quality: {error}", file=sys.stderr)
        return 2
    arguments.out.with_suffix(".md").write_text(table(rows), "utf-8")
    plot(rows, arguments.out.with_suffix(".png"))
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
