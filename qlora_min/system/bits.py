"""bitsandbytes: a faster import, and its 4-bit layer with its pitfalls avoided.

On import, bitsandbytes passes four functions to `torch.compile`. This loads the whole compiler, which takes 3 to 7
seconds, for operations that its CPU and CUDA kernels replace anyway. If `torch.compile` fails, it uses the functions
uncompiled, so we make it fail.

## Pitfalls of bitsandbytes 0.50
- A layer's forward dequantises to the compute dtype, but its backward and `dequantize_4bit` dequantise to the dtype
  that the weight had before quantisation. We quantise from fp32 and set the quant state's dtype to the compute dtype,
  so that forward, backward and merge use the same weight.
- On CPUs with AVX512-BF16, a forward in eval mode repacks the weight in place for an inference kernel, after which
  dequantising it is silently wrong. We disable that kernel.
- On CPUs, a matrix whose input size is no multiple of the block size (96 and 64, for example) is dequantised with the
  scales of other blocks. As a single row it is dequantised correctly, so that is how we do it there.
"""

import copy
from collections.abc import Mapping
from math import prod
from typing import Any
from unittest.mock import patch

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .text import refusing

with patch.object(torch, "compile", side_effect=RuntimeError("not while bitsandbytes is imported")):
    import bitsandbytes as bnb


class Linear4bit(bnb.nn.Linear4bit):
    """bitsandbytes' layer, but its result has the compute dtype, as under autocast, instead of the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        if _as_one_row(self.weight):
            return F.linear(x.to(self.compute_dtype), dequantized_weight(self), self.bias)
        return super().forward(x.to(self.compute_dtype))


def linear_4bit(linear: nn.Linear, weight: bnb.nn.Params4bit, dtype: torch.dtype) -> Linear4bit:
    """A layer of the shape and with the bias of `linear`, and a 4-bit weight."""
    with torch.device("meta"):
        layer = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype)
    layer.weight, layer.bias, layer.quant_state = weight, linear.bias, weight.quant_state
    layer.support_avx512bf16_for_cpu = False
    return layer


def quantized(weight: Tensor, quantization: str, dtype: torch.dtype) -> bnb.nn.Params4bit:
    """Quantise a weight (out, in) on its device; it dequantises to `dtype`."""
    packed = bnb.nn.Params4bit(weight.float(), quant_type=quantization, compress_statistics=True)
    packed = packed.to(weight.device)  # bitsandbytes quantises here
    packed.quant_state.dtype = dtype
    return packed


def stored_4bit(
    name: str, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> bnb.nn.Params4bit:
    """A weight (out, in) that bitsandbytes has packed, as it is: nothing is quantised again.

    Args:
        parts: all of `weights.PackedWeights`. shape: the weight's. dtype: to dequantise to.

    Raises:
        ValueError: a part is missing, damaged or of another size.
    """
    with refusing(f"weight '{name}': its 4-bit parts are damaged or missing; copy or download the model again"):
        values = {part.removeprefix(name): tensor for part, tensor in parts.items()}
        packed = values.pop("").contiguous().flatten().view(torch.uint8)[:, None]
        weight = bnb.nn.Params4bit.from_prequantized(packed, values, device=device)
        state, count = weight.quant_state, prod(shape)
        blocks, levels = -(-count // state.blocksize), bnb.functional.get_4bit_type(state.quant_type, device)
        scales = [(state.absmax, blocks)]
        if state.nested:
            scales = [(state.state2.absmax, -(-blocks // state.state2.blocksize)), (state.state2.code, 256)]
        sound = {
            "shape": state.shape == shape and len(packed) == (count + 1) // 2 and state.absmax.numel() == blocks,
            "block size": state.blocksize in (32, 64, 128, 256, 512, 1024, 2048, 4096),
            "levels": state.code.shape == (16,) and torch.allclose(state.code, levels, rtol=0, atol=1e-6),
            "scales": all(t.numel() == n and t.is_floating_point() and t.isfinite().all() for t, n in scales)
            and (not state.nested or (state.absmax.dtype == torch.uint8 and bool(state.offset.isfinite()))),
        }
        if wrong := [what for what, good in sound.items() if not good]:
            raise ValueError(f"wrong {', '.join(wrong)}")
    state.code, state.dtype = levels, dtype
    return weight


def dequantized(weight: bnb.nn.Params4bit) -> Tensor:
    """The weight (out, in) as it is computed with, in the compute dtype."""
    state = weight.quant_state
    if _as_one_row(weight):
        state = copy.copy(state)
        state.shape = torch.Size((1, state.shape.numel()))
    return bnb.functional.dequantize_4bit(weight.data, state).view(weight.quant_state.shape)


def _as_one_row(weight: bnb.nn.Params4bit) -> bool:
    return weight.device.type == "cpu" and weight.quant_state.shape[-1] % weight.quant_state.blocksize != 0


def dequantized_weight(linear: nn.Module) -> Tensor:
    """The weight (out, in) that a linear layer computes with, in the compute dtype."""
    return dequantized(linear.weight) if isinstance(linear, bnb.nn.Linear4bit) else linear.weight.data


def doubly_quantized(linear: nn.Module) -> bool:
    """Whether a layer's weight is held as `quantized` holds it: in blocks of 64, and their scales in blocks of 256."""
    state = getattr(linear.weight, "quant_state", None)
    return state is not None and state.blocksize == 64 and state.nested and state.state2.blocksize == 256


class AdamW8bit(bnb.optim.PagedAdamW8bit):
    """PagedAdamW8bit that accepts `optim_bits` per parameter group; bitsandbytes supports it only per parameter."""

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        return super().get_config(gindex, pindex, group) | {k: group[k] for k in ("optim_bits",) if k in group}

    def step(self) -> None:
        """As bitsandbytes', but does not wait for the device after each tensor, unless the state is paged."""
        if self.is_paged or not self.state:  # the first step makes the state
            return super().step()
        for g, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                self.update_step(group, p, g, i)
