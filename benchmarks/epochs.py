"""How long should each method train on Colored MNIST? Chosen on validation digits, here.

    python benchmarks/epochs.py runs/validation --methods erm group-dro ddb-ii --out docs/epochs

The run is a finished one of the preset colored-mnist with `--data.validation_share 0.1`. At every
look a method is scored on the validation digits in colours drawn at random; neither they nor the
rates (constant) depend on when training ends, so one training tells of all shorter ones. The test
images take no part. Writes OUT.json and prints the table; a repeated call continues.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from finished import open_run, read_rows, start, write_rows
from torch import nn

from ddb_fast.classification import train_classifier
from ddb_fast.config import AMPLIFIED
from ddb_fast.data.benchmarks.colored_mnist import recoloured
from ddb_fast.data.store import Split
from ddb_fast.engine import Selection
from ddb_fast.methods import build_method, first_networks, identify_errors
from ddb_fast.scoring import Scores, logits_of, read_scores

METHODS = ("erm", "lff", "jtt", "group-dro", *sorted(AMPLIFIED))


def curve(
    context, method: str, seed: int, scores: Scores | None, shown: Split, *, looks: int
) -> list[dict]:
    """A row a look of one method, accuracy on `shown` in each."""
    config, train = context.config.classifier, context.data.splits["train"]
    conflicting = shown.a != shown.y
    network, trained = first_networks(config, len(context.data.classes), method, seed)

    def figures(_: nn.Module) -> dict[str, float]:
        logits = logits_of(network, shown.large, config, device=context.device, crop=True)
        correct = (logits.argmax(1) == shown.y).double()
        return {
            "accuracy": correct.mean().item(),
            "aligned_accuracy": correct[~conflicting].mean().item(),
            "conflicting_accuracy": correct[conflicting].mean().item(),
        }

    selection = Selection(figures, by="accuracy", times=looks)
    with tempfile.TemporaryDirectory() as folder:
        resume = Path(folder) / "checkpoint.safetensors"
        if method == "jtt":
            identify_errors(context, seed, Path(folder), resume)
            resume.unlink(missing_ok=True)
        recipe, sampler = build_method(context, method, seed, scores=scores, folder=Path(folder))
        train_classifier(
            context,
            trained,
            config,
            train.large,
            train.y,
            recipe=recipe,
            sampler=sampler,
            stage=f"{method} seed {seed}",
            seed=seed,
            resume=resume,
            clipped=tuple(trained.children()) if method == "lff" else (),
            selection=selection,
        )
    return [{"epochs": round(row["images"] / len(train), 1), **row} for row in selection.curve]


def table(rows: list[dict]) -> str:
    """Mean accuracy over seeds, %: a row a method and variant, a column a number of epochs."""
    epochs = sorted({row["epochs"] for row in rows})
    lines = [
        "| method | " + " | ".join(f"{e:g} epochs" for e in epochs) + " |",
        "|---" * (1 + len(epochs)) + "|",
    ]
    for key in dict.fromkeys((row["method"], row["variant"]) for row in rows):
        own = {}
        for row in rows:
            if (row["method"], row["variant"]) == key:
                own.setdefault(row["epochs"], []).append(row["accuracy"])
        cells = [f"{100 * fmean(own[e]):.1f}" if e in own else "" for e in epochs]
        lines.append(f"| {' '.join(filter(None, key))} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run with a validation split")
    parser.add_argument("--out", type=Path, required=True, help="OUT.json")
    parser.add_argument("--methods", nargs="+", required=True, choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,))
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--looks", type=int, default=6)
    parser.add_argument("--jtt", nargs=2, type=int, default=(2, 100), metavar=("EPOCHS", "TIMES"))
    parser.add_argument("--plain", action="store_true", help="ddb-ii without average and maximum")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args(argv)
    rows = read_rows(arguments.out.with_suffix(".json"))
    try:
        context = open_run(arguments.run, start(arguments.threads))
        config, data = context.config, context.data
        if data.name != "colored-mnist" or "val" not in data.splits:
            raise ValueError(f"{arguments.run}: not Colored MNIST with a validation split")
        val = data.splits["val"]
        colours = np.random.default_rng(0).integers(0, 10, len(val))
        images = recoloured(Path(config.data.path), val.paths, colours)
        shown = replace(val, a=torch.from_numpy(colours), large=images)
        scores = None
        if AMPLIFIED.intersection(arguments.methods):
            scores = read_scores(arguments.run / "amplifier" / "scores.csv")
        length = arguments.epochs * len(data.splits["train"])
        first, times = arguments.jtt
        rule = {"moving_average": None, "class_maximum": False} if arguments.plain else {
            "moving_average": 0.7, "class_maximum": True}  # fmt: skip
        config = replace(
            config,
            classifier=replace(config.classifier, images=length),
            jtt=replace(config.jtt, first_share=min(1.0, first / arguments.epochs), upweight=times),
            reweighting=replace(config.reweighting, **rule),
        )
        context = replace(context, config=config)
        for method in arguments.methods:
            variant = f"({first}, x{times})" if method == "jtt" else ""
            if method == "ddb-ii":
                variant = "plain" if arguments.plain else "with average and maximum"
            for seed in arguments.seeds:
                told = {"run": arguments.run.name, "method": method, "variant": variant}
                told |= {"of": arguments.epochs, "looks": arguments.looks, "seed": seed}
                if any(told.items() <= row.items() for row in rows):
                    continue
                found = curve(context, method, seed, scores, shown, looks=arguments.looks)
                rows += [{**told, "rho": config.data.rho, **row} for row in found]
                write_rows(arguments.out.with_suffix(".json"), rows)
                print(method, variant, seed, *found, sep="\n", flush=True)
    except (ValueError, OSError) as error:
        print(f"epochs: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
