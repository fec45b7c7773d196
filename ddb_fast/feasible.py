"""Refusals before anything is trained: what would only fail, or mean nothing, at its stage."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ddb_fast.classification import bare_network
from ddb_fast.config import CONTROLS, ClassifierConfig, RunConfig
from ddb_fast.data.pixels import normalise
from ddb_fast.data.store import ImageData
from ddb_fast.diffusion.samplers import timesteps
from ddb_fast.generator import build_unet
from ddb_fast.kernels import use_backend
from ddb_fast.models.classifiers import TIMM, first_line, linear_head, load_pretrained

logger = logging.getLogger(__name__)

_FEW = 10
"""A validation group of fewer images is warned of, where something is chosen by groups."""


def check_feasible(
    config: RunConfig,
    *,
    num_classes: int,
    world: int,
    done: Callable[[str], bool] = lambda stage: False,
) -> None:
    """Refuse, before anything is trained, what would only fail at its stage.

    done: whether a stage of the run is; pretrained weights are read, or fetched, here for those
    that are not. ValueError for what cannot be, OSError for weights that are out of reach.
    """
    parts = {"classifier": config.classifier} if config.methods else {}
    if config.amplifies or CONTROLS.intersection(config.methods):
        parts["amplifier"] = config.amplifier
    if config.amplifies and config.sampling.load is None:
        size = config.diffusion.image_size
        # Torch's own: the others run on no meta tensor, and would be logged as passed over.
        own = use_backend(group_norm="torch", attention="torch")
        with torch.device("meta"), torch.no_grad(), own:
            unet, one = build_unet(config.diffusion, num_classes), torch.zeros(1).long()
            unet(torch.empty(1, 3, size, size), one, one)  # sides and heads are refused in a pass
        if config.sampling.sampler != "ddpm-authors":
            timesteps(config.diffusion.timesteps, config.sampling.steps)
        if config.diffusion.load is None:
            parts["diffusion"] = config.diffusion
    for name, part in parts.items():
        if part.batch_size % (world * part.accumulate):
            raise ValueError(
                f"{name}.batch_size {part.batch_size} is not a multiple of {world} devices x "
                f"{part.accumulate} accumulated"
            )
        if isinstance(part, ClassifierConfig):
            network = _check_classifier(part, name, num_classes, world=world)
            if user := _user_of_features(config, name, done):
                try:
                    linear_head(network)
                except ValueError as error:
                    raise ValueError(
                        f"{name}.model {part.model} does not serve {user}: {error}"
                    ) from None
            if part.weights is not None and not all(map(done, _trained(config, name))):
                if part.weights != "imagenet" and not Path(part.weights).is_file():
                    raise ValueError(f"{name}.weights: no file {part.weights}")
                _check_weights(part, name, num_classes)


def _user_of_features(config: RunConfig, name: str, done: Callable[[str], bool]) -> str | None:
    if name == "classifier":
        return "method dfr" if "dfr" in config.methods else None
    copies = config.amplifies and config.audit and not done("memorisation")
    return "the audit, which looks for copies by its features (--audit false)" if copies else None


def _trained(config: RunConfig, name: str) -> list[str]:
    """The stages that train networks of a part from its first weights."""
    if name == "classifier":
        return [f"{method}/seed{seed}" for method in config.methods for seed in config.seeds]
    stages = ["real-amplifier"] if CONTROLS.intersection(config.methods) else []
    if config.amplifies:
        stages += ["amplifier", "verdict"] if config.audit else ["amplifier"]
    return stages


def _check_classifier(
    part: ClassifierConfig, name: str, num_classes: int, *, world: int
) -> nn.Module:
    """The network of a part; it has been shown images where these may be too small or too few.

    Too small for one of timm's, whose limits nobody has written down; too few for batch norm.
    """
    size, count = part.image_size, part.batch_size // (world * part.accumulate)
    if count > 1 and not part.model.startswith(TIMM):
        with torch.device("meta"):
            return bare_network(part, num_classes)
    shown = min(count, 2)
    with torch.no_grad(), torch.random.fork_rng([]):
        network = bare_network(part, num_classes)
        try:
            logits = network(torch.zeros(shown, 3, size, size))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ValueError(
                f"{name}: {part.model} does not take images of {size} pixels, {shown} at a time: "
                f"{first_line(error)}"
            ) from error
    if not isinstance(logits, Tensor) or logits.shape != (shown, num_classes):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{name}: {part.model} answers {found}, not (images, classes)")
    return network


def _check_weights(part: ClassifierConfig, name: str, num_classes: int) -> None:
    network = bare_network(part, num_classes)
    if not load_pretrained(network, part.weights, name=part.model, image_size=part.image_size):
        logger.info("%s.weights: without a head for these classes; a new one is trained", name)
    expected = getattr(network, "pretrained_cfg", {}).get("mean")  # timm's
    if expected is None:
        return
    average = 255 * torch.tensor(expected, dtype=torch.float32).view(1, 3, 1, 1)
    if normalise(average, part.pixel_norm).abs().max() > 0.01:
        logger.warning(
            "%s.pixel_norm %s: the weights of %s were trained on pixels of mean %s (of 1)",
            name, part.pixel_norm, part.model, ", ".join(map(str, expected)),
        )  # fmt: skip


def check_labels(config: RunConfig, data: ImageData) -> None:
    """Refuse with ValueError methods that need labels or splits which the data lacks.

    What chooses by groups needs both sides of the bias in validation; a warning names the smallest
    validation group of those in training, where it is small.
    """
    for method in ("group-dro", "dfr"):
        if method in config.methods and data.groups("train") is None:
            raise ValueError(f"method {method} needs bias labels: a CSV with a column `a`")
    selects = config.selection != "last"
    by_groups = selects and config.selection != "average_accuracy"
    if selects and "val" not in data.splits:
        raise ValueError(f"selection {config.selection} needs a validation split; use last")
    if by_groups and data.groups("train") is None:
        raise ValueError(f"selection {config.selection} needs bias labels; use last")
    if "dfr" in config.methods:
        present = set(data.splits["val"].y.tolist()) if "val" in data.splits else set()
        absent = [name for c, name in enumerate(data.classes) if c not in present]
        if absent:
            raise ValueError(
                f"method dfr needs a validation split with every class: none of {absent[0]}"
            )
    if by_groups:
        _check_validation_groups(data, f"selection {config.selection}", instead="use last")
    if "dfr" in config.methods:
        _check_validation_groups(data, "method dfr", instead="leave it out")


def _check_validation_groups(data: ImageData, what: str, *, instead: str) -> None:
    groups, trained = data.groups("val"), data.groups("train").counts > 0
    for aligned, lacking in ((True, "aligned"), (False, "conflicting")):
        if not (groups.bias_aligned == aligned).any():
            raise ValueError(
                f"{what} needs bias-aligned and bias-conflicting images in the validation "
                f"split: none of its {len(groups)} is {lacking}; {instead}"
            )
    size, group = min((groups.counts[g].item(), g) for g in trained.nonzero()[:, 0].tolist())
    if size < _FEW:
        noun = "image" if size == 1 else "images"
        logger.warning(
            "%s rests on small groups of the validation split: %s has %d %s",
            what, groups.names[group], size, noun,
        )  # fmt: skip
