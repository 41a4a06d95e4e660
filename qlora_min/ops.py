"""What a decoder layer does between its matrix products, forward and backward, as formulas in plain PyTorch.

Tensors are flat over tokens: (N, ...). Each function computes in fp32 and returns the compute dtype of its input; on a
GPU the kernel of the same name in kernels.py does the same in one pass over memory. A name that ends in `_` works in
place. There are no gradients for norm weights: they are frozen.
"""

import functools
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        from . import kernels
    except ImportError:  # no Triton
        return None
    return kernels


def have_kernels() -> bool:
    """Whether Triton is there; without it a GPU runs the formulas below, and no CUDA graphs: many more launches."""
    return _kernels() is not None


def _on_gpu(x: Tensor) -> ModuleType | None:
    return _kernels() if x.is_cuda else None


def add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Residual sum and RMSNorm: s = x + delta, y = s r w with r = 1 / sqrt(mean(s^2) + eps).

    Args:
        x: (N, D) fp32, the residual stream. delta: (N, D), what a block adds to it, or None.

    Returns:
        s (N, D) fp32, y (N, D) in `dtype`, r (N,) fp32.
    """
    if k := _on_gpu(x):
        return k.add_norm(x, delta, weight, eps, dtype)
    s = x if delta is None else x + delta
    r = torch.rsqrt(s.pow(2).mean(-1) + eps)
    return s, (s * r[:, None]).mul_(weight).to(dtype), r


def norm_backward(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, dresidual: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream's gradient below a norm: dx = r (g - h mean(g h)) + dresidual, with h = x r and g = dy w.

    Returns:
        dx (N, D) fp32, in dresidual's memory, and a copy in dy's dtype.
    """
    if k := _on_gpu(x):
        return k.norm_backward(dy, x, rstd, weight, dresidual)
    hat, g = x * rstd[:, None], dy * weight
    dx = dresidual.add_((g - hat * (g * hat).mean(-1, keepdim=True)).mul_(rstd[:, None]))
    return dx, dx.to(dy.dtype)


def rotate_(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, heads: int, backward: bool = False) -> None:
    """Rotary position embedding of the first `heads` heads of qkv (N, heads * 2P + ...), in place.

    Each pair (a, b) of a head, P apart, turns by its angle: (a cos - b sin, b cos + a sin). The gradient turns back.

    Args:
        cos, sin: (positions, P) fp32. positions: (N,) int32.
    """
    if k := _on_gpu(qkv):
        return k.rotate_(qkv, cos, sin, positions, heads, backward)
    half = cos.shape[1]
    c, s = cos[positions][:, None], sin[positions][:, None]  # (N, 1, P)
    s = -s if backward else s
    x = qkv[:, : heads * 2 * half].unflatten(1, (heads, 2, half))  # (N, heads, 2, P), a view
    a, b = x[:, :, 0].float(), x[:, :, 1].float()
    a, b = a * c - b * s, b * c + a * s
    x[:, :, 0], x[:, :, 1] = a, b


def swiglu(gate_up: Tensor) -> Tensor:
    """(N, 2I) gate and up beside each other -> (N, I): silu(gate) * up, silu(g) = g sigmoid(g)."""
    if k := _on_gpu(gate_up):
        return k.swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate) * up


def swiglu_backward_(dh: Tensor, gate_up: Tensor) -> None:
    """Overwrite gate_up (N, 2I) with its gradient: dgate = dh up s (1 + g (1 - s)), dup = dh g s, s = sigmoid(g)."""
    if k := _on_gpu(gate_up):
        return k.swiglu_backward_(dh, gate_up)
    gate, up = gate_up.chunk(2, dim=1)
    act = F.silu(gate)
    dgate = torch.ops.aten.silu_backward(dh * up, gate)
    torch.mul(dh, act, out=up)
    gate.copy_(dgate)


def dropout(x: Tensor, p: float, seed: Tensor, stream: int) -> Tensor:
    """x with each element zeroed with probability p and the rest divided by 1 - p.

    The mask is a function of (seed, stream, element): the backward pass draws it again instead of keeping it, and so
    does a recomputed forward. The kernel's generator is another than the formula's, and so are its masks.

    Args:
        seed: 0-dim int64 on x's device. stream: which dropout of the model this is.
    """
    if k := _on_gpu(x):
        return k.dropout(x, p, seed, stream)
    return x * _mask(x, p, seed, stream)


def dropout_backward_(dx: Tensor, dy: Tensor, p: float, seed: Tensor, stream: int) -> None:
    """dx += the gradient below a dropout whose output has the gradient dy."""
    if k := _on_gpu(dx):
        return k.dropout_backward_(dx, dy, p, seed, stream)
    dx.addcmul_(dy, _mask(dx, p, seed, stream))


def _mask(x: Tensor, p: float, seed: Tensor, stream: int) -> Tensor:
    """0 or 1 / (1 - p) for each element, drawn on the CPU. 16 random bits decide, so p is met to within 1 / 65,536."""
    generator = torch.Generator().manual_seed(int(seed) + stream)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    keep = bits.view(torch.int16)[: x.numel()] >= round(p * 65536) - 32768
    return keep.view(x.shape).to(x.device, x.dtype).div_(1 - p)


def cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor, factor: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weighted token losses and the gradient of factor * their sum.

    Args:
        logits: (S, V) fp32. targets: (S,) int64. weights: (S,) fp32, 0 for a position that fills up a fixed count.
        factor: 0-dim fp32.

    Returns:
        (S,) fp32, -weight log p(target), and (S, V) in `dtype`, factor weight (p - one-hot).
    """
    if k := _on_gpu(logits):
        return k.cross_entropy(logits, targets, weights, factor, dtype)
    log_p = logits.log_softmax(-1)
    nll = -log_p.gather(1, targets[:, None])[:, 0] * weights
    d = log_p.exp_()
    d.scatter_add_(1, targets[:, None], torch.full_like(d[:, :1], -1.0))
    return nll, (d * (weights * factor)[:, None]).to(dtype)
