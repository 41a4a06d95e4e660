"""The LoRA layer, its injection into a model, and the merged weight.

The equation (Hu et al. 2021, "LoRA", section 4.1, eq. 3; with QLoRA's frozen 4-bit W, Dettmers et al. 2023, eq. 5):

    y = W x + (alpha / r) B A dropout(x)          A: (r, in)   B: (out, r)

W stays frozen, in 4 bits if the base is quantised; only A and B train, in fp32. B starts at zero, so the model with
fresh adapters computes exactly what the base computes, and the first gradient reaches B alone (dL/dA carries a factor
B). alpha/r keeps the size of the update, and with it the learning rate, roughly independent of the rank.

Cost: r (in + out) parameters a layer, and 2 r (in + out) multiply-adds a token on top of the base's in * out. On
Qwen2-0.5B with r = 16 and q, k, v, o of 24 layers: 2,162,688 parameters, 0.44% of the model.

PEFT's layer computes the same numbers in the same order (peft/tuners/lora/bnb.py, Linear4bit.forward): the tests
compare the two bit for bit.

Dropout's mask is a function of (seed, row's place in the step, token in the row, stream, feature): see ops.py. Layers
that share their input (q, k and v; gate and up) share a stream, and so a mask; PEFT's modules draw one each. Sharing
lets them be computed as one product with one dropout, and does not change what is learned beyond the noise of a seed.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from . import ops

SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # projections of one input, by their names
SMALL = 4096  # elements below which 8-bit AdamW keeps a matrix's state in fp32


@dataclass
class Tokens:
    """What decides the masks of the tokens that are computed: (N,) int32, by `ops.dropout_keys`; None: at random."""

    keys: Tensor | None = None


class Dropout(nn.Module):
    """Dropout whose mask follows the token, not the batch.

    Args:
        p: probability of zeroing an element. tokens: set by who computes. stream: which dropout of the model this is.
    """

    def __init__(self, p: float, tokens: Tokens, stream: int = 0):
        super().__init__()
        self.p, self.tokens, self.stream = p, tokens, stream

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)"""
        if not self.p or not self.training:
            return x
        keys, n = self.tokens.keys, x.shape[:-1].numel()
        if keys is None:
            keys = torch.randint(2**31, (n,), device=x.device).int()
        if len(keys) != n:
            raise ValueError(
                f"dropout: a targeted layer is given {n:,} tokens of the micro-batch's {len(keys):,} (routed experts, "
                "say), so their masks can't be told; use --dropout 0, or other --targets"
            )
        return _Dropout.apply(x, self.p, keys, self.stream)


