"""Dropout whose mask is a function of the element's location.

An element's mask is a hash of (seed of the step, index of the row in the step, index of the token in the row, stream,
feature), see masks.py. It is never stored: the backward pass, and a forward pass that gradient checkpointing repeats,
compute it again. It does not depend on how a step is cut into micro-batches or divided among processes.

A stream is a number that distinguishes the dropouts of a model. Layers that share their input (q, k and v; gate and up)
share a stream and thus a mask, so they can be computed as one product with one dropout. In PEFT each module draws its
own mask; the difference affects what is learned less than the choice of a seed does.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from . import formulas


@dataclass
class Tokens:
    """The keys of the dropout masks of the tokens being computed; one object for all layers of a model.

    keys: (N,) int32, from `masks.dropout_keys`. If None, masks are drawn at random.
    """

    keys: Tensor | None = None


class Dropout(nn.Module):
    """Dropout whose mask depends on the token and the feature, not on their location in the batch.

    Args:
        p: probability of zeroing an element. tokens: the keys of the tokens, set by the engine. stream: the number of
            this dropout in the model.
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
                "for example), so their masks are unknown; use --dropout 0, or other --targets"
            )
        return _Dropout.apply(x, self.p, keys, self.stream)


class _Dropout(torch.autograd.Function):
    """Stores no mask: the gradient of a dropout's input is the same dropout of its output's gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, p: float, keys: Tensor, stream: int) -> Tensor:
        ctx.save_for_backward(keys)
        ctx.p, ctx.stream = p, stream
        return formulas.dropout(x, p, keys, stream)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (keys,) = ctx.saved_tensors
        return formulas.dropout(dy, ctx.p, keys, ctx.stream), None, None, None
