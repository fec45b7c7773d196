"""Finished runs as `ddb-fast compare` reads them, and which of them share a row of a table.

Standard library only, so that a table is there at once.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ddb_fast.config import TAKES_RHO, DataConfig, RunConfig, from_json
from ddb_fast.fields import flatten
from ddb_fast.published import PUBLISHED, Published
from ddb_fast.stages import stage_fields

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
        # What does not choose images: where they lie, their decoded side, what broken ones do.
        which = replace(run.config.data, path=None, cache_size=1, corrupt="error")
        same = images.setdefault(which, run)
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