class _Dropout(torch.autograd.Function):
    """Keeps no mask: the gradient below a dropout is the same dropout of the gradient above it."""

    @staticmethod
    def forward(ctx, x: Tensor, p: float, keys: Tensor, stream: int) -> Tensor:
        ctx.save_for_backward(keys)
        ctx.p, ctx.stream = p, stream
        return ops.dropout(x, p, keys, stream)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (keys,) = ctx.saved_tensors
        return ops.dropout(dy, ctx.p, keys, ctx.stream), None, None, None


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update beside it.

    Args:
        base: `nn.Linear` or bitsandbytes' `Linear4bit` (anything with `in_features`, `out_features`, a `weight` and
            a forward from (..., in) to (..., out)). It is used as it is: freezing it is the caller's business.
        rank: r, the inner dimension of the update.
        alpha: the update is scaled by alpha / rank.
        dropout: probability of zeroing an input of the update while training, or a `Dropout`. W x never sees dropout.

    Raises:
        ValueError: rank below 1, or dropout outside [0, 1).
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float | Dropout = 0.0):
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank: got {rank}, expected an integer of at least 1")
        dropout = dropout if isinstance(dropout, Dropout) else Dropout(dropout, Tokens())
        if not 0.0 <= dropout.p < 1.0:
            raise ValueError(f"dropout: got {dropout.p}, expected a probability in [0, 1)")
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank, self.alpha = rank, alpha
        self.scaling = alpha / rank
        self.dropout = dropout
        self.enabled = True
        # Drawn on the CPU whatever the base's device, so that one seed gives one adapter everywhere.
        lora_A = torch.empty(rank, self.in_features, dtype=torch.float32)
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))  # U(-1/sqrt(in), 1/sqrt(in)), as nn.Linear's own default
        self.lora_A = nn.Parameter(lora_A.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, dtype=torch.float32, device=base.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out): y = W x + (alpha / r) B A dropout(x)."""
        y = self.base(x)
        if not self.enabled:
            return y
        kind = x.device.type  # the update's input waits for the backward pass: under autocast in 16 bits
        x = x.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.lora_A.dtype)
        h = F.linear(self.dropout(x), self.lora_A)  # (..., in) @ (in, r) -> (..., r)
        return y + (F.linear(h, self.lora_B) * self.scaling).to(y.dtype)  # (..., r) @ (r, out) -> (..., out)

    @torch.no_grad()
    def delta(self) -> torch.Tensor:
        """The update as one matrix, (alpha / r) B A: (out, in), fp32. Merging adds it to W."""
        return (self.lora_B @ self.lora_A) * self.scaling

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}"


def inject_lora(
    model: nn.Module, targets: Sequence[str], rank: int, alpha: float, dropout: float = 0.0, within: str = ""
) -> list[str]:
    """Freeze every parameter of `model`, then put a LoRALinear around each linear layer that `targets` names.

    A target is the last part of a module's name ("q_proj"), or more of its end ("self_attn.q_proj"). What trains
    follows from the structure: nothing but the new lora_A and lora_B requires a gradient.

    Args:
        within: only modules whose name starts with this are candidates (the decoder layers, say, but not the head).

    Returns:
        The names of the wrapped modules, in the model's order.

    Raises:
        ValueError: a target matches no linear layer (the message lists the candidates), the rank is larger than both
            sides of a layer, or the model has LoRA already.
    """
    if any(isinstance(m, LoRALinear) for m in model.modules()):
        raise ValueError("the model has LoRA layers already: load the base anew to inject another adapter")
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(within)]
    found = {t: [n for n in linears if n == t or n.endswith("." + t)] for t in targets}
    missing = [t for t, names in found.items() if not names]
    if missing or not targets:
        candidates = ", ".join(sorted({n.rsplit(".", 1)[-1] for n in linears})) or "none"
        unknown = ", ".join(map(repr, missing[:8])) or "none given"
        raise ValueError(
            f"targets: {unknown} matches no linear layer of the model's decoder layers; "
            f"expected names among: {candidates}"
        )
    chosen = set().union(*found.values())
    names = [n for n in linears if n in chosen]
    for name in names:  # before anything is allocated, and before the model is changed
        layer = model.get_submodule(name)
        if rank > max(layer.in_features, layer.out_features):
            raise ValueError(
                f"rank {rank} is above the larger dimension of '{name}' ({layer.out_features} x "
                f"{layer.in_features}), more than any update has; lower it"
            )
    model.requires_grad_(False)
    tokens, streams = Tokens(), {}
    for name in names:
        parent, _, child = name.rpartition(".")
        group = next((g for g in SHARED_INPUT if child in g), child)
        stream = streams.setdefault((parent, group), len(streams))
        owner = model.get_submodule(parent)
        base = getattr(owner, child)
        layer = LoRALinear(base, rank, alpha, Dropout(dropout, tokens, stream))
        setattr(owner, child, layer.train(base.training))
    return names


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Name -> layer of every LoRALinear in `model`, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of all that trains, e.g. "model.layers.0.self_attn.q_proj.lora_A", in the model's order."""
    return {f"{n}.{k}": getattr(layer, k) for n, layer in lora_layers(model).items() for k in ("lora_A", "lora_B")}


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Within this context the model computes what its base computes: y = W x."""
    layers = lora_layers(model).values()
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before):
            layer.enabled = enabled


class FlatLoRA:
    """All that trains in one flat tensor, and its gradients in another: cleared, summed and stepped at once.

    Building it moves every `lora_A` and `lora_B` of a model, and its `.grad`, to views of the two.

    Attributes:
        weights, grads: (n,) fp32; the As come before the Bs, in the model's order, those below 4,096 elements last.
        large, small: what an optimizer steps (see `optim.make_optimizer`): two flat tensors, if the blocks of 8-bit
            state then end where the matrices do; else every matrix by itself.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        layers = lora_layers(model).values()
        params = [m.lora_A for m in layers] + [m.lora_B for m in layers]
        params.sort(key=lambda w: w.numel() < SMALL)
        ends = list(itertools.accumulate((w.numel() for w in params), initial=0))
        self._starts = dict(zip(map(id, params), ends))
        self.weights = torch.empty(ends[-1], dtype=torch.float32, device=device)
        self.grads = torch.zeros_like(self.weights)
        with torch.no_grad():
            for w in params:
                mine = self.view(self.weights, w)
                mine.copy_(w)
                w.data, w.grad = mine, self.view(self.grads, w)
        self.large, self.small = ([w for w in params if (w.numel() < SMALL) == small] for small in (False, True))
        if all(w.numel() % 256 == 0 for w in self.large):
            bounds = [0, sum(w.numel() for w in self.large), ends[-1]]
            flat = [nn.Parameter(self.weights[a:b]) for a, b in itertools.pairwise(bounds)]
            for w, (a, b) in zip(flat, itertools.pairwise(bounds)):
                w.grad = self.grads[a:b]
            self.large, self.small = ([w] if w.numel() else [] for w in flat)

    def view(self, flat: Tensor, first: nn.Parameter, rows: int | None = None) -> Tensor:
        """The part of `flat` (n,) that stands for a matrix; `rows` more than it has reach into those behind it."""
        start, rows = self._starts[id(first)], rows or first.shape[0]
        return flat[start : start + rows * first.shape[1]].view(rows, first.shape[1])
