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
    """A program takes ``tokens`` of a tile at a time, and of products with v ``values`` channels."""

    tokens: int
    values: int
    num_warps: int = 4
    num_stages: int = 2

    def options(self, value_dim: int) -> dict[str, int]:
        values = min(self.values, padded(value_dim))
        return {"TOKENS": self.tokens, "DV": values, "num_warps": self.num_warps, "num_stages": self.num_stages}


#: By kernel of relu_linear_attention, then by padded head_dim.
RELU_LINEAR_ATTENTION: dict[str, dict[int, Launch]] = {
    "sum_tokens": {16: Launch(64, 32), 32: Launch(32, 32), 64: Launch(32, 16), 128: Launch(16, 16)},
    "attend": {16: Launch(128, 32), 32: Launch(128, 32), 64: Launch(64, 16), 128: Launch(32, 16)},
    "query_gradients": {16: Launch(128, 32), 32: Launch(32, 32), 64: Launch(32, 16), 128: Launch(32, 16)},
    "key_gradients": {16: Launch(128, 32), 32: Launch(64, 32), 64: Launch(64, 16), 128: Launch(32, 16)},
}

#: Programs that the sums over tokens are split into, over all groups, at least: a few for every multiprocessor of the
#: largest cards. Parts of fewer tokens than this are not worth a pass over the partial sums.
PROGRAMS = 1024
LEAST_TOKENS = 256


def padded(channels: int) -> int:
    """The power of two in which a tile holds so many channels."""
    return max(LEAST_CHANNELS, 1 << (channels - 1).bit_length())


def parts(groups: int, tokens: int) -> int:
    """Into how many parts the tokens of each group are split for the sums over them."""
    wanted = -(-PROGRAMS // max(groups, 1))
    return max(1, min(wanted, tokens // LEAST_TOKENS))
