"""A training run, from options to the best adapter on disk.

prepare   data -> base in NF4 -> LoRA injected, the rest frozen -> engine, and micro-batches that fit -> optimizer
train     loop.train
finish    the best adapter back in the model, samples, curves, and what to do next
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import loop
from ..adapter import AdapterConfig, attach
from ..base import add_lora, load_base
from ..batches import Schedule, balance
from ..config import Config
from ..data.readers import GIVEN
from ..data.rows import Rows
from ..fused.select import captured, make_engine
from ..loop import Progress
from ..lora import LoraSpec
from ..optim import Stepper
from ..scale.feed import Feed
from ..scale.processes import Processes, from_main, gather, in_step, join, process_index, together, world_size
from ..scale.sharding import shard
from ..system import console
from ..system.console import say
from ..system.device import available, pick_device, resolve_precision
from ..system.files import write_json
from ..system.peft_files import ADAPTER, PerLayer, named_targets
from ..system.started import command
from ..system.text import refusing
from . import checkpoint, forecast, resume
from .boards import BOARDS, shown_on
from .datasets import Data, encoder_of, read_data, table
from .ending import finish
from .plan import describe
from .signals import Signals
from .writer import RunWriter

SPACE = "expected a folder with space"
SMALL = 256  # hidden size up to which one CPU thread is faster than several


class Trainer:
    """One training run, prepared.

    Args:
        config: the options. With `resume`, as they were resolved when the run began.
        resume: the directory of a run to continue.
        data: encoded (training, held-out) data sets, instead of those that the options name.
        write: False writes nothing to disk, to `describe` and `estimate` a run without starting it.
        on_event: called with each event of metrics.jsonl, before it is on disk.

    Raises:
        ValueError: an option, the model, the data or the output directory is not usable, or another process trains
            in that directory; nothing has been written.
        TrainingError, SystemExit: as `processes.together` raises them, with several processes.
    """

    def __init__(
        self,
        config: Config,
        resume: Path | None = None,
        data: Data | None = None,
        write: bool = True,
        on_event: Callable[[dict[str, Any]], object] | None = None,
    ):
        self.lock: checkpoint.Lock | nullcontext = nullcontext()  # only process 0 has the lock
        try:
            with together():
                join()
                if resume and process_index() == 0:
                    with refusing(f"--resume {resume}: can't be written to", SPACE, OSError):
                        self.lock = checkpoint.Lock(resume)  # before anything in the directory is read
                self._prepare(config, resume, data)
                from_main(lambda: self._begin() if write and resume is None else None)
                in_step(self.processes.sharded)
        except BaseException:
            self.lock.__exit__(None, None, None)
            raise
        if on_event:
            self.writer.metrics.echo = on_event

    def _prepare(self, c: Config, resume_from: Path | None, data: Data | None) -> None:
        recorded = from_main(lambda: resume.unfinished(resume_from)) if resume_from else {}
        self.start = recorded.get("adapter") if recorded else from_main(lambda: resume.describe_adapter(c))
        revision = (recorded["base"] if recorded else self.start or {}).get("revision")
        self.device = pick_device()
        self.precision = resolve_precision(c.precision, self.device)
        self.folder = from_main(lambda: resume_from or resume.output_directory(c))
        reported = {*c.report, *(["tensorboard"] if c.tensorboard else [])}
        self.boards = [BOARDS[name](self.folder, name) for name in sorted(reported)]
        self.in_memory = [n for n in ("dataset", "eval_dataset") if GIVEN.keys() & {*getattr(c, n)}]
        here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if world_size() > 1 else 1  # on this host
        self.command = command("train", "--resume", self.folder, processes=here)
        if self.in_memory:
            rows = "".join(f", {name}=..." for name in self.in_memory)
            self.command = f"qlora_min.train(resume={str(self.folder)!r}{rows})"
        self.advice = f"continue with: {self.command}"
        self.signals = Signals(self.advice, index=process_index() if world_size() > 1 else None)
        signals = self.signals
        self.processes = Processes(lambda: signals.received, c.shard and world_size() > 1)
        if c.shard and not self.processes.sharded:
            say("note: --shard: a single process holds the whole base; start several with torchrun")
        encoder = encoder_of(c, revision, recorded.get("date"), resume_from)
        rows, sizes = self._take_data(c, data or read_data(c, encoder, commits=recorded.get("commits")))
        self._load(c, revision, encoder, new=not recorded)
        self.schedule = Schedule(rows, sizes, c, encoder)
        self.config = replace(c, eval_every=self.schedule.eval_every, output_dir=str(self.folder))
        self._choose_how_to_compute()
        self.stepper = Stepper(self.engine.adapter, c, self.schedule.total_steps, self.precision == "fp16")
        self.record = resume.make_record(self)
        same = {k: self.record[k] for k in ("precision", "engine", "data")}
        self.processes.check_equal(same | {"base": self.base.fingerprint})
        self.writer = RunWriter(self)
        self.progress = Progress()
        if recorded:
            resume.compare(self.folder, recorded, self.record)
            self.progress = resume.restore(self)

    def _take_data(self, c: Config, data: Data) -> tuple[Rows, list[int]]:
        """Returns (the training rows, their number in each data set); the held-out rows become attributes."""
        train, held = data
        self.data_sets = [*train, *held]
        say(table(self.data_sets))
        rows, self.held_out = (Rows.join(part.rows for part in side) for side in data)
        if c.shuffle_options and not rows[0].text:
            raise ValueError("--shuffle-options: the rows given have no text; encode them with texts=True")
        self.held_out_here = self.held_out
        if not self.processes.sharded and world_size() > 1:
            mine = balance(self.held_out.lengths, world_size())[process_index()]
            self.held_out_here = self.held_out[np.array(mine, int)]
        return rows, [len(part.rows) for part in train]

    def _load(self, c: Config, revision: str | None, encoder: Any, new: bool) -> None:
        """Load the base and inject LoRA, with the weights of --adapter if the run is new."""
        torch.manual_seed(c.seed)  # initialises A; order, dropout and the split have generators of their own
        how = shard if self.processes.sharded else None
        self.base = load_base(c.model, c.quantization, self.precision, self.device, revision, encoder, how)
        if self.device.type == "cpu" and self.base.model.config.get_text_config().hidden_size <= SMALL:
            torch.set_num_threads(1)
        recorded = self.start["per_layer"] if self.start else {}
        per_layer = PerLayer(**{k: ADAPTER[k][3](value) for k, value in recorded.items()})
        lora = LoraSpec(c.rank, c.alpha, c.dropout, c.targets, c.rslora, per_layer)
        if new and c.adapter:
            own = Path(c.adapter)
            self.wrapped = attach(self.base, own, replace(AdapterConfig.read(own), lora=lora))
        else:
            self.wrapped = add_lora(self.base, lora)
        self.lora = replace(lora, targets=named_targets(lora.targets, self.wrapped))

    def _choose_how_to_compute(self) -> None:
        """Choose the engine, and the largest micro-batches that fit the memory of every process, by measuring."""
        c, rows = self.config, self.schedule.rows
        longest = int(rows.lengths.max())
        longest_of_all = max(longest, int(self.held_out.lengths.max(initial=0)))
        self.engine, name, self.remark = make_engine(self.base, c.engine, longest_of_all)
        n_rows, supervised = -(-self.schedule.rows_per_step // world_size()), int(rows.supervised.max())
        self.work = forecast.Workload(n_rows, longest, supervised, bits8=c.optimizer == "paged_adamw8bit")
        room = available(self.device) / (world_size() if self.device.type == "cpu" else 1)
        gather(None)
        in_step(self.processes.sharded)
        on, n_tokens, self.footprint = forecast.plan(
            self.engine, self.work, lambda n: all(gather(n <= room)), c.gradient_checkpointing, c.micro_batch_tokens
        )
        in_step(False)
        self.engine.checkpointing = on
        resolved = {"engine": name, "gradient_checkpointing": "on" if on else "off", "micro_batch_tokens": n_tokens}
        self.config = replace(c, **resolved)
        computing = captured(self.engine, longest_of_all, n_tokens)
        self.feed = Feed(self.schedule, computing, self.processes, n_tokens)

    def _begin(self) -> None:
        """Create the run's directory, lock it and write config.json."""
        with refusing(f"--output-dir {self.folder}: can't be written to", SPACE, OSError):  # later it is tried again
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = checkpoint.Lock(self.folder)
            resume.output_directory(self.config)  # again: another process may have taken it while we loaded
            write_json(self.folder / "config.json", self.record)

    def communication(self) -> dict[str, float]:
        """Seconds that this process has waited and communicated so far, for the metrics; empty for a single process."""
        p = self.processes
        return {"waited": round(p.waited, 2), "summed": round(p.summed, 2)} if p.world_size > 1 else {}

    def train(self) -> Progress:
        """Train to the end or to the early stop.

        Raises:
            TrainingError: training can't continue, or nothing can be saved; the message says what is saved.
            SystemExit: a signal (SIGINT, SIGTERM, SIGHUP) came, and the run was saved; the code is 128 + its number.
        """
        say(describe(self))
        bar = console.bar(self.schedule.total_steps, None, "step", keep=True, initial=self.progress.step)
        boards = shown_on([] if process_index() else self.boards)
        with together(self._after_a_loss), self.lock, self.signals, boards, bar as self.writer.bar:
            loop.train(self.feed, self.stepper, self.held_out_here, self.config, self.progress, self.writer)
            finish(self)
        return self.progress

    def _after_a_loss(self) -> str:
        """What to add to the error if another process is lost. Only process 0 knows what is saved."""
        saved = "" if process_index() else f"; {self.writer.last_good()}"
        return f"{saved}; {self.advice}"
