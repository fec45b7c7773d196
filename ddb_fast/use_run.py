"""`ddb-fast score`, `evaluate`, `sample` and `report`: the commands that use a finished run.

Heavy imports wait until the arguments are understood, so that `--help` is there at once.
"""

import argparse
import json
import sys
import typing
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddb_fast.arguments import OneLineParser, check_takes_rho
from ddb_fast.cli import COMMANDS
from ddb_fast.compared_runs import Run
from ddb_fast.comparison_tables import group_tables, tables_of
from ddb_fast.config import CONTROLS, DataConfig, RunConfig
from ddb_fast.presets import PRESETS
from ddb_fast.streams import log_to_stderr
from ddb_fast.tabular import as_markdown
from ddb_fast.train import own_device, set_threads

if TYPE_CHECKING:
    import torch

    from ddb_fast.data.listing import Listing
    from ddb_fast.provenance import FinishedRun

SOURCES = typing.get_args(typing.get_type_hints(DataConfig)["source"])


def data_config(
    own: DataConfig, path: str | None, source: str | None, rho: float | None
) -> DataConfig:
    """Which images are meant, for a run whose own are `own`; ValueError for what does not fit.

    Without a path the run's own. Images of the run's kind are read as it reads them (rho, what is
    held out), published sets of another as their presets do. `digits` is the embedded set.
    """
    if path is None:
        if source is not None:
            raise ValueError("--as says what lies at --data; name both, or none for the run's own")
        config = own
    else:
        source = source or ("digits" if path == "digits" else "auto")
        if source == "digits" and path != "digits":
            raise ValueError(f"--data {path}: digits is embedded and lies nowhere; --data digits")
        plain = ("auto", "folder", "csv")
        if source == own.source or {source, own.source} <= set(plain):
            base = own
        else:
            base = PRESETS[source]().data if source in PRESETS else DataConfig()
        config = replace(base, source=source, path=None if source == "digits" else path)
    if rho is None:
        return config
    check_takes_rho(config.source, "--rho")
    if not 0 <= rho <= 1:
        raise ValueError(f"--rho {rho}: a share in 0 to 1 is needed")
    return replace(config, rho=rho)


def _images(run: "FinishedRun", arguments: argparse.Namespace) -> DataConfig:
    """The images that a command line means; ValueError where the run's own have changed."""
    config = data_config(run.config.data, arguments.data, arguments.source, arguments.rho)
    if arguments.data is None and config == run.config.data:
        if config.path is not None and not Path(config.path).exists():
            raise ValueError(
                f"{config.path}: nothing is there; if the run's images lie elsewhere now, --data "
                "names the place"
            )
        _check_unchanged(run, "--data names others")
    return config


def _check_unchanged(run: "FinishedRun", advice: str) -> "Listing":
    from ddb_fast.data.sources import open_listing

    listing = open_listing(run.config.data)
    if listing.fingerprint != run.fingerprint:
        raise ValueError(f"{run.path}: the run's images, labels or splits have changed; {advice}")
    return listing


def _parser(prog: str, command: str, *, run: str = "folder of a finished run") -> OneLineParser:
    parser = OneLineParser(prog=prog, allow_abbrev=False, description=COMMANDS[command])
    parser.add_argument("run", metavar="RUN", help=run)
    return parser


def _add_data(parser: OneLineParser) -> None:
    parser.add_argument(
        "--data", metavar="PATH",
        help="an image folder, a CSV or a published set; the run's own images without it",
    )  # fmt: skip
    parser.add_argument(
        "--as", dest="source", choices=SOURCES, help="what lies there (auto: a folder or a CSV)"
    )
    parser.add_argument("--rho", metavar="R", type=float, help="for data made with one only")
    parser.add_argument(
        "--corrupt", choices=("error", "skip"), help="what a broken image does (as in the run)"
    )


def _prepare(config: RunConfig | None) -> "torch.device":
    """Log to stderr, take threads and device as a run of this configuration does."""
    log_to_stderr()
    set_threads(None if config is None else config.threads)
    return own_device()


def score(argv: Sequence[str], *, prog: str = "ddb-fast score") -> int:
    """`ddb-fast score RUN`: a row an image, on the screen or in a file."""
    parser = _parser(prog, "score")
    _add_data(parser)
    parser.add_argument("--out", metavar="FILE", help="*.csv, *.parquet or *.json; else the screen")
    parser.add_argument("--format", metavar="NAME", help="csv, parquet or json, whatever its name")
    arguments = parser.parse_args(argv)

    from ddb_fast import apply
    from ddb_fast.provenance import FinishedRun
    from ddb_fast.scoring import table_format

    run = FinishedRun.open(arguments.run)
    # Before the work, which may take an hour.
    form = table_format(arguments.out, arguments.format)
    data = _images(run, arguments)
    device = _prepare(run.config)
    corrupt = arguments.corrupt or run.config.data.corrupt
    table = apply.score(run, data, corrupt=corrupt, device=device)
    if arguments.out is None:
        sys.stdout.writelines(table.parts(form))
    else:
        table.write(arguments.out, form)
    return 0


