"""The trainable parameters as views of one flat tensor."""

import itertools
from collections.abc import Collection

import torch
import torch.nn as nn
from torch import Tensor

EIGHT_BITS_FROM = 4096  # bitsandbytes keeps the optimizer state of tensors of at least so many elements in 8 bits


class FlatLoRA:
    """All trainable weights in one flat tensor and their gradients in another, to clear, sum and step them at once.

    The constructor turns every `lora_A` and `lora_B` and its `.grad` into views of the two tensors.

    Args:
        layers: the LoRA layers of a model, in its order.

    Attributes:
        weights, grads: (n,) fp32. All As, then all Bs, in the model's order; if all ranks are equal, matrices below
            4,096 elements come last. In either case the As of projections that share an input are adjacent.
        large, small: lists of parameters for the optimizer, of at least and below 4,096 elements. One flat tensor
            each, if all ranks are equal and no block of 8-bit state (256 elements) would then span two matrices; else
            one for each matrix.
        largest: the number of elements of the largest matrix.
    """

    def __init__(self, layers: Collection[nn.Module], device: torch.device):
        params = [m.lora_A for m in layers] + [m.lora_B for m in layers]
        one_rank = len({m.lora_A.shape[0] for m in layers}) <= 1
        if one_rank:
            params.sort(key=lambda w: w.numel() < EIGHT_BITS_FROM)
        ends = list(itertools.accumulate((w.numel() for w in params), initial=0))
        self._starts = dict(zip(map(id, params), ends))
        self.weights = torch.empty(ends[-1], dtype=torch.float32, device=device)
        self.grads = torch.zeros_like(self.weights)
        with torch.no_grad():
            for w in params:
                mine = self.view(self.weights, w)
                mine.copy_(w)
                w.data, w.grad = mine, self.view(self.grads, w)
        self.largest = max((w.numel() for w in params), default=0)
        self.large, self.small = ([w for w in params if (w.numel() < EIGHT_BITS_FROM) == low] for low in (False, True))
        if one_rank and all(w.numel() % 256 == 0 for w in self.large):
            bounds = [0, sum(w.numel() for w in self.large), ends[-1]]
            flat = [nn.Parameter(self.weights[a:b]) for a, b in itertools.pairwise(bounds)]
            for w, (a, b) in zip(flat, itertools.pairwise(bounds)):
                w.grad = self.grads[a:b]
            self.large, self.small = ([w] if w.numel() else [] for w in flat)

    def view(self, flat: Tensor, matrix: nn.Parameter, rows: int | None = None) -> Tensor:
        """The part of `flat` (n,) that holds a matrix, in its shape; with more `rows` it extends into the next."""
        start, rows = self._starts[id(matrix)], rows or matrix.shape[0]
        return flat[start : start + rows * matrix.shape[1]].view(rows, matrix.shape[1])
