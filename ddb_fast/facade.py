"""The whole road in four lines of Python; the same stages, folders and files as the command line.

data = load_data("photos"); amplifier = fit_amplifier(data, preset="tiny")
scores = amplifier.score(data.train); model = debias(data, scores, method="ddb-ii")
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddb_fast import apply
from ddb_fast.config import AMPLIFIED, DataConfig, RunConfig, with_fields
from ddb_fast.data.listing import Listing
from ddb_fast.data.sources import open_listing
from ddb_fast.presets import load_config
from ddb_fast.pretrained import BiasAmplifier, Classifier
from ddb_fast.provenance import FinishedRun
from ddb_fast.scoring import ScoreTable
from ddb_fast.train import own_device, run
from ddb_fast.use_run import data_config


@dataclass(frozen=True, eq=False)
class Part:
    """One split of the images: paths and class numbers (N,), in the order of a table's rows.

    Numbers are those of `data.classes`; a table's are those of its own `classes`.
    """

    data: "Data"
    split: str

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(e.path for e in self.data.listing.entries if e.split == self.split)

    @property
    def y(self) -> Tensor:
        return torch.tensor([e.y for e in self.data.listing.entries if e.split == self.split])

    def __len__(self) -> int:
        return sum(e.split == self.split for e in self.data.listing.entries)

    def __repr__(self) -> str:
        return f"Part({self.data.listing.name}: {len(self)} {self.split} images)"


@dataclass(frozen=True, eq=False)
class Data:
    """Images of a source, listed and not yet decoded."""

    config: DataConfig
    listing: Listing

    def __repr__(self) -> str:
        parts = (self.train, self.val, self.test)
        splits = ", ".join(f"{len(part)} {part.split}" for part in parts)
        return f"Data({self.listing.name}: {len(self.classes)} classes, {splits} images)"

    def check_unchanged(self) -> None:
        """ValueError where the images, labels or splits are others than when they were listed."""
        if self.config.path is None:  # embedded
            return
        if open_listing(self.config).fingerprint != self.listing.fingerprint:
            raise ValueError(
                f"{self.listing.name}: the images, labels or splits have changed since load_data; "
                "load them again"
            )

    @property
    def classes(self) -> tuple[str, ...]:
        return self.listing.classes

    @property
    def train(self) -> Part:
        return Part(self, "train")

    @property
    def val(self) -> Part:
        return Part(self, "val")

    @property
    def test(self) -> Part:
        return Part(self, "test")


def load_data(
    path: str | Path,
    *,
    source: str | None = None,
    rho: float | None = None,
    validation_share: float | None = None,
    test_share: float | None = None,
) -> Data:
    """List the images of a folder, a CSV or a published set; the word "digits" is the embedded one.

    source: what lies at `path`, as `ddb-fast data --as` has it; a folder or a CSV without it. rho:
    share of aligned images, where there is a choice. validation_share, test_share: what is held
    out, as the fields of `data`. ValueError, one line, for what is not there or laid out otherwise.
    """
    if not isinstance(path, str | Path):
        raise ValueError(
            f"load_data takes the path of a folder or a CSV; got {type(path).__name__}"
        )
    # Only the word is the embedded set: a Path names what lies there.
    path = str(path.absolute()) if isinstance(path, Path) else path
    config = data_config(DataConfig(), path, source, rho)
    if config.path is not None:  # the process may change its folder before the images are read
        config = replace(config, path=str(Path(config.path).absolute()))
    shares = {"data.validation_share": validation_share, "data.test_share": test_share}
    shares = {name: share for name, share in shares.items() if share is not None}
    # Any preset: a whole configuration checks its fields.
    config = with_fields(replace(load_config("tiny"), data=config), shares).data
    listing = open_listing(config)
    _ = listing.fingerprint  # of the files as they are now, kept by the listing
    return Data(config, listing)


def _configured(
    data: Data, preset: str, out: str | Path | None, fields: Mapping[str, Any] | None, **own: Any
) -> RunConfig:
    if not isinstance(data, Data):
        raise ValueError(f"data: give what load_data gives, all of it; got {type(data).__name__}")
    own |= {} if out is None else {"out": str(out)}
    if not isinstance(fields or {}, Mapping):
        raise ValueError(
            f"fields: names and values are needed, as in {{'diffusion.images': 64_000}}; got "
            f"{type(fields).__name__}"
        )
    for name, value in (fields or {}).items():
        if isinstance(value, Mapping):
            raise ValueError(f"fields: {name}: give each field by its dotted name, {name}.FIELD")
        if name.partition(".")[0] == "data":
            raise ValueError(
                f"fields: {name}: the images are as load_data listed them; rho, validation_share "
                "and test_share are arguments of load_data"
            )
        if name in own:
            raise ValueError(f"fields: {name}: the call itself decides it; leave it out")
    base = load_config(preset)
    which = ("source", "path", "rho", "validation_share", "test_share")
    here = replace(base.data, **{name: getattr(data.config, name) for name in which})
    data.check_unchanged()
    return with_fields(replace(base, data=here), {**(fields or {}), **own})


@dataclass(frozen=True, eq=False)
class Amplifier:
    """The bias amplifier of a finished run, and what the run found."""

    finished: FinishedRun
    device: torch.device

    def __repr__(self) -> str:
        return f"Amplifier({self.finished.path})"

    def score(self, images: Part | Data) -> ScoreTable:
        """A row for each image of a split, or of all: prediction, loss, score, pseudo label.

        Rows are in the order of what is given; where the run skips broken images, these have none.
        Images are read from where they lie. ValueError as `ddb-fast score`, and for images that
        have changed since load_data.
        """
        if not isinstance(images, Part | Data):
            kind = type(images).__name__
            raise ValueError(f"score takes what load_data gives, or a split of it; got {kind}")
        data = images if isinstance(images, Data) else images.data
        data.check_unchanged()
        run = self.finished.config
        asked = {} if images is data else {"splits": (images.split,)}
        table = apply.score(
            self.finished, data.config, corrupt=run.data.corrupt, device=self.device,
            progress=run.progress, **asked,
        )  # fmt: skip
        # The table is sorted by the run's class numbers, which may be others than the listing's.
        row = {path: i for i, path in enumerate(table.path)}
        paths = data.listing.paths if images is data else images.paths
        return table.where(np.array([row[path] for path in paths if path in row], dtype=int))

    @property
    def results(self) -> dict[str, Any]:
        """The contents of the run's results.json, the verdict on whether there is a bias in it."""
        return json.loads((self.finished.path / "results.json").read_text("utf-8"))

    @property
    def report(self) -> Path:
        """The page to look at."""
        return self.finished.path / "report.html"

    def model(self) -> BiasAmplifier:
        """The network, to keep (`save_pretrained`) or to ask."""
        return BiasAmplifier.from_run(self.finished.path)


