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
- On CPUs with AVX512, a matrix whose input size is a multiple of 16 but not of 64 (96, for example) is dequantised with
  the scales of other blocks, and subnormal bf16 results become 0. base.py refuses such a model on a CPU.
"""

from unittest.mock import patch

import torch
import torch.nn as nn
from torch import Tensor

with patch.object(torch, "compile", side_effect=RuntimeError("not while bitsandbytes is imported")):
    import bitsandbytes as bnb


class Linear4bit(bnb.nn.Linear4bit):
    """bitsandbytes' layer, but its result has the compute dtype, as under autocast, instead of the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        return super().forward(x.to(self.compute_dtype))


def empty_4bit(module: nn.Linear, quantization: str, dtype: torch.dtype) -> bnb.nn.Linear4bit:
    """A Linear4bit of the shape of `module`, on the meta device."""
    with torch.device("meta"):
        layer = Linear4bit(
            module.in_features, module.out_features, module.bias is not None,
            compute_dtype=dtype, compress_statistics=True, quant_type=quantization,
        )  # fmt: skip
    layer.support_avx512bf16_for_cpu = False
    return layer


def quantize_into(layer: bnb.nn.Linear4bit, weight: Tensor, quantization: str, dtype: torch.dtype) -> None:
    """Quantise a weight (out, in) on its device and put it into a Linear4bit; it dequantises to `dtype`."""
    packed = bnb.nn.Params4bit(weight.float(), quant_type=quantization, compress_statistics=True, module=layer)
    layer.weight = packed.to(weight.device)  # bitsandbytes quantises here
    layer.weight.quant_state.dtype = dtype


def quantize_linear(linear: nn.Linear, quantization: str, dtype: torch.dtype) -> bnb.nn.Linear4bit:
    """A Linear4bit with the quantised weight and the bias of a linear layer, on the same device."""
    layer = empty_4bit(linear, quantization, dtype)
    quantize_into(layer, linear.weight.detach(), quantization, dtype)
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.detach().to(dtype), requires_grad=False)
    return layer


def dequantized_weight(linear: nn.Module) -> Tensor:
    """The weight (out, in) that a linear layer computes with, in the compute dtype."""
    if isinstance(linear, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    return linear.weight.data
