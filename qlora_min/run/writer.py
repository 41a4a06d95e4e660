"""What a run writes to its directory and when, and what it does if a signal comes or the disk fails.

A full or missing disk does not end a run: training continues, and what could not be written waits. Only process 0
writes. What it alone knows (a signal came, saving is due) must not take it out of step with the other processes.
"""

import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..adapter import AdapterConfig, save_adapter
from ..batches import Packed, Schedule
from ..data.measures import Evaluation
from ..data.templates import SavedOnce, tokenizer_to_save
from ..loop import Progress, Recorder
from ..lora import lora_parameters
from ..optim import SKIPS_IN_A_ROW, TrainingError
from ..scale.processes import from_main, gather
from ..system import console
from ..system.console import say
from ..system.device import is_out_of_memory, peak_gib
from ..system.files import atomic_folder
from . import cards, checkpoint
from .cards import beside
from .plan import explain_memory, format_seconds
from .signals import Stop

SAVE_TRIES = 10  # that many failures in a row end the run
RETRY_SECONDS = 30.0  # between two tries


class RunWriter(Recorder):
    """Writes what `loop.train` reports to disk.

    Args:
        trainer: the run's `Trainer`.

    Attributes:
        best: the adapter with the best evaluation so far. saved: (step, evaluated) of the newest checkpoint.
        adapter_step: the step of the adapter in adapter/, or None if unknown.
        failures: the number of failed tries to save since the last success.
    """

    def __init__(self, trainer: Any):
        self.trainer = weakref.proxy(trainer)  # no cycle: a dropped Trainer releases its lock
        self.folder = trainer.folder
        self.tokenizer = SavedOnce(tokenizer_to_save(trainer.base.encoder))
        self.metrics = checkpoint.Metrics(self.folder)
        self.best: dict[str, torch.Tensor] = {}
        self.saved: tuple[int, int] | None = None
        self.adapter_step: int | None = None
        self.saved_at = time.monotonic()
        self.failures, self.retry_at = 0, 0.0
        self.boards, self.bar = trainer.boards, console.bar(0, None, "step", show=False)

    # -----------------------------------------------------------------------------------------------------------------
    # What the loop reports
    # -----------------------------------------------------------------------------------------------------------------

    def guarded(self, compute: Callable[[Callable[[], None]], Evaluation]) -> Evaluation | None:
        """Evaluate; None if a signal came, since a resumed run repeats the evaluation. With a sharded base no process
        may leave it by itself, so the processes agree before each batch whether to stop."""
        trainer = self.trainer

        def stop_together() -> None:
            trainer.processes.gather(None)
            if trainer.processes.stopping:
                raise Stop

        trainer.signals.received = trainer.signals.received or trainer.processes.stopping  # it may have come to another
        with suppress(Stop), trainer.signals.abandonable() as abandon_from_here:
            try:
                return compute(stop_together if trainer.processes.sharded else abandon_from_here)
            except MemoryError as e:
                raise TrainingError(f"{e}\n{self.how_to_go_on()}") from None
        return None

    def evaluated(self, progress: Progress, evaluation: Evaluation, improved: bool) -> None:
        """Print an evaluation and add it to the metrics."""
        found = evaluation.as_dict()
        line = f"step {progress.step}: held-out loss {evaluation.loss:.4f}, perplexity {evaluation.perplexity:.3f}"
        if evaluation.option_rows:
            line += f", option accuracy {evaluation.option_accuracy:.1%} ({beside(found)})"
        say(console.wrapped(line + (" *" if improved and progress.step else ""), 8))
        measures = {k: found[k] for k in ("perplexity", "token_accuracy", "option_accuracy")}
        self.record("eval", progress, eval_loss=evaluation.loss, **measures)

    def step_ended(self, progress: Progress, lr: float, grad_norm: float, skipped: bool) -> None:
        """Advance the progress bar; every --log-every steps, and before an evaluation, add an event to the metrics."""
        trainer, p = self.trainer, progress
        if skipped:
            say(f"step {p.step}: skipped, a gradient is not finite")
        if p.step % trainer.config.log_every == 0 or trainer.schedule.evaluation_due(p.step):
            loss, tokens_per_second = p.loss_sum / p.supervised, p.window_tokens / p.window_seconds
            peak = max(gather(peak_gib(trainer.device)))
            self.record(
                "train", p, loss=loss, lr=lr, grad_norm=grad_norm, skipped=trainer.stepper.skipped,
                tokens_per_second=round(tokens_per_second, 1), peak_memory_gib=round(peak, 3),
                seconds=round(p.seconds, 2), **trainer.communication(),
            )  # fmt: skip
            if trainer.processes.index == 0 and not self.failures:  # otherwise, the next save writes it
                self.write(self.metrics.flush)
            now = f"loss {loss:.3f}, lr {lr:.1e}, {tokens_per_second:,.0f} tok/s"
            self.bar.tell(f"{now}, {peak:.2f} GiB", lambda: f"{_reached(trainer.schedule, p)}, {now}")
            p.loss_sum, p.supervised, p.window_tokens, p.window_seconds = 0.0, 0, 0, 0.0
        self.bar.update()

    def record(self, event: str, progress: Progress, **values: Any) -> None:
        """Add an event to the metrics."""
        if self.trainer.processes.index == 0:
            epoch = progress.step / self.trainer.schedule.steps_per_epoch
            self.metrics.write(event, step=progress.step, epoch=epoch, **values)

    def failed(self, error: Exception, progress: Progress, batch: Packed | None) -> Exception:
        """Explain an error: memory ran out, or too many steps in a row had gradients that are not finite."""
        if isinstance(error, TrainingError) and self.trainer.stepper.skipped_in_a_row == SKIPS_IN_A_ROW:
            rows = ", ".join(r.location for r in self.trainer.schedule[progress.step][:8])
            return TrainingError(
                f"{error}, the last at step {progress.step + 1} with rows {rows}; {self.last_good()}. Lower "
                "--learning-rate, look at those rows, or use --precision bf16 or fp32"
            )
        if batch and is_out_of_memory(error) and not isinstance(error, TrainingError):  # else it is explained already
            return TrainingError(f"{explain_memory(self.trainer, progress.step, batch)}\n{self.how_to_go_on()}")
        return error

    # -----------------------------------------------------------------------------------------------------------------
    # Saving
    # -----------------------------------------------------------------------------------------------------------------

    def save(self, progress: Progress, finished: bool) -> None:
        """Save if it is due; at the end of the run, or after a signal to any process, try until it is saved.

        Raises:
            Stop: there was a signal.
        """
        trainer = self.trainer
        stop = trainer.signals.received if trainer.processes.world_size == 1 else trainer.processes.stopping
        if stop or finished:
            from_main(lambda: self.write(lambda: self.write_all(progress), insist=True))
        elif self._save_due(progress):
            self.write(lambda: self.write_all(progress))
        if stop:
            trainer.signals.received = stop
            say(f"saved step {progress.step}")
            raise Stop

    def _save_due(self, p: Progress) -> bool:
        c = self.trainer.config
        if self.trainer.processes.index:
            return False
        if self.failures:
            return time.monotonic() >= self.retry_at
        by_step = c.save_every is not None and p.step % c.save_every == 0
        by_time = c.save_minutes > 0 and time.monotonic() - self.saved_at >= 60 * c.save_minutes
        return self.saved != (p.step, p.evaluated) and (p.evaluated == p.step or by_step or by_time)

    def write(self, action: Callable[[], None], insist: bool = False) -> None:
        """Write to the run's directory by calling `action`. If the disk fails, warn, and retry only to `insist`.

        Raises:
            TrainingError: writing failed for the 10th time in a row.
        """
        while True:
            try:
                (self.folder / "config.json").stat()  # a local folder may be in the place of a drive that dropped out
                action()
                break
            except OSError as e:
                self.failures += 1
                self.retry_at = time.monotonic() + RETRY_SECONDS
                what = f"step {self.trainer.progress.step}: '{self.folder}' can't be written to ({e})"
                if self.failures >= SAVE_TRIES:
                    raise TrainingError(
                        f"{what}, {SAVE_TRIES} times in a row; {self.last_good()}; once it can be, "
                        f"{self.trainer.advice}"
                    ) from None
                say(f"warning: {what}; next try in {RETRY_SECONDS:.0f} s ({self.failures} of {SAVE_TRIES} failed)")
            if not insist:
                return
            time.sleep(RETRY_SECONDS)
        for board in self.boards:
            board.update()

    def write_all(self, progress: Progress) -> None:
        """Write what is not on disk yet: metrics first, since checkpoints refer to them, and the best adapter last."""
        checkpoint.clean(self.folder)
        self.metrics.flush()
        now = progress.step, progress.evaluated
        if self.saved != now:
            checkpoint.save_checkpoint(self.folder, progress.step, self.state(progress), keep={progress.best_step})
            self.saved, self.saved_at = now, time.monotonic()
        if self.best and self.adapter_step != progress.best_step:
            self._write_adapter(progress)
        if self.failures:
            say(f"step {progress.step}: saved again, after {self.failures} failures")
            self.failures = 0

    def _write_adapter(self, p: Progress) -> None:
        c, base = self.trainer.config, self.trainer.base
        local, date = Path(c.model), base.encoder.template.date
        name = str(local.resolve()) if local.is_dir() else c.model  # absolute, to be found from any working directory
        described = AdapterConfig(self.trainer.lora, name, base.revision, base.fingerprint, c.quantization, date)
        with atomic_folder(self.folder / "adapter") as folder:
            save_adapter(folder, base.model, described, self.tokenizer, self.best)
            card = cards.adapter_card(described, self.trainer.record, p.before, p.best, p.best_step)
            (folder / cards.CARD).write_text(card, encoding="utf-8", errors="replace")
        self.adapter_step = p.best_step

    def state(self, progress: Progress) -> dict[str, Any]:
        """The content of a checkpoint. No random state: order and dropout are functions of the seed and the step."""
        return {
            # A run's directory may be moved.
            "options": {k: v for k, v in self.trainer.record["options"].items() if k != "output_dir"},
            "progress": asdict(progress),
            "adapter": {n: w.detach() for n, w in lora_parameters(self.trainer.base.model).items()},
            "best_adapter": self.best,  # so that any one checkpoint can restore adapter/
            "stepper": self.trainer.stepper.state_dict(),
            "metrics_bytes": self.metrics.size,
        }

    def last_good(self) -> str:
        """The newest checkpoint, for a message."""
        newest = self.folder / "checkpoints" / f"step-{self.saved[0]}" if self.saved else "none"
        return f"last good checkpoint: {newest}"

    def how_to_go_on(self) -> str:
        """What to do after running out of memory, for a message."""
        return (
            f"  {self.last_good()}; if other programs held the memory, continue with: {self.trainer.command}\n"
            "  --resume keeps a run's options: with others, start a new run"
        )


def _reached(schedule: Schedule, p: Progress) -> str:
    """Where a run stands, and how long it will still train, evaluations apart."""
    left = format_seconds(p.seconds / p.step * (schedule.total_steps - p.step))
    return f"step {p.step:,}/{schedule.total_steps:,}, about {left} left, epoch {p.step / schedule.steps_per_epoch:.2f}"
