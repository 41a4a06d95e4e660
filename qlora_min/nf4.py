"""NF4 and double quantisation, written out: how QLoRA stores a weight in 4.127 bits (arXiv 2305.14314, section 3).

The trainer itself uses bitsandbytes; `tests/test_nf4.py` compares this text with it bit for bit (0.50.2, on the CPU).

## The levels
Trained weights look normal, so the levels are quantiles Q of a normal. The paper's equation 4 as printed,
q_i = (Q(i/17) + Q((i+1)/17)) / 2, is infinite at i = 0 and 16. That leaves 15 levels, symmetric around 0, and wastes
one code of 16. A 16th breaks the symmetry if -1, 0 and 1 are all to be exact (0 for padding and pruned weights, -1 and
1 because each block has one of them), so the paper's text estimates the two sides separately and merges their zeros.
bitsandbytes ships
    8 levels Q(p) and 7 levels -Q(p), p in even steps from 1 - delta down to 1/2 exclusive, and 0; all / Q(1 - delta)
with delta = (1/32 + 1/30) / 2, half a bin's mass for 16 bins and for 15, averaged (arXiv 2306.06965). The positive side
is thus the finer one: 0.0796 next to 0, against -0.0911.

## Blocks
With one scale, a tensor is at the mercy of its largest weight. So each run of 64 (row-major, across rows if need be) is
divided by its absmax c, and each weight takes the nearest level; a tie goes to the lower code. Two codes make a byte,
the first in the high nibble; an odd count is padded with code 7, the level 0.
    w  ->  code = nearest(w / c)  ->  level[code] * c

## Double quantisation
An fp32 c costs 32/64 = 0.5 bits a weight. So c - mean(c) (c is never negative, the codes are signed) is quantised
again, in blocks of 256, to 8-bit "dynamic" codes: on either side 2^e even steps in the decade up to 10^(e-6), e = 0..6.
    bits per weight = 4 + 8/64 + 32/(64 * 256) = 4.127, and one fp32 mean per tensor

## What "nearest" is, to the bit
- Whole blocks are multiplied by 1/c in fp32; a short last block is divided by c. The two differ in the last bit, and so
  in the code of a weight within an ulp of a midpoint.
- 1/c takes c as at least 1e-38, so a block of zeros has c = 0 and codes 7. A short last block of zeros has c = 1e-38.
- Second-level codes are not always the nearest. The C++ kernel reads them from a table of 65,536 even cells over
  [-1, 1], so a value is rounded to a cell first: about 0.2% of the codes are off, by up to 4 next to 0. No cell is
  nearer to 0 than 1.5e-5, so the 7 codes around 0 are never used. A block of zeros gets code 0, -0.993, times absmax 0.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK, BLOCK2 = 64, 256  # weights per first-level scale; first-level scales per second-level scale
# bitsandbytes' constants. `nf4_levels` derives them to 2e-7; equality bit for bit needs the very same floats.
# fmt: off
LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])


@dataclass(frozen=True)
class NF4:
    """A tensor of n weights in NF4 with double quantisation."""

    packed: Tensor  # (ceil(n/2),) uint8, two codes a byte, the first in the high nibble
    scales: Tensor  # (blocks = ceil(n/64),) uint8, second-level codes
    scales2: Tensor  # (ceil(blocks/256),) fp32, the absmax of each block of scales
    mean: Tensor  # () fp32, the mean of the first-level scales
    shape: torch.Size
    dtype: torch.dtype  # of the weight, and again of its dequantised copy

    @property
    def bits_per_weight(self) -> float:
        """Bits held per weight: 4.127 for large tensors."""
        return 8 * sum(t.nbytes for t in (self.packed, self.scales, self.scales2, self.mean)) / self.shape.numel()


def nf4_levels() -> Tensor:
    """The 16 levels from normal quantiles, (16,) fp32, ascending; within 2e-7 of `LEVELS`."""
    top = 1 - (1 / 32 + 1 / 30) / 2  # 1 - delta; bitsandbytes writes 0.9677083
    positive, negative = (torch.special.ndtri(torch.linspace(0.5, top, n, dtype=torch.float64)) for n in (9, 8))
    levels = torch.cat([-negative.flip(0)[:-1], positive])  # 7 below 0, then 0 (the two zeros merged) and 8 above
    return (levels / levels[-1]).float()


def equation_4(k: int = 4) -> Tensor:
    """Equation 4 as printed, its finite values over the largest: (2^k - 1,) fp32, symmetric: 15 levels for 4 bits."""
    q = torch.special.ndtri(torch.arange(2**k + 2, dtype=torch.float64) / (2**k + 1))  # Q(0) = -inf, Q(1) = inf
    q = (q[:-1] + q[1:]) / 2
    q = q[q.isfinite()]
    return (q / q[-1]).float()


def dynamic_map() -> Tensor:
    """The values of the 8-bit codes, (256,) fp32, ascending: 127 midpoints of either sign, 0 and 1."""
    edges = [torch.linspace(0.1, 1, 2**e + 1) for e in range(7)]
    positive = torch.cat([10 ** (e - 6) * ((x[:-1] + x[1:]) / 2) for e, x in enumerate(edges)])  # (127,)
    return torch.cat([-positive, positive, torch.tensor([0.0, 1.0])]).sort().values


def _blocks(x: Tensor, size: int) -> Tensor:
    return F.pad(x, (0, -x.numel() % size)).view(-1, size)  # [n] -> [ceil(n/size), size], zeros behind


def _nearest(x: Tensor, levels: Tensor) -> Tensor:
    return torch.bucketize(x, (levels[:-1] + levels[1:]) / 2)  # the count of midpoints below x: a tie goes down


def quantize_4bit(x: Tensor, levels: Tensor = LEVELS) -> tuple[Tensor, Tensor]:
    """Weights (n,) fp32 -> codes (n,) uint8 in 0..15, absmax of each block of 64 (ceil(n/64),) fp32."""
    blocks = _blocks(x, BLOCK)  # [n] -> [blocks, 64]
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1 / absmax.clamp(min=1e-38))[:, None]
    if x.numel() % BLOCK:  # the short last block
        absmax[-1] = absmax[-1].clamp(min=1e-38)
        scaled[-1] = blocks[-1] / absmax[-1]
    return _nearest(scaled, levels).flatten()[: x.numel()].to(torch.uint8), absmax


def quantize_8bit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Centred scales (n,) fp32 -> codes (n,) uint8, absmax of each block of 256 (ceil(n/256),) fp32."""
    blocks = _blocks(x, BLOCK2)  # [n] -> [blocks, 256]
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1 / absmax)[:, None]).clamp(-1, 1).nan_to_num(nan=-1.0)  # 0 * (1/0) is NaN, and gets code 0
    cell = ((scaled + 1) * 0.5 * 65535 + 0.5).int()  # 0..65535
    codes = _nearest(2 * cell.float() / 65535 - 1, dynamic_map())
    return codes.flatten()[: x.numel()].to(torch.uint8), absmax


