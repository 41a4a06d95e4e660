"""Training's peak memory, measured before it begins, and what would lower it.

At the peak, in the backward pass, these are on the device at once:

    base          the frozen weights as they are stored, one layer's dequantised weights, cuBLAS's workspaces
    adapter       A and B, their gradients and AdamW's two moments (8 bits, or fp32)
    tokens        what forward and backward of a micro-batch take: nearly a straight line over its tokens

The line is laid through two micro-batches that are computed and thrown away, with as many supervised tokens as any can
have. So it holds for every model and engine, with and without checkpointing, and needs to know nothing of them.
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

MOST_TOKENS = {"cuda": 16384, "cpu": 2048}  # of a micro-batch; larger ones are no faster
TRIED_TOKENS = {"cuda": 8192, "cpu": 256}  # of the larger micro-batch that is measured, at most
WORKSPACE = 8 * 2**20  # bytes of cuBLAS's, one for each of two streams: see base.py


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

    n_rows: int
    max_seqlen: int
    n_supervised: int
    bits8: bool

    def probe(self, tokens: int) -> list[Row]:
        """Rows of `tokens` tokens in all, as long as they come and as densely supervised."""
        lengths = [self.max_seqlen] * (tokens // self.max_seqlen) + [tokens % self.max_seqlen]
        return [
            Row(torch.arange(n, dtype=torch.int32) % 100, torch.arange(n) >= n - min(self.n_supervised, n - 1), "")
            for n in lengths
            if n > 1
        ]


def stored_bytes(model: torch.nn.Module) -> int:
    """Bytes in this process of every parameter and buffer, quantisation scales included; shared memory counts once."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            tensors += [state.absmax, *([state.state2.absmax] if state.nested else [])]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if not t.is_meta}
    return sum(storage.nbytes() for storage in storages.values())


def measure(engine: Engine, work: Workload, tokens: int) -> Footprint:
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


def _added(engine: Engine, work: Workload, tokens: int) -> int | None:
    """Bytes at the peak of a micro-batch beyond those that were there before; None where they are not to be had."""
    device = engine.device
    factor, seed = torch.zeros((), device=device), torch.zeros((), dtype=torch.int32, device=device)

    def compute() -> int:
        rows = work.probe(tokens)
        batch = engine.pack(rows, n_supervised=round_up(sum(r.n_supervised for r in rows)))
        before = restart_peak(device)
        engine.loss_and_gradients(batch, factor, seed)
        return peak_bytes(device) - before

    return unless_out_of_memory(compute, engine.base, tokens, f"a micro-batch of {tokens:,} tokens", "", "")


def plan(
    engine: Engine,
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
    most = max(work.max_seqlen, min(MOST_TOKENS[engine.device.type], work.n_rows * work.max_seqlen))
    sizes = [most]
    while sizes[-1] > work.max_seqlen:
        sizes.append(max(work.max_seqlen, sizes[-1] // 2))
    if tokens:
        sizes = [max(work.max_seqlen, tokens)]
    elif checkpointing == "on":
        sizes = [work.max_seqlen]
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
    """What would lower the peak of the longest row by itself, in order of effect; each way alone.

    Args:
        lengths: of all rows, to say how many a smaller --max-length leaves out.
        room: bytes; of several values of an option, the mildest that fits is named.
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
