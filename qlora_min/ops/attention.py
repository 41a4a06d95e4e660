"""Causal attention on packed rows: by PyTorch's own kernels on a GPU, row by row on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
import torch.utils.deterministic
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None = None, window: int = 0
) -> Tensor:
    """Causal attention within each row: q (N, H, P), k and v (N, K, P) with H a multiple of K -> (N, H, P).

    On a GPU this is PyTorch's flash attention, or its memory-efficient attention for fp32, heads wider than 256 and
    GPUs before Ampere. Both accept packed rows. On a CPU rows are computed one after the other.

    Args:
        cu_seqlens: (R + 1,) int32, the boundaries of the rows. max_seqlen: an upper bound of their lengths.
        scale: the factor of the scores; default 1 / sqrt(P).
        window: the number of tokens that a token attends to, itself included; 0 means all tokens up to itself.
    """
    if q.is_cuda:
        return _Attention.apply(q, k, v, cu_seqlens, max_seqlen, scale, window)
    rows = zip(*(t.split(cu_seqlens.diff().tolist()) for t in (q, k, v)))  # whose backward is one concatenation each
    out = []
    for row in rows:
        n, mask = len(row[0]), None
        if window and n > window:
            mask = torch.ones(n, n, dtype=torch.bool).tril().triu(1 - window)
        if n:
            heads = (t.transpose(0, 1)[None] for t in row)  # (1, H or K, n, P)
            out.append(F.scaled_dot_product_attention(
                *heads, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True)[0].transpose(0, 1)
            )  # fmt: skip
    return torch.cat(out)


class _Attention(torch.autograd.Function):
    """PyTorch's attention kernels for packed rows on a GPU.

    The backward kernels are called here because not all registered derivatives support windows.
    """

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale, window: int
    ) -> Tensor:
        aten, recent = torch.ops.aten, torch.cuda.get_device_capability(q.device)[0] >= 8
        ctx.flash = q.dtype != torch.float32 and recent and q.shape[-1] <= 256
        windows = {"window_size_left": window - 1, "window_size_right": 0} if window else {}
        ctx.arguments = max_seqlen, scale, window, windows
        if ctx.flash:
            out, *kept, _ = aten._flash_attention_forward(
                q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, True, False, scale=scale, **windows
            )
        else:
            kk, vv = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1)[None] for t in (k, v))
            out, *kept, _, _ = aten._efficient_attention_forward(
                q[None], kk, vv, None, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, 1, True, scale=scale,
                window_size=window or None,
            )  # fmt: skip
            out = out[0]
        ctx.save_for_backward(q, k, v, cu_seqlens, out, *kept)
        return out

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple:
        aten, (q, k, v, cu_seqlens, out, *kept) = torch.ops.aten, ctx.saved_tensors
        max_seqlen, scale, window, windows = ctx.arguments
        with _deterministic():
            if ctx.flash:
                logsumexp, *state = kept
                grads = aten._flash_attention_backward(
                    dout.contiguous(), q, k, v, out, logsumexp, *[cu_seqlens] * 2, *[max_seqlen] * 2, 0.0, True, *state,
                    scale=scale, **windows,
                )  # fmt: skip
            else:
                groups = q.shape[1] // k.shape[1]
                kk, vv = (t.repeat_interleave(groups, dim=1)[None] for t in (k, v))
                dq, dk, dv, _ = aten._efficient_attention_backward(
                    dout.contiguous()[None], q[None], kk, vv, None, out[None], *[cu_seqlens] * 2, *[max_seqlen] * 2,
                    kept[0], 0.0, *kept[1:], 1, False, scale=scale, window_size=window or None,
                )  # fmt: skip
                grads = dq[0], *(d[0].unflatten(1, (k.shape[1], groups)).sum(2) for d in (dk, dv))
        return *grads, None, None, None, None


@contextmanager
def _deterministic() -> Iterator[None]:
    """Make the backward of flash attention bit-identical every time; by default its order of summation varies."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill
