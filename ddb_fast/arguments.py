"""The command line of a run, made from the configuration's fields; standard library only.

Every leaf of `RunConfig` is an option (`--diffusion.lr 3e-4`, `--seeds 0 1 2`); three have a short
name too. Types, choices and help are those the dataclasses declare.
"""

import argparse
import ast
import dataclasses
import inspect
import typing
from collections.abc import Collection, Sequence

from ddb_fast import config as config_module
from ddb_fast.config import TAKES_RHO, RunConfig, with_fields
from ddb_fast.fields import flatten
from ddb_fast.presets import PRESETS, load_config

SHORT = {
    "data": ("data.path", "an image folder, a CSV (path, y[, a][, split]) or a published set"),
    "diffusion": ("diffusion.load", "start from this trained diffusion model's folder"),
    "synthetic": ("sampling.load", "start from these synthetic images, a folder per class"),
    "scores": (
        "pseudo_labels.load",
        "start from this scores.csv of the training images",
    ),
}


def field_texts() -> dict[str, tuple[str, str]]:
    """(what a value looks like, what it means) of every leaf, read off the dataclasses' source.

    The texts stand below the fields they describe, where Python itself does not keep them.
    """
    tree = ast.parse(inspect.getsource(config_module))
    described = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}

    def walk(cls: type, prefix: str) -> dict[str, tuple[str, str]]:
        texts = {}
        for base in cls.__mro__[-2::-1]:
            body = described[base.__name__].body
            for node, after in zip(body, [*body[1:], None], strict=True):
                if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr):
                    texts[node.target.id] = inspect.cleandoc(after.value.value)
        leaves = {}
        for name, hint in typing.get_type_hints(cls).items():
            if dataclasses.is_dataclass(hint):
                leaves |= walk(hint, f"{prefix}{name}.")
            else:
                text = " ".join(texts.get(name, "").split()).replace("%", "%%")
                leaves[prefix + name] = (_kind(hint), text)
        return leaves

    return walk(RunConfig, "")


def _kind(hint: object) -> str:
    options = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "{" + ",".join(options) + "}"
    names = [t.__name__.upper() for t in options if isinstance(t, type) and t is not type(None)]
    if type(None) in options:
        return "|".join([*names, "none"])
    return names[0] if names else hint.__name__.upper()


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, exit 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add everything `ddb-fast run` and `accelerate launch ddb_fast/train.py` take."""
    parser.usage = "%(prog)s PRESET_OR_CONFIG [--data PATH] [--out DIR] [any field below]"
    parser.add_argument(
        "config", metavar="PRESET_OR_CONFIG", help=f"{', '.join(PRESETS)}, or a .json file"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the configuration and stop")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="then run a few steps of its stages again and show where their time goes",
    )
    add_field_arguments(parser)


def add_field_arguments(parser: argparse.ArgumentParser, *, without: Collection[str] = ()) -> None:
    """Add every field of the configuration and the short names, except the fields in `without`."""
    for name, (target, text) in SHORT.items():
        if target not in without:
            parser.add_argument(f"--{name}", dest=target, metavar="PATH", help=text)
    texts = field_texts()
    fields = parser.add_argument_group("any field of the configuration; defaults by preset")
    for name, value in flatten(PRESETS["ddb"]()).items():
        if name == "preset" or name in without:
            continue
        kind, text = texts[name]
        several = {"nargs": "+"} if isinstance(value, list) else {}
        fields.add_argument(f"--{name}", dest=name, metavar=kind, help=text or None, **several)


def run_config(arguments: argparse.Namespace) -> RunConfig:
    """The configuration that parsed arguments ask for; ValueError names a field that is wrong."""
    given = {
        name: value
        for name, value in vars(arguments).items()
        if name not in ("config", "dry_run", "profile", "command") and value is not None
    }
    config = with_fields(load_config(arguments.config), given)
    if "pseudo_labels.load" in given and config.pseudo_labels.load and not config.scored:
        raise ValueError("--scores: none of the methods goes by scores")
    _refuse_unread(given, config)
    if config.data.path is not None and config.data.source == "digits":
        if "data.source" in given or "data.path" not in given:
            raise ValueError("data.source digits is embedded and takes no data.path")
        config = with_fields(config, {"data.source": "auto"})
    if "data.rho" in given:
        check_takes_rho(config.data.source, "data.rho")
    if config.data.path is None and config.data.source != "digits" and not arguments.dry_run:
        raise ValueError(f"preset {config.preset}: say which images with --data PATH")
    return config


def _refuse_unread(given: Collection[str], config: RunConfig) -> None:
    """Refuse with ValueError fields that nothing looks at, beside what replaces their stage."""
    generator, images = ("diffusion.",), ("diffusion.", "sampling.")
    scores = (*images, "amplifier.", "pseudo_labels.")
    if any(method.startswith("real-amplifier") for method in config.methods):
        scores = images
    for load, prefixes, told in (
        ("diffusion.load", generator, "--diffusion brings a generator as it was trained"),
        ("sampling.load", images, "--synthetic brings images, nothing is generated"),
        ("pseudo_labels.load", scores, "--scores brings scores as they are"),
    ):
        section, name = load.split(".")
        # Images are fitted to diffusion.image_size whoever made them.
        read = {load} if load == "diffusion.load" else {load, "diffusion.image_size"}
        if "ddb-i" in config.methods:  # its groups are made of whatever scores there are
            read.add("pseudo_labels.pseudo_groups")
        unread = sorted(n for n in given if n.startswith(prefixes) and n not in read)
        if unread and getattr(getattr(config, section), name) is not None:
            raise ValueError(f"{', '.join(unread)}: {told}")


def check_takes_rho(source: str, option: str) -> None:
    """Refuse with ValueError an option that gives a rho to a source which takes none."""
    if source not in TAKES_RHO:
        raise ValueError(
            f"{option}: images are read as they are (source {source}); rho is for "
            f"{', '.join(TAKES_RHO)}"
        )


def parse_run(argv: Sequence[str], *, prog: str) -> tuple[RunConfig, bool, bool]:
    """(configuration, whether only to print it, whether to profile the run).

    Exits with 2 and one line when it is wrong.
    """
    parser = OneLineParser(prog=prog, allow_abbrev=False, description="Run or resume the pipeline.")
    add_run_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        return run_config(arguments), arguments.dry_run, arguments.profile
    except ValueError as error:
        parser.error(str(error))
        raise AssertionError("unreachable") from None
