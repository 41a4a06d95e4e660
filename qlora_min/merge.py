"""Merging: adapter + base -> an ordinary checkpoint, checked after it was read back from disk.

    W_merged = W + (alpha / r) B A

Which W? The adapter was trained against the dequantised NF4 weights and has learned to correct their error too, so by
default BA is added to those, and every other linear layer of the decoder gets its dequantised weight as well: the
merged model computes what was trained. `base="original"` adds BA to the 16-bit weights that the NF4 ones were made
from: a model that was never trained, whose distance from the trained one is measured and printed.

The merged weight is computed in fp32 and rounded once, to the file's dtype. The check reads the file back, computes in
fp32 on both sides whatever the file's dtype, and compares by norm(difference) / norm(adapter's logits).
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from transformers import AutoModelForCausalLM

from .adapter import load_adapter, read_config
from .data import Row
from .engine import Modules
from .evaluate import Evaluation, evaluate
from .files import atomic_folder, write_text
from .hub import CARD, merged_card
from .lora import LoRALinear, lora_disabled
from .model import DTYPES, decoder_prefix, dequantized_weight, pick_device, quantize_linear

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
    """What the check measured: distances are norm(difference) / norm(reference), agreement the share of equal top-1."""

    difference: float
    agreement: float
    bound: float
    from_trained: float  # distance from the adapter on the NF4 base: the same as `difference` unless base is original


def merge(
    adapter: Path, output: Path, dtype: str = "fp16", base: str = "dequantized", model: str | None = None
) -> Merged:
    """Merge an adapter into its base, write the checkpoint to `output`, read it back and compare.

    The checkpoint is an ordinary Hugging Face folder: config, weights, generation config, tokenizer, chat template.

    Args:
        dtype: of the file: fp16, bf16 or fp32.
        base: dequantized (the weights that the adapter was trained on) or original.
        model: where the base is, if not where the adapter's files say.

    Raises:
        ValueError: bad input, or an output directory that holds something already.
        MergeError: the difference is above the bound for the dtype; the output is not kept.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output-dir {output}: exists and is not an empty directory; choose another")
    cpu = torch.device("cpu")
    loaded = load_adapter(adapter, model, "fp32", cpu)
    rows = [
        torch.tensor([loaded.encoder.encode([{"role": "user", "content": q}, {"role": "assistant", "content": a}])[0]])
        for q, a in PROMPTS
    ]
    trained = _logits(loaded.model, rows)
    if base == "original":
        loaded = load_adapter(adapter, model, "fp32", cpu, quantization="none")
    reference = trained if base == "dequantized" else _logits(loaded.model, rows)

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
        result = Merged(
            difference=_distance(logits, reference),
            agreement=(logits.argmax(-1) == reference.argmax(-1)).float().mean().item(),
            bound=BOUNDS[dtype],
            from_trained=_distance(logits, trained),
        )
        if not result.difference <= result.bound:  # NaN fails too
            raise MergeError(
                f"the merged checkpoint's logits are {result.difference:.1e} from the adapter's, "
                f"the bound for {dtype} is {result.bound:.1e}; {output} was not written"
            )
        how = (
            f"onto its {'dequantised' if base == 'dequantized' else 'original'} weights, in {dtype}; read back, its "
            f"logits differ from the adapter's on that base by {result.difference:.1e} of their norm"
        )
        write_text(new / CARD, merged_card(read_config(adapter), adapter, how))
    return result


def compare_merges(
    adapter: Path, rows: Sequence[Row], model: str | None, precision: str, batch_size: int
) -> dict[str, Evaluation]:
    """Evaluate an adapter in each way it can be used: on its base, and merged in the three ways there are."""
    device = pick_device()
    quantization = read_config(adapter).quantization
    if quantization == "none":
        raise ValueError(f"adapter '{adapter}' was trained on an unquantised base: there is one way to merge it")
    bits = quantization.upper()
    loaded = load_adapter(adapter, model, precision, device)
    longest, results = max(len(row) for row in rows), {}

    def measure(name: str) -> None:
        results[name] = evaluate(Modules(loaded, longest), rows, batch_size, name)

    with lora_disabled(loaded.model):
        measure(f"no adapter, {bits} base")
    measure(f"adapter on the {bits} base")
    fold(loaded.model)
    measure(f"merged onto the dequantised {bits} weights")
    for name, linear in _decoder_linears(loaded.model):
        loaded.model.set_submodule(name, quantize_linear(linear, quantization, loaded.dtype))
    measure(f"merged, then quantised to {bits} again")
    loaded = load_adapter(adapter, model, precision, device, quantization="none")
    fold(loaded.model)
    measure("merged onto the original weights")
    return results


def _decoder_linears(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, layer) of every linear layer of the decoder, with or without LoRA around it."""
    prefix = decoder_prefix(model)
    return [
        (name, module)
        for name, module in model.named_modules()
        if name.startswith(prefix) and isinstance(module, LoRALinear | nn.Linear) and not name.endswith(".base")
    ]


@torch.no_grad()
def fold(model: nn.Module) -> None:
    """Make every linear layer of the decoder an ordinary nn.Linear again, with its LoRA update added, in fp32."""
    for name, module in _decoder_linears(model):
        lora = isinstance(module, LoRALinear)
        linear = module.base if lora else module
        weight = dequantized_weight(linear).float()
        if lora:
            weight = weight + module.delta().to(weight)
        with torch.device("meta"):
            plain = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if linear.bias is not None:
            plain.bias = nn.Parameter(linear.bias.detach().float(), requires_grad=False)
        model.set_submodule(name, plain)


@torch.no_grad()
def _logits(model: nn.Module, rows: list[torch.Tensor]) -> torch.Tensor:
    """(total tokens, V) logits of rows (1, T), in fp32."""
    return torch.cat([model(input_ids=ids, use_cache=False).logits[0].float() for ids in rows])


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
