"""Dropout's random bits: a hash of where an element stands."""

import torch
from torch import Tensor

# An element's random bits are a hash of where it stands: (seed, row's place in the step, token in the row, stream,
# feature). So forward and backward pass draw the same mask, and so do a recomputed forward, both engines, every device,
# and every division of a step into micro-batches and processes. The hash is the 32-bit mixer of Chris Wellons'
# hash-prospector with the smallest bias among those whose constants are below 2^31. int32 products wrap around.
MIX = ((16, 0x21F0AAAD), (15, 0x735A2D97), (15, None))
FEATURE = -0x61C88647  # 2^32 / golden ratio, as int32: spreads neighbouring numbers


def mix(x: Tensor) -> Tensor:
    """int32 -> int32: every bit of the result depends on every bit of x."""
    for shift, factor in MIX:
        x = x ^ ((x >> shift) & (2 ** (32 - shift) - 1))  # a logical shift
        x = x if factor is None else x * factor
    return x


def dropout_keys(seed: Tensor, row_ids: Tensor, positions: Tensor) -> Tensor:
    """A key for each token's masks, (N,) int32.

    Args:
        seed: 0-dim int32, of the optimizer step. row_ids, positions: (N,), the row in the step, the token in the row.
    """
    return mix(mix(mix(seed) ^ row_ids.int()) ^ positions.int())


def dropout_mask(keys: Tensor, p: float, stream: int, features: int) -> Tensor:
    """(N, features) bool, True where an element is kept. 16 random bits decide, so p is met to within 1 / 65,536."""
    pairs = torch.arange(-(-features // 2), dtype=torch.int32, device=keys.device) * FEATURE
    bits = mix(mix(keys + stream)[:, None] ^ pairs).view(torch.int16)[:, :features]  # a hash gives two features theirs
    return bits >= threshold(p)


def threshold(p: float) -> int:
    """The 16-bit number, as int16, from which on an element is kept."""
    return min(round(p * 65536), 65535) - 32768
