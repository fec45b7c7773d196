"""`ddb-fast compare`: finished runs side by side, from their results.json; nothing is recomputed.

One table a data set, as text, or the same figures as data. Standard library only.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddb_fast.compared_runs import Run, blocks_of, by_dataset
from ddb_fast.comparison_tables import group_tables, metrics_of, tables_of
from ddb_fast.published import Published
from ddb_fast.tabular import COLUMNS, as_latex, as_markdown

FORMATS = ("markdown", "latex", "json")


def as_data(
    runs: Sequence[Run], *, metrics: Sequence[str] | None = None, published: bool = False
) -> dict[str, Any]:
    """What the tables say as one flat list of (run, method), fractions of 1, groups included.

    metrics: only these. Published entries have `published` true, no run and no groups.
    """
    entries = []
    for members in by_dataset(runs):
        dataset, benchmark = members[0].dataset, members[0].benchmark
        blocks_of(members)  # refuses what cannot be compared
        chosen = metrics_of(members, metrics) if metrics else None
        for run in members:
            for method, entry in run.results["methods"].items():
                kept = {k: v for k, v in entry["metrics"].items() if not chosen or k in chosen}
                entries.append(
                    {
                        "dataset": dataset,
                        "rho": run.rho,
                        "method": method,
                        "published": False,
                        "run": run.path,
                        "preset": run.config.preset,
                        "split": run.results["split"],
                        "selection": run.results["selection"],
                        "metrics": kept,
                        "groups": entry["groups"],
                    }
                )
        if published and benchmark is not None:
            entries += _published_data(dataset, benchmark, chosen)
    return {"format": 1, "results": entries}


def _published_data(
    dataset: str, benchmark: Published, chosen: Sequence[str] | None
) -> list[dict[str, Any]]:
    source, columns, rows = benchmark
    entries = []
    for row in rows:
        for rho in dict.fromkeys(rho for _, rho in columns):
            figures = {
                name: _fraction(text)
                for (name, at), text in zip(columns, row.figures, strict=True)
                if at == rho and text is not None and (not chosen or name in chosen)
            }
            if not figures:
                continue
            entries.append(
                {
                    "dataset": dataset,
                    "rho": rho,
                    "method": row.method,
                    "name": row.name,
                    "published": True,
                    "source": source,
                    "note": row.note,
                    "metrics": figures,
                }
            )
    return entries


def _fraction(text: str) -> dict[str, float | None]:
    """A printed figure, percent with or without its deviation, as fractions."""
    mean, _, std = text.partition(" ± ")
    # Printed to hundredths of a percent: dividing leaves digits that nobody printed.
    return {"mean": round(float(mean) / 100, 6), "std": round(float(std) / 100, 6) if std else None}


# --- all of it --------------------------------------------------------------------------------


def compare(
    runs: Sequence[Run],
    *,
    format: str = "markdown",
    metrics: Sequence[str] | None = None,
    published: bool = False,
    groups: bool = False,
) -> str:
    """Finished runs as text in one of FORMATS.

    ValueError, one line, for an unknown metric or format, a metric that a data set lacks, runs of
    one data set's name with other images, and a run named twice.
    """
    if format not in FORMATS:
        raise ValueError(f"--format {format}: unknown; {', '.join(FORMATS)}")
    unknown = [name for name in metrics or () if name not in COLUMNS]
    if unknown:
        raise ValueError(f"--metric {unknown[0]}: unknown; {', '.join(COLUMNS)}")
    seen: set[Path] = set()
    for run in runs:
        if Path(run.path).resolve() in seen:
            raise ValueError(f"{run.path}: named twice")
        seen.add(Path(run.path).resolve())
    if format == "json":
        return json.dumps(as_data(runs, metrics=metrics, published=published), indent=2) + "\n"
    tables = []
    for members in by_dataset(runs):
        tables += tables_of(members, metrics=metrics, published=published)
        tables += group_tables(members) if groups else []
    return (as_latex if format == "latex" else as_markdown)(tables)
