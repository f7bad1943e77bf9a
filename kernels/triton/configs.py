"""How kernels are launched: tiles, warps and pipeline stages as data beside each kernel, chosen by sizes.

The numbers of tokens are those at which the compiler spills no register on any of the targets that the tests compile
for; which of them is fastest has to be measured on a GPU. How a sum is split is a function of the sizes alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

#: Products of fewer channels are made with zeros behind them.
MIN_CHANNELS = 16
#: The largest head_dim and value_dim.
MAX_CHANNELS = 128
#: A program that mixes heads has two matrices of them by them in registers.
MAX_TALKING_HEADS = 64


@dataclass(frozen=True)
class Launch:
    """A program takes ``tokens`` of a tile, and at a time ``channels`` where it takes them in chunks and ``keys``."""

    tokens: int | None = None
    channels: int = 32
    num_warps: int = 4
    num_stages: int = 2
    keys: int | None = None

    def options(self, **chunked: int) -> dict[str, int]:
        """What a launch is given; of each dimension that is taken in chunks its name and size."""
        tiles = {name: size for name, size in (("TOKENS", self.tokens), ("KEYS", self.keys)) if size is not None}
        chunks = {name: min(self.channels, padded(size)) for name, size in chunked.items()}
        return {**tiles, **chunks, "num_warps": self.num_warps, "num_stages": self.num_stages}


@cache
def launches(op: str) -> dict[str, dict[int, Launch]]:
    """``LAUNCHES`` in the file of an operator's kernels: by kernel, then by the largest size that an entry is for.

    That is head_dim unless the table says otherwise. What is larger takes the last entry.
    """
    table: dict[str, dict[int, Launch]] = importlib.import_module(f"{__package__}.{op}").LAUNCHES
    return table


#: What was found to be faster on a gpu, by its name; then by operator, kernel and the size of the entry. None yet: no
#: GPU has been measured.
BY_GPU: dict[str, dict[tuple[str, str, int], Launch]] = {}


def find(op: str, kernel: str, size: int, gpu: str = "") -> Launch:
    """How a kernel is launched on a GPU."""
    table = launches(op)[kernel]
    entry = next((most for most in table if size <= most), max(table))
    key = (op, kernel, entry)
    if _asked is not None:
        _asked.add(key)
    return BY_GPU.get(gpu, {}).get(key, table[entry])


_asked: set[tuple[str, str, int]] | None = None


@contextmanager
def asked() -> Iterator[set[tuple[str, str, int]]]:
    """The entries that are asked for inside the block."""
    global _asked
    before, _asked = _asked, set()
    try:
        yield _asked
    finally:
        _asked = before


#: Taps times tokens and channels of a program that sums gradients of depthwise weights: more taps, fewer tokens.
MAX_TAPS = 4096

#: Programs that the sums over tokens are split into, over all groups, at least: a few for every multiprocessor of the
#: largest GPUs. Parts of fewer tokens than this are not worth a pass over the partial sums.
PROGRAMS = 1024
MIN_TOKENS = 256

#: Numbers of a program that adds up rows of them; of more rows than these, each part is added up by itself.
ADDED_UP = 512
ROWS_ADDED_UP = 64


def padded(channels: int) -> int:
    """The power of two in which a tile holds so many channels."""
    return max(MIN_CHANNELS, 1 << (channels - 1).bit_length())


def split(groups: int, tokens: int, tile: int) -> tuple[int, int]:
    """How the tokens of each group are split for sums over them: tokens of a part, whole tiles; number of parts."""
    wanted = -(-PROGRAMS // max(groups, 1))
    parts = max(1, min(wanted, tokens // MIN_TOKENS))
    part_tokens = max(1, -(-tokens // (parts * tile))) * tile
    return part_tokens, max(1, -(-tokens // part_tokens))


def split_tiles(programs: int, images: int, tokens: int, tile: int) -> tuple[int, int]:
    """The same for sums over all images, each of so many tokens: tiles of a part, number of parts."""
    tiles = -(-tokens // tile) * images
    part_tokens, count = split(programs, tiles * tile, tile)
    return part_tokens // tile, count
