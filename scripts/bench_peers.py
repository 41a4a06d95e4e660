"""Measure other trainers beside qlora_min, on the same rows and with the same options: peft + trl, and unsloth.

python scripts/bench_peers.py trl unsloth        each with its defaults, and with the best options found

By default a peer uses gradient checkpointing. The best options found are a single micro-batch without checkpointing, of
about as many tokens, packed into rows of --max-length. Every line of the table is measured in a process of its own.
Adapters are in fp32: trl makes them in bf16, which the fp16 gradient scaler refuses.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from types import SimpleNamespace
from typing import Any

from qlora_min.cli.bench import Clock, draw_rows, ours, prepared, shared_options, show
from qlora_min.cli.main import run_parsed
from qlora_min.cli.options import Emit, Parser


def main(args: argparse.Namespace, emit: Emit) -> None:
    """Print a table of qlora_min and two lines for each peer. With --only, emit the figures of a single line.

    The script calls itself with --only for every line of a peer.
    """
    if args.only:
        return emit(train(args, *args.only))
    with prepared(args) as args:
        from qlora_min.scale.processes import world_size
        from qlora_min.system.device import release

        if world_size() > 1:
            raise ValueError(f"{world_size()} processes: other trainers are measured in one; run this without torchrun")
        results, b, g = ours(args), args.config.batch_size, args.config.grad_accum
        release()  # other processes use the GPU from here on
        mean = statistics.mean(min(n, args.config.max_length) for n, _ in args.lengths)
        packed = max(1, round(b * g * mean / args.config.max_length))
        lines = {f"{b} x {g}, its default": (b, g, False),
                 f"{packed} x 1, packed, no checkpointing, its best found": (packed, 1, True)}  # fmt: skip
        for who, (line, options) in itertools.product(args.peers, lines.items()):
            more = ["--only", json.dumps([who, *options]), "--json", "--model", args.config.model]
            done = subprocess.run([sys.executable, __file__, *sys.argv[1:], *more], capture_output=True, text=True)
            found = [json.loads(text) for text in done.stdout.splitlines() if text.startswith("{")]
            results += [{"name": f"{who}, {line}", **figures} for figures in found]
            if not found:
                print(f"note: {who}, {line}: failed: {done.stderr.strip().rpartition(chr(10))[2]}", file=sys.stderr)
    for result in results:
        result["ours_faster_by"] = results[0]["tokens_per_second"] / result["tokens_per_second"]
    show(results, emit)


def train(args: argparse.Namespace, who: str, batch_size: int, grad_accum: int, best: bool) -> dict[str, Any]:
    """Train with peft + trl, or unsloth; returns the figures. Tokens are counted as rows times their mean length."""
    if who == "unsloth":
        import unsloth  # noqa: F401  it asks to be imported first
    with prepared(args) as args:
        import torch
        from datasets import Dataset
        from transformers import TrainerCallback
        from trl import SFTConfig, SFTTrainer, trainer

        config, clock = args.config, Clock(args, 4 if torch.cuda.is_available() else 1)
        model, tokenizer = load(config, who, checkpointing=not best)
        if clock.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            trainer.utils._ChunkedLogProbFunction = SimpleNamespace(apply=log_prob)
        count = batch_size * grad_accum
        most = max(1, config.max_length // min(n for n, _ in args.lengths)) if best else 1  # rows packed into one
        drawn = draw_rows(config, args.lengths, most * count * clock.steps)
        rows = [{"input_ids": ids, "completion_mask": [0] * (len(ids) - n) + [1] * n} for ids, n in drawn]
        own = {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if who == "trl" and not best else {}
        options = SFTConfig(
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=grad_accum, max_steps=clock.steps,
            max_length=config.max_length, packing=best, gradient_checkpointing=not best, completion_only_loss=True,
            fp16=config.precision == "fp16", bf16=config.precision == "bf16", optim="paged_adamw_8bit",
            learning_rate=2e-4, lr_scheduler_type="cosine", warmup_steps=1, logging_steps=10, save_strategy="no",
            report_to="none", disable_tqdm=True, output_dir=tempfile.mkdtemp(), **own,
        )  # fmt: skip

        class StepEnds(TrainerCallback):
            def on_step_end(self, _, state, control, **kwargs):
                clock.step_ended(state.global_step, state.global_step * step_tokens)

        sft = SFTTrainer(model=model, args=options, train_dataset=Dataset.from_list(rows), callbacks=[StepEnds()],
                         processing_class=tokenizer)  # fmt: skip
        step_tokens = count * statistics.mean(map(len, sft.train_dataset["input_ids"]))
        for p in sft.model.parameters():
            if p.requires_grad:
                p.data = p.data.float()
        sft.train()
        return clock.figures()


def load(config: Any, who: str, checkpointing: bool) -> tuple[Any, Any]:
    """Load a peer's model: (the base in NF4 with an adapter, its tokenizer)."""
    from qlora_min.system.device import DTYPES, pick_device

    dtype = DTYPES[config.precision]
    lora = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout,
            "target_modules": list(config.targets), "bias": "none"}  # fmt: skip
    if who == "unsloth":
        from unsloth import FastLanguageModel as Model

        options = {"max_seq_length": config.max_length, "dtype": dtype, "load_in_4bit": True}
        model, tokenizer = Model.from_pretrained(config.model, **options)
        checkpointing = "unsloth" if checkpointing else False
        return Model.get_peft_model(model, **lora, use_gradient_checkpointing=checkpointing, random_state=0), tokenizer
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=dtype)  # fmt: skip
    place = {"device_map": {"": pick_device()}, "dtype": dtype}
    model = AutoModelForCausalLM.from_pretrained(config.model, quantization_config=nf4, **place)
    model = peft.prepare_model_for_kbit_training(model, checkpointing, {"use_reentrant": False})
    model = peft.get_peft_model(model, peft.LoraConfig(**lora, task_type="CAUSAL_LM"))
    return model, AutoTokenizer.from_pretrained(config.model)


def log_prob(hidden, weight, bias, targets, *_):
    """A PyTorch version of the function with which trl 1.15 computes the loss, which needs a GPU.

    (N, D), (V, D), None, (N,) -> the targets' log p (N,), then the other values that trl logs.
    """
    log_p = (hidden @ weight.T).float().log_softmax(-1)
    top = log_p.argmax(-1) == targets
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1), None, None, top


if __name__ == "__main__":
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("peers", nargs="+", choices=("trl", "unsloth"), help="which trainers")
    parser.add_argument("--only", type=json.loads, help=argparse.SUPPRESS)
    shared_options(parser)
    run_parsed(parser.parse_args(), main)
