"""A forecast of training's peak memory, from shapes alone, and where the peak comes from.

At the peak, in the backward pass, these are on the device at once:

    base          the frozen weights, as they are stored
    adapter       A and B, their gradients (fp32) and AdamW's two moments (8 bits, or fp32)
    activations   what the backward pass needs of the forward: with checkpointing the input of each layer and all of
                  one layer, without it all of every layer; one layer's dequantised weights; cuBLAS's workspaces
    logits        what the supervised positions' logits take beyond the rest of the backward, which comes after them

The activations are counted line by line: of a packed micro-batch after `decoder.py`, where the forecast is within 10%
of what was measured, and of a padded one roughly, after the modules of Qwen2 and Llama.

When memory runs out all the same, the same forecast says which options would have freed how much.
"""

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
from transformers import PreTrainedModel

from .bits import bnb
from .lora import lora_layers, lora_parameters
from .sharding import is_sharded

GIB = 2**30
LOGIT_ROWS = 64  # positions whose logits exist at a time
MOST_TOKENS = {"cuda": 16384, "cpu": 2048}  # of a micro-batch; larger ones are no faster
ALONE = "takes more memory than there is, and a rank can't try less by itself where the base is shared out"
WORKSPACE = 8 * 2**20  # bytes of cuBLAS's, one for each of two streams: see model.py


@dataclass(frozen=True)
class Forecast:
    """Bytes by what they are for."""

    base: int
    adapter: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.base + self.adapter + self.activations + self.logits

    def __str__(self) -> str:
        parts = ", ".join(f"{k} {getattr(self, k) / GIB:.2f}" for k in ("base", "adapter", "activations", "logits"))
        return f"{self.total / GIB:.2f} GiB ({parts})"


