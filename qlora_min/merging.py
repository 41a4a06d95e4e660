"""Merging: adapter + base -> an ordinary checkpoint, checked after it was read back from disk.

    W_merged = W + (alpha / r) B A

Which W? The adapter was trained against the dequantised NF4 weights and has learned to correct their error too, so by
default BA is added to those, and every other linear layer of the decoder gets its dequantised weight as well. With
`onto="original"` BA is added to the 16-bit weights. The result is a model that was never trained; its distance from the
trained one is measured.

The sum is computed in fp32 and rounded once, to the file's dtype. The check compares logits, computed in fp32: the sum
must give those of the adapter, and the file, read back, those of the rounded sum. The error of rounding to the file's
dtype grows with the size of the update; it is measured (the file against the adapter), not bounded.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from transformers import AutoModelForCausalLM

from .adapter import load_adapter
from .base import decoder_prefix
from .data.templates import tokenizer_to_save
from .lora import LoRALinear, lora_layers
from .ops.probe import Probe, agreement, distance
from .system.bits import dequantized_weight
from .system.device import DTYPES
from .system.files import atomic_folder, write_text
from .system.peft_files import said_to_merge
from .system.serving import own_dtype, save_rounded
from .system.text import Failed

BOUND = 1e-4  # between two ways to compute the same in fp32
CPU = torch.device("cpu")


class MergeError(Failed):
    """The merged checkpoint does not compute what the adapter does; nothing was kept."""


@dataclass(frozen=True)
class Merged:
    """What the check measured on its rows. Distances: norm(difference) / norm(reference).

    exact: of the fp32 sum from the adapter on the weights merged onto. difference, agreement, loss_before, loss_after:
    the file against the same, in logits, equal top-1 tokens and the answers' loss. from_trained: of the file from the
    adapter on the weights that it was trained on (`bits`); equals `difference` unless merged onto others.
    """

    dtype: str
    onto: str
    bits: str
    exact: float
    difference: float
    agreement: float
    loss_before: float
    loss_after: float
    from_trained: float


def merge_adapter(
    adapter: Path,
    output: Path,
    dtype: str | None = None,
    onto: str | None = None,
    model: str | None = None,
    card: Callable[[Merged], str] = repr,
    quantization: str | None = None,
) -> Merged:
    """Merge an adapter into its base, write an ordinary Hugging Face folder to `output`, read it back and compare.

    Args:
        dtype: of the file: fp16, bf16 or fp32; the base's own if not given.
        onto: dequantized (the weights that the adapter was trained on, the default) or original.
        model: where the base is, if not where the adapter's files say.
        card: what was measured -> the text of the folder's model card.
        quantization: what the adapter was trained on, if its files don't say it.

    Raises:
        ValueError: bad input, an output directory that holds something already, or a merged weight that overflows.
        MergeError: the merge is wrong; the output is not kept.
    """
    if dtype not in (None, *DTYPES) or onto not in (None, "dequantized", "original"):
        raise ValueError(f"dtype {dtype!r}, onto {onto!r}: expected fp16, bf16 or fp32, and dequantized or original")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output-dir {output}: exists and is not an empty directory; choose another")
    loaded = load_adapter(adapter, model, "fp32", CPU, said_to_merge(adapter, quantization, onto))
    bits, probe = loaded.quantization, Probe(loaded.encoder)
    onto = "original" if onto == "original" or bits == "none" else "dequantized"
    trained = reference = probe.logits(loaded.model)
    if onto == "original" and bits != "none":
        loaded = load_adapter(adapter, model, "fp32", CPU, "none")
        reference = probe.logits(loaded.model)
    fold(loaded.model)
    if any(weight.dtype != torch.float32 for weight in loaded.model.parameters()):
        raise MergeError("the merge is wrong: a layer is still quantised")
    exact = _same(probe.logits(loaded.model), reference, "the weights merged in fp32 compute")
    dtype = dtype or own_dtype(loaded.folder)
    with atomic_folder(output) as new:
        save_rounded(new, loaded.model, dtype, tokenizer_to_save(loaded.encoder))
        rounded = probe.logits(loaded.model.float())
        del loaded
        gc.collect()
        reloaded = AutoModelForCausalLM.from_pretrained(new, dtype=torch.float32, trust_remote_code=False).eval()
        logits = probe.logits(reloaded)
        _same(logits, rounded, "the file computes")
        costs = distance(logits, reference), agreement(logits, reference), probe.loss(reference), probe.loss(logits)
        merged = Merged(dtype, onto, bits, exact, *costs, distance(logits, trained))
        write_text(new / "README.md", card(merged))
    return merged


def _same(logits: Tensor, reference: Tensor, what: str) -> float:
    """The distance of logits that have to be the same. Raises MergeError if it is above BOUND, or not a number."""
    if not (found := distance(logits, reference)) <= BOUND:
        raise MergeError(f"the merge is wrong: {what} logits {found:.1e} of their norm away; rounding is below {BOUND}")
    return found


def decoder_linears(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, layer) of every linear layer of the decoder, with or without LoRA around it."""
    prefix, inner = decoder_prefix(model), {layer.linear for layer in lora_layers(model).values()}
    return [
        (name, module)
        for name, module in model.named_modules()
        if name.startswith(prefix) and isinstance(module, LoRALinear | nn.Linear) and module not in inner
    ]


@torch.no_grad()
def fold(model: nn.Module) -> None:
    """Make every linear layer of the decoder an ordinary nn.Linear again, with its LoRA update added, in fp32."""
    for name, module in decoder_linears(model):
        lora = isinstance(module, LoRALinear)
        linear = module.linear if lora else module
        weight = dequantized_weight(linear).float()
        if lora:
            weight = weight + module.delta().to(weight)
        with torch.device("meta"):
            plain = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if linear.bias is not None:
            plain.bias = nn.Parameter(linear.bias.detach().float(), requires_grad=False)
        model.set_submodule(name, plain)
