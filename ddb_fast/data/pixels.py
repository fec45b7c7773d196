"""Pixels as networks see them: uint8 images to normalised floats and back.

The statistics are in units of 0..255, so that symmetric black and white are exactly -1 and 1.
"""

from functools import cache

import torch
from torch import Tensor

# (mean, standard deviation) of each channel; ImageNet's are those of every torchvision model.
_STATISTICS = {
    "symmetric": ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
    "imagenet": (
        tuple(255 * mean for mean in (0.485, 0.456, 0.406)),
        tuple(255 * std for std in (0.229, 0.224, 0.225)),
    ),
    "double-255": ((0.0, 0.0, 0.0), (65025.0, 65025.0, 65025.0)),
}
_UNIFORM = {
    kind for kind, both in _STATISTICS.items() if all(len(set(values)) == 1 for values in both)
}


@cache
def _on_device(kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    # Kept per device, because copying them there would stall every training step.
    mean, std = torch.tensor(_STATISTICS[kind], dtype=torch.float32, device=device)
    return mean.view(3, 1, 1), std.view(3, 1, 1)


def _statistics(kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    if kind not in _STATISTICS:
        raise ValueError(f"pixel normalisation {kind!r} is none of {', '.join(_STATISTICS)}")
    # An exporter's stand-ins for tensors, once kept, would be what every later call gets.
    tracing = torch.compiler.is_compiling()
    return (_on_device.__wrapped__ if tracing else _on_device)(kind, device)


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (N, 3, H, W), got {tuple(images.shape)}")


def normalise(images: Tensor, kind: str) -> Tensor:
    """Images as the float32 input of a network, in the same memory format.

    images: (N, 3, H, W) uint8, or float32 in 0..255 as augmentations leave them. kind: symmetric,
    to [-1, 1]; imagenet, to ImageNet's mean 0 and deviation 1 in each channel; double-255, to
    [0, 1/255] as the published Colored MNIST networks see them: their code scales pixels to [0, 1]
    and then again, which makes ERM 8 to 14 points worse, so figures compare only with it.
    ValueError for another kind, dtype or shape.
    """
    mean, std = _statistics(kind, images.device)
    _check_images(images)
    if images.dtype not in (torch.uint8, torch.float32):
        raise ValueError(f"images must be uint8 or float32, got {images.dtype}")
    if kind in _UNIFORM:
        # Numbers, not a (3, 1, 1) tensor, which in channels_last is a loop of three: 4x as fast.
        mean, std = (values[0] for values in _STATISTICS[kind])
        if mean == 0:
            return torch.div(images, std)
    return torch.sub(images, mean).div_(std)


def denormalise(x: Tensor, kind: str) -> Tensor:
    """The inverse of `normalise`, rounded to the nearest of 0..255.

    x: (N, 3, H, W), floating point. ValueError for another kind, dtype or shape.
    """
    mean, std = _statistics(kind, x.device)
    _check_images(x)
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}")
    return (x.float() * std + mean).round_().clamp_(0, 255).to(torch.uint8)


def value_range(kind: str) -> tuple[Tensor, Tensor]:
    """The values that black and white pixels take after `normalise`: low and high, (3, 1, 1) each.

    ValueError for an unknown kind.
    """
    mean, std = _statistics(kind, torch.device("cpu"))
    return (0 - mean) / std, (255 - mean) / std


def check_input(images: Tensor) -> None:
    """ValueError for all but RGB images (N, 3, H, W) that have pixels, uint8 or floats in [0, 1].

    While a graph is compiled values are not looked at.
    """
    given = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
    if isinstance(given, str) or len(given) != 4 or given[1] != 3 or 0 in given[2:]:
        raise ValueError(f"images must be a tensor (N, 3, H, W) that has pixels, got {given}")
    if images.is_floating_point():
        # A question about values, which a compiler cannot answer.
        asked = images.numel() and not torch.compiler.is_compiling()
        low, high = images.aminmax() if asked else (0, 1)
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"floating-point images must be in [0, 1], these are in [{low:.4g}, {high:.4g}]"
            )
    elif images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8 or floating point, got {images.dtype}")
