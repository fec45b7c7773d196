"""`ddb-fast compare`: finished runs side by side, from their results.json; nothing is recomputed.

One table a data set, a row a method; where runs differ in rho there is a table a metric and a
column a rho. Published figures stand below the method they belong to and are marked as such.
Standard library only, so that a table is there at once.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ddb_fast.config import (
    METHODS,
    TAKES_RHO,
    DataConfig,
    RunConfig,
    from_json,
)
from ddb_fast.fields import flatten
from ddb_fast.published import PUBLISHED, Published, Row
from ddb_fast.stages import stage_fields
from ddb_fast.tabular import (
    COLUMNS,
    Table,
    as_latex,
    as_markdown,
    caveats,
    percent,
    shown_metrics,
)

FORMATS = ("markdown", "latex", "json")
PUBLISHED_MARK = ", published"
_FEW = 2
"""Fields that a row's name may hold."""
# Fields in which runs of one row may differ: rho is its columns, the others leave results as they
# are or only say how many of them there are.
_ASIDE = {
    *("preset", "data.path", "data.rho", "out", "methods", "seeds", "threads", "step", "tracker"),
    *("progress", "checkpoint_minutes", "checkpoint_images"),
}


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run: its folder as given, its configuration and its results.json.

    fingerprint: of the images it was made with.
    """

    path: str
    config: RunConfig
    results: dict[str, Any]
    fingerprint: str

    @property
    def dataset(self) -> str:
        return self.results["dataset"]

    @property
    def benchmark(self) -> Published | None:
        """The published figures of its data set; None for one's own data of the same name."""
        known = self.config.data.source == self.dataset
        return PUBLISHED.get(self.dataset) if known else None

    @property
    def rho(self) -> float | None:
        """The share of bias-aligned training images, where the data is made with one."""
        return self.config.data.rho if self.config.data.source in TAKES_RHO else None

    @property
    def setting(self) -> str:
        """Everything but rho that the figures depend on."""
        fields = {k: v for k, v in flatten(self.config).items() if k not in _ASIDE}
        return json.dumps(fields, sort_keys=True)

    def metric(self, method: str, name: str) -> dict[str, Any] | None:
        return self.results["methods"].get(method, {"metrics": {}})["metrics"].get(name)


def read_run(path: str) -> Run:
    """Read a run's folder; ValueError, one line, if it holds no run or an unfinished one."""
    folder = Path(path)
    texts = {}
    for name in ("config.json", "manifest.json", "results.json"):
        if not (folder / name).is_file():
            if texts:
                raise ValueError(f"{path}: an unfinished run; the command that began it goes on")
            raise ValueError(f"{path}: no run; name a folder that `ddb-fast run --out` made")
        texts[name] = (folder / name).read_text("utf-8")
    try:
        config = from_json(texts["config.json"])
        results = json.loads(texts["results.json"])
        stages = json.loads(texts["manifest.json"])["stages"]
        there = (set(results["methods"]), set(results["seeds"]))
        run = Run(path, config, results, stages["data"]["fields"]["data.fingerprint"])
        _ = run.dataset, results["split"]
    except (ValueError, KeyError, TypeError) as error:  # JSON's own errors are ValueErrors
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: not a run of this version ({reason})") from None
    if there != (set(config.methods), set(config.seeds)):
        raise ValueError(
            f"{path}: an unfinished run, methods or seeds were added; the same command goes on"
        )
    return run


# --- which runs share a row --------------------------------------------------------------------


class Block(NamedTuple):
    """Runs of one data set that differ in rho alone; label tells it from the others, or is ''."""

    label: str
    runs: dict[float | None, Run]


def _distinct(names: Sequence[str]) -> bool:
    return len(set(names)) == len(names)


def blocks_of(runs: Sequence[Run]) -> list[Block]:
    """Sort the runs of one data set into blocks.

    ValueError for runs whose data has one name and one configuration, but other images.
    """
    settings: dict[str, list[Run]] = {}
    images: dict[DataConfig, Run] = {}
    for run in runs:
        same = images.setdefault(replace(run.config.data, path=None), run)
        if same.fingerprint != run.fingerprint:
            raise ValueError(
                f"{same.path} and {run.path}: both call their data {run.dataset}, but the images "
                "are not the same; compare them apart"
            )
        settings.setdefault(run.setting, []).append(run)
    groups = []
    for members in settings.values():
        # Two runs of one setting and rho cannot share a cell.
        together = _distinct([str(run.rho) for run in members])
        groups += [members] if together else [[run] for run in members]
    presets = [members[0].config.preset for members in groups]
    paths = [", ".join(run.path for run in members) for members in groups]
    labels = [""] if len(groups) == 1 else presets if _distinct(presets) else paths
    return [
        Block(label, {run.rho: run for run in members})
        for label, members in zip(labels, groups, strict=True)
    ]


def row_labels(blocks: Sequence[Block], method: str) -> list[str]:
    """What tells each block's row of a method from the others, in fewest words.

    Nothing where there is one block, else presets; else the fields that the method depends on and
    that are not the same everywhere, if they are few; else the block's own label.
    """
    labels = [block.label for block in blocks]
    configs = [next(iter(block.runs.values())).config for block in blocks]
    if len(blocks) == 1 or _distinct([config.preset for config in configs]):
        return labels
    fields = [stage_fields(config, method) for config in configs]
    names = [name for name in fields[0] if name not in _ASIDE]
    differing = [name for name in names if len({str(f[name]) for f in fields}) > 1]
    told = [", ".join(f"{name} {own[name]}" for name in differing) for own in fields]
    shown = [
        text
        for text, block in zip(told, blocks, strict=True)
        if any(method in run.results["methods"] for run in block.runs.values())
    ]
    return told if len(differing) <= _FEW and _distinct(shown) else labels


def by_dataset(runs: Iterable[Run]) -> list[list[Run]]:
    """The runs of each data set, in the order given; one's own `bar` is not the published one."""
    sets: dict[tuple[str, bool], list[Run]] = {}
    for run in runs:
        sets.setdefault((run.dataset, run.config.data.source == run.dataset), []).append(run)
    return list(sets.values())


# --- tables ------------------------------------------------------------------------------------


def _metrics(runs: Sequence[Run], asked: Sequence[str] | None) -> list[str]:
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
    chosen = _metrics(runs, metrics)
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


# --- figures as data -----------------------------------------------------------------------------


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
        chosen = _metrics(members, metrics) if metrics else None
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
