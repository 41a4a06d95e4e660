"""Training: the loop, in the order a reader expects, and early stopping.

    prepare   data -> base in NF4 -> LoRA injected, the rest frozen -> optimizer
    loop      evaluate and save, where due -> micro-batches: forward, masked loss, backward -> clip and step -> log
    finish    the best adapter back in, samples, curves, and what to do next

The loop begins with what is due at the step where it stands, so that a start, a boundary and a resumed run are one
case. A disk that fails (full, away) does not end a run: training goes on, and what could not be written waits.

The loss of one optimizer step is (sum of token losses over its micro-batches) / (number of supervised tokens in them).
The count is known from the data before the first forward, so each micro-batch's sum is divided by it at once, and the
gradients add up to the step's, however the rows are cut into micro-batches, and shared out among ranks: several
processes, each on a GPU of its own (distributed.py), make the same steps as one. What one of them learns by itself, a
signal or the time to save, must not lead it another way than the rest.
"""

import itertools
import math
import os
import platform
import shlex
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from . import __version__, checkpoint, hub, memory, ops, report
from .adapter import AdapterConfig, save_adapter
from .batches import Packed, cut, dropout_seed, epoch_rows, optimizer_steps, share, shuffle_options, steps_per_epoch
from .bits import bnb
from .config import FIELDS, Config, flag
from .data import Data, Row, Rows, data_hash, read_data, table
from .distributed import from_main, gather, in_step, join, rank, size, sum_, together
from .engine import captured, make_engine
from .evaluate import MEASURES, Evaluation, beside, evaluate
from .files import atomic_folder, write_json, write_jsonl
from .generate import generate
from .lora import lora_disabled, lora_parameters
from .model import add_lora, load_base, load_encoder, parameter_count, pick_device, resolve_precision
from .optim import PAGED_FROM, Stepper, TrainingError, cosine_with_warmup, make_optimizer
from .report import say
from .signals import Signals, Stop

MOVED_BY = 3  # optimizer steps after which every trained matrix must have moved: B moves at the first, A at the second
EVALUATED = 64  # packed rows at a time, if --micro-batch-tokens does not say fewer
SMALL = 256  # hidden size up to which a second CPU thread costs more than it brings
SAMPLES = 4  # held-out prompts answered before and after
SAMPLE_TOKENS = 48
SAVE_TRIES = 10  # failures to save in a row that end the run
RETRY_SECONDS = 30.0  # between them

# What resuming compares of config.json, in this order, and what it says of a value that changed: all but notes end it.
COMPARED = {
    **{part: f"the {part} changed: {{key}} was {{then}}, now {{now}}" for part in ("base", "files", "data")},
    "engine": "it began with --engine {then!r}, put that back",
    "precision": "it was trained in {then}, here --precision auto is {now}; expected the same kind of hardware",
    "versions": "note: {key} was {then}, now {now}",  # a GPU may be there now only
    "ranks": "note: it began in {then} processes, now {now}",
}


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0  # optimizer steps behind us, skipped ones included: the position in the data
    tokens: int = 0  # real tokens seen
    seconds: float = 0.0  # training time, evaluations and saving left out
    loss_sum: float | torch.Tensor = 0.0  # these four: since the last line in metrics.jsonl
    supervised: int = 0
    window_tokens: int = 0
    window_seconds: float = 0.0
    evaluated: int = -1  # the step last evaluated
    before: dict[str, Any] | None = None  # the evaluation before training
    best: dict[str, Any] | None = None  # the best evaluation so far
    best_step: int = 0
    bad_evaluations: int = 0  # in a row, without improvement
    stopped_early: bool = False


def versions() -> dict[str, str]:
    """Of everything that computes."""
    found = {"qlora_min": __version__, "python": platform.python_version()}
    found |= {m.__name__: m.__version__ for m in (torch, transformers, bnb)}
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


@contextmanager
def writing(where: str) -> Iterator[None]:
    """What the disk refuses before training is a ValueError that names the option; while training, `_write` waits."""
    try:
        yield
    except OSError as e:
        raise ValueError(f"{where}: can't be written to ({e.strerror or e}); expected a folder with space") from None


