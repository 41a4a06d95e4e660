"""The training loop, and early stopping.

    evaluate and save, where due -> micro-batches: forward, masked loss, backward -> clip and step -> log

The engine (`feed.engine`), the other processes (`feed.processes`) and what keeps a run on disk (`recorder`) are passed
in: this file knows nothing of files, CUDA or NCCL. No random state is saved: the order of rows and the dropout masks
are functions of the seed and the step.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .batches import Packed, dropout_seed
from .config import Config
from .data.measures import Evaluation
from .data.rows import Rows
from .evaluation import evaluate_rows
from .lora import lora_parameters
from .optim import Stepper, TrainingError
from .system.console import say
from .system.device import is_out_of_memory, release, to_host

MOVED_BY = 3  # steps after which every matrix must have changed: B does at step 1, A at step 2 (while B is 0, it can't)
EVALUATED = 64  # maximum rows of an evaluation batch; fewer if they would exceed the micro-batch's tokens


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0  # optimizer steps behind us, skipped ones included: the position in the data
    tokens: int = 0
    seconds: float = 0.0  # of training, without evaluations and saving
    loss_sum: float = 0.0  # these four: since the last line of the log
    supervised: int = 0
    window_tokens: int = 0
    window_seconds: float = 0.0
    evaluated: int = -1  # the step last evaluated
    before: dict[str, Any] | None = None  # the evaluation before training
    best: dict[str, Any] | None = None  # the best evaluation so far
    best_step: int = 0
    bad_evaluations: int = 0  # in a row, without improvement
    stopped_early: bool = False

    def count(self, loss: float, supervised: int, tokens: int, seconds: float) -> None:
        """Add an optimizer step."""
        self.step, self.tokens, self.seconds = self.step + 1, self.tokens + tokens, self.seconds + seconds
        self.loss_sum, self.supervised = self.loss_sum + loss, self.supervised + supervised
        self.window_tokens, self.window_seconds = self.window_tokens + tokens, self.window_seconds + seconds


class Recorder:
    """What the loop reports to; `run.writer.RunWriter` keeps a run on disk."""

    best: dict[str, Tensor]  # the adapter with the best evaluation so far

    def guarded(self, compute: Callable[[Callable[[], None] | None], Evaluation]) -> Evaluation | None:
        """Return `compute(f)`, which calls f, unless that is None, before each batch; or None if it was abandoned."""
        return compute(None)

    def evaluated(self, progress: Progress, evaluation: Evaluation, improved: bool) -> None:
        """Report an evaluation."""

    def save(self, progress: Progress, finished: bool) -> None:
        """Save what is due. Does not return if the run is to stop here."""

    def failed(self, error: Exception, progress: Progress, batch: Packed | None) -> Exception:
        """What to raise for an error in the step that computed this batch."""
        return error

    def step_ended(self, progress: Progress, lr: float, grad_norm: float, skipped: bool) -> None:
        """Report an optimizer step, counted in `progress`."""


def train(feed: Any, stepper: Stepper, held_out: Rows, config: Config, progress: Progress, recorder: Recorder) -> None:
    """Train from where `progress` stands to the end, or to the early stop.

    Args:
        feed: the micro-batches of each step, as `scale.feed.Feed`.
        held_out: the rows that this process evaluates: its part of them, or all with a sharded base.

    Raises:
        TrainingError: training can't go on; the message says what is saved.
    """
    schedule, model, ahead = feed.schedule, feed.engine.base.model, []
    initial = copies(model) if stepper.taken < MOVED_BY else {}
    compute_next = partial(compute_ahead, ahead, feed, stepper, config.seed, progress, recorder)
    while True:
        # The same code handles the start, a resumed run and the end of a step: evaluate and save what is due here.
        if schedule.evaluation_due(progress.step) and progress.evaluated != progress.step:
            evaluate_and_keep_the_best(feed, held_out, config.patience, progress, recorder)
        finished = progress.step == schedule.total_steps or progress.stopped_early
        recorder.save(progress, finished)
        if finished:
            return

        # The step's loss is the mean over the supervised tokens of all micro-batches and processes. Their number is
        # known beforehand and divides the summed loss of each micro-batch, so the gradients simply add up.
        begun, lr = time.perf_counter(), stepper.lr
        loss = ahead.pop() if ahead else compute_gradients(feed, stepper, config.seed, progress, recorder)
        if isinstance(loss, Exception):
            raise loss
        loss_here = to_host(loss)  # which does not wait for what is queued after it
        batches, supervised, tokens = feed[progress.step]  # remembered; halved, if memory ran out

        # Unscale, clip, step: clipping scaled gradients would clip to another norm. A step whose gradients are not
        # finite is skipped, and the learning rate stays where it is in its schedule. A GPU computes the next step's
        # gradients while we learn what became of this step, unless something else is due in between.
        try:
            grad_norm, taken = stepper.step(None if schedule.evaluation_due(progress.step + 1) else compute_next)
        except (TrainingError, RuntimeError, MemoryError) as e:
            raise recorder.failed(e, progress, batches[0] if batches else None) from None

        # The step has asked the device for the gradients' norm, so they have been computed by now.
        progress.count(loss_here(), supervised, tokens, time.perf_counter() - begun)
        if initial and stepper.taken == MOVED_BY:
            check_that_all_moved(initial, model, stepper)
            initial = {}
        recorder.step_ended(progress, lr, grad_norm, skipped=not taken)


def compute_gradients(feed: Any, stepper: Stepper, seed: int, progress: Progress, recorder: Recorder) -> Tensor:
    """Forward and backward of the next step's micro-batches; returns the summed loss of all processes, 0-dim.

    If memory runs out, in whichever process, all compute the step again in micro-batches half as large.
    """
    engine, processes, step = feed.engine, feed.processes, progress.step
    while True:
        batches, supervised, _ = feed[step]
        factor, of_step = stepper.scaled(1 / supervised), dropout_seed(seed, step, engine.device)
        loss, batch, failed = torch.zeros((), device=engine.device), None, False
        try:
            for batch in batches:
                loss = loss + engine.loss_and_gradients(batch, factor, of_step)
            batch = None  # none has failed
            if step + 1 < feed.schedule.total_steps:
                feed[step + 1]  # the next step's rows are made ready while the device computes
        except (RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e) or batch is None:
                raise
            if processes.sharded or batch.n_rows == 1:
                raise recorder.failed(e, progress, batch) from None
            failed = True
        # While the device computes: has memory run out, or a signal come, in another process?
        if not any(processes.gather(failed)):
            return processes.sum_step(loss, engine.adapter.grads)
        feed.halve()
        engine.adapter.grads.zero_()  # an unknown part of the step's gradients had been added
        engine.release()
        release()
        say(
            f"note: step {step + 1}: out of memory; its gradients are computed again, in micro-batches of up to "
            f"{feed.n_tokens:,} tokens, or one row, from now on"
        )


def compute_ahead(found: list, feed: Any, stepper: Stepper, seed: int, progress: Progress, recorder: Recorder) -> None:
    """Compute the gradients of the step after `progress.step`, and append its loss to `found`. A single process appends
    an error too, to count and save the current step before raising it; several processes raise it at once."""
    try:
        following = replace(progress, step=progress.step + 1)
        found.append(compute_gradients(feed, stepper, seed, following, recorder))
    except (RuntimeError, MemoryError) as e:
        if feed.processes.world_size > 1:
            raise
        found.append(e)


def evaluate_and_keep_the_best(
    feed: Any, held_out: Rows, patience: int, progress: Progress, recorder: Recorder
) -> None:
    """Evaluate on the held-out rows, and keep the adapter with the lowest loss, which may be the untrained one; without
    such rows, keep the last. Stop after `patience` evaluations in a row without improvement."""
    engine, processes, evaluation, improved = feed.engine, feed.processes, None, True
    processes.check_equal_adapters(engine.adapter.weights)
    if any(processes.gather(len(held_out))):
        label = None if processes.index else "evaluating"
        compute = partial(evaluate_rows, engine, held_out, EVALUATED, label, feed.n_tokens)
        parts = processes.gather(recorder.guarded(compute))
        if None in parts:
            return
        evaluation = parts[0] if processes.sharded else Evaluation.join(parts)
        losses = evaluation.loss, progress.best["loss"] if progress.best else math.inf
        loss, best = (math.inf if math.isnan(x) else x for x in losses)
        improved = progress.best is None or loss < best
        progress.bad_evaluations = 0 if improved else progress.bad_evaluations + 1
        progress.stopped_early = progress.bad_evaluations >= patience
        progress.before = progress.before or evaluation.as_dict()
        recorder.evaluated(progress, evaluation, improved)
    if improved:
        progress.best, progress.best_step = evaluation and evaluation.as_dict(), progress.step
        recorder.best = copies(engine.base.model)
    progress.evaluated = progress.step


def copies(model: torch.nn.Module) -> dict[str, Tensor]:
    """Name -> a copy on the CPU of all that trains."""
    return {n: w.detach().cpu().clone() for n, w in lora_parameters(model).items()}


def check_that_all_moved(initial: dict[str, Tensor], model: torch.nn.Module, stepper: Stepper) -> None:
    """Raise TrainingError if a trained matrix has not changed: its layer gets no gradient, or, if B has changed and A
    has not, the learning rate is so small that updates are lost in fp32's rounding."""
    now, lr = copies(model), max(stepper.learning_rate * stepper.lr_factor(step) for step in range(MOVED_BY))
    still = [n for n, w in initial.items() if torch.equal(w, now[n])]
    why = "those layers take no part in the model's output, or get no gradient"
    if not any(n.replace("lora_A", "lora_B") in still for n in still):
        why = f"a learning rate of {lr:.1e} is lost in fp32's rounding; raise --learning-rate, or shorten the warm-up"
    if still:
        raise TrainingError(
            f"after {MOVED_BY} optimizer steps {len(still)} of {len(now)} trained matrices did not move: "
            f"{', '.join(still[:8])}; {why}"
        )
