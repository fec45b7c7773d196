"""Which metrics a table shows, under which headings, and how; standard library only."""

from collections.abc import Sequence
from typing import Any

COLUMNS = {
    "average_accuracy": "average",
    "adjusted_average_accuracy": "adjusted average",
    "unbiased_accuracy": "unbiased",
    "worst_group_accuracy": "worst group",
    "aligned_accuracy": "aligned",
    "conflicting_accuracy": "conflicting",
    "background_gap": "background gap",
    "co_object_gap": "co-object gap",
    "both_gap": "gap of both",
    "texture_unbiased_accuracy": "texture-unbiased",
}
"""Every metric of results.json and its heading, in the order of the tables."""
GAPS = ("background_gap", "co_object_gap", "both_gap")
TEXTURE = "texture_unbiased_accuracy"


def percent(summary: dict[str, Any] | None) -> str:
    """A summarised metric in percent, `mean ± std` over the seeds; a dash where undefined."""
    if summary is None or summary["mean"] is None:
        return "-"
    text = f"{100 * summary['mean']:.1f}"
    return text if summary["std"] is None else f"{text} ± {100 * summary['std']:.1f}"


def shown_metrics(results: dict[str, Any]) -> list[str]:
    """The metrics that a table of these results has: those defined for any method.

    The average adjusted to the training set's groups stands where gaps are measured from it.
    """
    entries = [entry["metrics"] for entry in results["methods"].values()]
    defined = [name for name in COLUMNS if any(percent(m.get(name)) != "-" for m in entries)]
    if not any(name in GAPS for name in defined):
        defined = [name for name in defined if name != "adjusted_average_accuracy"]
    return defined


def caveats(results: dict[str, Any], shown: Sequence[str]) -> list[str]:
    """What has to be said with these metrics, and with weights that were selected."""
    said = []
    if any(name in GAPS for name in shown):
        said.append("gaps: points below the adjusted average, positive = worse")
    if TEXTURE in shown and results.get("texture_split") == "val":
        said.append("texture-unbiased: on the validation split")
    if results["selection"] != "last":
        said.append(f"weights: best {COLUMNS[results['selection']]} accuracy on validation")
    return said


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first of them the header, as a Markdown table that reads as text too."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)
