"""Batches as classifiers see them: augmentation in training, fixed views in evaluation.

Everything is batched on the images' device. Pixels come as uint8 and leave as float32, still in
0..255: `pixels.normalise` is the next step. Whatever shrinks is antialiased: a filter that does not
widen would skip pixels of a 256-pixel copy and show networks patterns that photographs do not have.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

KINDS = ("none", "flip", "shift", "shift-flip", "crop-flip")
# Evaluation shows the share of the side that the field's "resize to 256, crop 224" shows.
_CENTRE_SHARE = 224 / 256
_SHIFT_SHARE = 1 / 8
# RandomResizedCrop, Szegedy et al. 2015 with torchvision's numbers.
_CROP_AREA, _CROP_RATIO, _CROP_TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10


def augment(images: Tensor, kind: str, *, size: int, whole: bool = False) -> Tensor:
    """Draw a random view of each image: (N, 3, size, size) float32 in 0..255, channels_last.

    images: (N, 3, S, S) uint8. crop-flip: RandomResizedCrop (8 to 100 % of the area, 3:4 to 4:3, at
    positions that need not be whole pixels), then a flip. The other kinds start from `centre`, or
    with `whole` from `amplifier_view`:
    shift moves up to an eighth of the side in whole pixels and repeats the edge, flip mirrors left
    and right with probability 1/2. ValueError for another kind, dtype or shape.
    """
    if kind not in KINDS:
        raise ValueError(f"augmentation {kind!r} is none of {', '.join(KINDS)}")
    _check(images, size)
    if images.dtype != torch.uint8:
        raise ValueError(f"images to augment must be uint8, got {images.dtype}")
    if kind == "crop-flip":
        return _crop_flip(images, size)
    view = (amplifier_view if whole else centre)(images, size)
    if kind == "none":
        return view
    count, device = len(view), view.device
    rows = torch.arange(size, device=device).expand(count, 1, size)
    columns = rows
    if "shift" in kind:
        most = int(size * _SHIFT_SHARE)
        moves = torch.randint(-most, most + 1, (2, count, 1, 1), device=device)
        rows, columns = ((rows + move).clamp(0, size - 1) for move in moves)
    if "flip" in kind:
        columns = torch.where(_coins(count, device), columns.flip(2), columns)
    first = torch.arange(count, device=device).view(-1, 1, 1) * size * size
    index = first + rows.transpose(1, 2) * size + columns
    pixels = view.permute(0, 2, 3, 1).reshape(-1, 3).index_select(0, index.flatten())
    return pixels.view(count, size, size, 3).permute(0, 3, 1, 2)


def centre(images: Tensor, size: int) -> Tensor:
    """The view that target classifiers are evaluated on: (N, 3, size, size) float32 in 0..255.

    images: (N, 3, S, S) uint8, or float32 in 0..255. Larger ones: the centre, 224/256 of the side,
    resized (256 to 224 is a plain crop). Equal ones as they are; smaller ones enlarged whole.
    Bilinear, antialiased. ValueError for another dtype or shape.
    """
    _check(images, size)
    side = images.shape[2]
    if side > size:
        shown = max(1, round(side * _CENTRE_SHARE))
        start = (side - shown) // 2
        images = images[:, :, start : start + shown, start : start + shown]
    return _resize(images, size)


def amplifier_view(images: Tensor, size: int) -> Tensor:
    """The view that the amplifier scores: (N, 3, size, size) float32 in 0..255, channels_last.

    images: (N, 3, S, S) uint8, or float32 in 0..255, at the diffusion model's size, synthetic or
    real (`store.FITS`), the whole of which is resized: bilinear, antialiased, nothing where the
    size is equal. ValueError for another dtype or shape.
    """
    _check(images, size)
    return _resize(images, size)


def _check(images: Tensor, size: int) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be (N, 3, S, S), got {tuple(images.shape)}")
    if images.dtype not in (torch.uint8, torch.float32):
        raise ValueError(f"images must be uint8, or float32 in 0..255, got {images.dtype}")
    if size < 1:
        raise ValueError(f"no view of {size} pixels")


def _resize(images: Tensor, size: int) -> Tensor:
    x = images.float()
    if x.shape[2] != size:
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    return x.contiguous(memory_format=torch.channels_last)


def _coins(count: int, device: torch.device) -> Tensor:
    return torch.rand((count, 1, 1), device=device) < 0.5


def random_boxes(count: int, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw RandomResizedCrop's boxes in a unit square: corners and sides (count, 2), x then y.

    Area uniform, ratio of the sides log-uniform, redrawn while a side exceeds 1; after ten draws,
    which no batch will see, the side is cut.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, device=device)

    low, high = _CROP_AREA
    area = low + (high - low) * uniform(count, _CROP_TRIES)
    low, high = map(math.log, _CROP_RATIO)
    ratio = torch.exp(low + (high - low) * uniform(count, _CROP_TRIES))
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=2)
    # argmax of equal values is the first one: the first try that fits.
    fits = (sides <= 1).all(dim=2).int().argmax(dim=1)
    sides = sides[torch.arange(count, device=device), fits].clamp(max=1)
    return uniform(count, 2) * (1 - sides), sides


def _crop_flip(images: Tensor, size: int) -> Tensor:
    count, side, device = len(images), images.shape[2], images.device
    corners, sides = random_boxes(count, device=device)
    across, down = (
        _filter(side * corners[:, i], side * sides[:, i], size=size, side=side) for i in (0, 1)
    )
    across = torch.where(_coins(count, device), across.flip(1), across)
    x = images.permute(0, 2, 3, 1).float().reshape(count, side, side * 3)
    # Rows, then columns: a product each over all images, which have weights of their own. Autocast
    # would run them in half precision, too coarse for 255 levels.
    with torch.autocast(device.type, enabled=False):
        x = torch.bmm(down, x).view(count, size, side, 3)
        x = torch.bmm(across, x.transpose(1, 2).reshape(count, side, size * 3))
    x = x.view(count, size, size, 3).permute(0, 3, 2, 1)
    return x.contiguous(memory_format=torch.channels_last)


def _filter(start: Tensor, length: Tensor, *, size: int, side: int) -> Tensor:
    """Weights (N, size, side) that resize `length` pixels from `start`: bilinear, antialiased.

    Pillow's triangle: each output pixel averages what lies within one step of it, at least one
    pixel. start, length: (N,) in pixels of the input.
    """
    step = (length / size).view(-1, 1, 1)
    target = torch.arange(size, device=start.device).view(1, -1, 1) + 0.5
    source = torch.arange(side, device=start.device) + 0.5
    distance = (source - (start.view(-1, 1, 1) + target * step)).abs()
    weights = (1 - distance / step.clamp(min=1)).clamp(min=0)
    return weights / weights.sum(2, keepdim=True)
