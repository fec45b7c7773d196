"""The shapes that matter, as data: what diffusion U-Nets give to a group norm and to attention.

Each shape has the batch at which a GPU is measured; a CPU takes fewer samples (`GroupNorm.at`).
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class GroupNorm:
    """x (n, c, h, w), normalised in g groups."""

    n: int
    c: int
    h: int
    w: int
    g: int

    def __str__(self) -> str:
        return f"{self.n}x{self.c}x{self.h}x{self.w}/{self.g}"

    @property
    def elements(self) -> int:
        return self.n * self.c * self.h * self.w

    def at(self, n: int) -> "GroupNorm":
        return replace(self, n=n)


@dataclass(frozen=True)
class Attention:
    """q, k and v (b, h, s, d)."""

    b: int
    h: int
    s: int
    d: int

    def __str__(self) -> str:
        return f"{self.b}x{self.h}x{self.s}x{self.d}"

    @property
    def elements(self) -> int:
        return self.b * self.h * self.s * self.d

    @property
    def flops(self) -> int:
        """Of the two products of a forward pass, two per multiplication and addition."""
        return 4 * self.elements * self.s

    def at(self, b: int) -> "Attention":
        return replace(self, b=b)


def _norms(n: int, *shapes: tuple[int, int, int]) -> tuple[GroupNorm, ...]:
    """Shapes of (C, side of the square image, groups)."""
    return tuple(GroupNorm(n, c, side, side, g) for c, side, g in shapes)


GROUP_NORM = {
    # Every norm of preset ddb at 64 pixels, those after a concatenation (384, 512) included.
    "ddb": _norms(
        128,
        (128, 64, 32),
        (256, 64, 32),
        (384, 64, 32),
        (128, 32, 32),
        (256, 32, 32),
        (384, 32, 32),
        (512, 32, 32),
        (256, 16, 32),
        (512, 16, 32),
        (256, 8, 32),
        (512, 8, 32),
    ),
    # Preset lean: C / G of 2, 6, 10 and 14 beside powers of two.
    "lean": _norms(
        128,
        (64, 64, 32),
        (192, 64, 32),
        (320, 32, 32),
        (192, 16, 32),
        (448, 16, 32),
        (448, 8, 32),
    ),
    # Guided diffusion's ADM at 64 pixels (Dhariwal & Nichol 2021): C / G of 6 to 36.
    "adm64": _norms(
        64,
        (192, 64, 32),
        (384, 32, 32),
        (576, 32, 32),
        (576, 16, 32),
        (960, 16, 32),
        (768, 8, 32),
        (1152, 8, 32),
    ),
    # diffusers' UNet2DModel with its default channels: C / G of 7, 14, 21 and 28.
    "diffusers": _norms(64, (224, 64, 32), (448, 32, 32), (672, 16, 32), (896, 8, 32)),
    # DDPM++ (Song et al. 2021), 32 pixels: C / G of 4 to 16.
    "ddpmpp": _norms(128, (128, 32, 32), (256, 16, 32), (384, 16, 32), (512, 8, 32)),
    # EDM (Karras et al. 2022): min(32, C / 4) groups.
    "edm": _norms(128, (64, 64, 16), (128, 32, 32), (256, 16, 32)),
}

ATTENTION = {
    "ddb": (
        Attention(128, 1, 64, 256),
        Attention(128, 1, 256, 256),
        Attention(128, 1, 1024, 256),
        Attention(32, 1, 4096, 128),
    ),
    "lean": (
        Attention(128, 4, 64, 64),
        Attention(128, 3, 256, 64),
        Attention(128, 2, 1024, 64),
    ),
    "adm64": (
        Attention(64, 12, 64, 64),
        Attention(64, 9, 256, 64),
        Attention(64, 6, 1024, 64),
    ),
    # diffusers' default is heads of 8.
    "diffusers": (Attention(64, 64, 256, 8), Attention(64, 32, 1024, 8)),
    "ddpmpp": (Attention(128, 1, 256, 256),),
    "edm": (Attention(128, 4, 256, 64),),
}

# What a U-Net asks of a norm, as the names of the optional operands.
OPTIONS: dict[str, tuple[str, ...]] = {
    "silu": ("silu",),
    "silu+pre_bias": ("silu", "pre_bias"),
    "silu+pre_bias+dropout": ("silu", "pre_bias", "dropout"),
    "scale+shift+silu": ("silu", "scale", "shift"),
    "residual+return_sum": ("residual", "return_sum"),
}
# The shape on which every option set is measured against the plain one.
OPTIONS_SHAPES = (GROUP_NORM["ddb"][0], GROUP_NORM["ddb"][4], GROUP_NORM["ddb"][7])


def unique(groups: dict[str, tuple]) -> list[tuple[str, object]]:
    """(first group, shape) of every different shape, in order."""
    seen: dict[object, str] = {}
    for name, shapes in groups.items():
        for shape in shapes:
            seen.setdefault(shape, name)
    return [(name, shape) for shape, name in seen.items()]
