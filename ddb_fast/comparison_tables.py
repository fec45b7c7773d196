"""The tables of `ddb-fast compare`: methods of the runs of one data set, and groups of each.

A row a method; where runs differ in rho there is a table a metric and a column a rho. Published
figures stand below the method they belong to and are marked as such. Standard library only.
"""

from collections.abc import Sequence
from typing import Any

from ddb_fast.compared_runs import Run, blocks_of, row_labels
from ddb_fast.config import METHODS
from ddb_fast.published import Published, Row
from ddb_fast.tabular import COLUMNS, Table, caveats, percent, shown_metrics

PUBLISHED_MARK = ", published"


def metrics_of(runs: Sequence[Run], asked: Sequence[str] | None) -> list[str]:
    """The metrics that a table of these runs has, or those asked; ValueError for one it lacks."""
    defined = {
        name
        for run in runs
        for name in COLUMNS
        if any(percent(run.metric(method, name)) != "-" for method in run.results["methods"])
    }
    if asked:
        for name in asked:
            if name not in defined:
                had = ", ".join(n for n in COLUMNS if n in defined) or "no metric"
                raise ValueError(
                    f"--metric {name}: not defined for the runs of {runs[0].dataset}, which have "
                    f"{had}; compare runs of different data apart"
                )
        return list(asked)
    return [n for n in COLUMNS if any(n in shown_metrics(run.results) for run in runs)]


def _notes(runs: Sequence[Run], metrics: Sequence[str]) -> list[str]:
    splits = " and ".join(dict.fromkeys(run.results["split"] for run in runs))
    note = f"accuracy on the {splits} split, %"
    seeds = {tuple(run.results["seeds"]) for run in runs}
    if any(len(s) > 1 for s in seeds):
        which = " ".join(map(str, seeds.pop())) if len(seeds) == 1 else "of each run"
        note += f"; mean ± standard deviation over seeds {which} (generator and amplifier shared)"
    notes = [note]
    notes += dict.fromkeys(said for run in runs for said in caveats(run.results, metrics))
    rhos: dict[str, set[float]] = {}
    for run in runs:
        rhos.setdefault(run.fingerprint, set()).update({run.rho} - {None})
    notes += [
        f"the same images at rho {' and '.join(map(str, sorted(same)))}: {runs[0].dataset} has no "
        "others here"
        for same in rhos.values()
        if len(same) > 1
    ]
    return notes


def tables_of(
    runs: Sequence[Run], *, metrics: Sequence[str] | None = None, published: bool = False
) -> list[Table]:
    """The tables of one data set's runs; ValueError for a metric that none of them has."""
    dataset, blocks = runs[0].dataset, blocks_of(runs)
    benchmark = runs[0].benchmark if published else None
    chosen = metrics_of(runs, metrics)
    rhos = sorted({run.rho for run in runs if run.rho is not None}, reverse=True) or [None]
    if len(rhos) == 1:
        title = dataset if rhos[0] is None else f"{dataset}, rho {rhos[0]}"
        columns = [(name, rhos[0]) for name in chosen]
        groups = [(title, columns, [COLUMNS[name] for name in chosen])]
    else:
        heads = [f"rho {rho}" for rho in rhos]
        groups = [
            (f"{dataset}: {COLUMNS[name]}", [(name, rho) for rho in rhos], heads) for name in chosen
        ]
    tables = []
    for title, columns, heads in groups:
        rows, notes = [["method", *heads]], _notes(runs, [name for name, _ in columns])
        theirs: dict[str | None, list[Row]] = {}
        for row in benchmark.rows if benchmark is not None else ():
            theirs.setdefault(row.method, []).append(row)
        marks: list[str] = []
        for method in METHODS:
            for block, label in zip(blocks, row_labels(blocks, method), strict=True):
                if any(method in run.results["methods"] for run in block.runs.values()):
                    cells = [
                        percent(block.runs[rho].metric(method, name)) if rho in block.runs else "-"
                        for name, rho in columns
                    ]
                    rows.append([f"{method} ({label})" if label else method, *cells])
            rows += _published_rows(benchmark, theirs.pop(method, []), columns, marks)
        for rest in theirs.values():
            rows += _published_rows(benchmark, rest, columns, marks)
        if any(PUBLISHED_MARK in row[0] for row in rows):
            notes.append(f"published: {benchmark.source}")
        elif published:
            notes.append(f"published: nothing known to stand beside this table of {dataset}")
        notes += [f"[{i}] {text}" for i, text in enumerate(marks, 1)]
        tables.append(Table(title, rows, notes))
    return tables


def _published_rows(
    benchmark: Published | None,
    published: Sequence[Row],
    columns: Sequence[tuple[str, float | None]],
    marks: list[str],
) -> list[list[str]]:
    """Those published rows that have a figure under our columns; their notes join `marks`."""
    rows = []
    for name, _, printed, note in published:
        figures = dict(zip(benchmark.columns, printed, strict=True))
        cells = [figures.get(column) or "-" for column in columns]
        if set(cells) == {"-"}:
            continue
        label = f"{name}{PUBLISHED_MARK}"
        if note is not None:
            if note not in marks:
                marks.append(note)
            label += f" [{marks.index(note) + 1}]"
        rows.append([label, *cells])
    return rows


def group_tables(runs: Sequence[Run]) -> list[Table]:
    """For each run with bias labels: every group's size, accuracy and 95 % interval."""
    tables = []
    for block in blocks_of(runs):
        for rho, run in block.runs.items():
            entries = {m: e["groups"] for m, e in run.results["methods"].items() if e["groups"]}
            if not entries:
                continue
            rows = [["group", "n", *entries]]
            for same in zip(*entries.values(), strict=True):
                cells = [_interval(group) for group in same]
                rows.append([same[0]["name"], str(same[0]["n"]), *cells])
            parts = [run.dataset, *([f"rho {rho}"] if rho is not None else [])]
            parts += ["groups", *([block.label] if block.label else [])]
            notes = [
                f"accuracy on the {run.results['split']} split, %: mean over the seeds and its "
                "95 % Wilson interval for n images"
            ]
            tables.append(Table(", ".join(parts), rows, notes))
    return tables


def _interval(group: dict[str, Any]) -> str:
    if group["low"] is None:
        return "-"
    mean = sum(group["accuracy"]) / len(group["accuracy"])
    return f"{100 * mean:.1f} [{100 * group['low']:.1f}, {100 * group['high']:.1f}]"
