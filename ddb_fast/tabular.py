"""Which metrics a table shows, under which headings, and how; standard library only."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

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


class Table(NamedTuple):
    """Cells as text, the header first, and what has to be said with them."""

    title: str
    rows: list[list[str]]
    notes: list[str]


def as_markdown(tables: Iterable[Table]) -> str:
    """Each table under its title, its notes below."""
    parts = []
    for title, rows, notes in tables:
        # Two spaces end a line in Markdown.
        parts.append(f"### {title}\n\n{markdown(rows)}\n\n" + "  \n".join(notes) + "\n")
    return "\n".join(parts)


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "|": r"\textbar{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        # In braces: at the start of a row a bracket would be the row's optional argument.
        "[": "{[}",
        "]": "{]}",
        **{c: f"\\{c}" for c in "&%$#_{}"},
    }
)


def as_latex(tables: Iterable[Table]) -> str:
    """Each table as a plain `tabular` that needs no package, its notes as text below."""
    parts = []
    for title, rows, notes in tables:
        lines = [" & ".join(cell.translate(_LATEX) for cell in row) + r" \\" for row in rows]
        aligned = "l" + "r" * (len(rows[0]) - 1)
        body = [r"\hline", lines[0], r"\hline", *lines[1:], r"\hline"]
        text = [title.translate(_LATEX), *(note.translate(_LATEX) for note in notes)]
        parts.append(
            "\n".join(
                [
                    f"\\begin{{tabular}}{{{aligned}}}",
                    *body,
                    r"\end{tabular}",
                    "",
                    r"{\footnotesize " + ".\\par\n".join(text) + r".\par}",
                    "",
                ]
            )
        )
    return "\n".join(parts)
