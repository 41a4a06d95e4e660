"""bitsandbytes: imported in a fraction of the time, and its 4-bit layer without its traps.

On import it hands four functions to `torch.compile`, which loads the whole compiler, 3 to 7 seconds, for operations
that its CPU and CUDA kernels replace. It uses the functions as they are where `torch.compile` fails: so we let it fail.

## Traps of bitsandbytes 0.50
- A layer's forward dequantises to the compute dtype, but its backward and `dequantize_4bit` to the dtype that the
  weight had when it was quantised. We quantise from fp32 and set the quant state's dtype to the compute dtype, so that
  forward, backward and merge use one weight.
- On CPUs with AVX512-BF16 a forward in eval mode repacks the weight in place for an inference kernel, after which
  dequantising is silently wrong. We switch that kernel off.
- On CPUs with AVX512 a matrix whose rows are a multiple of 16 but not of 64 long (96, say) is dequantised with other
  blocks' scales, and subnormal bf16 results become 0. base.py refuses such a model on a CPU.
"""

from unittest.mock import patch

import torch
import torch.nn as nn
from torch import Tensor

with patch.object(torch, "compile", side_effect=RuntimeError("not while bitsandbytes is imported")):
    import bitsandbytes as bnb

__all__ = ["Linear4bit", "bnb", "dequantized_weight", "empty_4bit", "quantize_into", "quantize_linear"]


class Linear4bit(bnb.nn.Linear4bit):
    """bitsandbytes' layer, whose result has the compute dtype, as `nn.Linear`'s has under autocast, not its input's."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        return super().forward(x.to(self.compute_dtype))


def empty_4bit(module: nn.Linear, quantization: str, dtype: torch.dtype) -> bnb.nn.Linear4bit:
    """A Linear4bit of the same shape, without its weight."""
    with torch.device("meta"):
        layer = Linear4bit(
            module.in_features, module.out_features, module.bias is not None,
            compute_dtype=dtype, compress_statistics=True, quant_type=quantization,
        )  # fmt: skip
    layer.support_avx512bf16_for_cpu = False
    return layer


def quantize_into(layer: bnb.nn.Linear4bit, weight: Tensor, quantization: str, dtype: torch.dtype) -> None:
    """Quantise (out, in) weights into a Linear4bit, on the device where they are; they dequantise to `dtype`."""
    packed = bnb.nn.Params4bit(weight.float(), quant_type=quantization, compress_statistics=True, module=layer)
    layer.weight = packed.to(weight.device)  # this is where bitsandbytes quantises
    layer.weight.quant_state.dtype = dtype


def quantize_linear(linear: nn.Linear, quantization: str, dtype: torch.dtype) -> bnb.nn.Linear4bit:
    """A Linear4bit with the weight of an ordinary linear layer, on the same device."""
    layer = empty_4bit(linear, quantization, dtype)
    quantize_into(layer, linear.weight.detach(), quantization, dtype)
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.detach().to(dtype), requires_grad=False)
    return layer


def dequantized_weight(linear: nn.Module) -> Tensor:
    """A linear layer's weight as it computes with it: (out, in), in the compute dtype."""
    if isinstance(linear, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    return linear.weight.data
