"""Parameters as views of one flat tensor."""

import itertools
from collections.abc import Collection

import torch
import torch.nn as nn
from torch import Tensor

EIGHT_BITS_FROM = 4096  # elements of a matrix from which bitsandbytes keeps its optimizer state in 8 bits


class FlatLoRA:
    """All that trains in one flat tensor, and its gradients in another: cleared, summed and stepped at once.

    Building it moves every `lora_A` and `lora_B`, and its `.grad`, to views of the two.

    Args:
        layers: the LoRA layers of a model, in its order.

    Attributes:
        weights, grads: (n,) fp32; the As come before the Bs, in the model's order, those below 4,096 elements last.
        large, small: what an optimizer steps: two flat tensors, if the blocks of 8-bit state then end where the
            matrices do; else every matrix by itself.
        largest: elements of the largest matrix.
    """

    def __init__(self, layers: Collection[nn.Module], device: torch.device):
        params = [m.lora_A for m in layers] + [m.lora_B for m in layers]
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
        if all(w.numel() % 256 == 0 for w in self.large):
            bounds = [0, sum(w.numel() for w in self.large), ends[-1]]
            flat = [nn.Parameter(self.weights[a:b]) for a, b in itertools.pairwise(bounds)]
            for w, (a, b) in zip(flat, itertools.pairwise(bounds)):
                w.grad = self.grads[a:b]
            self.large, self.small = ([w] if w.numel() else [] for w in flat)

    def view(self, flat: Tensor, matrix: nn.Parameter, rows: int | None = None) -> Tensor:
        """The part of `flat` (n,) that belongs to a matrix; with more `rows` than it has, those of the ones behind."""
        start, rows = self._starts[id(matrix)], rows or matrix.shape[0]
        return flat[start : start + rows * matrix.shape[1]].view(rows, matrix.shape[1])
