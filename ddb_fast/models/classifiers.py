"""Classifiers by name, and ImageNet weights for those that have them.

The names of the parameters are timm's, so a `model.safetensors` of timm's Hub repositories, or one
saved from timm, loads without timm.
"""

import contextlib
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ddb_fast.data.files import few
from ddb_fast.models.densenet import DenseNet121
from ddb_fast.models.resnet import BasicBlock, Bottleneck, ResNet
from ddb_fast.models.small import MLP, SmallCNN

logger = logging.getLogger(__name__)

# timm: the weights with which torchvision first published these networks, ImageNet-1k.
HUB_REPOSITORIES = {
    "resnet18": "timm/resnet18.tv_in1k",
    "resnet50": "timm/resnet50.tv_in1k",
    "densenet121": "timm/densenet121.tv_in1k",
}
NETWORKS = {
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
    "densenet121": DenseNet121,
    "cnn": SmallCNN,
    "mlp": MLP,
}
# One whole pixel for the last stage, at 1/32 of the side (cnn: 1/8). The mlp takes any size.
SMALLEST_IMAGE = {"resnet18": 32, "resnet50": 32, "densenet121": 32, "cnn": 8, "mlp": 1}
TIMM = "timm:"


def build_classifier(
    name: str,
    num_classes: int,
    *,
    image_size: int,
    width: int | None = None,
) -> nn.Module:
    """Build a classifier with random weights: images (N, 3, S, S) -> logits (N, K).

    name: resnet18, resnet50, densenet121, cnn, mlp, or timm:NAME for a network of timm. image_size
    S in pixels: the mlp and timm's networks of fixed input are built for it, the others take any
    size from their smallest on. width: cnn (default 48) and mlp (default 100) only.
    ValueError for an unknown name, a size or number of classes that is too small, a width given to
    a network of fixed width, a width below 1, and for timm:NAME where timm does not import.
    """
    if not name.startswith(TIMM) and name not in NETWORKS:
        raise ValueError(
            f"unknown classifier {name!r}; there are {', '.join(NETWORKS)} and {TIMM}NAME"
        )
    if num_classes < 1:
        raise ValueError(f"num_classes must be >= 1, got {num_classes}")
    if width is not None and name not in ("cnn", "mlp"):
        raise ValueError(f"width {width} given to {name}; only cnn and mlp have one: take none")
    if width is not None and width < 1:
        raise ValueError(f"width must be >= 1, got {width}")
    if name.startswith(TIMM):
        return _timm_network(name, image_size=image_size, num_classes=num_classes)
    if image_size < SMALLEST_IMAGE[name]:
        raise ValueError(
            f"{name} needs images of {SMALLEST_IMAGE[name]} pixels or more, got {image_size}"
        )
    arguments = {"num_classes": num_classes}
    if name == "mlp":
        arguments["image_size"] = image_size
    if width is not None:
        arguments["width"] = width
    return NETWORKS[name](**arguments)


def channels_last(network: nn.Module) -> nn.Module:
    """Lay a network's weights channels_last, in place; those of 3-d convolutions cannot lie so."""
    return network._apply(lambda t: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t)


def first_line(error: Exception) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def load_pretrained(model: nn.Module, source: str, *, name: str, image_size: int) -> bool:
    """Load weights into `model`, in place; return whether its head was loaded too.

    source: path of a local safetensors file with the parameter names of the network `name`, which
    are timm's, or "imagenet" for the file of timm's Hub repository (resnet18, resnet50,
    densenet121) and for what timm itself fetches for timm:NAME, fitted to image_size pixels where
    that network's input is fixed. A head for another number of classes, or that the file lacks, is
    left as it was.
    OSError when the file or the Hub cannot be read; ValueError for a file that is not safetensors
    or does not fit (nothing is loaded then), and for "imagenet" where no such weights exist.
    """
    if source == "imagenet" and name.startswith(TIMM):
        path, tensors = name, _timm_weights(name, image_size=image_size)
    else:
        path = _download(name) if source == "imagenet" else Path(source)
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
    own, prefixes = model.state_dict(), _head_prefixes(model)
    head = [key for key in own if key.startswith(prefixes)]
    theirs = [key for key in head if key in tensors]
    other_classes = any(
        own[key].shape != tensors[key].shape and own[key].shape[1:] == tensors[key].shape[1:]
        for key in theirs
    )
    headless = bool(head) and not any(key.startswith(prefixes) for key in tensors)
    if other_classes or headless:
        tensors |= {key: own[key] for key in (head if headless else theirs)}
    _require_fit(own, tensors, path=path)
    model.load_state_dict(tensors)
    return not (other_classes or headless)


