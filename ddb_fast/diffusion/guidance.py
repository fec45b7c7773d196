"""From a network to a denoiser: classifier-free guidance, its interval, and limits on x0.

`denoise(x_t, t)` returns the predicted (x0, eps) that the samplers walk with.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ddb_fast.diffusion.schedule import Schedule

Denoiser = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def limit(x0: Tensor, low: Tensor, high: Tensor, percentile: float | None = None) -> Tensor:
    """x0 within [low, high]: clamped, or first drawn together as far as most of an image needs.

    low, high: broadcastable to x0, the ends of the range of real pixels. percentile None: clamped.
    Else the range is stretched about its middle, for each image on its own, until `percentile` per
    cent of its values lie inside; the others are clamped to that, and the image is shrunk back into
    [low, high]. Strong guidance pushes whole areas out of range, which a clamp alone makes flat.
    Source: Saharia et al. 2022 (Imagen), section 2.3, dynamic thresholding.
    """
    if percentile is None:
        return x0.clamp(low, high)
    middle, half = (low + high) / 2, (high - low) / 2
    z = (x0 - middle) / half
    # Never below one: a faint image is not to be stretched.
    stretch = z.abs().flatten(1).quantile(percentile / 100, dim=1).clamp_min(1).view(-1, 1, 1, 1)
    return middle + half * (z.clamp(-stretch, stretch) / stretch)


def guided(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    y: Tensor,
    *,
    guidance_scale: float,
    null_class: int,
    target: str,
    schedule: Schedule,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    clip: tuple[Tensor, Tensor] | None = None,
    clip_percentile: float | None = None,
) -> Denoiser:
    """A denoiser with classifier-free guidance, both branches in one forward pass.

    model(x, t, y) predicts `target`, eps or v; y: (N,) int64, the wanted classes. guidance_scale s:
    prediction = null + s (conditional - null), which is the paper's (1 + w) eps_c - w eps_null
    with s = 1 + w; s = 1 leaves the null branch out. guidance_interval: (low, high); guidance acts
    where low < 1 - alpha_bar_t <= high, the noise's share of x_t's variance, and elsewhere the null
    branch is left out. clip: (low, high), broadcastable to x; the predicted x0 is brought into them
    by `limit` and eps recomputed so that both still make up x_t.
    ValueError for an unknown target, an interval that is none or a percentile without limits.
    Source: Ho & Salimans 2022, equation 6; interval: Kynkäänniemi et al. 2024, equation 4.
    """
    if target not in ("eps", "v"):
        raise ValueError(f"target {target!r} is none of eps, v")
    low, high = guidance_interval
    if not low <= high:
        raise ValueError(f"guidance_interval {low} to {high} must not fall")
    if clip_percentile is not None and clip is None:
        raise ValueError(f"clip_percentile {clip_percentile} needs limits to clip to")
    y_both = torch.cat([y, torch.full_like(y, null_class)])

    def predict(x: Tensor, t: int) -> Tensor:
        if guidance_scale == 1 or not low < 1 - schedule.alpha_bar[t].item() <= high:
            return model(x, torch.full_like(y, t), y).to(x.dtype)
        # Back to the state's precision before the branches are subtracted.
        both = model(torch.cat([x, x]), torch.full_like(y_both, t), y_both).to(x.dtype)
        conditional, null = both.chunk(2)
        # v guided is eps guided: at fixed x_t eps is affine in v, and the branches' weights,
        # s and 1 - s, sum to one.
        return torch.lerp(null, conditional, guidance_scale)

    def denoise(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        prediction = predict(x, t)
        if target == "eps":
            x0, eps = schedule.x0_from_eps(x, prediction, t), prediction
        else:
            x0, eps = schedule.x0_from_v(x, prediction, t), schedule.eps_from_v(x, prediction, t)
        if clip is not None:
            x0 = limit(x0, *clip, clip_percentile)
            eps = schedule.eps_from_x0(x, x0, t)
        return x0, eps

    return denoise
