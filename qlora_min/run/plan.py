"""The plan of a run, printed before it starts; an estimate of its time; and an explanation when memory runs out."""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..batches import Packed, balance, dropout_seed
from ..fused.graphs import Captured
from ..lora import lora_layers
from ..ops import formulas
from ..optim import PAGED_FROM
from ..scale.processes import together
from ..system.bits import bnb
from ..system.console import wrapped
from ..system.device import GIB, synchronize, taken, total_bytes
from . import forecast

FEW_STEPS = 50  # of the optimizer; on the demo 12 teach no answers, 39 two thirds, 150 all (README, "Your own data")


def parameter_count(model: torch.nn.Module) -> int:
    """The number of parameters of a model; tied ones count once, and a 4-bit weight by its unquantised shape."""
    packed = bnb.nn.Params4bit
    return sum(p.quant_state.shape.numel() if isinstance(p, packed) else p.numel() for p in model.parameters())


def describe(trainer: Any) -> str:
    """The plan of a run (a `Trainer`) and its forecast memory, one item a line; items without content are left out."""
    c, schedule, adapter = trainer.config, trainer.schedule, trainer.engine.adapter
    trained = adapter.weights.numel()
    whole = parameter_count(trainer.base.model) - trained
    weights = ", ".join(f"{w:g} x {Path(name).name}" for name, w in zip(dict.fromkeys(c.dataset), c.mix))
    never = adapter.largest < PAGED_FROM or trainer.device.type == "cpu"
    device, how = _computing(trainer)
    loras = lora_layers(trainer.base.model).values()
    ranks = " to ".join(str(r) for r in dict.fromkeys(f({m.spec.rank for m in loras}) for f in (min, max)))
    n_tokens, processes = trainer.feed.n_tokens, trainer.processes.world_size
    lines = {
        "trained": f"{trained:,} parameters, {trained / whole:.2%} of the base's {whole:,}: rank {ranks} on "
        f"{len(trainer.wrapped)} layers",
        "base": f"{c.model}, {c.quantization}, fingerprint {trainer.base.fingerprint[:12]}",
        "goes on": trainer.start and f"from {c.adapter}, sha256 {trainer.start['sha256'][:12]}",
        "computes": f"{trainer.precision} on {device}",
        "steps": f"{schedule.total_steps:,} ({schedule.steps_per_epoch:,} an epoch), {schedule.rows_per_step} rows "
        f"({c.batch_size} x {c.grad_accum}) and about {schedule.n_tokens / schedule.steps_per_epoch:,.0f} tokens each",
        "engine": how,
        "batches": f"up to {n_tokens:,} tokens at a time"
        + (" (the longest row)" if n_tokens == trainer.work.max_seqlen else "")
        + f"; gradient checkpointing {c.gradient_checkpointing}",
        "memory": f"{trainer.footprint.describe(n_tokens)} forecast peak"
        + (" of the whole process" if trainer.device.type == "cpu" else ""),
        "an epoch": c.mix and f"{schedule.n_rows:,} rows: {weights}",
        "options": c.shuffle_options and "of multiple-choice rows in another order each epoch",
        "optimizer": c.optimizer == "paged_adamw8bit"
        and f"8-bit state, {'none of it paged' if never else 'paged where large'} (largest tensor "
        f"{adapter.largest:,}; paged from {PAGED_FROM:,} on a GPU)",
        "held out": not trainer.held_out and "nothing: no evaluation and no early stopping; the last adapter is kept",
        "processes": processes > 1
        and f"{processes} processes divide each step's rows; the busiest has {imbalance(schedule, processes):.1%} more "
        "tokens than the mean",
        "writes to": trainer.folder,
        "note": too_little(schedule, trainer.stepper.lr_factor),
    }
    return "\n".join(wrapped(f"{label:<12}{text}", 12) for label, text in lines.items() if text)


def too_little(schedule: Any, lr_factor: Callable[[int], float]) -> str:
    """Advice if training has fewer than FEW_STEPS steps, else "". lr_factor: step -> factor of the learning rate."""
    c, steps = schedule.config, math.ceil(schedule.config.epochs * schedule.steps_per_epoch)
    if steps >= FEW_STEPS:
        return ""
    warm_up = sum(lr_factor(step) < lr_factor(step + 1) for step in range(schedule.total_steps))
    return (
        f"{schedule.n_rows:,} rows, {c.epochs:g} epochs and {schedule.rows_per_step} rows a step make {steps} steps "
        f"({warm_up} of warm-up), too few to learn much: more rows, more --epochs, or a smaller --batch-size or "
        "--grad-accum"
    )


