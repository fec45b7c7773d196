"""results.json and the table a person reads, from the files that the stages left."""

from pathlib import Path
from typing import Any

from ddb_fast import checkpoint
from ddb_fast.config import RunConfig
from ddb_fast.data.store import ImageData
from ddb_fast.metrics import (
    accuracies,
    auroc,
    average_precision,
    merge_group_tables,
    null,
    precision_recall,
    summarise,
)
from ddb_fast.opinions import read_opinions
from ddb_fast.provenance import read_json
from ddb_fast.scoring import Scores
from ddb_fast.tabular import COLUMNS, TEXTURE, caveats, markdown, percent, shown_metrics
from ddb_fast.verdict import as_data, judge


def collect_results(
    path: Path,
    config: RunConfig,
    data: ImageData,
    scores: Scores | None,
    seconds: dict[str, float],
    *,
    real_scores: Scores | None = None,
) -> dict[str, Any]:
    """The contents of results.json: fractions of 1, None where labels are needed and absent.

    scores, real_scores: of the amplifier trained on synthetic and of the one on real images.
    """
    methods, textured = {}, {}
    for method in config.methods:
        files = [
            path / "classifiers" / method / f"seed{seed}" / "metrics.json" for seed in config.seeds
        ]
        written = [read_json(file) for file in files]
        tests = [seed.get("test") for seed in written]
        if None in tests:
            methods[method] = {"metrics": {}, "groups": []}
            continue
        metrics = {
            name: summarise([test["metrics"].get(name) for test in tests])
            for name in dict.fromkeys(name for test in tests for name in test["metrics"])
        }
        # ImageNet-9 has its clusters for the validation images, whatever the test images are.
        textures = [seed.get("val", {"metrics": {}})["metrics"].get(TEXTURE) for seed in written]
        if TEXTURE not in metrics and None not in textures:
            metrics[TEXTURE] = summarise(textures)
            textured = {"texture_split": "val"}
        tables = [test["groups"] for test in tests]
        groups = merge_group_tables(tables) if tables[0] else []
        methods[method] = {"metrics": metrics, "groups": groups}
    return {
        "format": 1,
        "dataset": data.name,
        "preset": config.preset,
        "split": "test",
        **textured,
        "selection": config.selection,
        "seeds": list(config.seeds),
        "methods": methods,
        "synthetic": _synthetic(path / "synthetic" / "images.safetensors", data),
        "amplifier": None if scores is None else _amplifier(scores, data),
        "verdict": _verdict(path / "audit", data),
        "memorisation": _memorisation(path / "memorisation.json"),
        "real_amplifier": None if real_scores is None else _amplifier(real_scores, data),
        "seconds": seconds,
    }


def _synthetic(path: Path, data: ImageData) -> dict[str, Any] | None:
    if not path.exists():
        return None
    tensors, _ = checkpoint.load_tensors(path)
    labels, groups = tensors["labels"], data.groups("train")
    share = by = None
    if data.bias_of is not None and groups is not None:
        a = data.bias_of(tensors["images"])
        share = groups.with_labels(labels, a).bias_aligned.double().mean().item()
        by = data.bias_of.__name__
    return {"count": len(labels), "aligned_share": share, "aligned_by": by}


def _memorisation(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.exists() else None


def _verdict(folder: Path, data: ImageData) -> dict[str, Any] | None:
    if not (folder / "predictions.safetensors").exists():
        return None
    y, said = data.splits["train"].y, read_opinions(folder)
    if said is None:
        return None
    verdict = judge(y, amplifier=said.amplifier, again=said.again, erm=said.erm, gain=said.gain)
    return as_data(verdict, y, data.classes)


def _amplifier(scores: Scores, data: ImageData) -> dict[str, Any]:
    names = ("auroc", "average_precision", "pseudo_precision", "pseudo_recall")
    groups, values = data.groups("train"), dict.fromkeys(names)
    correct = scores.predicted == data.splits["train"].y
    if groups is None:
        return {"split": "train", **values, "aligned_accuracy": None, "conflicting_accuracy": None}
    conflicting = ~groups.bias_aligned
    precision, recall = precision_recall(scores.conflicting, conflicting)
    figures = (
        auroc(scores.score, conflicting),
        average_precision(scores.score, conflicting),
        precision,
        recall,
    )
    measured = accuracies(correct, groups)
    return {
        "split": "train",
        **{name: null(value) for name, value in zip(names, figures, strict=True)},
        "aligned_accuracy": null(measured["aligned_accuracy"]),
        "conflicting_accuracy": null(measured["conflicting_accuracy"]),
    }


def table(results: dict[str, Any]) -> str:
    """The methods as a Markdown table, with what was found about the bias below it."""
    if not results["methods"]:
        return "\n".join(["", *findings(results)])
    shown = shown_metrics(results)
    rows = [["method", *(COLUMNS[name] for name in shown)]]
    rows += [
        [method, *(percent(entry["metrics"].get(name)) for name in shown)]
        for method, entry in results["methods"].items()
    ]
    seeds = len(results["seeds"])
    note = f"accuracy on the {results['split']} split, %"
    if seeds > 1:
        note += f"; mean ± standard deviation of {seeds} seeds (generator and amplifier shared)"
    note = "; ".join([note, *caveats(results, shown)])
    return "\n".join(["", note, "", markdown(rows), "", *findings(results)])


def findings(results: dict[str, Any]) -> list[str]:
    """What the run found out about the bias, a line each; only what was measured."""
    lines = []
    synthetic, amplifier = results["synthetic"], results["amplifier"]
    if results["verdict"] is not None:
        lines.append(results["verdict"]["sentences"][0])
    if synthetic is not None and synthetic["aligned_share"] is not None:
        lines.append(
            f"synthetic images that follow the bias: {100 * synthetic['aligned_share']:.1f} % "
            f"of {synthetic['count']}"
        )
    if amplifier is not None and amplifier["auroc"] is not None:
        lines.append(
            f"amplifier finds the bias-conflicting training images: "
            f"AUROC {amplifier['auroc']:.4f}, precision {_figure(amplifier['pseudo_precision'])}, "
            f"recall {_figure(amplifier['pseudo_recall'])}"
        )
    total = sum(results["seconds"].values())
    lines.append(f"{total:.0f} s in all stages")
    return lines


def _figure(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