def fit_amplifier(
    data: Data,
    *,
    preset: str = "tiny",
    out: str | Path | None = None,
    fields: Mapping[str, Any] | None = None,
) -> Amplifier:
    """Train the generator, sample synthetic images and train the amplifier on them alone.

    out: the run's folder, the preset's own without it; the same call again resumes there. fields:
    any field of the configuration by its dotted name, `{"diffusion.images": 64_000}`, but those of
    `data`. ValueError as `ddb-fast run`.
    """
    config = _configured(data, preset, out, fields, methods="none")
    run(config)
    return Amplifier(FinishedRun.open(Path(config.out).absolute()), own_device())


def debias(
    data: Data,
    scores: ScoreTable,
    *,
    method: str = "ddb-ii",
    preset: str = "tiny",
    out: str | Path | None = None,
    fields: Mapping[str, Any] | None = None,
) -> Classifier:
    """Train a classifier that does not rely on the shortcut, from the scores of its images.

    scores: of every training image, changed by hand or not. method: one of the ddb methods. out: a
    folder of its own, `<the preset's>-<method>` without it. fields: as `fit_amplifier`; ddb-i goes
    by `conflicting`, ddb-ii by `loss`, the other two by `predicted`.

    Raises:
        ValueError: another method; scores without labels, or not of every training image.
    """
    if method not in AMPLIFIED:
        known = ", ".join(sorted(AMPLIFIED))
        raise ValueError(f"method {method!r} takes no scores; one of {known}")
    if not isinstance(scores, ScoreTable):
        raise ValueError(f"scores: a table, as score gives, is needed; got {type(scores).__name__}")
    if scores.y is None:
        raise ValueError("images without labels have no scores to train with")
    if out is None:
        out = f"{load_config(preset).out}-{method}"
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder).resolve() / "scores.csv"  # the run keeps a copy, and goes by contents
        scores.write(given)
        own = {"methods": (method,), "pseudo_labels.load": str(given)}
        try:
            run(_configured(data, preset, out, fields, **own))
        except ValueError as error:  # nobody has seen that file
            raise ValueError(str(error).replace(str(given), "scores")) from error
    return Classifier.from_run(out, method=method)
