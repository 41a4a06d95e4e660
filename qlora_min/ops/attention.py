"""Causal attention on packed rows: by kernels on a GPU, row by row on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import formulas


def attention(
    qkv: Tensor, kv_heads: int, cu_seqlens: Tensor, max_seqlen: int, scale: float | None = None, window: int = 0
) -> Tensor:
    """Causal attention within each row: (N, H + 2K, P), the heads of q, k and v, H a multiple of K -> (N, H, P).

    On a GPU these are the kernels of flash.py, or PyTorch's memory-efficient attention for fp32, heads wider than 256,
    GPUs before Ampere and where there is no Triton. On a CPU rows are computed one after the other.

    Args:
        kv_heads: K. cu_seqlens: (R + 1,) int32, the boundaries of the rows. max_seqlen: an upper bound on
            their lengths.
        scale: the factor of the scores; default 1 / sqrt(P).
        window: the number of tokens that a token attends to, itself included; 0 means all tokens up to itself.
    """
    if qkv.is_cuda:
        return _Attention.apply(qkv, kv_heads, cu_seqlens, max_seqlen, scale or qkv.shape[2] ** -0.5, window)
    parts = split(qkv, kv_heads)
    rows = zip(*(t.split(cu_seqlens.diff().tolist()) for t in parts))  # whose backward is one concatenation each
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


def split(qkv: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(N, H + 2K, P) -> q (N, H, P), k and v (N, K, P)."""
    return qkv.split([qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1)


def try_kernels(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Try the kernels of flash.py once, against PyTorch's attention, on two rows of two heads that share a key."""
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(80, 4, head_dim, generator=generator, device=device).to(dtype).requires_grad_()
    cu_seqlens = torch.tensor([0, 70, 80], dtype=torch.int32, device=device)

    @torch.enable_grad()
    def outcome() -> list[Tensor]:
        out = attention(qkv, 1, cu_seqlens, 70)
        return [out.detach().double(), torch.autograd.grad(out, qkv, out.detach())[0].double()]

    formulas.try_kernel("attention", lambda: formulas.agree(outcome, dtype))


class _Attention(torch.autograd.Function):
    """Attention on packed rows on a GPU. The gradients are bit-identical every time."""

    @staticmethod
    def forward(
        ctx, qkv: Tensor, kv_heads: int, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int
    ) -> Tensor:
        recent = torch.cuda.get_device_capability(qkv.device)[0] >= 8 and qkv.dtype != torch.float32
        ctx.flash = recent and qkv.shape[2] <= 256 and formulas.have_kernels()
        ctx.arguments = kv_heads, max_seqlen, scale, window
        if ctx.flash:
            from . import flash

            out, *kept = flash.forward(qkv, cu_seqlens, *ctx.arguments)
        else:
            q, k, v = _of_all_heads(qkv, kv_heads)
            out, *kept, _, _ = torch.ops.aten._efficient_attention_forward(
                q, k, v, None, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, 1, True, scale=scale,
                window_size=window or None,
            )  # fmt: skip
            out = out[0]
        ctx.save_for_backward(qkv, cu_seqlens, out, *kept)
        return out

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple:
        qkv, cu_seqlens, out, *kept = ctx.saved_tensors
        kv_heads, max_seqlen, scale, window = ctx.arguments
        if ctx.flash:
            from . import flash

            return flash.backward(dout.contiguous(), qkv, out, *kept, cu_seqlens, *ctx.arguments), *[None] * 5
        q, k, v = _of_all_heads(qkv, kv_heads)
        dq, *grads, _ = torch.ops.aten._efficient_attention_backward(
            dout.contiguous()[None], q, k, v, None, out[None], *[cu_seqlens] * 2, *[max_seqlen] * 2, kept[0], 0.0,
            *kept[1:], 1, False, scale=scale, num_splits_key=1, window_size=window or None,
        )  # fmt: skip
        dk, dv = (d[0].unflatten(1, (kv_heads, -1)).sum(2) for d in grads)
        return torch.cat([dq[0], dk, dv], 1), *[None] * 5


def _of_all_heads(qkv: Tensor, kv_heads: int) -> tuple[Tensor, ...]:
    """q, k and v (1, N, H, P), keys and values repeated for the heads that share them."""
    q, *kv = split(qkv, kv_heads)
    return q[None], *(t.repeat_interleave(q.shape[1] // kv_heads, dim=1)[None] for t in kv)
