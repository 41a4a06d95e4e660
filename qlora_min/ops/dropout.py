"""Dropout whose masks are a function of where an element stands.

An element's mask is a hash of (the step's seed, the row's place in the step, token in the row, stream, feature), see
masks.py. It is never stored: the backward pass, and a forward pass that gradient checkpointing repeats, draw it again;
and however a step is cut into micro-batches and divided between processes, its masks are the same.

A stream is a number that tells the model's dropouts apart. Layers that share their input (q, k and v; gate and up)
share a stream, and so a mask, where PEFT's modules draw one each. This lets them be computed as one product with one
dropout, and changes what is learned by less than the choice of a seed does.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from . import formulas


@dataclass
class Tokens:
    """What decides the dropout masks of the tokens being computed, shared by all layers of a model.

    keys: (N,) int32, by `masks.dropout_keys`; None draws masks at random.
    """

    keys: Tensor | None = None


class Dropout(nn.Module):
    """Dropout whose mask follows the token, wherever in a batch it stands.

    Args:
        p: probability of zeroing an element. tokens: their keys, set by the engine. stream: which of the model's
            dropouts this is.
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
    """Stores no mask: the gradient below a dropout is the same dropout of the gradient above it."""

    @staticmethod
    def forward(ctx, x: Tensor, p: float, keys: Tensor, stream: int) -> Tensor:
        ctx.save_for_backward(keys)
        ctx.p, ctx.stream = p, stream
        return formulas.dropout(x, p, keys, stream)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (keys,) = ctx.saved_tensors
        return formulas.dropout(dy, ctx.p, keys, ctx.stream), None, None, None
