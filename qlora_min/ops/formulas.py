"""What a decoder layer does between its matrix products, forward and backward, as formulas in plain PyTorch.

Tensors are flat over tokens: (N, ...). On a GPU the kernel of the same name in kernels.py does the same in one pass
over memory, where it compiles and computes the same (`try_kernels`). Kernels compute in fp32, and so do the formulas,
but for SwiGLU and dropout, which compute in their input's dtype. A name that ends in `_` works in place. There are no
gradients for norm weights: they are frozen.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .masks import dropout_mask

why_formulas = ""  # why a GPU computes the formulas below, if it does


@functools.cache
def _kernels() -> ModuleType | None:
    global why_formulas
    try:
        from . import kernels
    except ImportError:
        why_formulas = "Triton is missing"
        return None
    return kernels


def have_kernels() -> bool:
    """Whether the kernels run on a GPU; otherwise the formulas below do."""
    return _kernels() is not None and not why_formulas


def _on_gpu(x: Tensor) -> ModuleType | None:
    return _kernels() if x.is_cuda and have_kernels() else None


@contextmanager
def formulas(why: str = "asked for") -> Iterator[None]:
    """Within this context a GPU computes the formulas."""
    global why_formulas
    before, why_formulas = why_formulas, why
    try:
        yield
    finally:
        why_formulas = before


def try_kernels(trials: dict[str, tuple], dtype: torch.dtype) -> None:
    """Compute each operation by its kernel and by its formula, and leave the kernels if one fails or differs.

    Triton supports compute capability 8.0 and above. On a T4 (7.5) the kernels work today, without a promise that they
    will tomorrow.

    Args:
        trials: name of an operation below -> arguments, tensors among them on the GPU.
    """
    bound = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]

    def same(name: str, arguments: tuple) -> bool:
        mine = _outcome(name, arguments)
        with formulas():
            theirs = _outcome(name, arguments)
        most = 0.0 if name == "dropout" else bound  # the same mask, to the bit
        return all((a - b).norm() <= most * b.norm() for a, b in zip(mine, theirs, strict=True))  # not so for NaN

    for name, arguments in trials.items():
        try_kernel(name, lambda name=name, arguments=arguments: same(name, arguments))


def try_kernel(name: str, works: Callable[[], bool]) -> None:
    """Leave the kernels if one of them does not work, or raises."""
    global why_formulas
    if not have_kernels():
        return
    try:
        if not works():
            why_formulas = f"the kernel of {name} computes something else than its formula"
    except Exception as e:  # whatever Triton, its compiler or the driver raise
        why_formulas = f"the kernel of {name} does not compile ({type(e).__name__})"


def _outcome(name: str, arguments: tuple) -> list[Tensor]:
    """All that an operation returns, and all that it was given, which it may have changed: in fp64."""
    given = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    returned: Any = globals()[name](*given)
    returned = returned if isinstance(returned, tuple) else (returned,)
    return [t.double() for t in itertools.chain(returned, given) if isinstance(t, Tensor)]


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


def rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, heads: int, norm: tuple[Tensor, float] | None
) -> Tensor:
    """Rotary position embedding of the first `heads` heads of qkv (N, heads * 2P + ...), behind a norm of each head.

    Each pair (a, b) of a head, P apart, turns by its angle: (a cos - b sin, b cos + a sin).

    Args:
        cos, sin: (positions, P) fp32. positions: (N,) integers.
        norm: None, and qkv is changed in place; or RMSNorm's weight for each head, (heads, 2P) fp32, and its eps, and
            the result is another tensor.
    """
    if k := _on_gpu(qkv):
        return k.rotate(qkv, cos, sin, positions, heads, norm)
    half = cos.shape[1]
    c, s = cos[positions][:, None], sin[positions][:, None]  # (N, 1, P)
    out = qkv if norm is None else qkv.clone()
    x = out[:, : heads * 2 * half].unflatten(1, (heads, 2, half))  # (N, heads, 2, P), a view
    v = x.float()
    if norm is not None:
        weight, eps = norm
        v = v * torch.rsqrt(v.pow(2).mean((2, 3), keepdim=True) + eps) * weight.view(heads, 2, half)
    a, b = v[:, :, 0], v[:, :, 1]
    x[:, :, 0], x[:, :, 1] = a * c - b * s, b * c + a * s
    return out


def rotate_backward_(
    d: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, heads: int, norm: tuple[Tensor, float] | None
) -> None:
    """Overwrite the gradient d of `rotate`'s result with that of its input qkv: turned back, then below the norm."""
    if k := _on_gpu(d):
        return k.rotate_backward_(d, qkv, cos, sin, positions, heads, norm)
    half = cos.shape[1]
    c, s = cos[positions][:, None], sin[positions][:, None]
    x = d[:, : heads * 2 * half].unflatten(1, (heads, 2, half))
    a, b = x[:, :, 0].float(), x[:, :, 1].float()
    g = torch.stack([a * c + b * s, b * c - a * s], 2)  # (N, heads, 2, P)
    if norm is not None:
        weight, eps = norm
        v = qkv[:, : heads * 2 * half].unflatten(1, (heads, 2, half)).float()
        r = torch.rsqrt(v.pow(2).mean((2, 3), keepdim=True) + eps)
        hat, g = v * r, g * weight.view(heads, 2, half)
        g = r * (g - hat * (g * hat).mean((2, 3), keepdim=True))
    x.copy_(g)


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


def dropout(x: Tensor, p: float, keys: Tensor, stream: int) -> Tensor:
    """x with each element zeroed with probability p and the rest divided by 1 - p.

    Args:
        x: (..., D), N tokens in all. keys: (N,) int32, by `dropout_keys`. stream: which dropout of the model this is.
    """
    if k := _on_gpu(x):
        return k.dropout(x, p, keys, stream)
    keep = dropout_mask(keys, p, stream, x.shape[-1]).view(x.shape)
    return torch.where(keep, x * (1 / (1 - p)), 0.0)


def dropout_backward_(dx: Tensor, dy: Tensor, p: float, keys: Tensor, stream: int) -> None:
    """dx += the gradient below a dropout whose output has the gradient dy: the same mask of dy."""
    if k := _on_gpu(dx):
        return k.dropout_backward_(dx, dy, p, keys, stream)
    dx += dropout(dy, p, keys, stream)


def cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor, factor: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weighted token losses and the gradient of factor * their sum.

    Args:
        logits: (S, V) fp32. targets: (S,) int64. weights: (S,) fp32, 0 at padding.
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
