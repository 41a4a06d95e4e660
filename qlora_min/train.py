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

import functools
import itertools
import math
import os
import platform
import random
import shlex
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import __version__, checkpoint, hub, memory, ops, report
from .adapter import AdapterConfig, save_adapter
from .batches import (
    Packed,
    cut,
    dropout_seed,
    epoch_rows,
    optimizer_steps,
    share,
    shuffle_options,
    steps_per_epoch,
)
from .config import FIELDS, Config, flag, shown
from .data import Data, Row, Rows, data_hash, read_data, table
from .distributed import from_main, gather, in_step, join, rank, size, sum_, together
from .engine import captured, make_engine
from .evaluate import MEASURES, Evaluation, beside, evaluate
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
    import bitsandbytes
    import transformers

    found = {"qlora_min": __version__, "python": platform.python_version(), "torch": torch.__version__}
    found |= {m.__name__: m.__version__ for m in (transformers, bitsandbytes)}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


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

    def _prepare(self, config: Config, resume: Path | None, data: Data | None) -> None:
        revision = None
        if resume:
            from_main(lambda: refuse_finished(resume))
            revision = from_main(lambda: checkpoint.read_record(resume))["base"].get("revision")
        self.device = pick_device()
        self.precision = resolve_precision(config.precision, self.device)
        self.run = from_main(lambda: resume or output_directory(config))
        self.board = report.Board(self.run) if config.tensorboard else None
        encoder = load_encoder(config.model, revision)
        train, held = data or read_data(config, encoder)
        say(table([*train, *held]))
        self.rows, self.held = (Rows.join(part.rows for part in side) for side in (train, held))
        self.sharded = config.shard and size() > 1
        if config.shard and not self.sharded:
            say("note: --shard: this is the only process, which holds the whole base (torchrun starts more)")
        self.held_here = self.held
        if size() > 1 and not self.sharded:
            self.held_here = self.held[np.array(share(self.held.lengths, size())[rank()], int)]
        if config.shuffle_options and not self.rows[0].text:
            raise ValueError("--shuffle-options: the rows given have no text; encode them with texts=True")

        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(config.seed)
        self.base = load_base(
            config.model, config.quantization, self.precision, self.device, revision, self.sharded, encoder
        )
        self.model = self.base.model
        if self.device.type == "cpu" and self.model.config.hidden_size <= SMALL:
            torch.set_num_threads(1)
        self.wrapped = add_lora(self.base, config.targets, config.rank, config.alpha, config.dropout)
        self.trained = lora_parameters(self.model)
        self.initial = {n: w.detach().cpu().clone() for n, w in self.trained.items()}  # until all have moved

        self.epoch_rows = functools.partial(epoch_rows, [len(p.rows) for p in train], config.mix, config.seed)
        visited = self.epoch_rows(0)
        self.epoch_tokens = int(self.rows.lengths[visited].sum())
        self.steps_per_epoch = steps_per_epoch(len(visited), config.batch_size, config.grad_accum)
        total = math.ceil(config.epochs * self.steps_per_epoch)
        self.total_steps = min(total, config.max_steps or total)
        every = config.eval_every or math.ceil(self.steps_per_epoch / 4)
        self.config = replace(config, eval_every=every, output_dir=str(self.run))
        self._choose_how_to_compute()
        matrices = list(self.trained.values())
        self.stepper = Stepper(
            make_optimizer(
                config.optimizer,
                self.engine.adapter.large,
                config.learning_rate,
                config.weight_decay,
                self.engine.adapter.small,
                paged=max(w.numel() for w in matrices) >= PAGED_FROM,
            ),
            config.learning_rate,
            cosine_with_warmup(self.total_steps, config.warmup_ratio),
            config.max_grad_norm,
            self.precision == "fp16",
            self.device,
        )
        self.progress = Progress()
        self.stopping: int | None = None  # the signal for which all ranks stop
        self.waited = self.summed = 0.0  # seconds: for the slowest rank, and summing gradients
        self._order: tuple[int, list, np.ndarray] = (-1, [], np.arange(0))  # of one epoch, and the rows it visits
        self._ready: dict[int, tuple] = {}  # steps' micro-batches
        self.metrics = checkpoint.Metrics(self.run)
        self.advice = f"continue with: {launcher()} scripts/train.py --resume {shlex.quote(str(self.run))}"
        self.signals = Signals(self.advice, among=rank() if size() > 1 else None)
        self.record = {
            "options": self.config.as_dict(),
            "precision": self.precision,
            "engine": self.config.engine,
            "total_steps": self.total_steps,
            "ranks": size(),
            "base": {"name": config.model, "revision": self.base.revision, "fingerprint": self.base.fingerprint},
            "files": {p.name: f"{len(p.rows)} rows, sha256 {data_hash(p.rows, [])[:16]}" for p in [*train, *held]},
            "data": {"rows": len(self.rows), "held_out": len(self.held), "sha256": data_hash(self.rows, self.held)},
            "versions": versions(),
        }
        self.best: dict[str, torch.Tensor] = {}  # the adapter of the best evaluation so far
        self.saved: tuple[int, int] | None = None  # (step, evaluated) of the newest checkpoint
        self.adapter_step: int | None = None  # the step whose adapter is in adapter/, as far as we know
        self.saved_at = time.monotonic()
        self.failures, self.retry_at = 0, 0.0  # to save, in a row
        same = {k: self.record[k] for k in ("precision", "engine", "data")} | {"base": self.base.fingerprint}
        self._check_that_ranks_agree(same)
        if resume:
            self._restore()

    def _begin(self) -> None:
        """Make the run's directory ours."""
        with writing(f"--output-dir {self.run}"):
            self.run.mkdir(parents=True, exist_ok=True)
            self.lock = checkpoint.Lock(self.run)
            output_directory(self.config)  # another process may have begun there while we loaded
            checkpoint.write_json(self.run / "config.json", self.record)

    def _choose_how_to_compute(self) -> None:
        """The engine, and micro-batches that fit the memory of every process: measured, where that is left to us."""
        c, longest = self.config, int(self.rows.lengths.max())
        longest_of_all = max(longest, int(self.held.lengths.max(initial=0)))
        self.engine, name, self.why_engine = make_engine(self.base, c.engine, longest_of_all)
        self.work = memory.Workload(
            rows=-(-c.batch_size * c.grad_accum // size()),
            longest=longest,
            supervised=int(self.rows.supervised.max()),
            bits8=c.optimizer == "paged_adamw8bit",
        )
        room = memory.available(self.device) / (size() if self.device.type == "cpu" else 1)

        def fits(peak: int) -> bool:
            return all(gather(peak <= room))

        gather(None)
        in_step(self.sharded)
        on, tokens, self.footprint = memory.plan(
            self.engine, self.work, fits, c.gradient_checkpointing, c.micro_batch_tokens
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
            self.clock = time.perf_counter()
            while True:
                # Evaluate and save, where due.
                if self._evaluation_due():
                    self._evaluate()
                stop = (self.signals.received if size() == 1 else self.stopping) is not None
                if stop or self._finished():
                    from_main(self._save_at_last)
                elif self._save_due():
                    self._save()
                if stop:
                    say(f"saved step {p.step}")
                    raise Stop
                if self._finished():
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
        p = self.progress
        supervised, tokens = self.step_totals(p.step)
        lr = self.stepper.lr
        while (loss := self._compute_gradients(p.step, supervised)) is None:
            pass  # with smaller micro-batches: their gradients add up to the same
        try:
            grad_norm, taken = self.stepper.step()
        except TrainingError as e:
            raise TrainingError(self._explain(e, [r.where for r in self.step_rows(p.step)])) from None
        except (RuntimeError, MemoryError) as e:
            if not memory.is_out_of_memory(e):
                raise
            raise TrainingError(self._explain_memory(self.step_batches(p.step)[0])) from None

        # Count.
        p.step += 1
        p.loss_sum = p.loss_sum + loss
        p.supervised, p.tokens, p.window_tokens = p.supervised + supervised, p.tokens + tokens, p.window_tokens + tokens
        if self.initial and self.stepper.taken == MOVED_BY:
            self._check_that_all_moved()
        if not taken:
            say(f"step {p.step}: skipped, a gradient is not finite")
        return lr, grad_norm

    def _compute_gradients(self, step: int, supervised: int) -> float | torch.Tensor | None:
        """Forward and backward of all processes' rows of a step; returns the sum of their losses.

        None where memory ran out: then the gradients are cleared, and micro-batches are half as large from now on.

        Raises:
            TrainingError: a single row takes more memory than there is, or a process can't try less by itself.
        """
        loss, failed = 0.0, None
        try:
            for batch in self.step_batches(step):
                failed = batch
                loss = loss + self.backward(batch, supervised, step)
            failed = None
            # The next step's rows are made ready while the device computes.
            if step + 1 < self.total_steps:
                self.step_batches(step + 1)
        except (RuntimeError, MemoryError) as e:
            if not memory.is_out_of_memory(e) or not failed:
                raise
            if self.sharded or len(failed.spans()) == 1:
                raise TrainingError(self._explain_memory(failed)) from None
        # While the device computes: has memory run out, or a signal come, in another process?
        if any(self._gather(failed is not None)):
            self._halve_micro_batches()
            return None
        return self._sum_over_ranks(loss) if size() > 1 else loss

    def _halve_micro_batches(self) -> None:
        self._ready.clear()
        self.engine.adapter.grads.zero_()
        if self.compute is not self.engine:
            self.compute.release()
        memory.release()
        self.tokens //= 2  # of one row, which is never cut, at least
        say(
            f"note: step {self.progress.step + 1}: out of memory; its gradients are computed again, in micro-batches "
            f"of up to {self.tokens:,} tokens, or one row, from now on"
        )

    def step_batches(self, step: int) -> list[Packed]:
        """This process's micro-batches of an optimizer step (0-based). The last two steps' are remembered."""
        if step not in self._ready:
            rows = self.step_rows(step)
            shares = share([len(r) for r in rows], size())
            batches = self._equal_micro_batches(rows, shares) if self.sharded else self._batches(rows, shares[rank()])
            totals = sum(r.n_supervised for r in rows), sum(map(len, rows))
            self._ready = {s: b for s, b in self._ready.items() if s == step - 1}
            self._ready[step] = batches, totals
        return self._ready[step][0]

    def _batches(self, rows: list[Row], mine: list[int]) -> list[Packed]:
        count = self.config.batch_size * self.config.grad_accum
        return [self.compute.pack([rows[i] for i in part], part, count) for part in self._cut(rows, mine)]

    def _cut(self, rows: list[Row], mine: list[int]) -> list[list[int]]:
        return [[mine[j] for j in part] for part in cut([len(rows[i]) for i in mine], self.tokens)]

    def _equal_micro_batches(self, rows: list[Row], shares: list[list[int]]) -> list[Packed]:
        """This process's micro-batches where all processes gather the base together: as many, of as many supervised
        positions.

        The padding's losses count for nothing; where a process has no row left, it computes one without losses.
        """
        batches, parts = [], [self._cut(rows, mine) if mine else [] for mine in shares]
        for here in itertools.zip_longest(*parts):
            supervised = max(sum(rows[i].n_supervised for i in part or ()) for part in here)
            other = rows[next(part for part in here if part)[0]]
            spare = replace(other, supervised=torch.zeros_like(other.supervised))
            mine = here[rank()]
            chosen = [rows[i] for i in mine] if mine else [spare]
            batches.append(self.engine.pack(chosen, mine, supervised=supervised))
        return batches

    def step_totals(self, step: int) -> tuple[int, int]:
        """(supervised tokens, tokens) of an optimizer step (0-based), over all ranks."""
        self.step_batches(step)
        return self._ready[step][1]

    def step_rows(self, step: int) -> list[Row]:
        """The rows of an optimizer step (0-based), those of all ranks: a function of the seed and the step alone."""
        c = self.config
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            visited = self.epoch_rows(epoch)
            steps = optimizer_steps(len(visited), c.batch_size, c.grad_accum, c.seed, epoch)
            self._order = (epoch, steps, visited)
        return [self._row(epoch, visit) for part in self._order[1][index] for visit in part]

    def _row(self, epoch: int, visit: int) -> Row:
        """What an epoch's visit (an index into `epoch_rows`) to a row shows of it: the same whenever it is asked."""
        row, c = self.rows[self._order[2][visit]], self.config
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

    def _count_time(self) -> None:
        """Add the time since the clock was last read, when all that was computed in it is done."""
        p = self.progress
        p.loss_sum = float(p.loss_sum)  # waits for the device; fp32 -> double -> fp32 changes nothing
        now = time.perf_counter()
        p.seconds, p.window_seconds, self.clock = p.seconds + now - self.clock, p.window_seconds + now - self.clock, now

    def _log(self, lr: float, grad_norm: float, bar: report.tqdm) -> None:
        self._count_time()
        p = self.progress
        loss, tokens_per_second = p.loss_sum / p.supervised, p.window_tokens / p.window_seconds
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

    def _finished(self) -> bool:
        return self.progress.step == self.total_steps or self.progress.stopped_early

    def _evaluation_due(self) -> bool:
        p = self.progress
        return p.evaluated != p.step and (p.step % self.config.eval_every == 0 or p.step == self.total_steps)

    def _evaluate(self) -> None:
        """Evaluate on the held-out rows, if any; remember the adapter if it is the best so far.

        A signal abandons it without a trace: a resumed run does it again.
        """
        p = self.progress
        improved = True
        self._check_that_ranks_agree({"adapter": self._checksum()})
        if self.held:
            try:
                # A sharded one can't be left by one rank alone: it asks before each batch.
                with nullcontext() if self.sharded else self.signals.abandonable():
                    result = self.evaluate()
            except Stop:
                result = None
            results = self._gather(result)
            if None in results:
                return
            result = results[0] if self.sharded else Evaluation.join(results)
            line = f"step {p.step}: held-out loss {result.loss:.4f}, perplexity {result.perplexity:.3f}"
            if result.option_accuracy is not None:
                line += f", option accuracy {result.option_accuracy:.1%} ({beside(result.as_dict())})"
            if p.before is None:
                p.before = result.as_dict()
            improved = p.best is None or result.loss < p.best["loss"] or math.isnan(p.best["loss"])
            if improved:
                p.best, p.bad_evaluations = result.as_dict(), 0
            else:
                p.bad_evaluations += 1
                p.stopped_early = p.bad_evaluations >= self.config.patience
            say(line + (" *" if improved and p.step else ""))
            self._record(
                "eval", step=p.step, epoch=p.step / self.steps_per_epoch, eval_loss=result.loss,
                perplexity=result.perplexity, token_accuracy=result.token_accuracy,
                option_accuracy=result.option_accuracy,
            )  # fmt: skip
        if improved:
            p.best_step = p.step
            self.best = {n: w.detach().cpu().clone() for n, w in self.trained.items()}
        p.evaluated = p.step
        self.clock = time.perf_counter()

    def evaluate(self) -> Evaluation:
        """Evaluate on this rank's share of the held-out rows, with a bar."""
        try:
            return evaluate(
                self.compute,
                self.held_here,
                EVALUATED,
                progress=None if rank() else "evaluating",
                tokens=self.tokens,
                before_each=self._abandon_together if self.sharded else None,
            )
        except MemoryError as e:
            raise TrainingError(f"{e}\n{self._saved()}") from None

    def _abandon_together(self) -> None:
        """Raises Stop, on all ranks alike, if a signal has come to one."""
        self._gather(None)
        if self.stopping:
            raise Stop

    def _checksum(self) -> int:
        """Of the adapter."""
        check = 0
        for w in self.trained.values() if size() > 1 else ():
            check = zlib.crc32(w.detach().cpu().numpy(), check)
        return check

    def _check_that_ranks_agree(self, facts: dict[str, Any]) -> None:
        """Raises ValueError where one of these is not the same on all ranks."""
        for r, theirs in enumerate(everyone := gather(facts)):
            for key, value in theirs.items():
                if value != (first := everyone[0][key]):
                    raise ValueError(
                        f"rank {r} has another {key} than rank 0: {value} and {first}; all need the same files, "
                        "versions and kind of GPU"
                    )

    def _save_due(self) -> bool:
        """Rank 0 alone writes, and when, only it knows."""
        p, c = self.progress, self.config
        if rank():
            return False
        if self.failures:
            return time.monotonic() >= self.retry_at
        if self.saved == (p.step, p.evaluated):
            return False
        by_step = c.save_every is not None and p.step % c.save_every == 0
        by_time = c.save_minutes > 0 and time.monotonic() - self.saved_at >= 60 * c.save_minutes
        return p.evaluated == p.step or by_step or by_time

    def _save(self) -> bool:
        """Bring the run's directory up to this step; False where that failed."""
        self._count_time()
        done = self._write(self._write_all)
        self.clock = time.perf_counter()
        return done

    def _save_at_last(self) -> None:
        """The save that the run must not end without."""
        while not self._save():
            time.sleep(RETRY_SECONDS)

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

    def _write_all(self) -> None:
        """What is not on disk yet: metrics first, which a checkpoint refers to, and the adapter of the best last."""
        p = self.progress
        checkpoint.clean(self.run)
        self.metrics.flush()
        if self.saved != (p.step, p.evaluated):
            checkpoint.save_checkpoint(self.run, p.step, self._state(), keep={p.best_step})
            self.saved, self.saved_at = (p.step, p.evaluated), time.monotonic()
        if self.best and self.adapter_step != p.best_step:
            with checkpoint.atomic_folder(self.run / "adapter") as folder:
                save_adapter(folder, self.model, self._described(), self.base.encoder.tokenizer, self.best)
                card = hub.adapter_card(self._described(), self.record, p.before, p.best, p.best_step)
                (folder / hub.CARD).write_text(card, encoding="utf-8")
            self.adapter_step = p.best_step
        if self.failures:
            say(f"step {p.step}: saved again, after {self.failures} failures")
            self.failures = 0

    def _state(self) -> dict[str, Any]:
        """All that resuming needs."""
        return {
            "options": {k: v for k, v in self.record["options"].items() if k != "output_dir"},  # a run may be moved
            "progress": asdict(self.progress),
            "adapter": {n: w.detach() for n, w in self.trained.items()},
            "best_adapter": self.best,  # adapter/ can be made again from any one checkpoint
            "stepper": self.stepper.state_dict(),
            "rng": checkpoint.rng_state(),
            "metrics_bytes": self.metrics.size,
        }

    def _described(self) -> AdapterConfig:
        c = self.config
        local = Path(c.model)  # a folder is named in full, so that the adapter finds it from anywhere
        base = str(local.resolve()) if local.is_dir() else c.model
        return AdapterConfig(
            c.rank, c.alpha, c.dropout, c.targets, base, self.base.revision, self.base.fingerprint, c.quantization
        )

    def _restore(self) -> None:
        """Continue from the newest good checkpoint, or from the beginning where there is none yet.

        Raises:
            ValueError: the data, the base or the precision is not what it was, which the message names; or no
                checkpoint is good.
        """
        recorded = from_main(lambda: checkpoint.read_record(self.run))
        if "engine" not in recorded:
            raise ValueError(
                f"--resume {self.run}: it was begun by an earlier version of qlora_min, which computes other dropout "
                "masks; start a new run (evaluating, merging and chatting still work)"
            )
        for what in ("base", "files", "data"):
            for key in recorded[what] | self.record[what]:
                then, now = recorded[what].get(key), self.record[what].get(key)
                if then != now:
                    raise ValueError(f"--resume {self.run}: the {what} changed: {key} was {then}, now {now}")
        if self.record["engine"] != recorded["engine"]:
            raise ValueError(f"--resume {self.run}: it began with --engine {shown(recorded['engine'])}, put that back")
        if self.record["precision"] != recorded.get("precision"):
            raise ValueError(
                f"--resume {self.run}: it was trained in {recorded.get('precision')}, here --precision auto is "
                f"{self.precision}; expected the same kind of hardware"
            )
        for key in recorded["versions"] | self.record["versions"]:  # a GPU may be there now only
            then, now = recorded["versions"].get(key), self.record["versions"].get(key)
            if then != now:
                say(f"note: {key} was {then}, now {now}: the run goes on, but not bitwise as it would have")
        if (ranks := recorded.get("ranks", 1)) != size():
            say(f"note: it began in {ranks} processes, now {size()}: the run goes on, but not bitwise as it would have")
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
        for name, then in state["options"].items():  # config.json has no manifest that keeps it as it was
            if then != (now := expected["options"][name]):
                raise ValueError(
                    f"--resume {self.run}: {flag(name)} was {then!r} when step-{step} was saved, now config.json says "
                    f"{now!r}; put it back there"
                )
        with torch.no_grad():
            for name, weight in self.trained.items():
                weight.copy_(state["adapter"][name])
        assert all(w.dtype == torch.float32 for w in self.trained.values())
        self.stepper.load_state_dict(state["stepper"])
        self.progress, self.best = Progress(**state["progress"]), state["best_adapter"]
        self.saved = (step, self.progress.evaluated)
        from_main(lambda: self.metrics.cut(state["metrics_bytes"]))
        checkpoint.set_rng_state(state["rng"])
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
        c, name = self.config, "CPU"
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory / memory.GIB
            name = f"{torch.cuda.get_device_name(self.device)}, {total:.0f} GiB"
        trained = sum(w.numel() for w in self.trained.values())
        whole = parameter_count(self.model) - trained
        per_step = self.epoch_tokens / self.steps_per_epoch
        lines = [
            f"trained     {trained:,} parameters, {trained / whole:.2%} of the base's {whole:,}: rank {c.rank} on "
            f"{len(self.wrapped)} layers",
            f"base        {c.model}, {c.quantization}, fingerprint {self.base.fingerprint[:12]}",
            f"computes    {self.precision} on {name}",
            f"steps       {self.total_steps:,} ({self.steps_per_epoch:,} an epoch), "
            f"{c.batch_size} x {c.grad_accum} rows and about {per_step:,.0f} tokens each",
            f"engine      {self._describe_engine()}",
            f"batches     up to {self.tokens:,} tokens; gradient checkpointing {c.gradient_checkpointing}",
            f"memory      {self.footprint.describe(self.tokens)} forecast peak",
        ]
        if c.mix:
            weights = ", ".join(f"{w:g} x {Path(name).name}" for name, w in zip(dict.fromkeys(c.dataset), c.mix))
            lines.append(f"an epoch    {len(self.epoch_rows(0)):,} rows: {weights}")
        if c.shuffle_options:
            lines.append("options     of multiple-choice rows in another order each epoch")
        if c.optimizer == "paged_adamw8bit":
            largest = max(w.numel() for w in self.trained.values())
            paged = "none of it paged" if largest < PAGED_FROM or self.device.type == "cpu" else "paged where large"
            lines.append(
                f"optimizer   8-bit state, {paged} (largest tensor {largest:,}; paged from {PAGED_FROM:,} on a GPU)"
            )
        if not self.held:
            lines.append("held out    nothing: no evaluation and no early stopping; the last adapter is kept")
        if size() > 1:
            lines.append(
                f"ranks       {size()} processes share out each step's rows; the busiest has {self.imbalance():.1%} "
                "more tokens than the mean"
            )
        lines.append(f"writes to   {self.run}")
        return "\n".join(lines)

    def _describe_engine(self) -> str:
        how = f"{self.config.engine} ({self.why_engine})"
        if self.device.type == "cuda":
            how += ", as CUDA graphs" if self.compute is not self.engine else ", without CUDA graphs"
            how += f"; formulas instead of kernels: {ops.why_formulas}" if ops.why_formulas else ""
        return how

    def estimate(self) -> dict[str, Any]:
        """Print how long training will take, from one micro-batch that is computed and thrown away; and its parts.

        Returns:
            steps, rows, tokens, seconds and evaluation_seconds of the whole run, memory_gib as forecast.
        """
        p, c = self.progress, self.config
        batch = self.step_batches(p.step)[0]
        supervised = max(1, batch.n_supervised)
        with together():
            for _ in range(2):  # the first pays for kernels and graphs
                memory.synchronize()
                start = time.perf_counter()
                self.backward(batch, supervised, p.step)
                memory.synchronize()
                seconds = time.perf_counter() - start
        self.stepper.optimizer.zero_grad(set_to_none=False)
        per_token = seconds / batch.n_tokens
        tokens = self.epoch_tokens * self.total_steps / self.steps_per_epoch
        evaluations = 1 + math.ceil(self.total_steps / c.eval_every) if self.held else 0
        held = int(self.held.lengths.sum()) * evaluations * per_token / 3  # a forward is a third of a step
        print(
            f"time        about {format_seconds(tokens * per_token)} of training for {tokens:,.0f} tokens at "
            f"{1 / per_token:,.0f} a second, and {format_seconds(held)} for {evaluations} evaluations; measured on one "
            f"micro-batch of {batch.n_tokens:,} tokens"
        )
        return {"steps": self.total_steps, "rows": len(self.rows), "held_out": len(self.held), "tokens": round(tokens),
                "seconds": tokens * per_token, "evaluation_seconds": held,
                "memory_gib": self.footprint.total(self.tokens) / memory.GIB}  # fmt: skip

    def imbalance(self, steps: int = 200) -> float:
        """How much more the busiest rank has to do in a step than the mean rank: 0.02 is 2% more tokens.

        Args:
            steps: the mean of so many, the first.
        """
        found = []
        for step in range(min(steps, self.steps_per_epoch)):
            lengths = np.array([len(r) for r in self.step_rows(step)])
            tokens = [lengths[part].sum() for part in share(lengths, size())]
            found.append(max(tokens) / np.mean(tokens) - 1)
        return float(np.mean(found))

    def _saved(self) -> str:
        return (
            f"  {self._last_good()}; if other programs held the memory, go on with: {launcher()} scripts/train.py "
            f"--resume {shlex.quote(str(self.run))}\n  --resume keeps a run's options: with others, start a new run"
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

    def _explain(self, error: TrainingError, where: list[str]) -> str:
        return (
            f"{error}, the last at step {self.progress.step + 1} with rows {', '.join(where[:8])}; "
            f"{self._last_good()}. Lower --learning-rate, look at those rows, or use --precision bf16 or fp32"
        )

    def _how_to_go_on(self) -> str:
        return f"; {self.advice}" if rank() else f"; {self._last_good()}; {self.advice}"  # rank 0 knows what it saved

    def _last_good(self) -> str:
        return f"last good checkpoint: {self.run / 'checkpoints' / f'step-{self.saved[0]}' if self.saved else 'none'}"

    def _finish(self) -> Progress:
        """The best adapter back into the model, samples, curves, and what to do next."""
        p = self.progress
        with torch.no_grad():
            for name, weight in self.trained.items():
                weight.copy_(self.best[name])
        peak = max(gather(memory.peak_gib(self.device)))
        answers = self._answers() if self.sharded else None  # which takes all ranks
        from_main(lambda: self._write_end(peak, answers))
        return p

    def _write_end(self, peak: float, answers: list[list[str]] | None) -> None:
        p = self.progress
        with self.signals.abandonable() if size() == 1 else nullcontext():  # the others wait, and would not know
            try:
                self._write_samples(answers)
                note = report.draw_curves({"": checkpoint.read_metrics(self.run)}, self.run / "curves.png")
            except OSError as e:  # the run is saved: these two are worth a warning
                note = f"warning: no samples or curves ({e})"
        speed = p.tokens / p.seconds if p.seconds else 0.0
        skipped = f", {self.stepper.skipped} steps skipped" if self.stepper.skipped else ""
        lines = [f"done: {p.step:,} steps in {p.seconds:.0f} s of training, {speed:,.0f} tokens/s{skipped}"]
        if p.stopped_early and p.step < self.total_steps:
            lines[0] += f"; stopped early after {p.bad_evaluations} evaluations without improvement"
        if p.before and p.best:
            lines.append(f"best step {p.best_step}, on {p.best['rows']} held-out rows:")
            for label, key, form in MEASURES:
                if p.best[key] is not None:
                    lines.append(f"  {label:<16}{form.format(p.before[key]):>10} -> {form.format(p.best[key])}")
        lines.append(f"adapter, metrics{', samples' if self.held else ''} and curves: {self.run}")
        if note:
            lines.append(note)
        adapter = shlex.quote(str(self.run / "adapter"))
        where = "" if self.held else " --dataset FILE"
        lines.append(f"next: python scripts/eval.py --adapter {adapter}{where}")
        lines.append(f"      python scripts/chat.py --adapter {adapter} --compare")
        self.metrics.write(
            "end",
            step=p.step,
            best_step=p.best_step,
            before=p.before,
            best=p.best,
            skipped=self.stepper.skipped,
            tokens=p.tokens,
            seconds=round(p.seconds, 2),
            tokens_per_second=round(speed, 1),
            peak_memory_gib=round(max(peak, memory.peak_gib(self.device)), 3),
            **self._communication(),
        )
        while not self._write(self.metrics.flush):
            time.sleep(RETRY_SECONDS)
        say("\n".join(lines))

    def _answers(self) -> list[list[str]]:
        """Answers to the first held-out prompts without and with the adapter."""
        prompts = [r.ids[: r.answer_start].tolist() for r in self.held[:SAMPLES]]
        if not prompts:
            return [[], []]
        with lora_disabled(self.model):
            before = generate(self.base, prompts, SAMPLE_TOKENS)
        return [before, generate(self.base, prompts, SAMPLE_TOKENS)]

    def _write_samples(self, answers: list[list[str]] | None) -> None:
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
        if not samples:
            return
        checkpoint.write_jsonl(self.run / "samples.jsonl", samples)
        first = samples[0]
        say(f"sample: expected {first['reference']!r}\n  before {first['before']!r}\n  after  {first['after']!r}")


def launcher() -> str:
    """How this program was started, to say how to go on."""
    return "python" if size() == 1 else f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', size())}"


def output_directory(config: Config) -> Path:
    """Where a new run writes.

    Raises:
        ValueError: the directory holds something already.
    """
    if config.output_dir is None:
        data = "+".join(Path(d).stem for d in config.dataset)
        name = f"{Path(config.model).name}-{data}-{time.strftime('%Y%m%d-%H%M%S')}"
        return Path("runs") / name
    run = Path(config.output_dir)
    if checkpoint.is_run(run):
        if checkpoint.is_finished(run):
            raise ValueError(f"--output-dir {run}: holds a finished run, which is never overwritten; choose another")
        raise ValueError(
            f"--output-dir {run}: holds an unfinished run, which is never overwritten; "
            f"continue it with --resume {shlex.quote(str(run))}, or choose another"
        )
    if run.exists() and (not run.is_dir() or {p.name for p in run.iterdir()} - checkpoint.BEFORE_A_RUN):
        raise ValueError(f"--output-dir {run}: exists and is not an empty directory; choose another")
    return run


def format_seconds(seconds: float) -> str:
    """40 s, 12 min, 3.5 h"""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def refuse_finished(run: Path) -> None:
    """Raises ValueError where a run came to its end."""
    if checkpoint.is_finished(run):
        raise ValueError(f"--resume {run}: that run is finished; start a new one without --resume")


def resume_config(directory: str, given: dict[str, Any]) -> tuple[Config, Path]:
    """The options and the directory of a run to continue; "" stands for the newest unfinished one under runs/.

    Args:
        given: options of the command line; each must be as it was when the run began.

    Raises:
        ValueError: no such run, it is finished, or an option differs.
    """
    run = Path(directory) if directory else checkpoint.newest_unfinished(Path("runs"))
    record = checkpoint.read_record(run)
    refuse_finished(run)
    config = Config.from_dict(record["options"], str(run / "config.json"))
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
