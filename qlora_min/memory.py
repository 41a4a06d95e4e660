"""Training's peak memory, measured before it begins, and what would lower it.

At the peak, in the backward pass, these are on the device at once:

    base          the frozen weights as they are stored, one layer's dequantised weights, cuBLAS's workspaces
    adapter       A and B, their gradients and AdamW's two moments (8 bits, or fp32)
    tokens        what forward and backward of a micro-batch take: nearly a straight line over its tokens

The line is laid through two micro-batches that are computed and thrown away, with as many supervised tokens as any can
have. So it holds for every model and engine, with and without checkpointing, and needs to know nothing of them.
"""

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from .batches import round_up
from .bits import bnb
from .data import Row
from .model import Base, decoder_layers
from .sharding import is_sharded

if TYPE_CHECKING:
    from .engine import Engine

GIB = 2**30
MOST_TOKENS = {"cuda": 16384, "cpu": 2048}  # of a micro-batch; larger ones are no faster
TRIED_TOKENS = {"cuda": 8192, "cpu": 256}  # of the larger micro-batch that is measured, at most
WORKSPACE = 8 * 2**20  # bytes of cuBLAS's, one for each of two streams: see model.py
ALONE = "takes more memory than there is, and with --shard a process can't try a smaller one by itself"


@dataclass(frozen=True)
class Footprint:
    """Bytes by what they are for; `fixed` and `per_token` make up what a micro-batch takes."""

    base: int
    adapter: int
    fixed: float
    per_token: float

    def total(self, tokens: int) -> int:
        """The peak with micro-batches of so many tokens."""
        return int(self.base + self.adapter + max(0.0, self.fixed + self.per_token * tokens))

    def describe(self, tokens: int) -> str:
        """In words."""
        total = self.total(tokens)
        unit, name, digits = (GIB, "GiB", 2) if total >= 0.1 * GIB else (2**20, "MiB", 1)
        base, adapter, rest = (
            f"{n / unit:.{digits}f}" for n in (self.base, self.adapter, total - self.base - self.adapter)
        )
        return f"{total / unit:.{digits}f} {name} (base {base}, adapter {adapter}, {tokens:,} tokens {rest})"


@dataclass(frozen=True)
class Workload:
    """What decides how large a micro-batch can be: rows of an optimizer step (of this process), the longest row in
    tokens, the most supervised tokens of a row, and whether the optimizer's state is in 8 bits."""

    rows: int
    longest: int
    supervised: int
    bits8: bool

    def probe(self, tokens: int) -> list[Row]:
        """Rows of `tokens` tokens in all, as long as they come and as densely supervised."""
        lengths = [self.longest] * (tokens // self.longest) + [tokens % self.longest]
        return [
            Row(torch.arange(n, dtype=torch.int32) % 100, torch.arange(n) >= n - min(self.supervised, n - 1), "")
            for n in lengths
            if n > 1
        ]


def stored_bytes(model: torch.nn.Module) -> int:
    """Bytes on this rank of every parameter and buffer, quantisation scales included; shared memory counts once."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            tensors += [state.absmax, *([state.state2.absmax] if state.nested else [])]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if not t.is_meta}
    return sum(storage.nbytes() for storage in storages.values())


def measure(engine: "Engine", work: Workload, tokens: int) -> Footprint:
    """What micro-batches take, from two that are computed: of `tokens`, or what fits, and half. Clears the gradients.

    Raises:
        MemoryError: not even a few tokens fit.
    """
    release()  # once: collecting garbage takes a quarter of a second
    found: dict[int, int] = {}
    n = max(4, min(tokens, TRIED_TOKENS[engine.device.type]))
    _added(engine, work, min(n, 64))  # the first pays for libraries' workspaces, and for compiling
    while len(found) < 2:
        if n < 2:
            raise MemoryError(f"not even {2 * n} tokens fit into the memory ({taken(engine.device)})")
        added = _added(engine, work, n)
        if added is not None:
            found[n] = added
        n //= 2
    (large, most), (small, least) = found.items()
    slope = max(0.0, (most - least) / (large - small))
    engine.adapter.grads.zero_()
    trained = engine.adapter.weights.numel()
    workspaces = 2 * WORKSPACE if engine.device.type == "cuda" else 0
    return Footprint(
        base=stored_bytes(engine.base.model) - 4 * trained + sum(t.nbytes for t in engine.buffers) + workspaces,
        adapter=trained * (4 + 4 + (2 if work.bits8 else 8)),
        fixed=most - slope * large,
        per_token=slope,
    )


def _added(engine: "Engine", work: Workload, tokens: int) -> int | None:
    """Bytes at the peak of a micro-batch beyond those that were there before; None where they are not to be had."""
    device = engine.device
    factor, seed = torch.zeros((), device=device), torch.zeros((), dtype=torch.int32, device=device)

    def compute() -> int:
        rows = work.probe(tokens)
        batch = engine.pack(rows, supervised=round_up(sum(r.n_supervised for r in rows)))
        before = _restart_peak(device)
        engine.loss_and_gradients(batch, factor, seed)
        return peak_bytes(device) - before

    return unless_out_of_memory(compute, engine.base, tokens, f"a micro-batch of {tokens:,} tokens", "", "")


def _restart_peak(device: torch.device) -> int:
    """Forget the peak so far; returns the bytes that are taken now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError, AttributeError):  # no Linux: the peak stays that of loading, and too little may be seen
        ctypes.CDLL(None).malloc_trim(0)  # what is free, but still the process's, would hide what is added
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes(device)


