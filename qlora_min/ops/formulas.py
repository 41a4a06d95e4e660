"""The operations between the matrix products of a decoder layer, forward and backward, as plain PyTorch.

Tensors are flat over tokens: (N, ...). On a GPU each operation is replaced by the kernel of the same name in kernels.py
(one pass over memory), unless a kernel fails to compile or gives other results (`try_kernels`). Kernels compute in
fp32, and so do the formulas, except SwiGLU and dropout, which compute in the dtype of their input. Operations whose
name ends in `_` work in place. Norm weights are frozen and get no gradients.
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

why_formulas = ""  # why a GPU computes the formulas instead of the kernels; "" if it does not
HeadNorm = tuple[Tensor, float] | None  # RMSNorm of each head: its weight (heads, 2P) in fp32, and its eps


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
    """Whether a GPU computes the kernels; otherwise it computes the formulas."""
    return _kernels() is not None and not why_formulas


def _by_kernel(formula: Callable) -> Callable:
    """Replace a formula by the kernel of the same name if its first argument is on a GPU, unless `why_formulas`."""

    @functools.wraps(formula)
    def operation(x: Tensor, *args, **kwargs):
        chosen = getattr(_kernels(), formula.__name__) if x.is_cuda and have_kernels() else formula
        return chosen(x, *args, **kwargs)

    return operation


@contextmanager
def use_formulas(why: str = "asked for") -> Iterator[None]:
    """Within this context a GPU computes the formulas instead of the kernels."""
    global why_formulas
    before, why_formulas = why_formulas, why
    try:
        yield
    finally:
        why_formulas = before


def try_kernels(trials: dict[str, tuple], dtype: torch.dtype) -> None:
    """Compute each operation by its kernel and by its formula, and stop using kernels if one fails or differs.

    Triton supports compute capability 8.0 and above. On a T4 (7.5) the kernels currently work, but Triton does not
    guarantee it.

    Args:
        trials: name of an operation below -> its arguments; tensors among them are on the GPU.
        dtype: the compute dtype, which sets the tolerance.
    """
    for name, arguments in trials.items():
        # dropout: the same mask, to the bit
        try_kernel(name, lambda n=name, a=arguments: agree(lambda: _outcome(n, a), dtype, exactly=n == "dropout"))


def agree(compute: Callable[[], list[Tensor]], dtype: torch.dtype, exactly: bool = False) -> bool:
    """Whether the kernels give what the formulas give, up to rounding in `dtype`."""
    mine = compute()
    with use_formulas():
        theirs = compute()
    bound = 0.0 if exactly else {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    return all((a - b).norm() <= bound * b.norm() for a, b in zip(mine, theirs, strict=True))  # False for NaN


def try_kernel(name: str, works: Callable[[], bool]) -> None:
    """Stop using kernels, and set `why_formulas`, if `works` returns False or raises."""
    global why_formulas
    if not have_kernels():
        return
    try:
        if not works():
            why_formulas = f"the kernel of {name} computes something else than its formula"
    except Exception as e:  # of any type: from Triton, its compiler or the driver
        why_formulas = f"the kernel of {name} does not compile ({type(e).__name__})"


def _outcome(name: str, arguments: tuple) -> list[Tensor]:
    """The tensors that an operation returns, and its arguments, which it may have changed in place; in fp64."""
    given = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    returned: Any = globals()[name](*given)
    returned = returned if isinstance(returned, tuple) else (returned,)
    return [t.double() for t in itertools.chain(returned, given) if isinstance(t, Tensor)]


@_by_kernel
def add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Residual sum and RMSNorm: s = x + delta, y = s r w with r = 1 / sqrt(mean(s^2) + eps).

    Args:
        x: (N, D) fp32, the residual stream. delta: (N, D), the output of a block, or None.

    Returns:
        s (N, D) fp32, y (N, D) in `dtype`, r (N,) fp32.
    """
    s = x if delta is None else x + delta
    r = torch.rsqrt(s.pow(2).mean(-1) + eps)
    return s, (s * r[:, None]).mul_(weight).to(dtype), r