def _computing(trainer: Any) -> tuple[str, str]:
    """The lines of the plan on (the device, the engine)."""
    device, how = "CPU", trainer.config.engine + (f" ({trainer.remark})" if trainer.remark else "")
    if trainer.device.type == "cuda":
        device = f"{torch.cuda.get_device_name(trainer.device)}, {total_bytes(trainer.device) / GIB:.0f} GiB"
        how += ", as CUDA graphs" if isinstance(trainer.feed.engine, Captured) else ", without CUDA graphs"
        how += f"; formulas instead of kernels: {formulas.why_formulas}" if formulas.why_formulas else ""
    return device, how


def imbalance(schedule: Any, processes: int) -> float:
    """How far the busiest process's tokens exceed the mean, averaged over the first 200 steps: 0.02 is 2% more."""
    found = []
    for step in range(min(200, schedule.steps_per_epoch)):
        lengths = np.array([len(r) for r in schedule[step]])
        tokens = [lengths[part].sum() for part in balance(lengths, processes)]
        found.append(max(tokens) / np.mean(tokens) - 1)
    return float(np.mean(found))


def format_seconds(seconds: float) -> str:
    """40 s, 12 min, 3.5 h"""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def estimate(trainer: Any) -> dict[str, Any]:
    """Estimate and print how long training will take, from one micro-batch that is computed and discarded.

    Returns:
        steps, rows, held_out, tokens, seconds and evaluation_seconds of the whole run; memory_gib, the forecast peak.
    """
    schedule, feed, step = trainer.schedule, trainer.feed, trainer.progress.step
    batch = feed[step][0][0]
    with together():
        for _ in range(2):  # the first one also compiles kernels and captures graphs
            start = time.perf_counter()
            factor = trainer.stepper.scaled(1 / max(1, batch.n_supervised))
            feed.engine.loss_and_gradients(batch, factor, dropout_seed(trainer.config.seed, step, trainer.device))
            synchronize()
            seconds = time.perf_counter() - start
    trainer.engine.adapter.grads.zero_()
    per_token = seconds / batch.n_tokens
    tokens = schedule.n_tokens * schedule.total_steps / schedule.steps_per_epoch
    evaluations = 1 + math.ceil(schedule.total_steps / schedule.eval_every) if trainer.held_out else 0
    held = int(trainer.held_out.lengths.sum()) * evaluations * per_token / 3  # a forward is a third of a step
    line = (
        f"time        about {format_seconds(tokens * per_token)} of training for {tokens:,.0f} tokens at "
        f"{1 / per_token:,.0f} a second, and {format_seconds(held)} for {evaluations} evaluations; measured on one "
        f"micro-batch of {batch.n_tokens:,} tokens"
    )
    print(wrapped(line, 12))
    return {"steps": schedule.total_steps, "rows": len(schedule.rows), "held_out": len(trainer.held_out),
            "tokens": round(tokens), "seconds": tokens * per_token, "evaluation_seconds": held,
            "memory_gib": trainer.footprint.total(feed.n_tokens) / GIB}  # fmt: skip


def explain_memory(trainer: Any, step: int, batch: Packed) -> str:
    """A message for when not even a micro-batch of one row fits: what memory was used for, and what would use less."""
    tokens, used = batch.n_tokens, taken(trainer.device)
    trainer.feed.forget()
    trainer.feed.engine.release()
    ways = []
    if not trainer.processes.sharded:  # measuring a sharded base takes all processes
        with suppress(MemoryError, torch.OutOfMemoryError):
            lengths, room = trainer.schedule.rows.lengths.tolist(), 0.9 * total_bytes(trainer.device)
            ways = forecast.ways_to_save(trainer.engine, trainer.work, trainer.footprint, lengths, room)
    return "\n".join([
        f"out of memory at step {step + 1}, in a micro-batch of {tokens:,} tokens, "
        f"{batch.n_supervised:,} supervised; {used}",
        f"  forecast for this micro-batch: {trainer.footprint.describe(tokens)}",
        "  what would take less, in order of effect:" if ways else "  no option is forecast to take less",
        *(f"    {way}" for way in ways),
    ])  # fmt: skip
