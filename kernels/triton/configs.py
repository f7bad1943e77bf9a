"""How every kernel is launched: tiles, warps and pipeline stages as data, chosen by sizes.

The numbers of tokens are those at which the compiler spills no register on any of the targets that the tests compile
for; which of them is fastest has to be measured on a card. How a sum is split is a function of the sizes alone.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Products of fewer channels are made with zeros behind them.
LEAST_CHANNELS = 16
#: The largest head_dim and value_dim.
MOST_CHANNELS = 128


@dataclass(frozen=True)
class Launch:
    """A program takes ``tokens`` of a tile at a time, and ``channels`` where it takes them in chunks."""

    tokens: int
    channels: int
    num_warps: int = 4
    num_stages: int = 2

    def options(self, **chunked: int) -> dict[str, int]:
        """What a launch is given; of each dimension that is taken in chunks its name and size."""
        chunks = {name: min(self.channels, padded(size)) for name, size in chunked.items()}
        return {"TOKENS": self.tokens, **chunks, "num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class AttentionLaunch(Launch):
    """A program takes ``tokens`` queries of a tile, and ``keys`` at a time."""

    keys: int = 32

    def options(self, **chunked: int) -> dict[str, int]:
        return {"KEYS": self.keys, **super().options(**chunked)}


#: By kernel of relu_linear_attention, then by padded head_dim.
RELU_LINEAR_ATTENTION: dict[str, dict[int, Launch]] = {
    "sum_tokens": {16: Launch(64, 32), 32: Launch(32, 32), 64: Launch(32, 16), 128: Launch(16, 16)},
    "attend": {16: Launch(128, 32), 32: Launch(128, 32), 64: Launch(64, 16), 128: Launch(32, 16)},
    "query_gradients": {16: Launch(128, 32), 32: Launch(32, 32), 64: Launch(32, 16), 128: Launch(32, 16)},
    "key_gradients": {16: Launch(128, 32), 32: Launch(64, 32), 64: Launch(64, 16), 128: Launch(32, 16)},
}

#: By kernel of multi_scale_aggregation and multi_scale_linear_attention, then by padded head_dim.
MULTI_SCALE: dict[str, dict[int, Launch]] = {
    "aggregate": {16: Launch(64, 16), 32: Launch(64, 32), 64: Launch(32, 32), 128: Launch(16, 32)},
    "sum_tokens": {
        16: Launch(32, 16),
        32: Launch(16, 32),
        64: Launch(32, 16, num_warps=8),
        128: Launch(16, 16, num_warps=8),
    },
    "attend": {
        16: Launch(64, 16),
        32: Launch(32, 32),
        64: Launch(32, 16, num_warps=8),
        128: Launch(16, 16, num_warps=8),
    },
    "through_pointwise": {16: Launch(64, 16), 32: Launch(64, 32), 64: Launch(64, 32), 128: Launch(32, 32)},
    "pointwise_gradients": {16: Launch(64, 16), 32: Launch(32, 32), 64: Launch(32, 16), 128: Launch(16, 16)},
    "input_gradients": {16: Launch(64, 16), 32: Launch(64, 16), 64: Launch(64, 16), 128: Launch(64, 16)},
}
#: Of the gradients of depthwise weights, by the memory order of images: tokens, and channels of a program. All taps are
#: taken at once.
DEPTHWISE_GRADIENTS = {"nchw": Launch(32, 1), "channels_last": Launch(4, 8)}

#: By kernel of biased_attention.
BIASED_ATTENTION = {
    "attend": AttentionLaunch(32, 32, keys=32),
    "softmax_gradients": AttentionLaunch(32, 32, keys=32),
    "pairs": AttentionLaunch(32, 32, keys=64),
    "multiply": AttentionLaunch(32, 32, keys=32),
}


#: Of the walks of cascaded_group_attention, by the padded tokens of a window; of larger ones, the last.
CASCADE = {
    16: AttentionLaunch(16, 32, keys=16),
    32: AttentionLaunch(16, 32, num_warps=8, keys=32),
    64: AttentionLaunch(64, 16, num_warps=8, keys=16),
}
#: Programs of a forward walk, at most: each has memory of its own, which should stay in the card's cache.
CASCADE_PROGRAMS = 1024
#: Of the gradients of its 1x1 weights.
CASCADE_WEIGHTS = Launch(64, 32)


@dataclass(frozen=True)
class TalkingLaunch:
    """A program takes ``keys`` at a time, of all heads."""

    keys: int
    num_warps: int = 4


#: Of talking heads, by the most heads.
TALKING_HEADS = {
    8: TalkingLaunch(64),
    16: TalkingLaunch(64),
    32: TalkingLaunch(32),
    128: TalkingLaunch(16, num_warps=16),
}

#: Programs that the sums over tokens are split into, over all groups, at least: a few for every multiprocessor of the
#: largest cards. Parts of fewer tokens than this are not worth a pass over the partial sums.
PROGRAMS = 1024
LEAST_TOKENS = 256

#: Numbers of a program that adds up rows of them; of more rows than these, each part is added up by itself.
ADDED_UP = 512
ROWS_ADDED_UP = 64


def padded(channels: int) -> int:
    """The power of two in which a tile holds so many channels."""
    return max(LEAST_CHANNELS, 1 << (channels - 1).bit_length())


def split(groups: int, tokens: int, tile: int) -> tuple[int, int]:
    """How the tokens of each group are split for sums over them: tokens of a part, whole tiles; number of parts."""
    wanted = -(-PROGRAMS // max(groups, 1))
    parts = max(1, min(wanted, tokens // LEAST_TOKENS))
    part_tokens = max(1, -(-tokens // (parts * tile))) * tile
    return part_tokens, max(1, -(-tokens // part_tokens))


def split_tiles(programs: int, images: int, tokens: int, tile: int) -> tuple[int, int]:
    """The same for sums over all images, each of so many tokens: tiles of a part, number of parts."""
    tiles = -(-tokens // tile) * images
    part_tokens, count = split(programs, tiles * tile, tile)
    return part_tokens // tile, count
