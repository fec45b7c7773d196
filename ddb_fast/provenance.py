"""Where a model comes from: a run's folder, what is finished there, and what may be told of it.

What is told goes into the config.json and the card of a model that leaves the machine, so it holds
figures and names of classes, and no place or name of any file.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ddb_fast.arguments import SHORT, field_texts
from ddb_fast.config import METHODS, RunConfig
from ddb_fast.data.listing import SPLITS
from ddb_fast.fields import from_dict
from ddb_fast.models.classifiers import NETWORKS
from ddb_fast.presets import PRESETS
from ddb_fast.scoring import rows_of_scores

_STARTERS = ("ddb-fast", "train.py", "cli.py")
_NUMBER = re.compile(r"-?[\d_]+(\.\d+)?(e-?\d+)?(,-?[\d.]+)*")
_TIMM = re.compile(r"timm:[\w.]+")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError, one line, if there is none."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except ValueError as error:  # of JSON and of UTF-8
        raise ValueError(f"{path}: not JSON, or cut short ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return content


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder, its configuration and the stages that are done."""

    path: Path
    config: RunConfig
    manifest: dict[str, Any]
    done: frozenset[str]

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Read a folder; ValueError, one line, if it holds no run or a damaged one."""
        path = Path(path)
        if not (path / "manifest.json").is_file() or not (path / "config.json").is_file():
            raise ValueError(f"{path}: no run; name a folder that `ddb-fast run --out` made")
        manifest, fields = (read_json(path / f"{name}.json") for name in ("manifest", "config"))
        try:
            config = from_dict(RunConfig, fields)
            done = frozenset(key for key, stage in manifest["stages"].items() if stage["done"])
            _ = manifest["command"], manifest["device"], manifest["versions"]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a run of this version ({error})") from None
        return cls(path, config, manifest, done)

    @property
    def fingerprint(self) -> str:
        """Of the images that the run began with, as `Listing.fingerprint`."""
        return self.manifest["stages"]["data"]["fields"]["data.fingerprint"]

    @property
    def decoded(self) -> int | None:
        """How many images of all splits the run decoded; None where they were deleted."""
        small, side = self.path / "cache" / "small.u8", self.config.diffusion.image_size
        return small.stat().st_size // (3 * side**2) if small.exists() else None

    @property
    def classifiers(self) -> dict[str, list[int]]:
        """The seeds of each method that has finished classifiers."""
        found: dict[str, list[int]] = {}
        for key in self.done:
            method, separator, seed = key.partition("/seed")
            if separator:
                found.setdefault(method, []).append(int(seed))
        return {method: sorted(seeds) for method, seeds in sorted(found.items())}

    def without(self, part: str) -> str:
        """The line for a run with no finished `part`, bias amplifier or generator, and why."""
        why, scores = "the same `ddb-fast run` goes on", self.config.pseudo_labels.load
        if scores is not None:
            place = f", {scores}" if Path(scores).exists() else ""  # `debias` gives a temporary one
            why = f"its scores are of another run{place}; name that one"
        elif not self.config.amplifies:
            why = "its methods need none; the same `ddb-fast run` with --methods ddb-ii makes one"
        elif part == "generator" and self.config.sampling.load is not None:
            why = "it used other images"
        return f"{self.path}: no finished {part}: {why}"

    def choose(self, method: str | None, seed: int | None) -> tuple[str, int]:
        """The classifier meant: without a method the only debiased one, without a seed the first.

        ValueError names what there is.
        """
        found = self.classifiers
        if not found:
            raise ValueError(f"{self.path}: no finished classifier")
        if method is None:
            candidates = [name for name in found if name != "erm"] or list(found)
            if len(candidates) > 1:
                raise ValueError(
                    f"{self.path}: has classifiers of {', '.join(found)}; say which method"
                )
            method = candidates[0]
        if method not in found:
            raise ValueError(f"{self.path}: no classifier of {method}, only of {', '.join(found)}")
        if seed is None:
            seed = found[method][0]
        if seed not in found[method]:
            seeds = ", ".join(map(str, found[method]))
            raise ValueError(f"{self.path}: {method} has no seed {seed}, only {seeds}")
        return method, seed


def facts(run: FinishedRun, *, classes: int, method: str | None, seed: int) -> dict[str, Any]:
    """What a card says of the run: figures, counts, versions; nothing of where its files lie.

    method: of a classifier; None for the models that all of them share. Figures are None or empty
    where the run has no results yet.
    """
    path = run.path / "results.json"
    results = read_json(path) if path.exists() else {"format": 1}
    if results.get("format") != 1:
        raise ValueError(f"{path}: format {results.get('format')!r}, not 1")
    entry = results.get("methods", {}).get(method, {})
    return {
        "dataset": results.get("dataset"),
        "preset": run.config.preset,
        "precision": run.config.precision,
        "method": method,
        "seed": seed,
        "counts": _counts(run.path, classes),
        "split": results.get("split"),
        "texture_split": results.get("texture_split"),
        "selection": run.config.selection,
        "seeds": results.get("seeds", []),
        "metrics": entry.get("metrics", {}),
        "groups": entry.get("groups", []),
        "synthetic": results.get("synthetic"),
        "amplifier": results.get("amplifier"),
        "command": shown_command(run.manifest["command"]),
        "device": run.manifest["device"],
        "versions": run.manifest["versions"],
    }


def _counts(run: Path, classes: int) -> dict[str, list[int]] | None:
    """Images of each class in each split, from an amplifier's verdicts; None where none judged."""
    tables = [run / name / "scores.csv" for name in ("amplifier", "real_amplifier")]
    table = next((table for table in tables if table.exists()), None)
    if table is None:
        return None
    with rows_of_scores(table) as rows:
        found = Counter((row["split"], int(row["y"])) for row in rows)
    counts = {split: [found[split, y] for y in range(classes)] for split in SPLITS}
    return {split: numbers for split, numbers in counts.items() if any(numbers)}


def shown_command(words: Sequence[str]) -> str | None:
    """The command of a run with `...` for every word that may name a place; None if it was none."""
    if not words or Path(words[0]).name not in _STARTERS:
        return None
    texts = field_texts()
    choices = {c for kind, _ in texts.values() if kind[0] == "{" for c in kind[1:-1].split(",")}
    known = choices.union(PRESETS, METHODS, NETWORKS, ("true", "false", "none", "imagenet"))
    options = {f"--{name}" for name in (*texts, *SHORT)}

    def shown(word: str) -> str:
        named = word in known or _NUMBER.fullmatch(word) or _TIMM.fullmatch(word)
        return word if named else "..."

    answer = ["ddb-fast run"]
    for word in words[2 if words[1:2] == ["run"] else 1 :]:
        option, equals, value = word.partition("=")
        if option in options:
            answer.append(option + equals + (shown(value) if equals else ""))
        else:
            answer.append(shown(word))
    return " ".join(answer)