def quantize(weight: Tensor, levels: Tensor = LEVELS) -> NF4:
    """Quantise a CPU tensor of any shape, fp16, bf16 or fp32, with double quantisation.

    Raises ValueError if the weight has another dtype, is on another device, is empty, or holds infinities or NaN.
    """
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"weight is {weight.dtype}, expected float16, bfloat16 or float32; convert it first")
    if weight.device.type != "cpu" or weight.numel() == 0:
        raise ValueError(f"weight is {tuple(weight.shape)} on {weight.device}, expected at least 1 element, on the CPU")
    if not weight.isfinite().all():
        raise ValueError("weight holds infinities or NaN, which would spoil whole blocks; expected finite values")
    codes, absmax = quantize_4bit(weight.detach().flatten().float(), levels)
    codes = F.pad(codes, (0, codes.numel() % 2), value=7)
    packed = codes[0::2] << 4 | codes[1::2]  # [2m] -> [m]
    mean = absmax.mean()
    scales, scales2 = quantize_8bit(absmax - mean)
    return NF4(packed, scales, scales2, mean, weight.shape, weight.dtype)


def dequantize_scales(q: NF4) -> Tensor:
    """The first-level scales as they come back, (ceil(n/64),) fp32: map[code] * scales2 + mean, each step in fp32."""
    scales2 = q.scales2.repeat_interleave(BLOCK2)[: q.scales.numel()]  # [blocks2] -> [blocks]
    return dynamic_map()[q.scales.long()] * scales2 + q.mean


def dequantize(q: NF4, levels: Tensor = LEVELS) -> Tensor:
    """level[code] * scale in fp32, rounded once to the weight's dtype; in the weight's shape."""
    n = q.shape.numel()
    codes = torch.stack([q.packed >> 4, q.packed & 15], dim=1).flatten()[:n]  # [m] -> [m, 2] -> [n]
    scales = dequantize_scales(q).repeat_interleave(BLOCK)[:n]  # [blocks] -> [n]
    return (levels[codes.long()] * scales).to(q.dtype).view(q.shape)
