"""qlora-min bench: how fast qlora_min trains, and in how much memory.

Speeds count real tokens, never padding. The first steps are a warm-up, which is timed separately. The steps after it
are timed in `--repeats` blocks of `--steps`, and the median of the blocks is reported; during a few further steps the
GPU's kernels are counted. The rows are random tokens of real lengths; unlike in training, long rows are truncated.

`scripts/bench_peers.py` measures other trainers with the same rows and the same `Clock`; `scripts/bench_sweep.py` draws
how time and memory grow.
"""

import argparse
import io
import itertools
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ..config import Config
from ..system.console import aligned, say
from .options import Emit, Parser, add_options, given_options

# (tokens, supervised tokens) of 48 MedQA questions in Qwen2's template, evenly spaced in order of length.
LENGTHS = [
    (137, 8), (154, 7), (163, 11), (173, 8), (181, 7), (186, 11), (192, 8), (196, 8), (201, 8), (205, 8), (209, 11),
    (215, 8), (218, 10), (222, 12), (226, 8), (230, 7), (233, 9), (237, 6), (241, 6), (244, 10), (247, 7), (250, 18),
    (254, 10), (258, 11), (262, 8), (266, 10), (271, 9), (276, 10), (280, 8), (284, 14), (289, 9), (294, 7), (298, 14),
    (302, 16), (308, 10), (313, 16), (319, 11), (325, 19), (334, 10), (341, 10), (348, 9), (358, 12), (372, 8),
    (384, 11), (404, 8), (428, 7), (468, 6), (530, 17),
]  # fmt: skip
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads")  # fmt: skip
SHAPES = {  # name -> (family, SIZES, differences from Qwen2-0.5B)
    "0.5b": ("qwen2", (151936, 896, 4864, 24, 14, 2), {}),
    "1.5b": ("qwen2", (151936, 1536, 8960, 28, 12, 2), {}),
    "3b": ("qwen2", (151936, 2048, 11008, 36, 16, 2), {}),
    "7b": ("qwen2", (152064, 3584, 18944, 28, 28, 4), {"tie_word_embeddings": False}),
    "32b": ("qwen2", (152064, 5120, 27648, 64, 40, 8), {"tie_word_embeddings": False}),
    "qwen3-0.6b": ("qwen3", (151936, 1024, 3072, 28, 16, 8), {"head_dim": 128}),
    "llama3.2-1b": ("llama", (128256, 2048, 8192, 16, 32, 8), {"head_dim": 64}),
    "gemma3-270m": ("gemma3_text", (262144, 640, 2048, 18, 4, 1),
                    {"head_dim": 256, "sliding_window": 512, "query_pre_attn_scalar": 256}),
}  # fmt: skip
LARGE = ("1.5b", "3b", "7b", "32b")  # whose weights are not written to disk
FAMILIES = [(shape, "fp16", ("fused", "modules")) for shape in ("0.5b", "qwen3-0.6b", "llama3.2-1b")]
FAMILIES += [("gemma3-270m", "bf16", ("modules",))]  # (shape, precision, the engines that compute it)
PROFILED = 3  # steps whose kernels are counted
COLUMNS = {  # key of a figure -> (label, format)
    "tokens_per_second": ("tokens/s", ",.0f"), "ms_per_step": ("ms/step", ",.1f"),
    "kernels_per_step": ("kernels/step", ",.0f"), "kernel_ms_per_1k": ("kernel ms/1k tokens", ".1f"),
    "peak_gib": ("peak GiB", ".3f"), "forecast_gib": ("forecast", ".2f"), "reserved_gib": ("reserved", ".3f"),
    "first_step_s": ("first step s", ".1f"), "waited_ms": ("waiting ms/step", ".1f"),
    "summed_ms": ("summing ms/step", ".1f"), "ours_faster_by": ("ours is faster by", ".1f"),
}  # fmt: skip


def shared_options(parser: Parser) -> None:
    """Add the options that all benchmarks share, those of scripts/ included."""
    parser.add_argument("--model", metavar="DIR", help="a model folder [a shape with random weights]")
    parser.add_argument("--shape", choices=[*SHAPES], default="0.5b", help="the shape, without --model [0.5b]")
    parser.add_argument("--lengths", metavar="FILE", help="JSON list of [tokens, supervised] of rows [48 of MedQA's]")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto: a GPU if there is one [auto]")
    parser.add_count("--warm-up", "steps that are not timed [100, and 1 on a CPU]")
    parser.add_count("--steps", "steps of a timed block", 30)
    parser.add_count("--repeats", "timed blocks, whose median is shown", 3)
    add_options(parser, ("max_length", "batch_size", "grad_accum", "rank", "precision", "engine", "shard",
                         "micro_batch_tokens"))  # fmt: skip