def stored_bytes(model: torch.nn.Module) -> int:
    """Bytes on this rank of every parameter and buffer, quantisation scales included; shared memory counts once."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            tensors += [state.absmax, *([state.state2.absmax] if state.nested else [])]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if not t.is_meta}
    return sum(storage.nbytes() for storage in storages.values())


def forecast(
    model: PreTrainedModel,
    dtype: torch.dtype,
    batch: int,
    length: int,
    supervised: int,
    checkpointing: bool,
    bits8: bool,
    packed: bool = False,
) -> Forecast:
    """Forecast the peak of training on micro-batches of `batch` rows of `length` tokens.

    Args:
        supervised: supervised tokens in the micro-batch.
        bits8: 8-bit optimizer state.
        packed: computed by `decoder.Decoder`, where only batch * length counts.
    """
    c = model.config
    s, low = dtype.itemsize, 0 if dtype == torch.float32 else dtype.itemsize
    d, inner, vocab, layers = c.hidden_size, c.intermediate_size, c.vocab_size, c.num_hidden_layers
    head = getattr(c, "head_dim", None) or d // c.num_attention_heads
    q, kv = c.num_attention_heads * head, c.num_key_value_heads * head
    loras = lora_layers(model).values()
    trained = sum(p.numel() for p in lora_parameters(model).values())
    tokens, quantised = batch * length, [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]

    if packed:
        ranks = sum(layer.rank for layer in loras) / layers
        per_layer = (  # bytes of one layer that wait for the backward pass, a token
            2 * (4 * d + s * d + 4)  # two norms: the residual stream, the normed, the reciprocal of its size
            + s * (q + 2 * kv) + s * q + 4 * c.num_attention_heads  # attention: q, k, v, the output, log-sum-exp
            + (2 * s * q if not low else 0)  # fp32's attention wants k and v for each head
            + s * 2 * inner + s * ranks  # gate and up; A drop(x)
        )  # fmt: skip
        waiting = tokens * ((4 * d * layers + per_layer) if checkpointing else per_layer * layers)
        after = tokens * (s * inner + 4 * d + s * d)  # the gradients of the stream and of gate * up
        rows = min(supervised, LOGIT_ROWS)
        during = tokens * (4 * d + 2 * s * d) + 3 * supervised * s * d + rows * vocab * (4 + s)
        if checkpointing:  # the logits are gone before a layer is computed again
            during -= tokens * per_layer
        linears = [m for m in model.get_decoder().layers.modules() if isinstance(m, nn.Linear)]
        scratch = s * sum(m.in_features * m.out_features for m in linears) // layers
        fixed = 2 * WORKSPACE + (scratch if quantised or is_sharded(model) else 0)
        return Forecast(
            base=stored_bytes(model) - 4 * trained,
            adapter=trained * (4 + 4 + low + (2 if bits8 else 8)),
            activations=int(waiting + after + fixed),
            logits=int(max(0, during - after)),
        )

    lora_inputs = sum(layer.in_features for layer in loras) / layers
    per_token = (  # bytes of one layer that wait for the backward pass, a token
        2 * (4 * d + 4 * d)  # two norms: input and normalised input, fp32
        + lora_inputs * (1 + s)  # per LoRA layer: dropout's mask and the dropped input
        + 4 * 2 * (q + kv)  # q and k before and after the rotary embedding, fp32
        + s * (2 * q + 2 * kv)  # attention: q, k, v and its output
        + 4 * 3 * inner  # gate, its activation, up: fp32
    )
    largest = max((m.in_features * m.out_features for m in quantised), default=0)
    activations = tokens * ((4 * d * layers + per_token) if checkpointing else per_token * layers)
    activations += 2 * 4 * tokens * inner + largest * s  # the gradients in flight and one dequantised weight
    return Forecast(
        base=stored_bytes(model) - 4 * trained,
        adapter=trained * (4 + 4 + (2 if bits8 else 8)),
        activations=int(activations),
        logits=supervised * vocab * (2 * s + 8),
    )


def plan(
    model: PreTrainedModel,
    dtype: torch.dtype,
    rows: int,
    longest: int,
    supervised: int,
    bits8: bool,
    available: float,
    checkpointing: str = "auto",
    tokens: int | None = None,
) -> tuple[bool, int]:
    """(whether to checkpoint, tokens of a packed micro-batch): the fastest of which the forecast fits.

    Without checkpointing where that fits, and as many tokens as a step can have; checkpointing that was asked for is
    there to save memory, so micro-batches are then as small as the longest row.

    Args:
        rows: of an optimizer step. longest: row, in tokens. supervised: the most in a row.
        available: bytes. checkpointing: auto, on or off. tokens: of a micro-batch, where that is given.
    """
    most = max(longest, min(MOST_TOKENS[next(model.parameters()).device.type], rows * longest))
    sizes = [most]
    while sizes[-1] > longest:
        sizes.append(max(longest, sizes[-1] // 2))
    if tokens:
        sizes = [max(longest, tokens)]
    elif checkpointing == "on":
        sizes = [longest]
    for on in {"auto": (False, True), "on": (True,), "off": (False,)}[checkpointing]:
        for n in sizes:
            taught = min(n, supervised * -(-n // longest))
            if forecast(model, dtype, 1, n, taught, on, bits8, packed=True).total <= available:
                return on, n
    return on, sizes[-1]


def ways_to_save(
    model: PreTrainedModel,
    dtype: torch.dtype,
    batch: int,
    length: int,
    supervised: int,
    checkpointing: bool,
    bits8: bool,
    rows_per_step: int,
    lengths: Sequence[int],
    available: float,
    packed: bool = False,
) -> list[str]:
    """What would lower the forecast for such a micro-batch, in order of effect; each way is forecast on its own.

    Args:
        batch, length, supervised, checkpointing, bits8, packed: as for `forecast`; packed rows are a batch of one.
        rows_per_step: micro-batch size times accumulation, which --batch-size need not change.
        lengths: of all rows, to say how many a smaller --max-length leaves out.
        available: bytes; of several values of an option, the mildest whose forecast fits is named.
    """
    shape = {"batch": batch, "length": length, "supervised": supervised,
             "checkpointing": checkpointing, "bits8": bits8, "packed": packed}  # fmt: skip
    now = forecast(model, dtype, **shape)

    def total(**changes) -> int:
        return forecast(model, dtype, **{**shape, **changes}).total

    ways = []
    if not checkpointing:
        ways.append((total(checkpointing=True), "--gradient-checkpointing on", "same results, more time"))
    longest = max(lengths)
    if packed and length > longest:
        sizes = sorted({max(longest, length // n) for n in (2, 4, 8, 16, 32)}, reverse=True)
        n = next((n for n in sizes if total(length=n) <= available), sizes[-1])
        ways.append((total(length=n), f"--micro-batch-tokens {n}", "same steps, but for rounding"))
    sizes = [b for b in range(batch // 2, 0, -1) if rows_per_step % b == 0]
    if sizes:
        of_size = {b: total(batch=b, supervised=-(-supervised * b // batch)) for b in sizes}
        b = next((b for b in sizes if of_size[b] <= available), sizes[-1])
        ways.append((of_size[b], f"--batch-size {b} --grad-accum {rows_per_step // b}", "same steps, but for rounding"))
    shorter = [n for n in (longest * 3 // 4, longest // 2, longest // 4) if n >= min(lengths)]
    if shorter and length <= longest:
        n = next((n for n in shorter if total(length=n) <= available), shorter[-1])
        lost = sum(other > n for other in lengths)
        ways.append((total(length=n), f"--max-length {n}", f"leaves {lost:,} of {len(lengths):,} rows out"))
    if not bits8:
        ways.append((total(bits8=True), "--optimizer paged_adamw8bit", "moments in 8 bits"))
    plain = [m.weight for m in model.get_decoder().layers.modules()
             if isinstance(m, nn.Linear) and not isinstance(m, bnb.nn.Linear4bit)]  # fmt: skip
    if plain:
        saved = sum(w.numel() * (w.element_size() - 4.127 / 8) for w in plain)
        ways.append((now.total - int(saved), "--quantization nf4", "another base"))
    return [
        f"{flag}: {now.total / GIB:.2f} -> {after / GIB:.2f} GiB, {effect}"
        for after, flag, effect in sorted(ways)
        if after < 0.98 * now.total
    ]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whichever device; libraries have several words for it."""
    words = ("out of memory", "DefaultCPUAllocator", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(w in str(error) for w in words)
    )


def release() -> None:
    """Give back what a failed attempt held. To be called behind its `except`: the error holds the attempt's tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize() -> None:
    """Wait until a GPU, if there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def total_bytes(device: torch.device) -> int:
    """Memory of the device in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**63


def available(device: torch.device) -> float:
    """Bytes that a forecast may fill: with room for fragments, and on a CPU for everything else that runs there."""
    if device.type == "cuda":
        return 0.6 * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    return 0.5 * total_bytes(device)


def taken(device: torch.device) -> str:
    """Where memory stands, in words."""
    return f"peak so far {peak_gib(device):.2f} GiB of {total_bytes(device) / GIB:.2f}"


def peak_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    import resource
    import sys

    scale = 1 if sys.platform == "darwin" else 1024  # bytes on a Mac, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / GIB
