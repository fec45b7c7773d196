"""The training loss of the class-conditional diffusion model."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ddb_fast.diffusion.schedule import Schedule


def min_snr_weight(
    schedule: Schedule, t: Tensor, like: Tensor, *, target: str, gamma: float
) -> Tensor:
    """Weight of each image's squared error under min-SNR-gamma, (N, 1, 1, 1) in like's dtype.

    With the signal-to-noise ratio snr = alpha_bar_t / (1 - alpha_bar_t): min(snr, gamma) / snr for
    target eps and min(snr, gamma) / (snr + 1) for v, which both weigh the error of the x0 that the
    prediction implies by min(snr, gamma). Nearly clean images, easy and many, no longer drown the
    rest. t: (N,) int64. Source: Hang et al. 2023, section 3.4.
    """
    signal, noise = schedule.coefficients(t, like)
    # The same without the ratio, which spans 1e-9 to 1e4.
    if target == "eps":
        return (gamma * (noise / signal).square()).clamp_max(1)
    return torch.minimum(signal.square(), gamma * noise.square())


def diffusion_loss(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    x0: Tensor,
    y: Tensor,
    *,
    schedule: Schedule,
    null_class: int,
    target: str = "eps",
    class_dropout: float = 0.1,
    class_dropout_per: str = "sample",
    loss_scale: str = "mean",
    loss_weight: str = "none",
    min_snr_gamma: float = 5.0,
    batch_size: int | None = None,
) -> Tensor:
    """Squared error of the predicted noise (or v) at random timesteps, a scalar.

    model(x_t, t, y) -> prediction of x_t's shape, in any dtype; it may be wrapped (DDP), hence
    null_class, the label that stands for "no class". x0: (N, C, H, W) normalised images; the loss
    is computed in their dtype, so keep them float32 under autocast. y: (N,) int64.
    target: eps | v. class_dropout: probability that a label is dropped, drawn for every sample or
    (the authors) once for all of this call. loss_scale: mean, or authors, who divide the sum over
    everything by N^2, N the batch of all devices: batch_size, None for this call's. loss_weight:
    none, or min-snr, each image's error by `min_snr_weight` before either.
    ValueError for an unknown name or a probability outside [0, 1].
    Source: Ho et al. 2020, equation 14; v: Salimans & Ho 2022; dropped labels: Ho & Salimans 2022,
    algorithm 1.
    """
    if target not in ("eps", "v"):
        raise ValueError(f"target {target!r} is none of eps, v")
    if class_dropout_per not in ("sample", "batch"):
        raise ValueError(f"class_dropout_per {class_dropout_per!r} is none of sample, batch")
    if loss_scale not in ("mean", "authors"):
        raise ValueError(f"loss_scale {loss_scale!r} is none of mean, authors")
    if loss_weight not in ("none", "min-snr"):
        raise ValueError(f"loss_weight {loss_weight!r} is none of none, min-snr")
    if not 0 <= class_dropout <= 1:
        raise ValueError(f"class_dropout {class_dropout} is outside 0 to 1")
    n, device = len(x0), x0.device
    t = torch.randint(schedule.timesteps, (n,), device=device)
    # Keeps channels_last, as randn would not, and draws in the order of memory, as randn_like would
    # not: a CPU draws one number at a time for what does not look contiguous, 8 times as slow.
    eps = torch.empty_like(x0)
    eps.as_strided((eps.numel(),), (1,)).normal_()
    draws = n if class_dropout_per == "sample" else 1
    dropped = torch.rand(draws, device=device) < class_dropout
    prediction = model(schedule.add_noise(x0, eps, t), t, torch.where(dropped, null_class, y))
    truth = eps if target == "eps" else schedule.v(x0, eps, t)
    if loss_weight == "none":
        mean = F.mse_loss(prediction.to(x0.dtype), truth)
    else:
        weight = min_snr_weight(schedule, t, x0, target=target, gamma=min_snr_gamma)
        mean = (weight * (prediction.to(x0.dtype) - truth).square()).mean()
    if loss_scale == "mean":
        return mean
    return mean * (x0[0].numel() / (batch_size or n))