def plan(
    engine: "Engine",
    work: Workload,
    fits: Callable[[int], bool],
    checkpointing: str = "auto",
    tokens: int | None = None,
) -> tuple[bool, int, Footprint]:
    """(whether to checkpoint, tokens of a micro-batch, what that takes): the fastest that fits.

    Without checkpointing where that fits, and as many tokens as a step can have; checkpointing that was asked for is
    there to save memory, so micro-batches are then as small as the longest row.

    Args:
        fits: whether there is room for a peak of so many bytes. checkpointing: auto, on or off. tokens: of a
            micro-batch, where that is given.
    """
    most = max(work.longest, min(MOST_TOKENS[engine.device.type], work.rows * work.longest))
    sizes = [most]
    while sizes[-1] > work.longest:
        sizes.append(max(work.longest, sizes[-1] // 2))
    if tokens:
        sizes = [max(work.longest, tokens)]
    elif checkpointing == "on":
        sizes = [work.longest]
    for on in {"auto": (False, True), "on": (True,), "off": (False,)}[checkpointing]:
        engine.checkpointing = on
        footprint = measure(engine, work, sizes[0])
        for n in sizes:
            if fits(footprint.total(n)):
                return on, n, footprint
    return on, n, footprint


def ways_to_save(
    engine: "Engine", work: Workload, footprint: Footprint, lengths: Sequence[int], room: float
) -> list[str]:
    """What would lower the peak of the longest row by itself, in order of effect; each way alone.

    Args:
        lengths: of all rows, to say how many a smaller --max-length leaves out.
        room: bytes; of several values of an option, the mildest that fits is named.
    """
    tokens = work.longest
    now, ways = footprint.total(tokens), []
    if not engine.checkpointing:
        engine.checkpointing = True
        after = measure(engine, work, tokens).total(tokens)
        engine.checkpointing = False
        ways.append((after, "--gradient-checkpointing on", "same results, more time"))
    shorter = [n for n in (tokens * 3 // 4, tokens // 2, tokens // 4) if n >= min(lengths)]
    if shorter:
        n = next((n for n in shorter if footprint.total(n) <= room), shorter[-1])
        lost = sum(other > n for other in lengths)
        ways.append((footprint.total(n), f"--max-length {n}", f"leaves {lost:,} of {len(lengths):,} rows out"))
    if not work.bits8:
        saved = 6 * engine.adapter.weights.numel()
        ways.append((now - saved, "--optimizer paged_adamw8bit", "moments in 8 bits"))
    plain = [m.weight for m in decoder_layers(engine.base.model).modules()
             if isinstance(m, nn.Linear) and not isinstance(m, bnb.nn.Linear4bit)]  # fmt: skip
    if plain:
        saved = sum(w.numel() * (w.element_size() - 4.127 / 8) for w in plain)
        ways.append((now - int(saved), "--quantization nf4", "another base"))
    return [
        f"{flag}: {now / GIB:.2f} -> {after / GIB:.2f} GiB, {effect}"
        for after, flag, effect in sorted(ways)
        if after < 0.98 * now
    ]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whichever device; libraries have several words for it."""
    words = ("out of memory", "DefaultCPUAllocator", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(w in str(error) for w in words)
    )


def unless_out_of_memory(compute: Callable[[], Any], base: Base, rows: int, several: str, one: str, fix: str) -> Any:
    """What `compute` returns; None where memory runs out, for the caller to go on with half of the rows.

    Args:
        rows: how many `compute` takes; several, one: what it does, and fix: what would need less, for messages.

    Raises:
        MemoryError: there is too little for one row, or --shard is on: a process can't try less by itself.
    """
    try:
        return compute()
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        if is_sharded(base.model):
            raise MemoryError(f"{several} {ALONE}") from None
    release()
    if rows == 1:
        device = next(base.model.parameters()).device
        raise MemoryError(
            f"{one} takes more memory than there is ({taken(device)}); {fix}, or free the device of other programs"
        )
    return None


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


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration):  # Linux: what is of this process alone, and can be restarted
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    import resource  # which Windows has not

    scale = 1 if sys.platform == "darwin" else 1024  # bytes on a Mac, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def peak_gib(device: torch.device) -> float:
    """`peak_bytes` in GiB."""
    return peak_bytes(device) / GIB
