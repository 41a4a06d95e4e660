"""The optimizer, its schedule, and when a step is taken: 8-bit AdamW, warm-up and decay, fp16 loss scaling.

fp16 loss scaling: gradients below 6e-8 vanish in fp16, so the loss is multiplied by a scale S (65,536 at first) and
the gradients are divided by it again in fp32. When they overflow, the step is skipped and S halved; after 2,000 good
steps S doubles. A skipped step changes neither weights, optimizer state nor the learning rate; its rows count as seen,
so a run with skips ends before its learning rate schedule does. With GradScaler alone, a run whose steps all overflow
would go on for ever, S sinking to 0; ours ends after 20 skips in a row. The same rule guards bf16 and fp32, where
gradients that are not finite mean that something is broken.

8-bit AdamW (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization") keeps both moments in 8 bits, in
blocks of 256 values with an absmax each: 2.03 bytes a parameter instead of 8. Tensors below 4,096 elements keep fp32
state. Paging (QLoRA, section 3) lets state move to CPU memory when the GPU runs out, but bitsandbytes pages tensors of
100,000 elements and more only: at rank 16 on Qwen2-0.5B the largest has 14,336, so nothing is paged.

The GPU is kept busy: `Stepper.step` queues the step and the work after it before the CPU knows whether the gradients
are finite; if not, a copy of the state undoes the step. With a matrix of 100,000 elements it waits, to save the copy.
"""

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .config import Config
from .ops.flat import FlatLoRA
from .system.bits import AdamW8bit
from .system.device import to_host
from .system.text import Failed

SKIPS_IN_A_ROW = 20  # steps without finite gradients before the run ends
PAGED_FROM = 100_000  # elements of a tensor from which bitsandbytes pages its state


class TrainingError(Failed):
    """Training can't go on; the message says why, and what is saved."""


def lr_schedule(config: Config, total: int) -> Callable[[int], float]:
    """step (0-based) -> factor of the peak learning rate, for `total` steps.

    Linear over the first w steps, (step + 1) / (w + 1), so that the first step already trains; then as transformers'
    get_{cosine,linear,constant}_schedule_with_warmup. w: warmup_steps, or ceil(warmup_ratio * total).
    """
    ratio = 0.03 if config.warmup_ratio is None else config.warmup_ratio
    warmup = math.ceil(ratio * total) if config.warmup_steps is None else config.warmup_steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        if config.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        return 1.0 - progress if config.schedule == "linear" else 1.0

    return factor


def make_optimizer(adapter: FlatLoRA, config: Config) -> torch.optim.Optimizer:
    """`paged_adamw8bit`: bitsandbytes' PagedAdamW8bit; `adamw`: torch's. Betas 0.9 and 0.999, eps 1e-8.

    If every matrix has a multiple of 256 elements, no block of 8-bit state spans two, so one step of a flat tensor
    gives the same bits as a step per matrix. The largest matrix decides on paging, not the flat tensor's size.
    """
    groups = [{"params": adapter.large}, {"params": adapter.small, "optim_bits": 32}][: 2 if adapter.small else 1]
    options = {"lr": config.learning_rate, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options)
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")  # the plan says it
    optimizer = AdamW8bit(groups, **options)
    optimizer.is_paged = adapter.largest >= PAGED_FROM
    return optimizer


class Stepper:
    """Optimizer steps, with loss scaling, clipping, the schedule, and the policy on overflows.

    Args:
        total_steps: of the schedule. fp16: scale the loss; for bf16 and fp32 the scaler is off.

    Attributes:
        taken: optimizer steps taken: where the schedule stands. skipped: steps skipped in all.
    """

    def __init__(self, adapter: FlatLoRA, config: Config, total_steps: int, fp16: bool):
        self.optimizer = make_optimizer(adapter, config)
        self.learning_rate, self.max_grad_norm = config.learning_rate, config.max_grad_norm
        self.lr_factor = lr_schedule(config, total_steps)
        self.device = adapter.weights.device
        self.params = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self.taken = self.skipped = self.skipped_in_a_row = 0
        self.waits = self.device.type != "cuda" or adapter.largest >= PAGED_FROM

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.learning_rate * self.lr_factor(self.taken)

    def scaled(self, factor: float) -> Tensor:
        """0-dim: a factor of the loss, times the loss scale."""
        return self.scaler.scale(torch.full((), factor, device=self.device))  # a copy from the CPU would wait

    def step(self, meanwhile: Callable[[], None] | None = None) -> tuple[float, bool]:
        """Take the optimizer step, unless a gradient is not finite.

        Args:
            meanwhile: called, if at all, when the step is queued on the device: before its outcome is known here.

        Returns:
            (global gradient norm before clipping, whether the step was taken).

        Raises:
            TrainingError: this was the 20th skip in a row.
        """
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.params, self.max_grad_norm)
        outcome, state = to_host(norm), self.optimizer.state.values()
        ahead = meanwhile if state and not self.waits else None
        if ahead or math.isfinite(outcome()):
            self._step(norm.isfinite() if ahead else None)
        self.scaler.update()  # `unscale_` has noted whether the gradients overflowed
        self.optimizer.zero_grad(set_to_none=False)  # they may be views of one flat tensor
        if ahead:
            ahead()
        taken = math.isfinite(norm := outcome())
        for s in state if ahead and not taken else ():
            s["step"] -= 1
        self.taken += taken
        self.skipped += not taken
        self.skipped_in_a_row = 0 if taken else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= SKIPS_IN_A_ROW:
            raise TrainingError(f"{SKIPS_IN_A_ROW} optimizer steps in a row had gradients that are not finite")
        return norm, taken

    def _step(self, finite: Tensor | None) -> None:
        """Take the optimizer step. If `finite` (0-dim bool) is given, undo it on the device where that is False."""
        state = itertools.chain.from_iterable(s.items() for s in self.optimizer.state.values())
        tensors = [*self.params, *(t for k, t in state if isinstance(t, Tensor) and k != "step")]
        before = [] if finite is None else [(t, t.clone()) for t in tensors]
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.step()  # scaler.step would ask the device once more whether the gradients are finite
        for now, then in before:
            now.data.copy_(torch.where(finite, now, then))

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs: optimizer, scaler and counters."""
        counters = {k: getattr(self, k) for k in ("taken", "skipped", "skipped_in_a_row")}
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), **counters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.taken, self.skipped, self.skipped_in_a_row = (state[k] for k in ("taken", "skipped", "skipped_in_a_row"))
