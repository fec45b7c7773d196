"""How a tensor is cut up among the programs of Triton's fused group norm: regime, blocks, warps."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from . import tuned
from .launch import multiprocessors, power_of_two

# The widest slab of whole groups one program takes; wider groups are split.
MAX_SLAB = 512
# Elements of a tile that is read once and stays in registers, four warps' worth.
_IN_REGISTERS = 4096
# In NCHW a tile of up to so many pixels and bytes is the faster (1.1 to 1.6 times on an H200).
_SMALL, _SMALL_BYTES = 256, 2**14
# Bytes of a slab that a GPU's L2 holds as often as programs run side by side.
_IN_L2 = 2**17


@dataclass(frozen=True)
class Plan:
    """How one tensor is cut up; `splits` 0 is the fused regime.

    unroll: tiles whose loads are on their way together. stages: how many of these a loop fetches
    ahead into shared memory, 1 for none.
    """

    slab_groups: int
    slabs: int
    splits: int
    chunk: int
    one_tile: bool
    block_p: int
    block_c: int
    num_warps: int
    unroll: int
    stages: int
    channels_last: bool


def plan(x: Tensor, num_groups: int, *, backward: bool, dropout: bool) -> Plan:
    """Choose regime, blocks and warps for x (N, C, H, W).

    A slab is at least 64 bytes of channels wide, or 32 if it then stays in registers, in whole
    16-byte vectors. Slabs of channels_last that are too large for what runs side by side to stay in
    L2 are read twice from memory anyway, which whole rows do faster: they are split.
    """
    # Its answer is remembered: working it out costs the host as much as launching the kernel.
    return _plan(
        tuple(x.shape), x.dtype, x.is_contiguous(), x.device, num_groups, backward, dropout
    )


@functools.lru_cache(maxsize=4096)
def _plan(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    contiguous: bool,
    device: torch.device,
    num_groups: int,
    backward: bool,
    dropout: bool,
) -> Plan:
    n, c, h, w = shape
    hw, group, size = h * w, c // num_groups, dtype.itemsize
    # With one pixel both layouts are the same memory, whose fast axis is the channels'.
    channels_last = not contiguous or hw == 1
    name = tuned.group_norm_class(dtype, contiguous, shape[1:], backward)
    asked = tuned.configuration("group_norm", device, f"{name}/{group}") or {}
    # Dropout draws for whole blocks of eight channels.
    multiple = 8 if dropout else math.gcd(c, 16 // size)
    narrowest = 8 if channels_last or dropout else 4

    def width(bytes_wide: int) -> int:
        """Groups of the narrowest slab that may be so narrow."""
        for count in range(1, num_groups):
            slab = count * group
            wide = slab * size >= bytes_wide or (not channels_last and slab * hw * size >= 4096)
            if wide and slab % multiple == 0:
                return count
        return num_groups

    def block(slab_groups: int) -> int:
        return max(narrowest, power_of_two(slab_groups * group))

    # Larger tiles were measured, and do not spill, without masked pixels.
    whole = hw == power_of_two(hw)
    any_slab = whole and not channels_last and not dropout
    limit = _IN_REGISTERS
    if any_slab and hw <= _SMALL:
        limit = max(limit, _SMALL_BYTES // size)
    if whole:
        limit = asked.get("registers", limit)

    def in_registers(slab_groups: int) -> bool:
        return power_of_two(hw) * block(slab_groups) <= limit

    wide, narrow = width(64), width(32)
    if any_slab and (hw <= _SMALL or "registers" in asked):
        # Pixels lie side by side, whatever a slab's channels begin with.
        narrow = 1
    slab_groups = narrow if in_registers(narrow) and not in_registers(wide) else wide
    one_tile = in_registers(slab_groups)
    slab = slab_groups * group
    slabs = -(-num_groups // slab_groups)
    target = 2 * multiprocessors(device)
    if 2 * n * slabs < target and asked.get("split") == 0:
        # It was measured with more samples.
        asked = {}
    too_few = n * slabs < target
    too_large = channels_last and hw * slab * size > _IN_L2
    split = slab > MAX_SLAB or (not one_tile and asked.get("split", too_few or too_large))
    if split and (hw > 1 or slab > MAX_SLAB):
        return _split_plan(n, c, hw, size, channels_last, target, backward, asked)
    block_c = block(slab_groups)
    if one_tile:
        block_p = power_of_two(hw)
        warps = min(16, max(1, block_p * block_c // 1024))
        return Plan(slab_groups, slabs, 0, hw, True, block_p, block_c, warps, 1, 1, channels_last)
    slab_bytes = hw * slab * size
    warps = 16 if slab_bytes > _IN_L2 else 8 if slab_bytes > 2**15 else 4
    warps = asked.get("num_warps", warps)
    block_p = max(1, min(power_of_two(hw), _tile(warps, size) // block_c))
    unroll, stages = asked.get("unroll", 2), asked.get("stages", 3)
    return Plan(
        slab_groups, slabs, 0, hw, False, block_p, block_c, warps, unroll, stages, channels_last
    )


def _tile(warps: int, size: int) -> int:
    """Elements of a tile with 16 bytes for each thread.

    Three operands of two tiles each, fetched two steps ahead, are then 96 KiB with 16 warps, which
    is what the smallest of today's GPUs have room for.
    """
    return warps * 32 * (16 // size)


def _split_plan(
    n: int,
    c: int,
    hw: int,
    size: int,
    channels_last: bool,
    target: int,
    backward: bool,
    asked: Mapping[str, int],
) -> Plan:
    block_c = min(max(8, power_of_two(c)), (256 if channels_last else 32) // size)
    warps = asked.get("num_warps", 8 if channels_last and backward and c >= 256 else 4)
    block_p = min(max(16, _tile(warps, size) // block_c), max(16, power_of_two(hw)))
    slabs = -(-c // block_c)
    # Twice the multiprocessors' worth of programs, but no chunk below one tile.
    splits = max(1, min(-(-2 * target // max(1, n * slabs)), -(-hw // block_p)))
    chunk = -(-hw // (splits * block_p)) * block_p
    unroll, stages = asked.get("unroll", 2 if backward else 1), asked.get("stages", 3)
    splits = -(-hw // chunk)
    return Plan(
        0, slabs, splits, chunk, False, block_p, block_c, warps, unroll, stages, channels_last
    )
