"""A forecast of training's peak memory, and options that would lower it.

At the peak, in the backward pass, these are on the device:

    program       the rest of the process; on a CPU only, where just the whole resident memory can be measured
    base          the frozen weights as stored, the dequantised weights that are kept, cuBLAS's workspaces
    adapter       A and B, their gradients and AdamW's two moments (8 bits, or fp32)
    tokens        forward and backward of a micro-batch: nearly linear in its number of tokens

The line is fitted to two micro-batches, computed and discarded, that have the largest possible number of supervised
tokens. So the forecast holds for every model and engine, with and without gradient checkpointing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn

from ..base import decoder_layers
from ..data.rows import Row
from ..engine import Engine
from ..fused.graphs import round_up
from ..system.bits import bnb
from ..system.device import GIB, peak_bytes, release, restart_peak, taken, unless_out_of_memory

MOST_TOKENS = {"cuda": 16384, "cpu": 2048}  # in a micro-batch; larger ones are no faster
TRIED_TOKENS = {"cuda": 8192, "cpu": 256}  # at most, in the larger of the two measured micro-batches
WORKSPACE = 8 * 2**20  # bytes of cuBLAS's workspace for each of two streams, see base.py


@dataclass(frozen=True)
class Footprint:
    """Bytes at the peak. A micro-batch of N tokens takes fixed + per_token * N."""

    base: int
    adapter: int
    fixed: float
    per_token: float
    program: int = 0  # on a CPU, the process without all these

    def total(self, tokens: int) -> int:
        """The peak in bytes with micro-batches of `tokens` tokens."""
        return int(self.program + self.base + self.adapter + max(0.0, self.fixed + self.per_token * tokens))

    def describe(self, tokens: int) -> str:
        """The peak and its parts, for a message."""
        total = self.total(tokens)
        unit, name, digits = (GIB, "GiB", 2) if total >= 0.1 * GIB else (2**20, "MiB", 1)
        parts = {"program": self.program, "base": self.base, "adapter": self.adapter}
        parts[f"{tokens:,} tokens"] = total - sum(parts.values())
        shown = ", ".join(f"{k} {n / unit:.{digits}f}" for k, n in parts.items() if n or k != "program")
        return f"{total / unit:.{digits}f} {name} ({shown})"


@dataclass(frozen=True)
class Workload:
    """What limits the size of a micro-batch.

    n_rows: rows of an optimizer step, in this process. max_seqlen, n_supervised: the most tokens and supervised tokens
    of a row. bits8: whether the optimizer's state is in 8 bits.
    """

    n_rows: int
    max_seqlen: int
    n_supervised: int
    bits8: bool

    def probe(self, tokens: int) -> list[Row]:
        """Rows with `tokens` tokens in total, as long as the longest row and as densely supervised as any."""
        lengths = [self.max_seqlen] * (tokens // self.max_seqlen) + [tokens % self.max_seqlen]
        return [
            Row(torch.arange(n, dtype=torch.int32) % 100, torch.arange(n) >= n - min(self.n_supervised, n - 1), "")
            for n in lengths
            if n > 1
        ]


def stored_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters, buffers and quantisation scales in this process; shared memory counts once."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            tensors += [state.absmax, *([state.state2.absmax] if state.nested else [])]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if not t.is_meta}
    return sum(storage.nbytes() for storage in storages.values())


def measure(engine: Engine, work: Workload, tokens: int) -> Footprint:
    """Measure a micro-batch as large as fits, up to `tokens` or TRIED_TOKENS, and a smaller one. Zeroes the gradients.

    Raises:
        MemoryError: not even a few tokens fit.
    """
    release()  # only once, since garbage collection takes a quarter of a second
    found: dict[int, int] = {}
    n = max(4, min(tokens, TRIED_TOKENS[engine.device.type]))
    _added(engine, work, min(n, 64))  # the first one also allocates libraries' workspaces and compiles
    while len(found) < 2:
        if n < 2:
            raise MemoryError(f"not even {2 * n} tokens fit into the memory ({taken(engine.device)})")
        if (added := _added(engine, work, n)) is not None:
            found[n] = added
        n //= 2
    (large, most), (small, least) = found.items()
    slope = max(0.0, (most - least) / (large - small))
    engine.adapter.grads.zero_()
    trained = engine.adapter.weights.numel()
    base = stored_bytes(engine.base.model) - 4 * trained + sum(t.nbytes for t in engine.buffers)
    on_cpu = engine.device.type == "cpu"
    return Footprint(
        base=base + (0 if on_cpu else 2 * WORKSPACE),
        adapter=trained * (4 + 4 + (2 if work.bits8 else 8)),
        fixed=most - slope * large,
        per_token=slope,
        program=max(0, restart_peak(engine.device) - base - 8 * trained) if on_cpu else 0,
    )


def _added(engine: Engine, work: Workload, tokens: int) -> int | None:
    """Bytes that a micro-batch adds at its peak; None if they don't fit."""
    device = engine.device
    factor, seed = torch.zeros((), device=device), torch.zeros((), dtype=torch.int32, device=device)

    def compute() -> int:
        rows = work.probe(tokens)
        batch = engine.pack(rows, n_supervised=round_up(sum(r.n_supervised for r in rows), tokens))
        before = restart_peak(device)
        engine.loss_and_gradients(batch, factor, seed)
        return peak_bytes(device) - before

    return unless_out_of_memory(compute, engine.base, tokens, f"a micro-batch of {tokens:,} tokens", "", "")


def plan(
    engine: Engine, work: Workload, fits: Callable[[int], bool], checkpointing: str = "auto", tokens: int | None = None
) -> tuple[bool, int, Footprint]:
    """The fastest way to compute that fits: (gradient checkpointing, tokens of a micro-batch, its footprint).

    Prefers no checkpointing, then the largest micro-batch. If nothing fits, returns the last that was tried.

    Args:
        fits: whether a peak of that many bytes fits. checkpointing: auto, on or off. tokens: the tokens of a
            micro-batch, if the user gives them.
    """
    longest = work.max_seqlen
    most = tokens or min(MOST_TOKENS[engine.device.type], work.n_rows * longest)
    sizes = [max(longest, most)]
    while sizes[-1] > longest and not tokens:
        sizes.append(max(longest, sizes[-1] // 2))
    for on in {"auto": (False, True), "on": (True,), "off": (False,)}[checkpointing]:
        engine.checkpointing = on
        footprint = measure(engine, work, sizes[0])
        for n in sizes:
            if fits(footprint.total(n)):
                return on, n, footprint
    return on, n, footprint


def ways_to_save(
    engine: Engine, work: Workload, footprint: Footprint, lengths: Sequence[int], room: float
) -> list[str]:
    """Options that would lower the peak of a micro-batch of one longest row, each by itself, in order of effect.

    Args:
        lengths: the tokens of each row, to count how many a smaller --max-length leaves out.
        room: bytes; of several values of --max-length, the largest that fits is named.
    """
    tokens = work.max_seqlen
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
    if engine.base.quantization == "none":
        plain = [m.weight for m in decoder_layers(engine.base.model).modules() if isinstance(m, nn.Linear)]
        saved = sum(w.numel() * (w.element_size() - 4.127 / 8) for w in plain)
        ways.append((now - int(saved), "--quantization nf4", "another base"))
    return [
        f"{flag}: {now / GIB:.2f} -> {after / GIB:.2f} GiB, {effect}"
        for after, flag, effect in sorted(ways)
        if now - after > 0.02 * (now - footprint.program)
    ]