def options(parser: Parser) -> None:
    shared_options(parser)
    parser.add_argument("--families", action="store_true", help="measure four families by each engine instead")
    parser.removed = {"peers": "python scripts/bench_peers.py", "sweep": "python scripts/bench_sweep.py"}


def command(args: argparse.Namespace, emit: Emit) -> None:
    """Measure how fast qlora_min trains, and in how much memory.

    bench                                             Qwen2-0.5B's shape in fp16, random weights, MedQA's real lengths
    bench --families                                  other families' shapes, by each engine
    python scripts/bench_peers.py trl unsloth         the same work by peft + trl and by unsloth
    python scripts/bench_sweep.py costs.png           how time and memory grow with row length, rows and rank
    """
    if args.families:
        results = []
        for shape, precision, engines in FAMILIES:
            with prepared(args, model=None, shape=shape, precision=precision) as case:
                results += [measure(case, f"{shape}, {precision}", engine=e, gradient_checkpointing=c)
                            for e, c in itertools.product(engines, ("off", "on"))]  # fmt: skip
    else:
        with prepared(args) as case:
            results = ours(case)
    show(results, emit)


def ours(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure qlora_min without and with gradient checkpointing."""
    name = f"qlora_min, {args.config.batch_size} x {args.config.grad_accum}"
    return [measure(args, name), measure(args, name, gradient_checkpointing="on")]


@contextmanager
def prepared(args: argparse.Namespace, **changes: Any) -> Iterator[argparse.Namespace]:
    """Join the processes; yields the options with `changes`, the Config as `config`, and the rows' `lengths`."""
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before CUDA is initialised
    from ..scale.processes import from_main, join, together
    from ..system.device import pick_device, resolve_precision

    args, device = argparse.Namespace(**vars(args) | changes), pick_device()
    args.lengths = json.loads(Path(args.lengths).read_text(encoding="utf-8")) if args.lengths else LENGTHS
    given = given_options(args)
    given["precision"] = resolve_precision(given.get("precision", "fp16" if device.type == "cuda" else "fp32"), device)
    with together(), tempfile.TemporaryDirectory() as folder:
        join()
        given["model"] = args.model or from_main(lambda: random_base(folder, args.shape))
        args.config = Config(**given, eval_fraction=0.0, epochs=1, save_minutes=0, eval_every=10**9)
        with random_weights() if not args.model and args.shape in LARGE else nullcontext():
            yield args


def random_base(folder: str, shape: str) -> str:
    """Save a model of a shape, and the demo's tokenizer, in a folder; returns the folder. Its weights are random, fp16;
    a LARGE model is saved without them, to be loaded within `random_weights`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from ..demo import world

    torch.manual_seed(0)
    family, sizes, more = SHAPES[shape]
    same = {"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "max_position_embeddings": 32768}
    config = AutoConfig.for_model(family, **dict(zip(SIZES, sizes)) | same | more)
    config.save_pretrained(folder)
    if shape not in LARGE:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(world.MODEL_DIR).save_pretrained(folder)
    return folder


@contextmanager
def random_weights() -> Iterator[None]:
    """Within this context models have weights that are not on disk: random, in fp16, each made when it is read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..system import weights

    few = 0.02 * torch.randn(997, generator=torch.Generator().manual_seed(0))  # the same in all processes

    def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}

    def read(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in shapes(folder).items():
            values = (torch.ones(1) if "norm" in name else few).half()
            yield name, values.repeat(-(-math.prod(shape) // len(values)))[: math.prod(shape)].view(shape)

    with patch.multiple(weights, read_weights=read, weight_shapes=shapes):
        yield


def draw_rows(config: Config, lengths: Sequence[tuple[int, int]], count: int) -> list[tuple[list[int], int]]:
    """Draw `count` rows of random tokens: (input_ids, the number of supervised tokens, which are the last ones)."""
    from transformers import AutoConfig

    rng, vocab = random.Random(0), AutoConfig.from_pretrained(config.model).vocab_size
    chosen = rng.choices(lengths, k=count)
    return [([rng.randrange(vocab) for _ in range(min(n, config.max_length))], last) for n, last in chosen]


def measure(args: argparse.Namespace, name: str, **options: Any) -> dict[str, Any]:
    """Train with qlora_min; returns the figures. options: fields of Config that replace those of `args.config`."""
    import numpy as np
    import torch

    from .. import loop
    from ..data.rows import Row, Rows
    from ..run.datasets import Encoded
    from ..run.trainer import Trainer
    from ..scale.processes import world_size
    from ..system.device import GIB, release

    config = replace(args.config, **options)
    release()  # the memory of the previous trainer
    graphs = torch.cuda.is_available() and not (config.shard and world_size() > 1)
    clock = Clock(args, 100 if graphs else 1)  # in the warm-up, a graph is captured for each shape
    rows = Rows.write(
        Row(torch.tensor(ids, dtype=torch.int32), torch.arange(len(ids)) >= len(ids) - n, "")
        for ids, n in draw_rows(config, args.lengths, config.batch_size * config.grad_accum * clock.steps)
    )
    data = Encoded("drawn", rows, np.zeros(len(rows), np.uint64), np.ones(len(rows), bool))
    with redirect_stdout(io.StringIO()):
        trainer = Trainer(config, data=([data], []), write=False)

    class Timed(loop.Recorder):
        def step_ended(self, progress: Any, *_: Any, **__: Any) -> None:
            p = trainer.processes
            between = {"waited_ms": 1000 * p.waited, "summed_ms": 1000 * p.summed} if p.world_size > 1 else {}
            clock.step_ended(progress.step, progress.tokens, **between)

    loop.train(trainer.feed, trainer.stepper, trainer.held_out, config, trainer.progress, Timed())
    name = ", ".join([name, *(f"{k.replace('_', ' ')} {v}" for k, v in options.items())])
    result = {"name": name, **clock.figures(), "forecast_gib": trainer.footprint.total(trainer.feed.n_tokens) / GIB,
              "ranks": world_size()}  # fmt: skip
    say(f"  {name}: {result['tokens_per_second']:,.0f} tokens/s", sys.stderr)
    return result | {k: getattr(trainer.config, k) for k in ("micro_batch_tokens", "gradient_checkpointing", "engine")}


class Clock:
    """Time and memory of a training by any trainer, which calls `step_ended` after each of `steps` steps.

    Args:
        warm_up: steps before the timed ones, if --warm-up is not given.
    """

    def __init__(self, args: argparse.Namespace, warm_up: int):
        import torch

        self.cuda, self.block, warm_up = torch.cuda.is_available(), args.steps, args.warm_up or warm_up
        self.marks = range(warm_up, warm_up + args.repeats * self.block + 1, self.block)  # around the timed blocks
        self.profiled = self.marks[-1] + PROFILED
        self.steps = self.profiled + 1 if self.cuda else self.marks[-1]  # one more, computed ahead
        self.start, self.at = time.perf_counter(), {}
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated()
            self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def step_ended(self, step: int, tokens: float, **ms: float) -> None:
        """Record the end of a step. tokens, ms: totals since the start; each of `ms` is a time in milliseconds."""
        import torch

        from ..scale.processes import gather
        from ..system.device import GIB, synchronize

        if step not in (1, *self.marks, self.profiled):
            return
        synchronize()
        self.at[step] = {"tokens": tokens, "ms_per_step": 1000 * (time.perf_counter() - self.start), **ms}
        if self.cuda and step == self.marks[-1]:
            peaks = (torch.cuda.max_memory_allocated() - self.held) / GIB, torch.cuda.max_memory_reserved() / GIB
            self.peaks = [max(p) for p in zip(*gather(peaks))]  # the maximum over processes
            self.profile.start()
        elif self.cuda and step == self.profiled:
            self.profile.stop()

    def figures(self) -> dict[str, float]:
        """The medians of the timed blocks, and the other figures."""
        blocks = [{k: self.at[b][k] - self.at[a][k] for k in self.at[a]} for a, b in itertools.pairwise(self.marks)]
        found = {k: statistics.median(b[k] for b in blocks) / self.block for k in blocks[0] if k != "tokens"}
        found["tokens_per_second"] = statistics.median(1000 * b["tokens"] / b["ms_per_step"] for b in blocks)
        found["first_step_s"], found["warm_up_s"] = (self.at[n]["ms_per_step"] / 1000 for n in (1, self.marks[0]))
        if self.cuda:
            found["peak_gib"], found["reserved_gib"] = self.peaks
            events, (before, after) = self.profile.key_averages(), (self.marks[-1], self.profiled)
            tokens = self.at[after]["tokens"] - self.at[before]["tokens"]
            found["kernels_per_step"] = sum(e.count for e in events) / PROFILED
            found["kernel_ms_per_1k"] = sum(e.self_device_time_total for e in events) / tokens
        return found


def show(results: Sequence[dict[str, Any]], emit: Emit) -> None:
    """Print a table with a line for each result, and emit each result."""
    columns = {k: c for k, c in COLUMNS.items() if any(k in r for r in results)}
    lines = [[r["name"], *(f"{r[k]:{form}}" if k in r else "" for k, (_, form) in columns.items())] for r in results]
    print(aligned([["", *(label for label, _ in columns.values())], *lines]))
    for result in results:
        emit(result)
