"""Causal attention on packed rows as Triton kernels: FlashAttention-2 (Dao 2023), with small tiles and grouped heads.

Rows of fine-tuning are short: for a row of 265 tokens, 64 x 64 tiles compute 61,440 scores, 128 x 128 tiles 98,304.
Gradients of keys are computed head by head and then summed, so that they are bit-identical every time. One program
computes one tile of one row and one head; `cu` (R + 1,) says where rows begin and end. N varies from batch to batch and
is not specialised: a kernel must not be compiled anew while a CUDA graph is captured.

Forward, for a tile of queries: S = Q K^T, P = softmax(S), O = P V, and the log-sum-exp of S, base 2.
Backward, with D = rowsum(dO * O), dP = dO V^T and dS = P * (dP - D): dQ = dS K, dK = dS^T Q, dV = P^T dO.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOW = tl.constexpr(-1e30)  # of scores that are masked; -inf would give NaN where a whole tile is masked


@triton.jit
def _place(first, rows, stride, head, P, COLUMNS: tl.constexpr):
    return (first + rows)[:, None] * stride + head * P + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _tile(x, first, rows, n, stride, head, P, COLUMNS: tl.constexpr):
    """[rows, COLUMNS]: tokens of a row and one head; zeros behind the row's n tokens and the head's P features."""
    there = (rows < n)[:, None] & (tl.arange(0, COLUMNS) < P)[None, :]
    return tl.load(x + _place(first, rows, stride, head, P, COLUMNS), mask=there, other=0.0)


@triton.jit
def _save(x, value, first, rows, n, stride, head, P, COLUMNS: tl.constexpr):
    there = (rows < n)[:, None] & (tl.arange(0, COLUMNS) < P)[None, :]
    tl.store(x + _place(first, rows, stride, head, P, COLUMNS), value.to(x.dtype.element_ty), mask=there)


@triton.jit
def _seen(i, j, WINDOW):
    """Whether token i attends to token j."""
    return (i >= j) & (i - j < WINDOW)


@triton.jit
def _bounds(cu):
    """(where this program's row begins, its number of tokens)"""
    first = tl.load(cu + tl.program_id(1)).to(tl.int64)
    return first, (tl.load(cu + tl.program_id(1) + 1) - first).to(tl.int32)


@triton.jit(do_not_specialize=["N"])
def _forward_kernel(
    q, k, v, out, lse, cu, STRIDE, N, H, P, GROUP, WINDOW, scale, BLOCK: tl.constexpr, COLUMNS: tl.constexpr
):
    head = tl.program_id(2)
    first, n = _bounds(cu)
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK  # the tiles with most work first
    if start < n:
        i = start + tl.arange(0, BLOCK)
        a = _tile(q, first, i, n, STRIDE, head, P, COLUMNS)
        high = tl.full([BLOCK], LOW, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        acc = tl.zeros([BLOCK, COLUMNS], tl.float32)
        for at in range(tl.maximum(0, start - WINDOW + 1) // BLOCK * BLOCK, start + BLOCK, BLOCK):
            j = at + tl.arange(0, BLOCK)
            s = tl.dot(a, tl.trans(_tile(k, first, j, n, STRIDE, head // GROUP, P, COLUMNS))) * scale
            s = tl.where(_seen(i[:, None], j[None, :], WINDOW), s, LOW)
            new = tl.maximum(high, tl.max(s, 1))
            p, shrink = tl.exp2(s - new[:, None]), tl.exp2(high - new)
            b = _tile(v, first, j, n, STRIDE, head // GROUP, P, COLUMNS)
            total, high = total * shrink + tl.sum(p, 1), new
            acc = tl.dot(p.to(b.dtype), b, acc * shrink[:, None])
        _save(out, acc / total[:, None], first, i, n, H * P, head, P, COLUMNS)
        tl.store(lse + head * N + first + i, high + tl.log2(total), mask=i < n)


@triton.jit(do_not_specialize=["N"])
def _query_kernel(
    q, k, v, out, lse, dout, dq, delta, cu, STRIDE, N, H, P, GROUP, WINDOW, scale, factor,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dQ and D"""
    head = tl.program_id(2)
    first, n = _bounds(cu)
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK
    if start < n:
        i = start + tl.arange(0, BLOCK)
        a = _tile(q, first, i, n, STRIDE, head, P, COLUMNS)
        da = _tile(dout, first, i, n, H * P, head, P, COLUMNS)
        d = tl.sum(da.to(tl.float32) * _tile(out, first, i, n, H * P, head, P, COLUMNS).to(tl.float32), 1)
        tl.store(delta + head * N + first + i, d, mask=i < n)
        level = tl.load(lse + head * N + first + i, mask=i < n, other=0.0)
        acc = tl.zeros([BLOCK, COLUMNS], tl.float32)
        for at in range(tl.maximum(0, start - WINDOW + 1) // BLOCK * BLOCK, start + BLOCK, BLOCK):
            j = at + tl.arange(0, BLOCK)
            b = _tile(k, first, j, n, STRIDE, head // GROUP, P, COLUMNS)
            p = tl.exp2(tl.dot(a, tl.trans(b)) * scale - level[:, None])
            p = tl.where(_seen(i[:, None], j[None, :], WINDOW), p, 0.0)
            dp = tl.dot(da, tl.trans(_tile(v, first, j, n, STRIDE, head // GROUP, P, COLUMNS)))
            acc = tl.dot((p * (dp - d[:, None])).to(b.dtype), b, acc)
        _save(dq, acc * factor, first, i, n, STRIDE, head, P, COLUMNS)


@triton.jit(do_not_specialize=["N"])
def _key_kernel(
    q, k, v, lse, dout, dk, dv, delta, cu, STRIDE, N, H, P, GROUP, WINDOW, scale, factor,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dK and dV of a tile of keys, from one of the heads that share them: (N, 2H, P)"""
    head = tl.program_id(2)
    first, n = _bounds(cu)
    start = tl.program_id(0) * BLOCK
    if start < n:
        j = start + tl.arange(0, BLOCK)
        b = _tile(k, first, j, n, STRIDE, head // GROUP, P, COLUMNS)
        c = _tile(v, first, j, n, STRIDE, head // GROUP, P, COLUMNS)
        of_k, of_v = tl.zeros([BLOCK, COLUMNS], tl.float32), tl.zeros([BLOCK, COLUMNS], tl.float32)
        for at in range(start, tl.minimum(n, start + BLOCK - 1 + WINDOW), BLOCK):
            i = at + tl.arange(0, BLOCK)
            a, da = _tile(q, first, i, n, STRIDE, head, P, COLUMNS), _tile(dout, first, i, n, H * P, head, P, COLUMNS)
            level = tl.load(lse + head * N + first + i, mask=i < n, other=0.0)
            d = tl.load(delta + head * N + first + i, mask=i < n, other=0.0)
            p = tl.exp2(tl.dot(b, tl.trans(a)) * scale - level[None, :])
            p = tl.where(_seen(i[None, :], j[:, None], WINDOW), p, 0.0)
            of_v = tl.dot(p.to(da.dtype), da, of_v)
            dp = tl.dot(c, tl.trans(da))
            of_k = tl.dot((p * (dp - d[None, :])).to(a.dtype), a, of_k)
        _save(dk, of_k * factor, first, j, n, 2 * H * P, head, P, COLUMNS)
        _save(dv, of_v, first, j, n, 2 * H * P, head, P, COLUMNS)


def _tiles(qkv: Tensor) -> tuple[int, int]:
    """(tokens, columns) of a tile; eight tiles fit into the shared memory of a thread block."""
    columns = max(16, triton.next_power_of_2(qkv.shape[2]))
    shared = torch.cuda.get_device_properties(qkv.device).shared_memory_per_block_optin
    return next(n for n in (64, 32, 16) if 8 * 2 * n * columns <= shared), columns  # 2 bytes an element


def forward(qkv: Tensor, cu: Tensor, kv_heads: int, max_seqlen: int, scale: float, window: int):
    """As `attention`, and the log-sum-exp (H, N) of its scores for `backward`."""
    (n, heads, p), (block, columns) = qkv.shape, _tiles(qkv)
    h = heads - 2 * kv_heads
    out, lse = qkv.new_empty(n, h, p), qkv.new_empty(h, n, dtype=torch.float32)
    _forward_kernel[(triton.cdiv(max_seqlen, block), len(cu) - 1, h)](
        *qkv.split([h, kv_heads, kv_heads], 1), out, lse, cu, qkv.stride(0), n, h, p, h // kv_heads, window or 2**30,
        scale / math.log(2), block, columns, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu: Tensor, kv_heads: int, max_seqlen: int, scale: float,
    window: int,
) -> Tensor:  # fmt: skip
    """The gradient of qkv (N, H + 2K, P); dout, out: (N, H, P)."""
    (n, h, p), (block, columns), parts = out.shape, _tiles(qkv), [out.shape[1], kv_heads, kv_heads]
    grads, delta, (q, k, v) = torch.empty_like(qkv), torch.empty_like(lse), qkv.split(parts, 1)
    by_head = qkv.new_empty(n, 2 * h, p)  # dK and dV
    common = (
        delta, cu, qkv.stride(0), n, h, p, h // kv_heads, window or 2**30, scale / math.log(2), scale, block, columns,
    )  # fmt: skip
    tiles, rows = triton.cdiv(max_seqlen, block), len(cu) - 1
    _query_kernel[(tiles, rows, h)](q, k, v, out, lse, dout, grads, *common, num_warps=4, num_stages=2)
    dk, dv = by_head.split(h, 1)
    _key_kernel[(tiles, rows, h)](q, k, v, lse, dout, dk, dv, *common, num_warps=4, num_stages=2)
    torch.sum(by_head.unflatten(1, (2 * kv_heads, -1)), 2, out=grads[:, h:])
    return grads