def _timm_network(name: str, *, image_size: int, **arguments: Any) -> nn.Module:
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        # RuntimeError: a torchvision built for another torch ("torchvision::nms does not exist").
        raise ValueError(
            f"{name} needs timm, which does not import here ({error}): install ddb-fast[timm], "
            "with a torchvision of the same build as torch"
        ) from error
    timm_name = name.removeprefix(TIMM)
    if not timm.is_model(timm_name):
        raise ValueError(f"timm {timm.__version__} has no network {timm_name!r}")
    try:
        pretrained = timm.get_pretrained_cfg(timm_name)
        if pretrained is not None and pretrained.fixed_input_size:
            arguments["img_size"] = image_size
        return timm.create_model(timm_name, in_chans=3, **arguments)
    # A tag that is none, no weights where they are wanted, a size that patches do not divide.
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: timm {timm.__version__}: {first_line(error)}") from error


def _timm_weights(name: str, *, image_size: int) -> dict[str, Tensor]:
    try:
        with _quiet_hub():
            return _timm_network(name, image_size=image_size, pretrained=True).state_dict()
    except OSError as error:
        raise OSError(
            f"timm cannot fetch the weights of {name} ({error}); where the Hub is reachable, save "
            f"the network at {image_size} pixels as safetensors, and give that file's path instead"
        ) from error


def _download(name: str) -> Path:
    if name not in HUB_REPOSITORIES:
        raise ValueError(
            f"no 'imagenet' weights for {name}, only for {', '.join(HUB_REPOSITORIES)}; "
            "give the path of a safetensors file"
        )
    from huggingface_hub import hf_hub_download

    repository = HUB_REPOSITORIES[name]
    try:
        with _quiet_hub():
            return Path(hf_hub_download(repository, "model.safetensors"))
    except OSError as error:
        raise OSError(
            f"cannot download model.safetensors of {repository} from the Hugging Face Hub "
            f"({error}); fetch it where the Hub is reachable and give its path instead"
        ) from error


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Without a line for each of its retries: the last error is told, and says the same."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(level)


def _head_prefixes(model: nn.Module) -> tuple[str, ...]:
    """What the head's parameters start with; timm writes it into every network it builds."""
    names = getattr(model, "pretrained_cfg", {"classifier": ("fc", "classifier")})["classifier"]
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def linear_head(model: nn.Module) -> nn.Linear:
    """The last layer of a classifier, whose inputs are its features.

    ValueError where the network does not end in one linear layer with a bias, as a few of timm's.
    """
    names = {prefix.removesuffix(".") for prefix in _head_prefixes(model)}
    heads = [module for name, module in model.named_modules() if name in names]
    if len(heads) != 1 or not isinstance(heads[0], nn.Linear) or heads[0].bias is None:
        kinds = ", ".join(type(head).__name__ for head in heads) or "nothing"
        raise ValueError(f"{type(model).__name__} ends in {kinds}, not in one linear layer")
    return heads[0]


def _require_fit(own: dict[str, Tensor], tensors: dict[str, Tensor], *, path: Path | str) -> None:
    problems = {
        # Batch norm's step counter decides nothing at a fixed momentum; files older than it exist.
        "missing": [
            key for key in own if key not in tensors and not key.endswith(".num_batches_tracked")
        ],
        "unexpected": sorted(key for key in tensors if key not in own),
        "of another shape": [
            f"{key} {tuple(tensors[key].shape)} for {tuple(own[key].shape)}"
            for key in own
            if key in tensors and tensors[key].shape != own[key].shape
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{what}: {few(keys, 4)}" for what, keys in problems.items() if keys)
        raise ValueError(f"{path} does not fit the network: {found}")