@_by_kernel
def norm_backward(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, dresidual: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of a norm's input x: dx = r (g - h mean(g h)) + dresidual, with h = x r and g = dy w.

    Args:
        dy: (N, D). x: (N, D) fp32. rstd: (N,) fp32, r of `add_norm`. dresidual: (N, D) fp32, the gradient that reaches
            x past the norm; overwritten.

    Returns:
        dx (N, D) fp32, in the memory of dresidual, and a copy in the dtype of dy.
    """
    hat, g = x * rstd[:, None], dy * weight
    dx = dresidual.add_((g - hat * (g * hat).mean(-1, keepdim=True)).mul_(rstd[:, None]))
    return dx, dx.to(dy.dtype)


@_by_kernel
def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, heads: int, norm: HeadNorm) -> Tensor:
    """Rotary position embedding of the first `heads` heads of qkv (N, heads * 2P + ...), after a norm of each head.

    P is half the size of a head. Each pair (a, b) of elements P apart is rotated to (a cos - b sin, b cos + a sin).

    Args:
        cos, sin: (positions, P) fp32. positions: (N,) integers.
        norm: if None, qkv is changed in place and returned; otherwise the result is a new tensor.
    """
    out = qkv if norm is None else qkv.clone()
    x = _heads(out, heads, cos)
    v = x.float()
    if norm is not None:
        weight, eps = norm
        v = v * torch.rsqrt(v.pow(2).mean((2, 3), keepdim=True) + eps) * weight.view(v.shape[1:])
    x.copy_(_rotated(v, cos[positions], sin[positions]))
    return out


@_by_kernel
def rotate_backward_(
    d: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, heads: int, norm: HeadNorm
) -> None:
    """Overwrite d, the gradient of `rotate`'s result, with that of its input qkv: rotated back, then through the norm.

    The arguments are those of `rotate`, with qkv as it was before the norm.
    """
    x = _heads(d, heads, cos)
    g = _rotated(x.float(), cos[positions], -sin[positions])
    if norm is not None:
        weight, eps = norm
        v = _heads(qkv, heads, cos).float()
        r = torch.rsqrt(v.pow(2).mean((2, 3), keepdim=True) + eps)
        hat, g = v * r, g * weight.view(g.shape[1:])
        g = r * (g - hat * (g * hat).mean((2, 3), keepdim=True))
    x.copy_(g)


def _heads(x: Tensor, heads: int, cos: Tensor) -> Tensor:
    """The first heads of x (N, heads * 2P + ...) as a view (N, heads, 2, P)."""
    half = cos.shape[1]
    return x[:, : heads * 2 * half].unflatten(1, (heads, 2, half))


def _rotated(v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """v (N, heads, 2, P), rotated by angles (N, P)."""
    (a, b), c, s = v.unbind(2), cos[:, None], sin[:, None]
    return torch.stack([a * c - b * s, b * c + a * s], 2)


@_by_kernel
def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up (N, 2I), the two concatenated -> (N, I): silu(gate) * up, with silu(g) = g sigmoid(g)."""
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate) * up


@_by_kernel
def swiglu_backward_(dh: Tensor, gate_up: Tensor) -> None:
    """Overwrite gate_up (N, 2I) with its gradient: dgate = dh up s (1 + g (1 - s)), dup = dh g s, s = sigmoid(g)."""
    gate, up = gate_up.chunk(2, dim=1)
    act = F.silu(gate)
    dgate = torch.ops.aten.silu_backward(dh * up, gate)
    torch.mul(dh, act, out=up)
    gate.copy_(dgate)


@_by_kernel
def dropout(x: Tensor, p: float, keys: Tensor, stream: int) -> Tensor:
    """Zero each element of x with probability p, and divide the others by 1 - p.

    Args:
        x: (..., D), of N tokens. keys: (N,) int32, from `dropout_keys`. stream: this dropout's number in the model.
    """
    keep = dropout_mask(keys, p, stream, x.shape[-1]).view(x.shape)
    return torch.where(keep, x * (1 / (1 - p)), 0.0)


@_by_kernel
def dropout_backward_(dx: Tensor, dy: Tensor, p: float, keys: Tensor, stream: int) -> None:
    """Add to dx the gradient of the input of a dropout whose output has the gradient dy: the same dropout of dy."""
    dx += dropout(dy, p, keys, stream)


@_by_kernel
def cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor, factor: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weighted token losses, and the gradient of factor * their sum with respect to the logits.

    Args:
        logits: (S, V) fp32. targets: (S,) int64. weights: (S,) fp32, 0 at padding.
        factor: 0-dim fp32.

    Returns:
        (S,) fp32, -weight log p(target), and (S, V) in `dtype`, factor weight (p - one-hot).
    """
    log_p = logits.log_softmax(-1)
    nll = -log_p.gather(1, targets[:, None])[:, 0] * weights
    d = log_p.exp_()
    d.scatter_add_(1, targets[:, None], torch.full_like(d[:, :1], -1.0))
    return nll, (d * (weights * factor)[:, None]).to(dtype)
