"""Why the amplifier sees synthetic images only: its pseudo labels over training time.

    python benchmarks/memorisation.py runs/cmnist-0.98 --out docs/memorisation

The amplifier's network of a finished run is trained twice, on the synthetic images and on the real
training images, at a constant rate and for longer than the run's own. At every look it scores real
training images, and AUROC, precision and recall of its pseudo labels are taken against the true
groups, which are shown, never used. Writes OUT.json and OUT.png; a repeated call continues.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from finished import judge_amplifier, open_run, read_rows, start, write_rows

from ddb_fast import checkpoint
from ddb_fast.classification import first_network, train_classifier
from ddb_fast.data.samplers import ShuffledSampler
from ddb_fast.engine import Selection
from ddb_fast.metrics import null
from ddb_fast.recipes import ERM


def curve(context, source: str, *, images: int, looks: int, scored: int) -> list[dict]:
    """A row a look of the amplifier trained on `source`: synthetic or real."""
    data = context.data
    config = replace(context.config.amplifier, images=images, lr_schedule="constant")
    train = data.splits["train"]
    if source == "real":
        pixels, y = train.small, train.y
    else:
        path = Path(context.config.out) / "synthetic" / "images.safetensors"
        tensors, _ = checkpoint.load_tensors(path)
        pixels, y = tensors["images"].permute(0, 2, 3, 1).contiguous(), tensors["labels"]
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:scored]
    chosen = chosen.sort().values
    judge = partial(judge_amplifier, context, chosen=chosen)
    selection = Selection(judge, by="auroc", times=looks)
    with tempfile.TemporaryDirectory() as folder:
        train_classifier(
            context,
            first_network(config, len(data.classes), seed=context.config.seed),
            config,
            pixels,
            y,
            whole=True,
            recipe=ERM(),
            sampler=ShuffledSampler(len(y), seed=context.config.seed),
            stage="amplifier",
            seed=context.config.seed,
            resume=Path(folder) / "checkpoint.safetensors",
            selection=selection,
        )
    return [
        {"dataset": data.name, "rho": context.config.data.rho,
         **{name: null(value) for name, value in row.items()}}
        for row in selection.curve
    ]  # fmt: skip


def plot(rows: list[dict], path: Path) -> None:
    """A panel a figure over the images shown; one line a data set and source."""
    from matplotlib.figure import Figure

    names = ("auroc", "precision", "recall")
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    keys = sorted({(r["dataset"], r["rho"]) for r in rows})
    for panel, name in zip(figure.subplots(1, 3), names, strict=True):
        for number, key in enumerate(keys):
            for source, style in (("synthetic", "-"), ("real", "--")):
                own = [r for r in rows if ((r["dataset"], r["rho"]), r["trained_on"])
                       == (key, source) and r[name] is not None]  # fmt: skip
                panel.plot([r["images"] for r in own], [r[name] for r in own], style,
                           color=f"C{number}", label=f"{key[0]} {key[1]:g}, {source}")  # fmt: skip
        panel.set(title=name, xlabel="images shown to the amplifier", xscale="log", ylim=(0, 1.03))
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--out", type=Path, required=True, help="OUT.json and OUT.png")
    parser.add_argument("--images", type=int, help="length of each training (4x the run's)")
    parser.add_argument("--looks", type=int, default=40)
    parser.add_argument("--scored", type=int, default=10_000, help="real images scored at a look")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args(argv)
    accelerator = start(arguments.threads)
    rows = read_rows(arguments.out.with_suffix(".json"))
    try:
        for run in arguments.runs:
            context = open_run(run, accelerator)
            for source in ("synthetic", "real"):
                images = arguments.images or 4 * context.config.amplifier.images
                options = {"looks": arguments.looks, "scored": arguments.scored}
                told = {"run": run.name, "trained_on": source, "of": images, **options}
                if any(told.items() <= row.items() for row in rows):
                    continue
                rows += [told | row for row in curve(context, source, images=images, **options)]
                write_rows(arguments.out.with_suffix(".json"), rows)
                print(*rows[-arguments.looks :: max(1, arguments.looks // 6)], sep="\n", flush=True)
    except (ValueError, OSError) as error:
        print(f"memorisation: {error}", file=sys.stderr)
        return 2
    plot(rows, arguments.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