class Trainer:
    """One training run, from options to the best adapter on disk.

    Args:
        config: the options. With `resume`, as they were resolved when the run began.
        resume: the directory of a run to continue.
        data: encoded (training, held-out) rows, instead of those that the options name.
        write: False leaves the disk alone, to `describe` and to `estimate` a run before it is begun.

    Raises:
        ValueError: an option, the model, the data or the output directory is not usable, or another process trains
            there; nothing has been written.
        TrainingError, SystemExit: as `distributed.together`, where there are several processes.
    """

    def __init__(self, config: Config, resume: Path | None = None, data: Data | None = None, write: bool = True):
        self.lock: checkpoint.Lock | nullcontext = nullcontext()  # rank 0 has the lock
        try:
            with together():
                join()
                if resume and rank() == 0:
                    with writing(f"--resume {resume}"):
                        self.lock = checkpoint.Lock(resume)  # before anything is read there
                self._prepare(config, resume, data)
                from_main(lambda: self._begin() if write and resume is None else None)
                in_step(self.sharded)
        except BaseException:
            self.lock.__exit__(None, None, None)
            raise

    def _prepare(self, c: Config, resume: Path | None, data: Data | None) -> None:
        self.recorded = from_main(lambda: unfinished(resume)) if resume else None  # when the run began
        revision = self.recorded["base"].get("revision") if resume else None
        self.device = pick_device()
        self.precision = resolve_precision(c.precision, self.device)
        self.run = from_main(lambda: resume or output_directory(c))
        self.board = report.Board(self.run) if c.tensorboard else None
        encoder = load_encoder(c.model, revision)
        train, held = data or read_data(c, encoder)
        say(table([*train, *held]))
        self.rows, self.held = (Rows.join(part.rows for part in side) for side in (train, held))
        self.sharded = c.shard and size() > 1
        if c.shard and not self.sharded:
            say("note: --shard: this is the only process, which holds the whole base (torchrun starts more)")
        all_here = self.sharded or size() == 1
        self.held_here = self.held if all_here else self.held[np.array(share(self.held.lengths, size())[rank()], int)]
        if c.shuffle_options and not self.rows[0].text:
            raise ValueError("--shuffle-options: the rows given have no text; encode them with texts=True")

        torch.manual_seed(c.seed)  # of A; order, dropout and the split have their own
        self.base = load_base(c.model, c.quantization, self.precision, self.device, revision, self.sharded, encoder)
        self.model = self.base.model
        if self.device.type == "cpu" and self.model.config.hidden_size <= SMALL:
            torch.set_num_threads(1)
        self.wrapped = add_lora(self.base, c.targets, c.rank, c.alpha, c.dropout)
        self.trained = lora_parameters(self.model)
        self.largest = max(w.numel() for w in self.trained.values())
        self.initial = self._copy_of_adapter()  # until all have moved

        self._plan_steps(c, [len(part.rows) for part in train])
        self._choose_how_to_compute()
        self.record = {
            "options": self.config.as_dict(),
            "precision": self.precision,
            "engine": self.config.engine,
            "total_steps": self.total_steps,
            "ranks": size(),
            "base": {"name": c.model, "revision": self.base.revision, "fingerprint": self.base.fingerprint},
            "files": {p.name: f"{len(p.rows)} rows, sha256 {data_hash(p.rows, [])[:16]}" for p in [*train, *held]},
            "data": {"rows": len(self.rows), "held_out": len(self.held), "sha256": data_hash(self.rows, self.held)},
            "versions": versions(),
        }
        same = {k: self.record[k] for k in ("precision", "engine", "data")} | {"base": self.base.fingerprint}
        self._check_that_ranks_agree(same)
        self._stand_at_the_start()
        if resume:
            self._restore()

    def _plan_steps(self, c: Config, sizes: list[int]) -> None:
        """What each step learns from: a function of the seed and the step alone.

        Args:
            sizes: rows of each data set.
        """
        self.epoch_rows = lru_cache(1)(partial(epoch_rows, sizes, c.mix, c.seed))
        visited = self.epoch_rows(0)
        self.epoch_tokens = int(self.rows.lengths[visited].sum())
        self.epoch_steps = lru_cache(1)(partial(optimizer_steps, len(visited), c.batch_size, c.grad_accum, c.seed))
        self.steps_per_epoch = steps_per_epoch(len(visited), c.batch_size, c.grad_accum)
        total = math.ceil(c.epochs * self.steps_per_epoch)
        self.total_steps = min(total, c.max_steps or total)
        every = c.eval_every or math.ceil(self.steps_per_epoch / 4)
        self.config = replace(c, eval_every=every, output_dir=str(self.run))
        self._ready: dict[int, tuple] = {}  # steps' micro-batches

    def _stand_at_the_start(self) -> None:
        """What changes in the course of a run, as it is at its beginning."""
        c, adapter, paged = self.config, self.engine.adapter, self.largest >= PAGED_FROM
        optimizer = make_optimizer(c.optimizer, adapter.large, c.learning_rate, c.weight_decay, adapter.small, paged)
        schedule, fp16 = cosine_with_warmup(self.total_steps, c.warmup_ratio), self.precision == "fp16"
        self.stepper = Stepper(optimizer, c.learning_rate, schedule, c.max_grad_norm, fp16, self.device)
        self.progress = Progress()
        self.stopping: int | None = None  # the signal for which all ranks stop
        self.waited = self.summed = 0.0  # seconds: for the slowest rank, and summing gradients
        self.metrics = checkpoint.Metrics(self.run)
        ranks = os.environ.get("LOCAL_WORLD_SIZE", size())
        launcher = "python" if size() == 1 else f"torchrun --nproc-per-node {ranks}"
        self.command = f"{launcher} scripts/train.py --resume {shlex.quote(str(self.run))}"
        self.advice = f"continue with: {self.command}"
        self.signals = Signals(self.advice, among=rank() if size() > 1 else None)
        self.best: dict[str, torch.Tensor] = {}  # the adapter of the best evaluation so far
        self.saved: tuple[int, int] | None = None  # (step, evaluated) of the newest checkpoint
        self.adapter_step: int | None = None  # the step whose adapter is in adapter/, as far as we know
        self.saved_at = time.monotonic()
        self.failures, self.retry_at = 0, 0.0  # to save, in a row

    def _begin(self) -> None:
        """Make the run's directory ours."""
        with writing(f"--output-dir {self.run}"):
            self.run.mkdir(parents=True, exist_ok=True)
            self.lock = checkpoint.Lock(self.run)
            output_directory(self.config)  # another process may have begun there while we loaded
            write_json(self.run / "config.json", self.record)

    def _choose_how_to_compute(self) -> None:
        """The engine, and micro-batches that fit the memory of every process: measured, where that is left to us."""
        c, longest = self.config, int(self.rows.lengths.max())
        longest_of_all = max(longest, int(self.held.lengths.max(initial=0)))
        self.engine, name, self.why_engine = make_engine(self.base, c.engine, longest_of_all)
        rows, supervised = -(-c.batch_size * c.grad_accum // size()), int(self.rows.supervised.max())
        self.work = memory.Workload(rows, longest, supervised, bits8=c.optimizer == "paged_adamw8bit")
        room = memory.available(self.device) / (size() if self.device.type == "cpu" else 1)
        gather(None)
        in_step(self.sharded)
        on, tokens, self.footprint = memory.plan(
            self.engine, self.work, lambda n: all(gather(n <= room)), c.gradient_checkpointing, c.micro_batch_tokens
        )
        in_step(False)
        self.engine.checkpointing = on
        self.config = replace(c, engine=name, gradient_checkpointing="on" if on else "off", micro_batch_tokens=tokens)
        self.tokens = tokens  # of a micro-batch; fewer where memory runs out
        self.compute = captured(self.engine, longest_of_all, tokens)

    # -----------------------------------------------------------------------------------------------------------------
    # The loop
    # -----------------------------------------------------------------------------------------------------------------

    def train(self) -> Progress:
        """Run to the end, or to the early stop; returns where it ended.

        Raises:
            TrainingError: it can't go on, or nothing can be saved; the message says what is safe.
            SystemExit: SIGINT or SIGTERM came, and the run was saved; the code is 128 + the signal's number.
        """
        p, c = self.progress, self.config
        say(self.describe())
        bar = report.bar(self.total_steps, None, "step", keep=True, initial=p.step)
        with together(self._how_to_go_on), self.lock, self.signals, bar:
            while True:
                # Evaluate and save, where due.
                if self._evaluation_due():
                    self._evaluate()
                stop = (self.signals.received if size() == 1 else self.stopping) is not None
                finished = p.step == self.total_steps or p.stopped_early
                if stop or finished:
                    from_main(lambda: self._insist(self._write_all))
                elif self._save_due():
                    self._write(self._write_all)
                if stop:
                    say(f"saved step {p.step}")
                    raise Stop
                if finished:
                    return self._finish()

                lr, grad_norm = self.take_step()
                if p.step % c.log_every == 0 or self._evaluation_due():
                    self._log(lr, grad_norm, bar)
                bar.update()

    def take_step(self) -> tuple[float, float]:
        """The next optimizer step; returns its learning rate and its gradient's norm before clipping.

        Raises:
            TrainingError: it was the 20th in a row without finite gradients, memory ran out, or a layer does not train.
            SystemExit, Lost: as `distributed.gather`.
        """
        p, begun = self.progress, time.perf_counter()
        supervised, tokens = self.step_totals(p.step)
        lr = self.stepper.lr
        while (loss := self._compute_gradients(p.step, supervised)) is None:
            self._halve_micro_batches()  # their gradients add up to the same
        try:
            grad_norm, taken = self.stepper.step()
        except TrainingError as e:
            where = ", ".join([r.where for r in self.step_rows(p.step)][:8])
            raise TrainingError(
                f"{e}, the last at step {p.step + 1} with rows {where}; {self._last_good()}. Lower --learning-rate, "
                "look at those rows, or use --precision bf16 or fp32"
            ) from None
        except (RuntimeError, MemoryError) as e:
            if not memory.is_out_of_memory(e):
                raise
            raise TrainingError(self._explain_memory(self.step_batches(p.step)[0])) from None

        # Count.
        p.step += 1
        p.loss_sum = p.loss_sum + loss
        p.supervised, p.tokens, p.window_tokens = p.supervised + supervised, p.tokens + tokens, p.window_tokens + tokens
        seconds = time.perf_counter() - begun  # the step has asked the device for the norm, so this is its time too
        p.seconds, p.window_seconds = p.seconds + seconds, p.window_seconds + seconds
        if self.initial and self.stepper.taken == MOVED_BY:
            self._check_that_all_moved()
        if not taken:
            say(f"step {p.step}: skipped, a gradient is not finite")
        return lr, grad_norm

    def _compute_gradients(self, step: int, supervised: int) -> float | torch.Tensor | None:
        """Forward and backward of all processes' rows of a step; returns the sum of their losses.

        None where memory ran out, in whichever process: of the gradients, an unknown part has been added.

        Raises:
            TrainingError: a single row takes more memory than there is, or a process can't try less by itself.
        """
        loss, batch = 0.0, None
        try:
            for batch in self.step_batches(step):
                loss = loss + self.backward(batch, supervised, step)
            batch = None
            # The next step's rows are made ready while the device computes.
            if step + 1 < self.total_steps:
                self.step_batches(step + 1)
        except (RuntimeError, MemoryError) as e:
            if not memory.is_out_of_memory(e) or not batch:
                raise
            if self.sharded or batch.n_rows == 1:
                raise TrainingError(self._explain_memory(batch)) from None
        # While the device computes: has memory run out, or a signal come, in another process?
        if any(self._gather(batch is not None)):
            return None
        return self._sum_over_ranks(loss) if size() > 1 else loss

    def _halve_micro_batches(self) -> None:
        """Make them half as large from now on, and clear the gradients."""
        self._ready.clear()
        self.engine.adapter.grads.zero_()
        if self.compute is not self.engine:
            self.compute.release()
        memory.release()
        self.tokens = max(1, self.tokens // 2)  # a row is never cut
        say(
            f"note: step {self.progress.step + 1}: out of memory; its gradients are computed again, in micro-batches "
            f"of up to {self.tokens:,} tokens, or one row, from now on"
        )

    def step_batches(self, step: int) -> list[Packed]:
        """This process's micro-batches of an optimizer step (0-based). The last two steps' are remembered."""
        if step not in self._ready:
            rows = self.step_rows(step)
            lengths = [len(r) for r in rows]
            cuts = [  # of each process's share, indices into the step's rows
                [[mine[j] for j in part] for part in cut([lengths[i] for i in mine], self.tokens)]
                for mine in share(lengths, size())
            ]
            if self.sharded:
                batches = self._equal_micro_batches(rows, cuts)
            else:
                count = self.config.batch_size * self.config.grad_accum
                batches = [self.compute.pack([rows[i] for i in part], part, count) for part in cuts[rank()]]
            self._ready = {s: b for s, b in self._ready.items() if s == step - 1}
            self._ready[step] = batches, (sum(r.n_supervised for r in rows), sum(lengths))
        return self._ready[step][0]

    def _equal_micro_batches(self, rows: list[Row], cuts: list[list[list[int]]]) -> list[Packed]:
        """This process's micro-batches where all processes gather the base together: as many, of as many supervised
        positions.

        The padding's losses count for nothing; where a process has no row left, it computes one without losses.
        """
        batches = []
        for here in itertools.zip_longest(*cuts, fillvalue=[]):
            supervised = max(sum(rows[i].n_supervised for i in part) for part in here)
            other = rows[next(part for part in here if part)[0]]
            spare = replace(other, supervised=torch.zeros_like(other.supervised))
            mine = [rows[i] for i in here[rank()]]
            batches.append(self.engine.pack(mine or [spare], here[rank()] or None, supervised=supervised))
        return batches

    def step_totals(self, step: int) -> tuple[int, int]:
        """(supervised tokens, tokens) of an optimizer step (0-based), over all ranks."""
        self.step_batches(step)
        return self._ready[step][1]

    def step_rows(self, step: int) -> list[Row]:
        """The rows of an optimizer step (0-based), those of all ranks: a function of the seed and the step alone."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return [self._row(epoch, visit) for part in self.epoch_steps(epoch)[index] for visit in part]

    def _row(self, epoch: int, visit: int) -> Row:
        """What an epoch's visit (an index into `epoch_rows`) to a row shows of it: the same whenever it is asked."""
        row, c = self.rows[self.epoch_rows(epoch)[visit]], self.config
        if not c.shuffle_options:
            return row
        return shuffle_options(row, self.base.encoder, int(self.rows.lengths.max()), c.seed, epoch, visit)

    def backward(self, batch: Packed, supervised: int, step: int) -> torch.Tensor:
        """Forward and backward of a micro-batch: adds its part of the step's gradient.

        Args:
            supervised: tokens of the whole step, by whose number the loss is divided.

        Returns:
            the sum of the micro-batch's token losses: 0-dim, fp32.
        """
        factor = self.stepper.scaler.scale(torch.tensor(1 / supervised, device=self.device))
        return self.compute.loss_and_gradients(batch, factor, dropout_seed(self.config.seed, step).to(self.device))

    def _sum_over_ranks(self, loss: float | torch.Tensor) -> torch.Tensor:
        """Sum the gradients of all ranks, on each; returns the sum of their losses.

        A gradient that is not finite on one of them is so on all after it, so that they skip the same steps.
        """
        in_step(True)
        memory.synchronize()
        start = time.perf_counter()
        loss = torch.as_tensor(loss, dtype=torch.float64, device=self.device)
        sum_([loss])  # one number: this waits for the slowest
        then = time.perf_counter()
        self.stepper.scaler.scale(torch.zeros((), device=self.device))  # as above: makes the scale
        sum_([self.engine.adapter.grads])
        self.waited, self.summed = self.waited + then - start, self.summed + time.perf_counter() - then
        in_step(self.sharded)
        return loss

    def _gather(self, value: Any) -> list[Any]:
        """Every rank's value; with it all learn of a signal that came to one."""
        values, signals = zip(*gather((value, self.signals.received)))
        self.stopping = next((s for s in signals if s), None)
        self.signals.received = self.stopping or self.signals.received
        return list(values)

    def _check_that_all_moved(self) -> None:
        """Is it really training? Every A and B must differ from what it was, or the layer gets no gradient."""
        still = [n for n, w in self.trained.items() if torch.equal(w.cpu(), self.initial[n])]
        if still:
            raise TrainingError(
                f"after {MOVED_BY} optimizer steps {len(still)} of {len(self.trained)} trained matrices did not move: "
                f"{', '.join(still[:8])}; those layers take no part in the model's output, or get no gradient"
            )
        self.initial = {}

    def _log(self, lr: float, grad_norm: float, bar: report.tqdm) -> None:
        p = self.progress
        loss, tokens_per_second = float(p.loss_sum) / p.supervised, p.window_tokens / p.window_seconds
        peak = max(gather(memory.peak_gib(self.device)))
        self._record(
            "train", step=p.step, epoch=p.step / self.steps_per_epoch, loss=loss, lr=lr, grad_norm=grad_norm,
            skipped=self.stepper.skipped, tokens_per_second=round(tokens_per_second, 1), peak_memory_gib=round(peak, 3),
            seconds=round(p.seconds, 2), **self._communication(),
        )  # fmt: skip
        if rank() == 0 and not self.failures:  # or else the next save writes it
            self._write(self.metrics.flush)
        bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.1e}, {tokens_per_second:,.0f} tok/s, {peak:.2f} GiB")
        p.loss_sum, p.supervised, p.window_tokens, p.window_seconds = 0.0, 0, 0, 0.0

    def _communication(self) -> dict[str, float]:
        """What goes into the metrics of several ranks, of this process's life so far."""
        return {"waited": round(self.waited, 2), "summed": round(self.summed, 2)} if size() > 1 else {}

    # -----------------------------------------------------------------------------------------------------------------
    # Evaluating, saving, resuming
    # -----------------------------------------------------------------------------------------------------------------

    def _evaluation_due(self) -> bool:
        p = self.progress
        return p.evaluated != p.step and (p.step % self.config.eval_every == 0 or p.step == self.total_steps)

    def _evaluate(self) -> None:
        """Evaluate on the held-out rows, if any; remember the adapter if it is the best so far.

        A signal abandons it without a trace: a resumed run does it again.
        """
        p, found, improved = self.progress, None, True
        self._check_that_ranks_agree({"adapter": zlib.crc32(self.engine.adapter.weights.detach().cpu().numpy())})
        if self.held:
            result = None
            # A sharded one can't be left by one rank alone: it asks before each batch.
            with suppress(Stop), nullcontext() if self.sharded else self.signals.abandonable():
                result = self.evaluate()
            results = self._gather(result)
            if None in results:
                return
            result = results[0] if self.sharded else Evaluation.join(results)
            found = result.as_dict()
            line = f"step {p.step}: held-out loss {result.loss:.4f}, perplexity {result.perplexity:.3f}"
            if result.option_accuracy is not None:
                line += f", option accuracy {result.option_accuracy:.1%} ({beside(found)})"
            p.before = p.before or found
            improved = p.best is None or result.loss < p.best["loss"] or math.isnan(p.best["loss"])
            p.bad_evaluations = 0 if improved else p.bad_evaluations + 1
            p.stopped_early = p.bad_evaluations >= self.config.patience
            say(line + (" *" if improved and p.step else ""))
            measures = {k: found[k] for k in ("perplexity", "token_accuracy", "option_accuracy")}
            self._record("eval", step=p.step, epoch=p.step / self.steps_per_epoch, eval_loss=result.loss, **measures)
        if improved:
            p.best, p.best_step, self.best = found, p.step, self._copy_of_adapter()
        p.evaluated = p.step

    def evaluate(self) -> Evaluation:
        """Evaluate on this rank's share of the held-out rows, with a bar."""
        label, before_each = None if rank() else "evaluating", self._abandon_together if self.sharded else None
        try:
            return evaluate(self.compute, self.held_here, EVALUATED, label, self.tokens, before_each)
        except MemoryError as e:
            raise TrainingError(f"{e}\n{self._saved()}") from None

    def _abandon_together(self) -> None:
        """Raises Stop, on all ranks alike, if a signal has come to one."""
        self._gather(None)
        if self.stopping:
            raise Stop

    def _check_that_ranks_agree(self, facts: dict[str, Any]) -> None:
        """Raises ValueError where one of these is not the same on all ranks."""
        for r, theirs in enumerate(everyone := gather(facts)):
            for key, value, first in differences(theirs, everyone[0]):
                raise ValueError(
                    f"rank {r} has another {key} than rank 0: {value} and {first}; all need the same files, "
                    "versions and kind of GPU"
                )

    def _copy_of_adapter(self) -> dict[str, torch.Tensor]:
        return {n: w.detach().cpu().clone() for n, w in self.trained.items()}

    @torch.no_grad()
    def _put_into_adapter(self, weights: dict[str, torch.Tensor]) -> None:
        for name, weight in self.trained.items():
            weight.copy_(weights[name])

    def _save_due(self) -> bool:
        """Rank 0 alone writes, and when, only it knows."""
        p, c = self.progress, self.config
        if rank():
            return False
        if self.failures:
            return time.monotonic() >= self.retry_at
        by_step = c.save_every is not None and p.step % c.save_every == 0
        by_time = c.save_minutes > 0 and time.monotonic() - self.saved_at >= 60 * c.save_minutes
        return self.saved != (p.step, p.evaluated) and (p.evaluated == p.step or by_step or by_time)

    def _record(self, event: str, **values: Any) -> None:
        if rank() == 0:
            self.metrics.write(event, **values)

    def _write(self, action: Callable[[], None]) -> bool:
        """Write to the run's directory; a failure is a warning, and the run goes on.

        Raises:
            TrainingError: it failed for the 10th time in a row.
        """
        try:
            (self.run / "config.json").stat()  # where a drive dropped out, a local folder may stand in its place
            action()
        except OSError as e:
            self.failures += 1
            self.retry_at = time.monotonic() + RETRY_SECONDS
            what = f"step {self.progress.step}: '{self.run}' can't be written to ({e})"
            if self.failures >= SAVE_TRIES:
                raise TrainingError(
                    f"{what}, {SAVE_TRIES} times in a row; {self._last_good()}; when it can be, {self.advice}"
                ) from None
            say(f"warning: {what}; next try in {RETRY_SECONDS:.0f} s ({self.failures} of {SAVE_TRIES} failed)")
            return False
        if self.board:
            self.board.update()
        return True

    def _insist(self, action: Callable[[], None]) -> None:
        """The writing that the run must not end without."""
        while not self._write(action):
            time.sleep(RETRY_SECONDS)

    def _write_all(self) -> None:
        """What is not on disk yet: metrics first, which a checkpoint refers to, and the adapter of the best last."""
        p = self.progress
        checkpoint.clean(self.run)
        self.metrics.flush()
        if self.saved != (p.step, p.evaluated):
            checkpoint.save_checkpoint(self.run, p.step, self._state(), keep={p.best_step})
            self.saved, self.saved_at = (p.step, p.evaluated), time.monotonic()
        if self.best and self.adapter_step != p.best_step:
            self._write_adapter()
        if self.failures:
            say(f"step {p.step}: saved again, after {self.failures} failures")
            self.failures = 0

    def _write_adapter(self) -> None:
        p, c, base = self.progress, self.config, self.base
        local = Path(c.model)  # a folder is named in full, so that the adapter finds it from anywhere
        name = str(local.resolve()) if local.is_dir() else c.model
        described = AdapterConfig(
            c.rank, c.alpha, c.dropout, c.targets, name, base.revision, base.fingerprint, c.quantization
        )
        with atomic_folder(self.run / "adapter") as folder:
            save_adapter(folder, self.model, described, base.encoder.tokenizer, self.best)
            card = hub.adapter_card(described, self.record, p.before, p.best, p.best_step)
            (folder / hub.CARD).write_text(card, encoding="utf-8")
        self.adapter_step = p.best_step

    def _state(self) -> dict[str, Any]:
        """All that resuming needs. No random state: order and dropout are functions of the seed and the step."""
        return {
            "options": {k: v for k, v in self.record["options"].items() if k != "output_dir"},  # a run may be moved
            "progress": asdict(self.progress) | {"loss_sum": float(self.progress.loss_sum)},  # fp32 -> double is exact
            "adapter": {n: w.detach() for n, w in self.trained.items()},
            "best_adapter": self.best,  # adapter/ can be made again from any one checkpoint
            "stepper": self.stepper.state_dict(),
            "metrics_bytes": self.metrics.size,
        }

    def _restore(self) -> None:
        """Continue from the newest good checkpoint, or from the beginning where there is none yet.

        Raises:
            ValueError: the data, the base or the precision is not what it was, which the message names; or no
                checkpoint is good.
        """
        if "engine" not in self.recorded:
            raise ValueError(
                f"--resume {self.run}: it was begun by an earlier version of qlora_min, whose dropout masks "
                "were different; start a new run (evaluating, merging and chatting still work)"
            )
        for part, words in COMPARED.items():
            for key, then, now in differences(self.recorded.get(part), self.record[part]):
                changed = words.format(key=key, then=then, now=now)
                if not words.startswith("note: "):
                    raise ValueError(f"--resume {self.run}: {changed}")
                say(f"{changed}: the run goes on, but not bitwise as it would have")
        found = from_main(self._newest_checkpoint)
        if found is None:
            say(f"no checkpoint in {self.run}: starting from the beginning")
            from_main(lambda: self.metrics.cut(0))
            return
        step, state = found
        expected = self._state()
        known = state.keys() == expected.keys()
        if not known or any(state[part].keys() != expected[part].keys() for part in ("options", "progress")):
            raise ValueError(f"--resume {self.run}: step-{step} is of another version of qlora_min; resume with that")
        # config.json has no manifest that keeps it as it was.
        for name, then, now in differences(state["options"], expected["options"]):
            raise ValueError(
                f"--resume {self.run}: {flag(name)} was {then!r} when step-{step} was saved, now config.json says "
                f"{now!r}; put it back there"
            )
        self._put_into_adapter(state["adapter"])
        assert all(w.dtype == torch.float32 for w in self.trained.values())
        self.stepper.load_state_dict(state["stepper"])
        self.progress, self.best = Progress(**state["progress"]), state["best_adapter"]
        self.saved = (step, self.progress.evaluated)
        from_main(lambda: self.metrics.cut(state["metrics_bytes"]))
        say(f"continues at step {step:,}")

    def _newest_checkpoint(self) -> tuple[int, dict[str, Any]] | None:
        """(step, state) of the newest good checkpoint, or None where there is none yet."""
        checkpoint.clean(self.run)
        found = checkpoint.newest_checkpoint(self.run)
        if found is None and (self.run / "adapter").exists():  # the best of a run whose checkpoints are lost
            raise ValueError(
                f"--resume {self.run}: none of its checkpoints is good, and beginning again would overwrite its "
                "adapter/; start a new run, without --resume"
            )
        return found

    # -----------------------------------------------------------------------------------------------------------------
    # The beginning and the end
    # -----------------------------------------------------------------------------------------------------------------

    def describe(self) -> str:
        """What is about to happen, and what memory it is expected to take."""
        c, device = self.config, "CPU"
        how = c.engine + (f" ({self.why_engine})" if self.why_engine else "")
        if self.device.type == "cuda":
            size_gib = memory.total_bytes(self.device) / memory.GIB
            device = f"{torch.cuda.get_device_name(self.device)}, {size_gib:.0f} GiB"
            how += ", as CUDA graphs" if self.compute is not self.engine else ", without CUDA graphs"
            how += f"; formulas instead of kernels: {ops.why_formulas}" if ops.why_formulas else ""
        trained = sum(w.numel() for w in self.trained.values())
        whole = parameter_count(self.model) - trained
        weights = ", ".join(f"{w:g} x {Path(name).name}" for name, w in zip(dict.fromkeys(c.dataset), c.mix))
        never = self.largest < PAGED_FROM or self.device.type == "cpu"
        lines = {  # those that say nothing are left out
            "trained": f"{trained:,} parameters, {trained / whole:.2%} of the base's {whole:,}: rank {c.rank} on "
            f"{len(self.wrapped)} layers",
            "base": f"{c.model}, {c.quantization}, fingerprint {self.base.fingerprint[:12]}",
            "computes": f"{self.precision} on {device}",
            "steps": f"{self.total_steps:,} ({self.steps_per_epoch:,} an epoch), {c.batch_size * c.grad_accum} rows "
            f"({c.batch_size} x {c.grad_accum}) and about {self.epoch_tokens / self.steps_per_epoch:,.0f} tokens each",
            "engine": how,
            "batches": f"up to {self.tokens:,} tokens at a time"
            + (" (the longest row)" if self.tokens == self.work.longest else "")
            + f"; gradient checkpointing {c.gradient_checkpointing}",
            "memory": f"{self.footprint.describe(self.tokens)} forecast peak"
            + (", beyond the program's own" if self.device.type == "cpu" else ""),
            "an epoch": c.mix and f"{len(self.epoch_rows(0)):,} rows: {weights}",
            "options": c.shuffle_options and "of multiple-choice rows in another order each epoch",
            "optimizer": c.optimizer == "paged_adamw8bit"
            and f"8-bit state, {'none of it paged' if never else 'paged where large'} (largest tensor "
            f"{self.largest:,}; paged from {PAGED_FROM:,} on a GPU)",
            "held out": not self.held and "nothing: no evaluation and no early stopping; the last adapter is kept",
            "ranks": size() > 1
            and f"{size()} processes share each step's rows; the busiest has {self._imbalance():.1%} more tokens "
            "than the mean",
            "writes to": self.run,
        }
        return "\n".join(f"{label:<12}{text}" for label, text in lines.items() if text)

    def _imbalance(self) -> float:
        """How much more the busiest rank has to do in a step than the mean rank, in the first 200: 0.02 is 2% more."""
        found = []
        for step in range(min(200, self.steps_per_epoch)):
            lengths = np.array([len(r) for r in self.step_rows(step)])
            tokens = [lengths[part].sum() for part in share(lengths, size())]
            found.append(max(tokens) / np.mean(tokens) - 1)
        return float(np.mean(found))

    def estimate(self) -> dict[str, Any]:
        """Print how long training will take, from one micro-batch that is computed and thrown away; and its parts.

        Returns:
            steps, rows, tokens, seconds and evaluation_seconds of the whole run, memory_gib as forecast.
        """
        step = self.progress.step
        batch = self.step_batches(step)[0]
        with together():
            for _ in range(2):  # the first pays for kernels and graphs
                start = time.perf_counter()
                self.backward(batch, max(1, batch.n_supervised), step)
                memory.synchronize()
                seconds = time.perf_counter() - start
        self.stepper.optimizer.zero_grad(set_to_none=False)
        per_token = seconds / batch.n_tokens
        tokens = self.epoch_tokens * self.total_steps / self.steps_per_epoch
        evaluations = 1 + math.ceil(self.total_steps / self.config.eval_every) if self.held else 0
        held = int(self.held.lengths.sum()) * evaluations * per_token / 3  # a forward is a third of a step
        print(
            f"time        about {format_seconds(tokens * per_token)} of training for {tokens:,.0f} tokens at "
            f"{1 / per_token:,.0f} a second, and {format_seconds(held)} for {evaluations} evaluations; measured on one "
            f"micro-batch of {batch.n_tokens:,} tokens"
        )
        return {"steps": self.total_steps, "rows": len(self.rows), "held_out": len(self.held), "tokens": round(tokens),
                "seconds": tokens * per_token, "evaluation_seconds": held,
                "memory_gib": self.footprint.total(self.tokens) / memory.GIB}  # fmt: skip

    def _saved(self) -> str:
        return (
            f"  {self._last_good()}; if other programs held the memory, go on with: {self.command}\n"
            "  --resume keeps a run's options: with others, start a new run"
        )

    def _explain_memory(self, batch: Packed) -> str:
        """Where the memory went in a step that had too little for a single row, and what would have taken less."""
        tokens, stood = batch.n_tokens, memory.taken(self.device)
        self._ready.clear()
        if self.compute is not self.engine:
            self.compute.release()
        ways, room = [], 0.9 * memory.total_bytes(self.device)
        if not self.sharded:  # where measuring takes all processes
            with suppress(MemoryError):
                ways = memory.ways_to_save(self.engine, self.work, self.footprint, self.rows.lengths.tolist(), room)
        return "\n".join([
            f"out of memory at step {self.progress.step + 1}, in a micro-batch of {tokens:,} tokens, "
            f"{batch.n_supervised:,} supervised; {stood}",
            f"  forecast for this micro-batch: {self.footprint.describe(tokens)}",
            "  what would take less, in order of effect:" if ways else "  no option is forecast to take less",
            *(f"    {way}" for way in ways),
            self._saved(),
        ])  # fmt: skip

    def _how_to_go_on(self) -> str:
        return f"; {self.advice}" if rank() else f"; {self._last_good()}; {self.advice}"  # rank 0 knows what it saved

    def _last_good(self) -> str:
        return f"last good checkpoint: {self.run / 'checkpoints' / f'step-{self.saved[0]}' if self.saved else 'none'}"

    def _finish(self) -> Progress:
        """The best adapter back into the model, samples, curves, and what to do next."""
        self._put_into_adapter(self.best)
        peak = max(gather(memory.peak_gib(self.device)))
        answers = self._answers() if self.sharded and self.held else None  # which takes all ranks
        from_main(lambda: self._write_end(peak, answers))
        return self.progress

    def _write_end(self, peak: float, answers: list[list[str]] | None) -> None:
        p, skipped = self.progress, self.stepper.skipped
        with self.signals.abandonable() if size() == 1 else nullcontext():  # the others wait, and would not know
            try:
                self._write_samples(answers)
                note = report.draw_curves({"": checkpoint.read_metrics(self.run)}, self.run / "curves.png")
            except OSError as e:  # the run is saved: these two are worth a warning
                note = f"warning: no samples or curves ({e})"
        speed = p.tokens / p.seconds if p.seconds else 0.0
        lines = [f"done: {p.step:,} steps in {p.seconds:.0f} s of training, {speed:,.0f} tokens/s"]
        lines[0] += f", {skipped} steps skipped" if skipped else ""
        if p.stopped_early and p.step < self.total_steps:
            lines[0] += f"; stopped early after {p.bad_evaluations} evaluations without improvement"
        if p.best:
            lines.append(f"best step {p.best_step}, on {p.best['rows']} held-out rows:")
            for label, key, form in MEASURES:
                if p.best[key] is not None:
                    lines.append(f"  {label:<16}{form.format(p.before[key]):>10} -> {form.format(p.best[key])}")
        adapter = shlex.quote(str(self.run / "adapter"))
        lines += [
            f"adapter, metrics{', samples' if self.held else ''} and curves: {self.run}",
            *([note] if note else []),
            f"next: python scripts/eval.py --adapter {adapter}{'' if self.held else ' --dataset FILE'}",
            f"      python scripts/chat.py --adapter {adapter} --compare",
        ]
        self.metrics.write(
            "end", step=p.step, best_step=p.best_step, before=p.before, best=p.best, skipped=skipped, tokens=p.tokens,
            seconds=round(p.seconds, 2), tokens_per_second=round(speed, 1),
            peak_memory_gib=round(max(peak, memory.peak_gib(self.device)), 3), **self._communication(),
        )  # fmt: skip
        self._insist(self.metrics.flush)
        say("\n".join(lines))

    def _answers(self) -> list[list[str]]:
        """Answers to the first held-out prompts without and with the adapter."""
        prompts = [r.ids[: r.answer_start].tolist() for r in self.held[:SAMPLES]]
        with lora_disabled(self.model):
            before = generate(self.base, prompts, SAMPLE_TOKENS)
        return [before, generate(self.base, prompts, SAMPLE_TOKENS)]

    def _write_samples(self, answers: list[list[str]] | None) -> None:
        if not self.held:
            return
        decode = self.base.encoder.tokenizer.decode
        samples = [
            {
                "where": row.where,
                "prompt": decode(row.ids[: row.answer_start].tolist()),
                "reference": decode(row.ids[row.answer_start :].tolist(), skip_special_tokens=True),
                "before": before,
                "after": after,
            }
            for row, before, after in zip(self.held[:SAMPLES], *(answers or self._answers()))
        ]
        write_jsonl(self.run / "samples.jsonl", samples)
        say("sample: expected {reference!r}\n  before {before!r}\n  after  {after!r}".format(**samples[0]))


def output_directory(config: Config) -> Path:
    """Where a new run writes.

    Raises:
        ValueError: the directory holds something already.
    """
    if config.output_dir is None:
        data = "+".join(Path(d).stem for d in config.dataset)
        return Path("runs") / f"{Path(config.model).name}-{data}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = Path(config.output_dir)
    if checkpoint.is_run(run):
        what, fix = "a finished run", "choose another"
        if not checkpoint.is_finished(run):
            what, fix = "an unfinished run", f"continue it with --resume {shlex.quote(str(run))}, or {fix}"
        raise ValueError(f"--output-dir {run}: holds {what}, which is never overwritten; {fix}")
    if run.exists() and (not run.is_dir() or {p.name for p in run.iterdir()} - checkpoint.BEFORE_A_RUN):
        raise ValueError(f"--output-dir {run}: exists and is not an empty directory; choose another")
    return run


def format_seconds(seconds: float) -> str:
    """40 s, 12 min, 3.5 h"""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def unfinished(run: Path) -> dict[str, Any]:
    """The config.json of a run to continue. Raises ValueError where there is none, or it came to its end."""
    record = checkpoint.read_record(run)
    if checkpoint.is_finished(run):
        raise ValueError(f"--resume {run}: that run is finished; start a new one without --resume")
    return record


def differences(then: Any, now: Any) -> list[tuple[str, Any, Any]]:
    """(key, value then, value now) where two dictionaries differ, None where a key is missing; other values: key ""."""
    if not isinstance(now, dict):
        then, now = {"": then}, {"": now}
    return [(k, then.get(k), now.get(k)) for k in then | now if then.get(k) != now.get(k)]


def resume_config(directory: str, given: dict[str, Any]) -> tuple[Config, Path]:
    """The options and the directory of a run to continue; "" stands for the newest unfinished one under runs/.

    Args:
        given: options of the command line; each must be as it was when the run began.

    Raises:
        ValueError: no such run, it is finished, or an option differs.
    """
    run = Path(directory) if directory else checkpoint.newest_unfinished(Path("runs"))
    config = Config.from_dict(unfinished(run)["options"], str(run / "config.json"))
    for name, value in given.items():
        if name == "output_dir" and Path(value).resolve() != run.resolve():
            raise ValueError(f"--output-dir {value}: --resume continues in {run} itself; leave it out")
        resolved = name == "output_dir" or (name in ("gradient_checkpointing", "engine") and value == "auto")
        if name in FIELDS and not resolved and getattr(config, name) != value:
            raise ValueError(
                f"--resume {run}: {flag(name)} was {getattr(config, name)!r} when the run began, now {value!r}; "
                "leave it out, or start a new run"
            )
    return config, run
