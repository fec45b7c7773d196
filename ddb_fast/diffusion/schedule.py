"""The noise schedule of a discrete-time diffusion model, and what can be computed from x_t with it.

x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps, with t = 0 the least noisy of the timesteps
0..T-1. Everything derives from alpha_bar, which is kept in fp64: in fp32 the noise's variance
1 - alpha_bar loses four of its seven digits at the first timesteps.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ddb_fast.config import DiffusionConfig


@dataclass(frozen=True, eq=False)
class Schedule:
    """Share of the signal's variance left at every timestep.

    alpha_bar: (T,) float64 on the CPU, falling and strictly between 0 and 1; else ValueError.
    In the methods t is one timestep (int, costs no device synchronisation) or one for each image
    ((N,) int64 on the images' device); images are (N, C, H, W) and computed in their own dtype.
    """

    alpha_bar: Tensor
    _tables: dict[tuple[torch.device, torch.dtype], Tensor] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        alpha_bar = self.alpha_bar
        if alpha_bar.ndim != 1 or len(alpha_bar) == 0 or alpha_bar.dtype != torch.float64:
            raise ValueError(
                f"alpha_bar must be (T,) float64, got {tuple(alpha_bar.shape)} {alpha_bar.dtype}"
            )
        # Written so that NaN fails too.
        if not (alpha_bar[0] < 1 and alpha_bar[-1] > 0 and (alpha_bar.diff() < 0).all()):
            raise ValueError(
                "alpha_bar must fall and stay strictly between 0 and 1, got "
                f"{alpha_bar[0]:g} to {alpha_bar[-1]:g} over {len(alpha_bar)} timesteps"
            )

    @classmethod
    def linear(cls, timesteps: int, beta_start: float, beta_end: float) -> "Schedule":
        """Variances of the added noise that rise linearly (Ho et al. 2020, section 4)."""
        betas = torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)
        return cls((1 - betas).cumprod(0))

    @classmethod
    def cosine(cls, timesteps: int) -> "Schedule":
        """Squared cosine (Nichol & Dhariwal 2021, equation 17), betas cut at 0.999."""
        s = 0.008
        time = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
        f = ((time + s) / (1 + s) * (math.pi / 2)).cos().square()
        betas = (1 - f[1:] / f[:-1]).clamp_max(0.999)
        return cls((1 - betas).cumprod(0))

    @property
    def timesteps(self) -> int:
        """Number T of timesteps."""
        return len(self.alpha_bar)

    def coefficients(
        self, t: int | Tensor, like: Tensor
    ) -> tuple[float, float] | tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), ready to multiply images `like` these."""
        if isinstance(t, int):
            alpha_bar = self.alpha_bar[t].item()
            return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        key = (like.device, like.dtype)
        if key not in self._tables:
            table = torch.stack([self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()])
            # Rounded before it moves, because not every device has fp64; kept, because copying it
            # there would stall every training step.
            self._tables[key] = table.to(like.dtype).to(like.device)
        signal, noise = self._tables[key][:, t].view(2, -1, 1, 1, 1)
        return signal, noise

    def add_noise(self, x0: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        """x_t of images x0 and noise eps."""
        signal, noise = self.coefficients(t, x0)
        return signal * x0 + noise * eps

    def v(self, x0: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        """v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x0 (Salimans & Ho 2022, section 4)."""
        signal, noise = self.coefficients(t, x0)
        return signal * eps - noise * x0

    def x0_from_eps(self, x_t: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        """The images x0 that eps and x_t imply."""
        signal, noise = self.coefficients(t, x_t)
        return (x_t - noise * eps) / signal

    def eps_from_x0(self, x_t: Tensor, x0: Tensor, t: int | Tensor) -> Tensor:
        """The noise eps that x0 and x_t imply."""
        signal, noise = self.coefficients(t, x_t)
        return (x_t - signal * x0) / noise

    def x0_from_v(self, x_t: Tensor, v: Tensor, t: int | Tensor) -> Tensor:
        """The images x0 that v and x_t imply."""
        signal, noise = self.coefficients(t, x_t)
        return signal * x_t - noise * v

    def eps_from_v(self, x_t: Tensor, v: Tensor, t: int | Tensor) -> Tensor:
        """The noise eps that v and x_t imply."""
        signal, noise = self.coefficients(t, x_t)
        return signal * v + noise * x_t


def make_schedule(config: DiffusionConfig) -> Schedule:
    """The schedule of a configuration; ValueError for an unknown name."""
    if config.schedule == "linear":
        return Schedule.linear(config.timesteps, config.beta_start, config.beta_end)
    if config.schedule == "cosine":
        return Schedule.cosine(config.timesteps)
    raise ValueError(f"schedule {config.schedule!r} is none of linear, cosine")
