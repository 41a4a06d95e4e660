"""The random bits of dropout: a hash of the element's location."""

import torch
from torch import Tensor

# An element's random bits are a hash of its location: (seed, index of the row in the step, index of the token in the
# row, stream, feature). So the mask is the same in forward, recomputed forward and backward, in both engines, on every
# device, and for every division of a step into micro-batches and processes. The hash is the 32-bit mixer of Chris
# Wellons' hash-prospector with the smallest bias of those whose constants are below 2^31. int32 products wrap around.
MIX = ((16, 0x21F0AAAD), (15, 0x735A2D97), (15, None))
FEATURE = -0x61C88647  # 2^32 / golden ratio as int32, which spreads consecutive numbers


def mix(x: Tensor) -> Tensor:
    """int32 -> int32: every bit of the result depends on every bit of x."""
    for shift, factor in MIX:
        x = x ^ ((x >> shift) & (2 ** (32 - shift) - 1))  # a logical shift
        x = x if factor is None else x * factor
    return x


def dropout_keys(seed: Tensor, row_ids: Tensor, positions: Tensor) -> Tensor:
    """A key for the dropout masks of each token: (N,) int32.

    Args:
        seed: 0-dim int32, the seed of the optimizer step. row_ids: (N,), the index of the token's row in the step.
        positions: (N,), the index of the token in its row.
    """
    return mix(mix(mix(seed) ^ row_ids.int()) ^ positions.int())


def dropout_mask(keys: Tensor, p: float, stream: int, features: int) -> Tensor:
    """(N, features) bool, True for elements to keep. 16 random bits decide, so p is exact to within 1 / 65,536."""
    pairs = torch.arange(-(-features // 2), dtype=torch.int32, device=keys.device) * FEATURE
    bits = mix(mix(keys + stream)[:, None] ^ pairs).view(torch.int16)[:, :features]  # each hash serves two features
    return bits >= threshold(p)


def threshold(p: float) -> int:
    """The smallest 16-bit number, as int16, for which an element is kept."""
    return min(round(p * 65536), 65535) - 32768
