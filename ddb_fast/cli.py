"""`ddb-fast`: every command a person types. Heavy imports wait until a command needs them."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ddb_fast.arguments import OneLineParser, check_takes_rho
from ddb_fast.streams import log_to_stderr, printing

COMMANDS = {
    "run": "all stages on a preset's or your images; the same command again resumes",
    "report": "a run's page again, from its files; --open shows it in the browser",
    "score": "how much each image is at odds with its class, by a run's amplifier",
    "evaluate": "a run's classifiers on other images: by class, and by group with bias labels",
    "sample": "images of a run's generator, a folder per class",
    "export": "a run's model to take away: for from_pretrained, torch.export or ONNX",
    "compare": "finished runs side by side, with or without published figures",
    "sweep": "presets x methods x seeds x rho, a run each; the same command again resumes",
    "data": "what would be read: classes, splits, groups; --check finds broken files",
    "import": "turn a checkpoint of the authors into a folder for `run --diffusion`",
    "kernels": "`kernels check`: each op and backend against fp64, forward and backward",
    "env": "this machine, the packages, and every kernel backend with its reasons",
    "completion": "a script that completes commands, options and choices in bash, zsh or fish",
}


_NO_ROOM = (
    "can't start new thread",
    "can't allocate memory",
    "out of memory",
    "Storage size calculation overflowed",
)
"""What Python and PyTorch say where threads or memory run out, in errors without a class."""


def run(argv: Sequence[str]) -> int:
    from ddb_fast.train import main as train_main

    return train_main(argv, prog="ddb-fast run")


def use_run(argv: Sequence[str], command: str) -> int:
    from ddb_fast import use_run

    return getattr(use_run, command)(argv, prog=f"ddb-fast {command}")


def export(argv: Sequence[str]) -> int:
    from ddb_fast.config import METHODS

    parser = OneLineParser(
        prog="ddb-fast export", description="Take one model out of a run's folder."
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", metavar="DIR", required=True, help="a new folder, or an empty one")
    parser.add_argument(
        "--model", choices=("classifier", "amplifier", "diffusion"), default="classifier"
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        metavar="METHOD",
        help="whose classifier; may be left out where the run debiased by one method only",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the classifier; the run's first")
    parser.add_argument(
        "--format",
        choices=("pretrained", "torch-export", "onnx"),
        default="pretrained",
        help="pretrained: weights, config.json and model card, for from_pretrained and the Hub; "
        "torch-export: model.pt2; onnx: model.onnx",
    )
    arguments = parser.parse_args(argv)

    from ddb_fast import export
    from ddb_fast.pretrained import BiasAmplifier, Classifier, Generator

    if arguments.model == "classifier":
        model = Classifier.from_run(arguments.run, method=arguments.method, seed=arguments.seed)
    elif arguments.method is not None or arguments.seed is not None:
        raise ValueError(f"--method and --seed are of classifiers; a run has one {arguments.model}")
    else:
        model = (BiasAmplifier if arguments.model == "amplifier" else Generator).from_run(
            arguments.run
        )
    said = export.export(model, Path(arguments.out), format=arguments.format)
    method, seed = model.description["run"]["method"], model.description["run"]["seed"]
    which = f"{method} seed {seed}" if arguments.model == "classifier" else arguments.model
    print(f"{arguments.out}: {which}, {arguments.format}; {said}")
    return 0


def completion(argv: Sequence[str]) -> int:
    from ddb_fast.completion import main as completion_main

    return completion_main(argv, prog="ddb-fast completion")


def compare_runs(argv: Sequence[str]) -> int:
    from ddb_fast.compare import FORMATS, compare
    from ddb_fast.compared_runs import read_run

    parser = OneLineParser(prog="ddb-fast compare", description=COMMANDS["compare"])
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of finished runs")
    parser.add_argument("--format", choices=FORMATS, default="markdown")
    parser.add_argument(
        "--metric", metavar="NAME", nargs="+", help="only these, named as in results.json"
    )
    parser.add_argument(
        "--published", action="store_true", help="published figures below ours, marked as such"
    )
    parser.add_argument(
        "--groups", action="store_true", help="also each group's size, accuracy and 95 %% interval"
    )
    arguments = parser.parse_args(argv)
    text = compare(
        [read_run(path) for path in arguments.runs],
        format=arguments.format,
        metrics=arguments.metric,
        published=arguments.published,
        groups=arguments.groups,
    )
    sys.stdout.write(text)
    return 0


def sweep(argv: Sequence[str]) -> int:
    from ddb_fast.sweep import main as sweep_main

    return sweep_main(argv, prog="ddb-fast sweep")


def show_data(argv: Sequence[str]) -> int:
    from dataclasses import replace

    from ddb_fast.config import DataConfig
    from ddb_fast.presets import PRESETS
    from ddb_fast.use_run import SOURCES

    parser = OneLineParser(prog="ddb-fast data", description=COMMANDS["data"])
    parser.add_argument("path", help="an image folder or a CSV; `digits` for the embedded set")
    parser.add_argument(
        "--as",
        dest="source",
        choices=[name for name in SOURCES if name != "digits"],
        default="auto",
        help="what lies there (auto: a folder or a CSV)",
    )
    parser.add_argument(
        "--rho", type=float, help="share of aligned images, where there is a choice"
    )
    parser.add_argument(
        "--check", action="store_true", help="decode every image; exit 2 if one cannot be read"
    )
    arguments = parser.parse_args(argv)

    from ddb_fast.data.sources import describe, open_listing
    from ddb_fast.data.store import broken_images

    source, path = arguments.source, arguments.path
    if path == "digits" and source == "auto":
        source, path = "digits", None
    # A set's preset has its own rho and held-out share, which a run of it reads with.
    config = PRESETS[source]().data if source in PRESETS else DataConfig(source=source)
    config = replace(config, path=path)
    if arguments.rho is not None:
        check_takes_rho(source, "--rho")
        config = replace(config, rho=arguments.rho)
    log_to_stderr()
    listing = open_listing(config)
    print(describe(listing), flush=True)
    if arguments.check:
        broken = broken_images(listing)
        print(*broken.values() or ("every image can be read",), sep="\n")
        if broken:
            raise ValueError(
                f"{len(broken)} of {len(listing)} images cannot be read; repair or remove them, or "
                "leave them out of a run with --data.corrupt skip"
            )
    return 0


def import_authors(argv: Sequence[str]) -> int:
    parser = OneLineParser(prog="ddb-fast import", description=COMMANDS["import"])
    parser.add_argument("checkpoint", help="a file torch.save wrote, with model_state_dict")
    parser.add_argument("--out", required=True, help="folder for model.safetensors")
    parser.add_argument("--image-size", type=int, default=64, help="pixels a side (64)")
    arguments = parser.parse_args(argv)

    from ddb_fast.generator import import_checkpoint

    print(import_checkpoint(Path(arguments.checkpoint), Path(arguments.out), arguments.image_size))
    return 0


def show_environment(argv: Sequence[str]) -> int:
    OneLineParser(prog="ddb-fast env", description=COMMANDS["env"]).parse_args(argv)

    import torch

    from ddb_fast.kernels import backends, tuned
    from ddb_fast.run_folder import versions

    for name, value in versions().items():
        print(f"{name:12} {value}")
    gpu = torch.cuda.is_available()
    print(f"{'device':12} {torch.cuda.get_device_name() if gpu else 'cpu'}")
    print(f"{'kernels':12} {tuned.describe(torch.device('cuda' if gpu else 'cpu', 0))}")
    for op, choices in backends().items():
        for backend, reasons in choices.items():
            print(f"{op:12} {backend:10} {'; '.join(reasons) or 'available'}")
    return 0


def check_kernels(argv: Sequence[str]) -> int:
    parser = OneLineParser(prog="ddb-fast kernels", description=COMMANDS["kernels"])
    parser.add_argument("action", choices=("check",), help="exit 1 if an error exceeds its bound")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (cuda where there is one)")
    arguments = parser.parse_args(argv)

    import torch

    from ddb_fast.kernels.check import report

    table, fine = report(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    print(table)
    return 0 if fine else 1


def _usage() -> str:
    lines = "\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items())
    return f"usage: ddb-fast COMMAND [...]; each has --help\n{lines}"


def show_usage(_: Sequence[str]) -> int:
    print(_usage())
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to a command; a user's error is one line and exit 2, Ctrl-C one and exit 130."""
    given = list(sys.argv[1:] if argv is None else argv)
    prog = " ".join(["ddb-fast", *given[:1]])
    return printing(lambda: _main(given, prog), prog=prog)


def _main(given: list[str], prog: str) -> int:
    actions: dict[str, Callable[[Sequence[str]], int]] = {
        "run": run,
        **{
            name: partial(use_run, command=name)
            for name in ("report", "score", "evaluate", "sample")
        },
        "export": export,
        "compare": compare_runs,
        "sweep": sweep,
        "data": show_data,
        "import": import_authors,
        "kernels": check_kernels,
        "env": show_environment,
        "completion": completion,
        **dict.fromkeys(("-h", "--help"), show_usage),
    }
    if given and given[0] in actions:
        try:
            return actions[given[0]](given[1:])
        except BrokenPipeError:  # an OSError, but nothing to tell: nobody reads
            raise
        except (ValueError, OSError) as error:
            print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        except (MemoryError, OverflowError, RuntimeError) as error:
            text = " ".join(str(error).split())
            if isinstance(error, RuntimeError) and not any(words in text for words in _NO_ROOM):
                raise
            print(f"{prog}: this machine has no room for it: {text or 'memory'}", file=sys.stderr)
            return 2
    if given:
        print(f"ddb-fast: no command {given[0]!r}; {', '.join(COMMANDS)}", file=sys.stderr)
    else:
        print(_usage(), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
