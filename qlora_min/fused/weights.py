"""The frozen weights of a decoder's layers in the compute dtype: as they are, dequantised, or gathered."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn

from ..base import Base
from ..ops import formulas
from ..scale.sharding import prefetch, unshard
from ..system.bits import bnb, dequantized_weight, doubly_quantized
from ..system.device import available

# On a GPU, dequantised weights are kept if they take at most 1/8 of the memory that a plan may use, which is 4% faster.
# On a CPU they are never kept: it would be 2% faster, for half a GiB.
KEPT = {"cuda": 8, "cpu": math.inf}


class Weights:
    """Sets the `weight` of each group of projections: the modules' own weights, concatenated, or a view of `scratch`.

    Args:
        layers: the decoder's `Layer`s. modules: the modules that they compute.

    Attributes:
        scratch: (1 or all layers, elements of a layer), the weights if the base is quantised or sharded; else empty.
    """

    def __init__(self, base: Base, layers: Sequence[Any], modules: nn.ModuleList, device: torch.device):
        self.base, self.layers, self.modules = base, layers, modules
        self.dequantizers, self.kept = [None] * len(layers), False
        groups = [p for layer in layers for p in layer.projections]
        linears = [m for p in groups for m in p.linears]
        self.stored = not base.sharded and not any(isinstance(m, bnb.nn.Linear4bit) for m in linears)
        self.scratch = torch.empty(0, dtype=base.dtype, device=device)
        if self.stored:
            for p in groups:
                p.weight = torch.cat([m.weight.data for m in p.linears])
                for m, w in zip(p.linears, p.weight.split([m.out_features for m in p.linears])):
                    m.weight.data = w  # a view, so that no weight is stored twice
            return
        self._make_room(1)
        if device.type == "cuda" and any(map(doubly_quantized, linears)):
            formulas.try_kernel("dequantize", self._use_dequantizers)

    def keep(self, wanted: bool) -> None:
        """Keep the dequantised weights of all layers from now on, if `wanted` and they take little of the memory;
        otherwise there is room for those of one layer, and `fetch` dequantises it."""
        if self.stored:
            return
        size, device = len(self.layers) * self.scratch[0].nbytes, self.scratch.device
        fits = self.kept or KEPT[device.type] * size <= available(device)  # what is kept is not available
        wanted = wanted and fits and not self.base.sharded
        if wanted != self.kept:
            self.kept = wanted
            self._make_room(len(self.layers) if wanted else 1)
            for i in range(len(self.layers) if wanted else 0):
                self._dequantize(i)

    def fetch(self, index: int, following: int) -> None:
        """Make the weights of layer `index` valid until the next call, and start to gather those of layer `following`,
        if there is one, while this one computes."""
        unshard(self.modules[index])
        if not self.stored and not self.kept:
            self._dequantize(index)
        if 0 <= following < len(self.layers):
            prefetch(self.modules[following])

    def _make_room(self, count: int) -> None:
        sizes = [p.shape[0] * p.shape[1] for p in self.layers[0].projections]
        self.scratch = self.scratch.new_empty(count, sum(sizes))
        for i, layer in enumerate(self.layers):
            for p, part in zip(layer.projections, self.scratch[i % count].split(sizes)):
                p.weight = part.view(p.shape)

    def _dequantize(self, index: int) -> None:
        if dequantizer := self.dequantizers[index]:
            dequantizer(self.scratch[index % len(self.scratch)])
            return
        for p in self.layers[index].projections:
            for m, out in zip(p.linears, p.weight.split([m.out_features for m in p.linears])):
                out.copy_(dequantized_weight(m))

    def _use_dequantizers(self) -> bool:
        """Dequantise with our kernel from now on if it agrees with bitsandbytes, and return whether it does.

        It takes one launch per layer. A layer stored in another form, 16 bits or another block size, does not use it.
        """
        from ..ops.kernels import Dequantizer

        def make(layer: Any) -> "Dequantizer | None":
            linears = [m for p in layer.projections for m in p.linears]
            states = [(m.weight.data, m.weight.quant_state) for m in linears if doubly_quantized(m)]
            return Dequantizer(states) if len(states) == len(linears) else None

        def agrees(index: int) -> bool:
            unshard(self.modules[index])
            self._dequantize(index)
            theirs = self.scratch.clone()
            made[index](self.scratch[0])
            return torch.equal(theirs, self.scratch)

        made = [make(layer) for layer in self.layers]
        wrong = [i for i, dequantizer in enumerate(made) if dequantizer and not agrees(i)]
        self.dequantizers = self.dequantizers if wrong else made
        return not wrong
