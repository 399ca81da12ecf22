"""Divide a tensor into tiles: one program of the GPU reads one tile, or several along L.

Legend: N batch, C channels, L positions. A tile is BL positions of BC channels of one sample. `ROWS` says that the L
positions of a channel are contiguous, as in (N, C, L); otherwise the channels are, as in (N, L, C).

Program ids count the channel blocks first, so neighbouring programs read neighbouring addresses. All three axes share
grid axis 0: the other grid axes are limited to 65,535.

The sizes come from a sweep on an H200 (bfloat16, channels last, the shapes of ResNet-50): tiles of 2,048 elements and
4 warps copy at the speed of `Tensor.copy_`. Reductions need narrow tiles, so that warps exchange few values.
"""

from typing import NamedTuple

import triton
import triton.language as tl

_PROGRAMS = 1056  # 8 per multiprocessor of an H100 (132); with fewer programs, a reduction is split along L


class Tile(NamedTuple):
    """BL positions by BC channels, and the warps that share it."""

    positions: int
    channels: int
    warps: int


def streaming_tile(length: int, channels: int, *, rows: bool) -> Tile:
    """The tile of a pass that reads each element once and writes one for it."""
    if rows:
        positions = min(triton.next_power_of_2(length), 2048)
        return Tile(positions, max(1, min(2048 // positions, triton.next_power_of_2(channels))), 4)
    width = min(triton.next_power_of_2(channels), 128)
    return Tile(max(1, min(2048 // width, triton.next_power_of_2(length))), width, 4)


def reduction_tile(length: int, channels: int, *, rows: bool) -> Tile:
    """The tile of a pass that sums over L."""
    if rows:
        positions = min(triton.next_power_of_2(length), 1024)
        return Tile(positions, max(1, min(1024 // positions, triton.next_power_of_2(channels))), 4)
    width = min(triton.next_power_of_2(channels), 64)
    if channels <= width and length >= 512:
        return Tile(32, width, 8)
    return Tile(min(16, triton.next_power_of_2(length)), width, 4)


def merge_tile(parts: int) -> Tile:
    """The tile, of parts by channels, of a launch that merges partial results: few loads that wait for each other."""
    height = min(triton.next_power_of_2(parts), 32)
    return Tile(height, 32, 1 if height <= 4 else 4)


def positions_per_program(samples: int, length: int, channels: int, tile: Tile) -> int:
    """Return how many positions one program of a reduction sums: L, or fewer if there would be too few programs."""
    programs = samples * triton.cdiv(channels, tile.channels)
    split = max(1, min(triton.cdiv(_PROGRAMS, programs), triton.cdiv(length, 2 * tile.positions)))
    return triton.cdiv(triton.cdiv(length, split), tile.positions) * tile.positions


@triton.jit
def place(blocks_c, blocks_l):
    """Return the sample (in 64 bits), the block of positions and the block of channels of this program."""
    program = tl.program_id(0)
    rest = program // blocks_c
    return (rest // blocks_l).to(tl.int64), rest % blocks_l, program % blocks_c


@triton.jit
def offsets(l, c, length, channels, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """Return the offsets of positions `l` and channels `c` in a sample, (BL, BC); in 64 bits if a sample needs them."""
    if WIDE:
        l = l.to(tl.int64)
        c = c.to(tl.int64)
    if ROWS:
        return c[None, :] * length + l[:, None]
    return l[:, None] * channels + c[None, :]
