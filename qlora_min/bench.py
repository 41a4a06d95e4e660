"""Measure how fast qlora_min trains, and in how much memory; beside other trainers, where they are installed.

Speeds count real tokens, never what fills up. A run's warm-up, everything up to the end of its first steps, is left out
of its speed and shown by itself. The rows are random tokens of real lengths, and rows over --max-length are cut, here
only, for every trainer alike.
"""

import gc
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .config import Config, positive
from .report import aligned, say

# (tokens, supervised) of 48 of MedQA's questions under Qwen2's template, at even distances in order of length.
LENGTHS = [
    (137, 8), (154, 7), (163, 11), (173, 8), (181, 7), (186, 11), (192, 8), (196, 8), (201, 8), (205, 8), (209, 11),
    (215, 8), (218, 10), (222, 12), (226, 8), (230, 7), (233, 9), (237, 6), (241, 6), (244, 10), (247, 7), (250, 18),
    (254, 10), (258, 11), (262, 8), (266, 10), (271, 9), (276, 10), (280, 8), (284, 14), (289, 9), (294, 7), (298, 14),
    (302, 16), (308, 10), (313, 16), (319, 11), (325, 19), (334, 10), (341, 10), (348, 9), (358, 12), (372, 8),
    (384, 11), (404, 8), (428, 7), (468, 6), (530, 17),
]  # fmt: skip
SHAPES = {  # name -> family and sizes
    "0.5b": ("qwen2", {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                       "num_attention_heads": 14, "num_key_value_heads": 2}),
    "7b": ("qwen2", {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                     "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False}),
    "qwen3-0.6b": ("qwen3", {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128,
                             "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8}),
    "llama3.2-1b": ("llama", {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64,
                              "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}),
    "gemma3-270m": ("gemma3_text", {"vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048,
                                    "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1,
                                    "head_dim": 256, "sliding_window": 512, "query_pre_attn_scalar": 256}),
}  # fmt: skip
FAMILIES = (("0.5b", "fp16"), ("qwen3-0.6b", "fp16"), ("llama3.2-1b", "fp16"), ("gemma3-270m", "bf16"))
WARM_UP = {"cuda": 40, "cpu": 1, "peers": 4}  # steps; on a GPU we capture a graph for each shape in them
PROFILED = 3
SWEEP = {"length": (128, 256, 512, 1024, 2048, 4096), "rows": (1, 4, 16, 32), "rank": (8, 16, 32, 64, 128)}


def add_arguments(parser: Any) -> None:
    parser.add_argument("--model", metavar="DIR", help="a model folder [a shape of Qwen2's with random weights]")
    parser.add_argument("--shape", choices=SHAPES, default="0.5b", help="which shape, without --model [0.5b]")
    parser.add_argument("--shard", action="store_true", help="under torchrun: each GPU keeps a part of the base")
    parser.add_argument("--lengths", metavar="FILE", help="JSON list of [tokens, supervised] of rows [48 of MedQA's]")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="a GPU if there is one [auto]")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), help="[fp16, and fp32 on a CPU]")
    for name, default, text in (
        ("--batch-size", 4, ""), ("--grad-accum", 4, ""), ("--max-length", 512, ""), ("--rank", 16, ""),
        ("--steps", 30, "optimizer steps a run, timed "), ("--repeats", 3, "runs of so many; their median is shown "),
    ):  # fmt: skip
        parser.add_argument(name, type=positive, default=default, metavar="N", help=f"{text}[{default}]")
    parser.add_argument("--peers", default="", metavar="A,B", help="also measure trl, unsloth")
    parser.add_argument("--engine", choices=("auto", "modules", "fused"), default="auto", help="[auto]")
    parser.add_argument("--families", action="store_true", help="four families' shapes by each engine, instead")
    parser.add_argument("--sweep", metavar="FILE.png", help="measure how costs grow, and draw it, instead")
    parser.add_argument("--only", help="JSON of one run of another trainer: how this command calls itself")


def bench(args: Any, emit: Callable[[dict], None]) -> None:
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported
    if args.only:
        return peer(args, **json.loads(args.only))
    unknown = set(filter(None, args.peers.split(","))) - {"trl", "unsloth"}
    if unknown:
        raise ValueError(f"--peers: got {', '.join(sorted(unknown))}, expected trl, unsloth or both")
    import torch

    from .distributed import from_main, join, size, together

    args.precision = args.precision or ("fp16" if torch.cuda.is_available() else "fp32")
    with together(), tempfile.TemporaryDirectory() as folder:
        join()
        if size() > 1 and args.peers:
            raise ValueError("--peers: they are measured on one GPU; run them without torchrun")
        if not args.families:
            args.model = args.model or from_main(lambda: random_base(Path(folder) / "base", args.shape))
        results = families(args, Path(folder)) if args.families else sweep(args) if args.sweep else compare(args)
    for result in results:
        emit(result)


def random_base(folder: Path, shape: str) -> str:
    """A model of a shape with random weights in fp16, and the demo's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from . import demo

    torch.manual_seed(0)
    family, sizes = SHAPES[shape]
    more = {"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "max_position_embeddings": 32768}
    config = AutoConfig.for_model(family, **more | sizes)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo.MODEL_DIR).save_pretrained(folder)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return str(folder)


def draw_rows(args, count: int, lengths=None) -> list[tuple[list[int], int]]:
    """(ids, how many at the end are supervised) of `count` rows in random order."""
    from transformers import AutoConfig

    rng, vocab = random.Random(0), AutoConfig.from_pretrained(args.model).vocab_size
    lengths = lengths or (json.loads(Path(args.lengths).read_text()) if args.lengths else LENGTHS)
    chosen = [rng.choice(lengths) for _ in range(count)]
    return [([rng.randrange(vocab) for _ in range(min(n, args.max_length))], taught) for n, taught in chosen]


# ---------------------------------------------------------------------------------------------------------------------
# One run of one trainer
# ---------------------------------------------------------------------------------------------------------------------


def ours(args, steps: int, warm_up: int | None = None, profile: bool = True, lengths=None, **options) -> dict:
    """qlora_min's trainer with its own options: figures of one run."""
    import numpy as np
    import torch

    from .data import Encoded, Row, Rows
    from .distributed import gather, size
    from .memory import GIB, synchronize
    from .train import Trainer

    start = time.perf_counter()
    cuda = torch.cuda.is_available()
    warm_up = warm_up or WARM_UP["cuda" if cuda and not (args.shard and size() > 1) else "cpu"]
    options = {"batch_size": args.batch_size, "grad_accum": args.grad_accum, "rank": args.rank, "engine": args.engine,
               **options}  # fmt: skip
    per_step = options["batch_size"] * options["grad_accum"]
    drawn = draw_rows(args, per_step * (warm_up + steps + PROFILED), lengths)
    rows = Rows.write(
        Row(torch.tensor(ids, dtype=torch.int32), torch.arange(len(ids)) >= len(ids) - n, "") for ids, n in drawn
    )
    data = Encoded("drawn", rows, np.zeros(len(rows), np.uint64), np.ones(len(rows), bool))
    config = Config(
        model=args.model, eval_fraction=0.0, epochs=1, max_length=args.max_length, precision=args.precision,
        alpha=2.0 * options["rank"], save_minutes=0, output_dir=tempfile.mkdtemp(), shard=args.shard, **options,
    )  # fmt: skip
    gc.collect()  # the trainer before
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    held_before = torch.cuda.memory_allocated() if cuda else 0
    with silent():
        trainer = Trainer(config, data=([data], []))

    def run(count: int) -> tuple[float, int]:
        synchronize()
        began, tokens = time.perf_counter(), trainer.progress.tokens
        for _ in range(count):
            trainer.take_step()
        synchronize()
        return time.perf_counter() - began, trainer.progress.tokens - tokens

    run(1)
    first = time.perf_counter() - start
    run(warm_up - 1)
    warm = time.perf_counter() - start
    waited, summed = trainer.waited, trainer.summed
    seconds, tokens = run(steps)
    result = {
        "tokens_per_second": tokens / seconds, "ms_per_step": 1000 * seconds / steps, "first_step_s": first,
        "warm_up_s": warm, "forecast_gib": trainer.footprint.total(trainer.tokens) / GIB,
        "micro_batch_tokens": trainer.config.micro_batch_tokens,
        "gradient_checkpointing": trainer.config.gradient_checkpointing, "engine": trainer.config.engine,
    }  # fmt: skip
    if size() > 1:
        result |= {"ranks": size(), "waited_ms": 1000 * (trainer.waited - waited) / steps,
                   "summed_ms": 1000 * (trainer.summed - summed) / steps}  # fmt: skip
    if cuda:
        peaks = (torch.cuda.max_memory_allocated() - held_before) / GIB, torch.cuda.max_memory_reserved() / GIB
        result["peak_gib"], result["reserved_gib"] = map(max, zip(*gather(peaks)))  # of the rank that takes most
        if profile:
            with profiled() as kernels:
                _, tokens = run(PROFILED)
            result |= kernels(tokens, PROFILED)
    trainer.lock.__exit__()
    return result


def peer(args, who: str, batch_size: int, grad_accum: int, checkpointing: bool, grouped: bool) -> None:
    """peft + trl, or unsloth, with the same rows and options, in fp16, on a CPU in fp32: prints a line of figures.

    Which rows a step had is not told, so a run's tokens are its steps times the mean. Where rows come by length that is
    about right for many steps, and not for the few whose kernels are counted: no kernel time a token then.
    """
    if who == "unsloth":
        import unsloth  # before the rest, as it asks for
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    from .memory import GIB, synchronize

    start, cuda = time.perf_counter(), torch.cuda.is_available()
    dtype = torch.float16 if cuda else torch.float32
    count, targets = batch_size * grad_accum, ["q_proj", "k_proj", "v_proj", "o_proj"]
    warm_up = WARM_UP["peers" if cuda else "cpu"]
    last = warm_up + args.repeats * args.steps  # timed in `repeats` runs, one after the other
    steps = last + (PROFILED if cuda else 0)
    if who == "unsloth":
        model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
            args.model, max_seq_length=args.max_length, dtype=torch.float16, load_in_4bit=True
        )
        model = unsloth.FastLanguageModel.get_peft_model(
            model, r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.05, target_modules=targets, bias="none",
            use_gradient_checkpointing="unsloth" if checkpointing else False, random_state=0,
        )  # fmt: skip
    else:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        quantised = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(
            args.model, quantization_config=quantised, dtype=dtype, device_map={"": 0 if cuda else "cpu"}
        )
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.05, target_modules=targets,
                          bias="none", task_type="CAUSAL_LM")  # fmt: skip
        model, tokenizer = get_peft_model(model, lora), AutoTokenizer.from_pretrained(args.model)
    from trl import SFTConfig, SFTTrainer

    if not cuda:
        import trl

        trl.trainer.utils._ChunkedLogProbFunction = LogProb
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    drawn = draw_rows(args, count * steps)
    rows = [{"input_ids": ids, "completion_mask": [0] * (len(ids) - n) + [1] * n} for ids, n in drawn]
    kwargs = {"train_sampling_strategy": "group_by_length"} if grouped else {}
    if checkpointing and who != "unsloth":
        kwargs["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=batch_size, gradient_accumulation_steps=grad_accum,
        max_steps=steps, learning_rate=2e-4, lr_scheduler_type="cosine", warmup_steps=1, fp16=cuda, bf16=False,
        optim="paged_adamw_8bit", gradient_checkpointing=checkpointing, max_length=args.max_length, logging_steps=10,
        save_strategy="no", report_to="none", completion_only_loss=True, disable_tqdm=True, **kwargs,
    )  # fmt: skip
    result, times = {}, {}

    class Clock(TrainerCallback):
        def on_step_end(self, _, state, control, **kwargs):
            if state.global_step in (1, *range(warm_up, last + 1, args.steps)):
                synchronize()
                times[state.global_step] = time.perf_counter()
            if state.global_step == last and cuda:
                result["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
                result["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
                self.profile = profiled()
                self.kernels = self.profile.__enter__()
            if state.global_step == steps and cuda:
                self.profile.__exit__(None, None, None)

    clock = Clock()
    trainer = SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                         callbacks=[clock])  # fmt: skip
    for p in trainer.model.parameters():
        if p.requires_grad:
            p.data = p.data.float()  # as released it makes them bf16, which the fp16 GradScaler refuses
    trainer.train()
    mean = sum(len(ids) for ids, _ in drawn) / len(drawn)
    ends = [times[step] for step in range(warm_up, last + 1, args.steps)]
    seconds = statistics.median(b - a for a, b in itertools.pairwise(ends))
    if cuda:
        result |= clock.kernels(mean * count * PROFILED, PROFILED)
        if grouped:
            del result["kernel_ms_per_1k"]
    result |= {"tokens_per_second": mean * count * args.steps / seconds, "ms_per_step": 1000 * seconds / args.steps,
               "first_step_s": times[1] - start, "warm_up_s": times[warm_up] - start}  # fmt: skip
    print("RESULT " + json.dumps(result))


class LogProb:
    """In PyTorch what trl 1.15 computes the loss with, which is a kernel for GPUs alone."""

    @staticmethod
    def apply(hidden, weight, bias, targets, *_):
        """(N, D), (V, D), None, (N,) -> log p of the targets (N,), and what trl logs besides."""
        log_p = (hidden @ weight.T).float().log_softmax(-1)
        top = log_p.argmax(-1) == targets
        return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1), None, None, top


class profiled:
    """A block whose kernels are counted; `as f`, and f(tokens, steps) then gives the figures."""

    def __enter__(self):
        import torch

        torch.cuda.synchronize()
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self.profile.__enter__()
        return self.figures

    def __exit__(self, *error) -> None:
        import torch

        torch.cuda.synchronize()
        self.profile.__exit__(*error)

    def figures(self, tokens: float, steps: int) -> dict:
        events = self.profile.key_averages()
        microseconds = sum(e.self_device_time_total for e in events)
        return {"kernels_per_step": sum(e.count for e in events) / steps, "kernel_ms_per_1k": microseconds / tokens}


class silent:
    """A block that prints nothing to stdout."""

    def __enter__(self) -> None:
        self.before, sys.stdout = sys.stdout, open("/dev/null", "w")

    def __exit__(self, *_: object) -> None:
        sys.stdout.close()
        sys.stdout = self.before


# ---------------------------------------------------------------------------------------------------------------------
# Tables and pictures
# ---------------------------------------------------------------------------------------------------------------------


def compare(args) -> list[dict]:
    """Each trainer by default and at its best; prints one table."""
    b, g = args.batch_size, args.grad_accum
    results = [
        repeated(args, f"qlora_min, {b} x {g}"),
        repeated(args, f"qlora_min, {b} x {g}, checkpointing on", gradient_checkpointing="on"),
    ]
    for who in filter(None, args.peers.split(",")):
        default = {"batch_size": b, "grad_accum": g, "checkpointing": True, "grouped": False}
        best = {"batch_size": b * g, "grad_accum": 1, "checkpointing": False, "grouped": True}
        for name, options in ((f"{b} x {g}, its default", default), (f"{b * g} x 1, grouped, no checkpointing", best)):
            name = f"{who}, {name}"
            command = [sys.executable, "-m", "qlora_min.cli", "bench"]
            command += ["--only", json.dumps({"who": who, **options}), "--model", args.model]
            for key in ("device", "max_length", "rank", "steps", "repeats", *(["lengths"] if args.lengths else [])):
                command += ["--" + key.replace("_", "-"), str(getattr(args, key))]
            done = subprocess.run(command, capture_output=True, text=True)
            line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
            if line is None:
                print(
                    f"note: {name} failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}", file=sys.stderr
                )
            else:
                results.append({"name": name, **json.loads(line[7:])})
                say(f"  {name}: {results[-1]['tokens_per_second']:,.0f} tokens/s", sys.stderr)
    print_table(results)
    return results


def repeated(args, name: str, **options) -> dict:
    """The medians of several runs of ours."""
    runs = [ours(args, args.steps, **options) for _ in range(args.repeats)]
    speeds = ", ".join(f"{r['tokens_per_second']:,.0f}" for r in runs)
    say(f"  {name}: {speeds} tokens/s", sys.stderr)
    return {"name": name, **{k: middle([r[k] for r in runs]) for k in runs[0]}}


def families(args, folder: Path) -> list[dict]:
    """Each family by each engine that computes it; prints one table."""
    results = []
    for shape, args.precision in FAMILIES:
        args.model = random_base(folder / shape, shape)
        for engine in ("fused", "modules"):
            for checkpointing in ("off", "on"):
                name = f"{shape}, {args.precision}, {engine}, checkpointing {checkpointing}"
                try:
                    results.append(repeated(args, name, engine=engine, gradient_checkpointing=checkpointing))
                except ValueError as e:  # the fused engine does not compute this family
                    say(f"  {name}: {e}", sys.stderr)
    print_table(results)
    return results


def middle(values: list):
    """The median of numbers; of anything else, the first."""
    return statistics.median(values) if isinstance(values[0], int | float) else values[0]


COLUMNS = (("tokens/s", "tokens_per_second", "{:,.0f}"), ("ms/step", "ms_per_step", "{:,.1f}"),
           ("kernels/step", "kernels_per_step", "{:,.0f}"), ("kernel ms/1k tokens", "kernel_ms_per_1k", "{:.1f}"),
           ("peak GiB", "peak_gib", "{:.3f}"), ("reserved", "reserved_gib", "{:.3f}"),
           ("first step s", "first_step_s", "{:.1f}"), ("waiting ms/step", "waited_ms", "{:.1f}"),
           ("summing ms/step", "summed_ms", "{:.1f}"))  # fmt: skip


def print_table(results: list[dict]) -> None:
    """A line a trainer; ratios are of our first line's speed to the line's."""
    columns = [c for c in COLUMNS if any(r.get(c[1]) is not None for r in results)]
    lines = [["", *(label for label, _, _ in columns), "ours is faster by"]]
    for r in results:
        cells = [form.format(r[key]) if r.get(key) is not None else "" for _, key, form in columns]
        lines.append([r["name"], *cells, f"{results[0]['tokens_per_second'] / r['tokens_per_second']:.1f}"])
    print(aligned(lines))


def sweep(args) -> list[dict]:
    """Time and memory against row length, rows at a time and rank, each with and without checkpointing."""
    results = []
    for axis, values in SWEEP.items():
        for value, checkpointing in ((v, c) for v in values for c in ("off", "on")):
            point = {"length": 512, "rows": 4, "rank": args.rank, axis: value}
            args.max_length = point["length"]
            options = {"batch_size": point["rows"], "grad_accum": 1, "rank": point["rank"],
                       "micro_batch_tokens": point["rows"] * point["length"],
                       "gradient_checkpointing": checkpointing}  # fmt: skip
            result = ours(args, 5, warm_up=3, profile=False, lengths=[(point["length"], 10)], **options)
            results.append({"axis": axis, **point, **result})
            error = result["forecast_gib"] / result["peak_gib"] - 1 if "peak_gib" in result else float("nan")
            print(f"{point['length']:>5} tokens x {point['rows']:>2}, rank {point['rank']:>3}, checkpointing "
                  f"{checkpointing:<3}: {result['tokens_per_second']:>9,.0f} tokens/s, peak "
                  f"{result.get('peak_gib', float('nan')):6.3f} GiB, forecast {result['forecast_gib']:6.2f} "
                  f"({error:+.0%})", flush=True)  # fmt: skip
    draw(results, args.sweep)
    return results


def draw(results: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6.5), sharex="col", sharey="row", constrained_layout=True)
    titles = {"length": "tokens in a row (4 rows)", "rows": "rows of 512 tokens at a time", "rank": "rank (4 x 512)"}
    for column, axis in enumerate(SWEEP):
        for checkpointing, style in (("off", "o-"), ("on", "s--")):
            points = [r for r in results if r["axis"] == axis and r["gradient_checkpointing"] == checkpointing]
            x, label = [r[axis] for r in points], f"checkpointing {checkpointing}"
            axes[0][column].plot(x, [r["tokens_per_second"] / 1000 for r in points], style, label=label)
            if all("peak_gib" in r for r in points):
                (line,) = axes[1][column].plot(x, [r["peak_gib"] for r in points], style, label=label)
                axes[1][column].plot(
                    x, [r["forecast_gib"] for r in points], ":", color=line.get_color(), label="forecast"
                )
        axes[1][column].set(
            xlabel=titles[axis], xscale="log", yscale="log", xticks=SWEEP[axis], xticklabels=SWEEP[axis]
        )
        axes[1][column].minorticks_off()
        for row in axes:
            row[column].grid(alpha=0.3)
    axes[0][0].set(ylabel="thousand tokens/s", ylim=(0, None))
    axes[1][0].set(ylabel="peak memory, GiB")
    axes[1][0].yaxis.set_major_formatter("{x:g}")
    axes[0][0].legend()
    axes[1][0].legend()
    figure.savefig(path, dpi=110)
    print(f"drawn: {path}")
