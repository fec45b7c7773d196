"""The page that goes with a model: what it is, how it did, where it ends, what it was made of.

It is a function of the model's config.json alone, so a model loaded from anywhere writes the same
page again. Names of classes, groups and data come from other people's folders, and pages are read
far from there: every value is escaped unless it is marked as safe.
"""

import unicodedata
from collections.abc import Sequence
from typing import Any

import jinja2
from huggingface_hub import ModelCardData
from markupsafe import Markup

from ddb_fast.tabular import COLUMNS, caveats, markdown, percent, shown_metrics

_TASKS = {"classifier": "image-classification"}
"""What the Hub files a kind of model under; the others are no answer to any task it knows."""
_ESCAPED = str.maketrans(
    {
        **{c: f"\\{c}" for c in "\\`*_{}[]#~!$"},
        # Renderers that do not know a backslash before these know their entities.
        **{"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;"},
    }
)


def plain(text: object) -> str:
    """Any text as one line of Markdown that shows it and does nothing else."""
    line = " ".join(str(text).split())
    visible = "".join("\ufffd" if unicodedata.category(c)[0] == "C" else c for c in line)
    return visible.translate(_ESCAPED)


def _final(value: object) -> object:
    return value if isinstance(value, Markup) else plain(value)


def card(kind: str, name: str, description: dict[str, Any], *, file: str | None = None) -> str:
    """The card of a model as Markdown below its metadata.

    description: the contents of its config.json. kind: as there; name: of its Python class. file:
    the program that stands in place of the class's own files, where that was exported.
    """
    run, classes = description["run"], description["classes"]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ddb_fast", "."),
        finalize=_final,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    metadata = ModelCardData(
        library_name="ddb-fast",
        pipeline_tag=_TASKS.get(kind),
        tags=["ddb-fast", "debiasing", kind, "model_hub_mixin", "pytorch_model_hub_mixin"],
    )
    results = {**run, "methods": {"this": {"metrics": run["metrics"]}}}
    shown = shown_metrics(results)
    return environment.get_template("model_card.md.j2").render(
        metadata=Markup(metadata.to_yaml()),
        kind=kind,
        name=name,
        file=file,
        run=run,
        network=description["network"],
        sampling=description.get("sampling"),
        classes=classes,
        metrics=_metrics(run, shown),
        groups=_groups(run),
        caveats=caveats(results, shown),
        counts=_count_table(run["counts"], classes),
        # In a block of code escapes would show; its words are known ones.
        command=run["command"] and Markup(run["command"]),
    )


def _table(rows: list[list[str]]) -> Markup:
    return Markup(markdown([[plain(cell) for cell in row] for row in rows]))


def _metrics(run: dict[str, Any], shown: Sequence[str]) -> Markup | None:
    if not shown:
        return None
    several = len(run["seeds"]) > 1
    rows = [["%", f"this model (seed {run['seed']})"]]
    if several:
        rows[0] += ["mean ± standard deviation", f"seeds {' '.join(map(str, run['seeds']))}"]
    for name in shown:
        summary = run["metrics"][name]
        values = dict(zip(run["seeds"], summary["seeds"], strict=True))
        row = [COLUMNS[name], _percent(values.get(run["seed"]))]
        if several:
            row += [percent(summary), " ".join(_percent(value) for value in values.values())]
        rows.append(row)
    return _table(rows)


def _groups(run: dict[str, Any]) -> Markup | None:
    if not run["groups"]:
        return None
    rows = [["group", "images", f"this model (seed {run['seed']}), %"]]
    for group in run["groups"]:
        values = dict(zip(run["seeds"], group["accuracy"], strict=True))
        rows.append([group["name"], str(group["n"]), _percent(values.get(run["seed"]))])
    return _table(rows)


def _count_table(counts: dict[str, list[int]] | None, classes: Sequence[str]) -> Markup | None:
    if counts is None:
        return None
    rows = [["class", *counts]]
    rows += [[c, *map(str, column)] for c, *column in zip(classes, *counts.values(), strict=True)]
    rows.append(["all", *(str(sum(numbers)) for numbers in counts.values())])
    return _table(rows)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