def evaluate(argv: Sequence[str], *, prog: str = "ddb-fast evaluate") -> int:
    """`ddb-fast evaluate RUN`: tables of accuracies, or the same as JSON."""
    parser = _parser(prog, "evaluate")
    _add_data(parser)
    parser.add_argument("--methods", metavar="NAME", nargs="+", help="only these")
    parser.add_argument("--seeds", metavar="N", type=int, nargs="+", help="only these")
    parser.add_argument(
        "--split", choices=("train", "val", "test"), nargs="+", default=["test"],
        help="test without it; what names no split is held out as in a run",
    )  # fmt: skip
    parser.add_argument("--format", choices=("markdown", "json"), default="markdown")
    arguments = parser.parse_args(argv)

    from ddb_fast import evaluation
    from ddb_fast.provenance import FinishedRun

    run = FinishedRun.open(arguments.run)
    data = _images(run, arguments)
    device = _prepare(run.config)
    results = evaluation.evaluate(
        run,
        data,
        methods=arguments.methods,
        seeds=arguments.seeds,
        splits=tuple(dict.fromkeys(arguments.split)),
        corrupt=arguments.corrupt or run.config.data.corrupt,
        device=device,
    )
    if arguments.format == "json":
        print(json.dumps(results, indent=2))
    else:
        sys.stdout.write(tables(replace(run.config, data=data), results))
    return 0


def tables(config: RunConfig, results: dict[str, Any]) -> str:
    """What `evaluate` found as Markdown: methods, then classes, then groups; as `compare` has it.

    config: the run's, with the data that was evaluated.
    """
    run = Run(results["run"], config, results, fingerprint="")
    by_class = {
        method: {"metrics": {}, "groups": entry["classes"]}
        for method, entry in results["methods"].items()
    }
    classes = group_tables([replace(run, results={**results, "methods": by_class})])
    named = [
        table._replace(
            title=table.title.replace(", groups", ", classes"),
            rows=[["class", *table.rows[0][1:]], *table.rows[1:]],
        )
        for table in classes
    ]
    return as_markdown([*tables_of([run]), *named, *group_tables([run])])


def sample(argv: Sequence[str], *, prog: str = "ddb-fast sample") -> int:
    """`ddb-fast sample RUN --out DIR`: PNG files in a folder per class."""
    where = "folder of a finished run, or one with a generator's model.safetensors"
    parser = _parser(prog, "sample", run=where)
    parser.add_argument("--out", metavar="DIR", required=True, help="a new folder")
    parser.add_argument("--per-class", metavar="N", type=int, help="images of each class")
    parser.add_argument("--seed", metavar="K", type=int, help="another seed, other images")
    parser.add_argument(
        "--guidance-scale", metavar="S", type=float, help="1: none; larger: more of the class"
    )
    parser.add_argument("--steps", metavar="N", type=int, help="of the sampler")
    parser.add_argument("--classes", metavar="NAME", nargs="+", help="only these")
    parser.epilog = "What is not given is as in the run."
    arguments = parser.parse_args(argv)

    from ddb_fast import apply
    from ddb_fast.provenance import FinishedRun

    path, out = Path(arguments.run), Path(arguments.out)
    is_run = (path / "manifest.json").is_file()
    device = _prepare(FinishedRun.open(path).config if is_run else None)
    count = apply.sample(
        path,
        out,
        classes=arguments.classes,
        per_class=arguments.per_class,
        seed=arguments.seed,
        guidance_scale=arguments.guidance_scale,
        steps=arguments.steps,
        device=device,
    )
    print(f"{out}: {count} images")
    return 0


def report(argv: Sequence[str], *, prog: str = "ddb-fast report") -> int:
    """`ddb-fast report RUN`: results.json and report.html anew, from what the stages left."""
    parser = _parser(prog, "report")
    parser.add_argument("--open", action="store_true", help="show it in the browser")
    arguments = parser.parse_args(argv)

    from ddb_fast.provenance import FinishedRun
    from ddb_fast.run_folder import lock_folder

    # A run that decodes or trains there would be given half of what this writes, and the reverse.
    with lock_folder(FinishedRun.open(arguments.run).path):
        page = _write_report(FinishedRun.open(arguments.run))
    print(f"report:  {page}")
    if arguments.open:
        import webbrowser

        if not webbrowser.open(page.resolve().as_uri()):
            print(f"{prog}: no browser was found; open the file yourself", file=sys.stderr)
    return 0


def _write_report(run: "FinishedRun") -> Path:
    from ddb_fast.pipeline import read_data, write_results

    config = run.config
    needed = {f"{method}/seed{seed}" for method in config.methods for seed in config.seeds}
    needed |= {"scores"} if config.scored else set()
    needed |= {"real-scores"} if CONTROLS.intersection(config.methods) else set()
    if not needed <= run.done:
        raise ValueError(f"{run.path}: an unfinished run; the command that began it goes on")
    listing = _check_unchanged(run, "a report shows those that it began with")
    _prepare(config)
    data = read_data(config, run.path, listing)
    write_results(run.path, config, data, run.manifest["seconds"])
    return run.path / "report.html"
