"""The operations of formulas.py as Triton kernels, each in one pass over memory, and dequantisation.

A training step of a small model is bound by memory bandwidth and kernel launches, not by arithmetic: written with
PyTorch's own operations, a norm alone takes six kernels forward and ten backward, each of which reads and writes the
whole tensor. Here each operation reads its inputs once, computes in fp32 and writes its outputs once. formulas.py has
the same operations in plain PyTorch, with shapes; the tests compare the two.

One program handles one token unless the docstring says otherwise. Nothing here waits for the device, and no result
depends on the order in which programs execute, so a step is bit-identical every time.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .masks import threshold

NF4_BLOCK, SCALE_BLOCK = 64, 256  # weights per scale, scales per second-level scale
CHUNK = 64  # NF4 blocks that one program dequantises: 4,096 weights


@triton.jit
def _dequantize_kernel(
    packed_at, scales_at, scales2_at, means, starts, blocks, places, code, code2, out,
    MATRICES: tl.constexpr, BLOCK: tl.constexpr, SCALE_BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: CHUNK blocks of one of the MATRICES, the last whose first program is at or before this one."""
    pid = tl.program_id(0)
    m = 0
    for i in tl.static_range(1, MATRICES):
        m += (pid >= tl.load(starts + i)).to(tl.int32)
    first, n = tl.load(starts + m), tl.load(blocks + m)
    block = (pid - first) * CHUNK + tl.arange(0, CHUNK)  # [CHUNK]
    there = block < n
    packed = tl.load(packed_at + m).to(tl.pointer_type(tl.uint8))
    scales = tl.load(scales_at + m).to(tl.pointer_type(tl.uint8))
    scales2 = tl.load(scales2_at + m).to(tl.pointer_type(tl.float32))
    level2 = tl.load(code2 + tl.load(scales + block, mask=there, other=0).to(tl.int32))
    scale = level2 * tl.load(scales2 + block // SCALE_BLOCK, mask=there, other=0.0) + tl.load(means + m)
    half = tl.arange(0, BLOCK // 2)
    pair = tl.load(packed + block[:, None] * (BLOCK // 2) + half[None, :], mask=there[:, None], other=0).to(tl.int32)
    high = tl.load(code + (pair >> 4)) * scale[:, None]  # [CHUNK, BLOCK/2], the first weight of each pair
    low = tl.load(code + (pair & 15)) * scale[:, None]
    w = tl.interleave(high, low)  # [CHUNK, BLOCK]
    at = out + tl.load(places + m) + block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(at, w.to(out.dtype.element_ty), mask=there[:, None])


class Dequantizer:
    """Dequantises doubly quantised 4-bit matrices into one flat tensor, concatenated, in one launch.

    Args:
        states: bitsandbytes' (packed weight, QuantState) of each matrix. Their tensors must not move afterwards: the
            kernel keeps their addresses.
    """

    def __init__(self, states: Sequence[tuple[Tensor, Any]]):
        device = states[0][0].device
        blocks = [s.absmax.numel() for _, s in states]
        programs = [triton.cdiv(b, CHUNK) for b in blocks]

        def table(values, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(list(values), dtype=dtype, device=device)

        self.arguments = (
            table(w.data_ptr() for w, _ in states),
            table(s.absmax.data_ptr() for _, s in states),
            table(s.state2.absmax.data_ptr() for _, s in states),
            table((float(s.offset) for _, s in states), torch.float32),
            table(itertools.accumulate([0, *programs[:-1]]), torch.int32),
            table(blocks, torch.int32),
            table(itertools.accumulate([0, *(b * NF4_BLOCK for b in blocks[:-1])])),
            states[0][1].code.float(),
            states[0][1].state2.code.float(),
        )
        self.programs, self.matrices = sum(programs), len(states)

    def __call__(self, out: Tensor) -> None:
        _dequantize_kernel[(self.programs,)](
            *self.arguments, out, MATRICES=self.matrices, BLOCK=NF4_BLOCK, SCALE_BLOCK=SCALE_BLOCK, CHUNK=CHUNK,
            enable_fp_fusion=False,  # one rounding for the product and one for the sum, as in bitsandbytes
        )  # fmt: skip


@triton.jit
def _norm_kernel(x, delta, weight, total, y, rstd, D, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    there = i < D
    v = tl.load(x + row * D + i, mask=there, other=0.0).to(tl.float32)
    if ADD:
        v += tl.load(delta + row * D + i, mask=there, other=0.0).to(tl.float32)
        tl.store(total + row * D + i, v, mask=there)
    r = 1 / tl.sqrt(tl.sum(v * v) / D + eps)
    w = tl.load(weight + i, mask=there, other=0.0).to(tl.float32)
    tl.store(y + row * D + i, (v * r * w).to(y.dtype.element_ty), mask=there)
    tl.store(rstd + row, r)


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype):
    n, d = x.shape
    y = torch.empty(n, d, dtype=dtype, device=x.device)
    rstd = torch.empty(n, dtype=torch.float32, device=x.device)
    total, add = (x, False) if delta is None else (torch.empty_like(x), True)
    delta = delta if add else x
    _norm_kernel[(n,)](x, delta, weight, total, y, rstd, d, eps, add, triton.next_power_of_2(d))
    return total, y, rstd


@triton.jit
def _norm_backward_kernel(dy, x, rstd, weight, dresidual, dx, dx_low, D, LOW: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    there = i < D
    r = tl.load(rstd + row)
    hat = tl.load(x + row * D + i, mask=there, other=0.0) * r
    g = tl.load(dy + row * D + i, mask=there, other=0.0).to(tl.float32)
    g *= tl.load(weight + i, mask=there, other=0.0).to(tl.float32)
    out = r * (g - hat * (tl.sum(g * hat) / D)) + tl.load(dresidual + row * D + i, mask=there, other=0.0)
    tl.store(dx + row * D + i, out, mask=there)
    if LOW:
        tl.store(dx_low + row * D + i, out.to(dx_low.dtype.element_ty), mask=there)


def norm_backward(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, dresidual: Tensor):
    n, d = x.shape
    low = dy.dtype != torch.float32
    dx_low = torch.empty_like(dy) if low else dresidual
    _norm_backward_kernel[(n,)](dy, x, rstd, weight, dresidual, dresidual, dx_low, d, low, triton.next_power_of_2(d))
    return dresidual, dx_low


@triton.jit
def _rotate_kernel(
    x, qkv, out, cos, sin, positions, weight, eps, WIDTH, HALF,
    BACKWARD: tl.constexpr, NORM: tl.constexpr, HEADS: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The first HEADS heads of a token, x -> out: normalised, then rotated. BACKWARD, where x is a gradient: rotated
    back, then through the norm of qkv."""
    row = tl.program_id(0).to(tl.int64)
    i, h = tl.arange(0, P)[None, :], tl.arange(0, H)[:, None]
    there = (h < HEADS) & (i < HALF)
    place = h * 2 * HALF + i
    at = tl.load(positions + row) * HALF
    c = tl.load(cos + at + i, mask=i < HALF, other=0.0)
    s = tl.load(sin + at + i, mask=i < HALF, other=0.0)
    a = tl.load(x + row * WIDTH + place, mask=there, other=0.0).to(tl.float32)
    b = tl.load(x + row * WIDTH + place + HALF, mask=there, other=0.0).to(tl.float32)
    if BACKWARD:
        a, b = a * c + b * s, b * c - a * s
    if NORM:
        wa = tl.load(weight + place, mask=there, other=0.0)
        wb = tl.load(weight + place + HALF, mask=there, other=0.0)
        va = tl.load(qkv + row * WIDTH + place, mask=there, other=0.0).to(tl.float32)
        vb = tl.load(qkv + row * WIDTH + place + HALF, mask=there, other=0.0).to(tl.float32)
        r = 1 / tl.sqrt(tl.sum(va * va + vb * vb, 1)[:, None] / (2 * HALF) + eps)
        va, vb = va * r, vb * r
        if BACKWARD:
            a, b = a * wa, b * wb
            mean = tl.sum(a * va + b * vb, 1)[:, None] / (2 * HALF)
            a, b = r * (a - va * mean), r * (b - vb * mean)
        else:
            a, b = va * wa, vb * wb
    if not BACKWARD:
        a, b = a * c - b * s, b * c + a * s
    tl.store(out + row * WIDTH + place, a.to(out.dtype.element_ty), mask=there)
    tl.store(out + row * WIDTH + place + HALF, b.to(out.dtype.element_ty), mask=there)


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, heads: int, norm: tuple[Tensor, float] | None):
    out = qkv if norm is None else qkv.clone()
    _rotate(qkv, qkv, out, cos, sin, positions, heads, norm, False)
    return out


def rotate_backward_(d: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, heads: int, norm) -> None:
    _rotate(d, qkv, d, cos, sin, positions, heads, norm, True)


def _rotate(x: Tensor, qkv: Tensor, out: Tensor, cos, sin, positions: Tensor, heads: int, norm, backward: bool) -> None:
    half, (weight, eps) = cos.shape[1], norm or (cos, 0.0)
    _rotate_kernel[(len(x),)](
        x, qkv, out, cos, sin, positions, weight, eps, x.stride(0), half,
        backward, norm is not None, heads, triton.next_power_of_2(heads), triton.next_power_of_2(half),
    )  # fmt: skip


@triton.jit
def _swiglu_kernel(gate_up, h, INNER, BLOCK: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = i < INNER
    g = tl.load(gate_up + row * 2 * INNER + i, mask=there, other=0.0).to(tl.float32)
    u = tl.load(gate_up + row * 2 * INNER + INNER + i, mask=there, other=0.0).to(tl.float32)
    tl.store(h + row * INNER + i, (g * tl.sigmoid(g) * u).to(h.dtype.element_ty), mask=there)


@triton.jit
def _swiglu_backward_kernel(dh, gate_up, INNER, BLOCK: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = i < INNER
    at = gate_up + row * 2 * INNER + i
    g = tl.load(at, mask=there, other=0.0).to(tl.float32)
    u = tl.load(at + INNER, mask=there, other=0.0).to(tl.float32)
    d = tl.load(dh + row * INNER + i, mask=there, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(at, (d * u * s * (1 + g * (1 - s))).to(gate_up.dtype.element_ty), mask=there)
    tl.store(at + INNER, (d * g * s).to(gate_up.dtype.element_ty), mask=there)


def swiglu(gate_up: Tensor) -> Tensor:
    n, inner = len(gate_up), gate_up.shape[1] // 2
    h = torch.empty(n, inner, dtype=gate_up.dtype, device=gate_up.device)
    _swiglu_kernel[(n, triton.cdiv(inner, 1024))](gate_up, h, inner, 1024)
    return h


def swiglu_backward_(dh: Tensor, gate_up: Tensor) -> None:
    n, inner = dh.shape
    _swiglu_backward_kernel[(n, triton.cdiv(inner, 1024))](dh, gate_up, inner, 1024)


@triton.jit
def _mix(x):
    """uint32 -> uint32, as `masks.mix`."""
    x ^= x >> 16
    x *= 0x21F0AAAD
    x ^= x >> 15
    x *= 0x735A2D97
    x ^= x >> 15
    return x


@triton.jit(do_not_specialize=["stream", "threshold"])
def _dropout_kernel(x, y, keys, stream, threshold, scale, D, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK features of a token. y = keep x scale; if ADD, y += keep x scale."""
    row, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    key = tl.load(keys + row).to(tl.uint32, bitcast=True) + stream.to(tl.uint32)
    pairs = (start // 2 + tl.arange(0, BLOCK // 2)).to(tl.uint32)
    bits = _mix(_mix(key) ^ (pairs * 0x9E3779B9))
    half = tl.interleave(bits & 0xFFFF, bits >> 16)  # 16 bits for each feature, as int16 below
    keep = (half ^ 0x8000).to(tl.int32) - 32768 >= threshold
    i = start + tl.arange(0, BLOCK)
    there = i < D
    v = tl.load(x + row * D + i, mask=there, other=0.0).to(tl.float32)
    v = tl.where(keep, v * scale, 0.0)
    if ADD:
        v += tl.load(y + row * D + i, mask=there, other=0.0).to(tl.float32)
    tl.store(y + row * D + i, v.to(y.dtype.element_ty), mask=there)


def dropout(x: Tensor, p: float, keys: Tensor, stream: int) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    _dropout(x, y, p, keys, stream, False)
    return y


def dropout_backward_(dx: Tensor, dy: Tensor, p: float, keys: Tensor, stream: int) -> None:
    _dropout(dy, dx, p, keys, stream, True)


def _dropout(x: Tensor, y: Tensor, p: float, keys: Tensor, stream: int, add: bool) -> None:
    d, block = x.shape[-1], 1024
    grid = (len(keys), triton.cdiv(d, block))
    _dropout_kernel[grid](x, y, keys, stream, threshold(p), 1 / (1 - p), d, add, block)


@triton.jit
def _cross_entropy_kernel(logits, targets, weights, factor, nll, dlogits, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    high, total = -float("inf"), 0.0
    for start in range(0, V, BLOCK):  # the largest logit, and the sum of exp(logit - largest) on the way
        v = tl.load(logits + row * V + start + i, mask=start + i < V, other=-float("inf"))
        new = tl.maximum(high, tl.max(v))
        total = total * tl.exp(high - new) + tl.sum(tl.exp(v - new))
        high = new
    target, weight = tl.load(targets + row), tl.load(weights + row)
    lse = high + tl.log(total)
    tl.store(nll + row, weight * (lse - tl.load(logits + row * V + target)))
    scale = weight * tl.load(factor)
    for start in range(0, V, BLOCK):
        v = tl.load(logits + row * V + start + i, mask=start + i < V, other=-float("inf"))
        g = scale * (tl.exp(v - lse) - tl.where(start + i == target, 1.0, 0.0))
        tl.store(dlogits + row * V + start + i, g.to(dlogits.dtype.element_ty), mask=start + i < V)


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor, factor: Tensor, dtype: torch.dtype):
    n, v = logits.shape
    nll = torch.empty(n, dtype=torch.float32, device=logits.device)
    dlogits = torch.empty(n, v, dtype=dtype, device=logits.device)
    _cross_entropy_kernel[(n,)](logits, targets, weights, factor, nll, dlogits, v, 4096, num_warps=8)
    return nll, dlogits
