"""Merging: adapter + base -> an ordinary checkpoint, checked after it was read back from disk.

    W_merged = W + (alpha / r) B A

Which W? The adapter was trained against the dequantised NF4 weights and has learned to correct their error too, so by
default BA is added to those, and every other linear layer of the decoder gets its dequantised weight as well. With
`onto="original"` BA is added to the 16-bit weights: a model that was never trained; how far it is from the trained one
is measured.

The sum is computed in fp32 and rounded once, to the file's dtype. The check reads the file back, computes in fp32 and
compares by norm(difference) / norm(adapter's logits).
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
from .base import Base, decoder_prefix
from .lora import LoRALinear, lora_layers
from .system.bits import dequantized_weight
from .system.device import DTYPES
from .system.files import atomic_folder, write_text

BOUNDS = {"fp32": 1e-5, "fp16": 1.5e-3, "bf16": 1e-2}

# What the check computes logits for: answers of different lengths, so that many positions are compared.
PROMPTS = (
    ("Which vitamin deficiency causes scurvy?", "Vitamin C, also called ascorbic acid."),
    ("Q: A drug slows conduction in the AV node. Which?\n{'A': 'Verapamil', 'B': 'Insulin'},", "A: Verapamil"),
    ("Name three primary colours and say why they are called so.", "Red, yellow and blue; no mixture gives them."),
    ("def add(a, b):", "    return a + b"),
)


class MergeError(RuntimeError):
    """The merged checkpoint does not compute what the adapter does; nothing was kept."""


@dataclass(frozen=True)
class Merged:
    """What the check measured. Distances: norm(difference) / norm(reference). agreement: fraction of equal top-1."""

    difference: float
    agreement: float
    bound: float
    from_trained: float  # distance from the adapter on the NF4 base: the same as `difference` unless onto the original


def merge_adapter(
    adapter: Path,
    output: Path,
    dtype: str = "fp16",
    onto: str = "dequantized",
    model: str | None = None,
    card: Callable[[Merged], str] = repr,
) -> Merged:
    """Merge an adapter into its base, write an ordinary Hugging Face folder to `output`, read it back and compare.

    Args:
        dtype: of the file: fp16, bf16 or fp32.
        onto: dequantized (the weights that the adapter was trained on) or original.
        model: where the base is, if not where the adapter's files say.
        card: what was measured -> the text of the folder's model card.

    Raises:
        ValueError: bad input, or an output directory that holds something already.
        MergeError: the difference is above the bound; the output is not kept.
    """
    if dtype not in BOUNDS or onto not in ("dequantized", "original"):
        raise ValueError(f"dtype {dtype!r}, onto {onto!r}: expected fp16, bf16 or fp32, and dequantized or original")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output-dir {output}: exists and is not an empty directory; choose another")
    cpu = torch.device("cpu")
    loaded = load_adapter(adapter, model, "fp32", cpu)
    rows = _check_rows(loaded)
    trained = reference = _logits(loaded.model, rows)
    if onto == "original":
        loaded = load_adapter(adapter, model, "fp32", cpu, quantization="none")
        reference = _logits(loaded.model, rows)
    fold(loaded.model)
    loaded.model.to(DTYPES[dtype])
    loaded.model.config.use_cache = True
    with atomic_folder(output) as new:
        loaded.model.save_pretrained(new)
        loaded.encoder.tokenizer.save_pretrained(new)
        del loaded
        gc.collect()
        reloaded = AutoModelForCausalLM.from_pretrained(new, dtype=torch.float32, trust_remote_code=False).eval()
        logits = _logits(reloaded, rows)
        agreement = (logits.argmax(-1) == reference.argmax(-1)).float().mean().item()
        merged = Merged(_distance(logits, reference), agreement, BOUNDS[dtype], _distance(logits, trained))
        if not merged.difference <= merged.bound:  # NaN fails too
            raise MergeError(
                f"the merged checkpoint's logits are {merged.difference:.1e} from the adapter's, "
                f"the bound for {dtype} is {merged.bound:.1e}; {output} was not written"
            )
        write_text(new / "README.md", card(merged))
    return merged


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


def _check_rows(base: Base) -> list[Tensor]:
    """The token ids (1, T) of PROMPTS."""
    return [
        torch.tensor([base.encoder.encode([{"role": "user", "content": q}, {"role": "assistant", "content": a}])[0]])
        for q, a in PROMPTS
    ]


@torch.no_grad()
def _logits(model: nn.Module, rows: list[Tensor]) -> Tensor:
    """(total tokens, V) logits of rows (1, T), in fp32."""
    return torch.cat([model(input_ids=ids, use_cache=False).logits[0].float() for ids in rows])


def _distance(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
