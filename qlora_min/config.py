"""Every option of a training run, in one frozen dataclass: its default, its check, its help.

The command line, a TOML file and a run's config.json are all made from the fields below. `learning_rate` here is
`--learning-rate` on the command line, and `learning-rate` or `learning_rate` in a file.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from .data.layouts import FIELDS_OF_A_ROW, parse_columns
from .system.fields import ABOVE_0, AT_LEAST_0, BOARDS, FRACTION, IN_32_BITS, WEIGHTS, choice, option, positive
from .system.text import refuse_secrets


@dataclass(frozen=True)
class Config:
    """The options of one training run. Without arguments: the reference configuration.

    Raises:
        ValueError: a value fails its field's check; the message gives option, value and what was expected.
    """

    model: str = option("Qwen/Qwen2-0.5B-Instruct", "base model: a hub id or a local folder", group="model and data")
    dataset: tuple[str, ...] = option(
        ("medalpaca/medical_meadow_medqa",),
        "training data: .jsonl/.json/.csv/.tsv/.parquet files (also .gz), folders of them, or hub ids, "
        "NAME[@REVISION][:CONFIG[:SPLIT]]; several are mixed",
        check=bool,
        expected="at least one data set",
    )
    eval_dataset: tuple[str, ...] = option((), "held-out data; without it, a fraction of --dataset is held out")
    columns: tuple[str, ...] = option(
        (),
        "what columns are that are not recognised: prompt=NAME completion=NAME [system=NAME]",
        check=lambda v: parse_columns(v) is not None,
        expected=f"FIELD=COLUMN, one each of {FIELDS_OF_A_ROW}",
    )
    eval_fraction: float = option(0.1, "fraction of --dataset held out (0: no evaluation)", **FRACTION)
    chat_template: str | None = option(None, "a file with a chat template, or chatml, instead of the model's own")
    train_on: str = choice("all", ("all", "last"), "which answers of a conversation are learned")
    max_length: int = positive(512, "longest row in tokens; longer rows are left out whole")
    limit: int | None = positive(None, "use at most the first N rows of each training data set")
    eval_limit: int | None = positive(None, "use at most the first N held-out rows (of each held-out data set)")
    skip_bad_rows: bool = option(False, "leave rows that can't be used out, and count them, instead of ending")
    shuffle_options: bool = option(False, "multiple choice: reorder options each epoch; the answer's letter follows")
    mix: tuple[float, ...] = option(
        (), "weights of the data sets: 2 shows rows twice in an epoch, 0.5 half of them, then the other half", **WEIGHTS
    )

    epochs: float = option(3.0, "passes over the data", group="steps", **ABOVE_0)
    max_steps: int | None = positive(None, "end after N optimizer steps, whatever the epochs")
    batch_size: int = positive(4, "times --grad-accum: the rows of an optimizer step")
    grad_accum: int = positive(4, "times --batch-size: the rows of an optimizer step")
    learning_rate: float = option(2e-4, "peak learning rate, QLoRA's for models up to 13B (its table 9)", **ABOVE_0)
    schedule: str = choice("cosine", ("cosine", "linear", "constant"), "from the peak, after the warm-up, down to 0")
    warmup_ratio: float | None = option(None, "fraction of the steps that warm up (default: 0.03)", **FRACTION)
    warmup_steps: int | None = option(None, "steps that warm up, instead of a fraction", **AT_LEAST_0)
    weight_decay: float = option(0.0, "AdamW's weight decay", **AT_LEAST_0)
    max_grad_norm: float = option(1.0, "clip the gradients to this global norm", **ABOVE_0)
    optimizer: str = choice(
        "paged_adamw8bit", ("paged_adamw8bit", "adamw"), "bitsandbytes' paged 8-bit AdamW, or torch's AdamW"
    )
    seed: int = option(42, "seed of the split, the order, the adapter and dropout", **IN_32_BITS)

    rank: int = positive(
        16, "r: the rank of a layer's update; QLoRA saw no effect of 8 to 256 (appendix A)", group="LoRA and its base"
    )
    alpha: float = option(32.0, "the update is scaled by alpha / rank: one learning rate suits many ranks", **ABOVE_0)
    dropout: float = option(0.05, "dropout on the update's input; QLoRA took 0.1 up to 13B, 0.05 above", **FRACTION)
    targets: tuple[str, ...] = option(
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        "the linear layers that get an update, or all-linear; QLoRA needed all to match full fine-tuning (section 4)",
        check=bool,
        expected="at least one name",
        separator=",",
    )
    rslora: bool = option(False, "scale by alpha / sqrt(rank) instead (rank-stabilised LoRA)")
    adapter: str | None = option(None, "go on from an adapter, ours or PEFT's: its rank, alpha, targets and base")
    quantization: str = choice(
        "nf4", ("nf4", "fp4", "none"), "the frozen base's 4-bit type, doubly quantised; or none. QLoRA: nf4 loses less"
    )

    precision: str = choice(
        "auto",
        ("auto", "bf16", "fp16", "fp32"),
        "compute dtype; auto: bf16 where the hardware has it, fp16 on older GPUs, fp32 on a CPU",
        group="speed and memory",
    )
    gradient_checkpointing: str = choice(
        "auto", ("auto", "on", "off"), "recompute activations: less memory, more time; auto: where they do not fit"
    )
    micro_batch_tokens: int | None = positive(None, "tokens of a micro-batch; changes no result (default: what fits)")
    engine: str = choice(
        "auto", ("auto", "modules", "fused"), "modules: by autograd; fused: with own kernels; auto: fused where it can"
    )
    shard: bool = option(False, "several GPUs: each keeps a part of the frozen base, and gathers layers as it computes")

    eval_every: int | None = positive(
        None, "steps between evaluations (default: a quarter of an epoch)", group="evaluating, saving, stopping"
    )
    patience: int = positive(3, "stop after N evaluations in a row without improvement")
    log_every: int = positive(10, "steps between lines in metrics.jsonl")
    report: tuple[str, ...] = option((), "where metrics.jsonl is shown too (extras of these names)", **BOARDS)
    tensorboard: bool = option(False, "the same as --report tensorboard")
    save_every: int | None = positive(None, "steps between checkpoints (besides those at evaluations)")
    save_minutes: float = option(5.0, "minutes after which a checkpoint is due (0: none by time)", **AT_LEAST_0)
    output_dir: str | None = option(None, "the run directory (default: runs/MODEL-DATASET-TIME)")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, check = getattr(self, f.name), f.metadata["check"]
            if f.type is float and type(value) is int:  # epochs=1: in a checkpoint as from the command line, 1.0
                value = float(value)
            if f.type == tuple[str, ...] and isinstance(value, str | dict):  # dataset="rows.jsonl"; columns={}
                value = (value,) if isinstance(value, str) else tuple(f"{k}={v}" for k, v in value.items())
            object.__setattr__(self, f.name, value)
            for name in (value,) if isinstance(value, str) else value if f.type == tuple[str, ...] else ():
                refuse_secrets(name, flag(f.name))
            finite = not isinstance(value, float) or math.isfinite(value)
            if not finite or (check and value != f.default and not check(value)):
                shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
                raise ValueError(f"{flag(f.name)}: got {shown!r}, expected {f.metadata['expected'] or 'a number'}")
        if None not in (self.warmup_ratio, self.warmup_steps):
            raise ValueError("--warmup-ratio and --warmup-steps: got both, expected one of them")
        if self.mix and len(self.mix) != (n := len(set(self.dataset))):
            raise ValueError(f"--mix: got {len(self.mix)} weights, expected {n}, one for each data set of --dataset")

    def as_dict(self) -> dict[str, Any]:
        """Field -> value, ready for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


FIELDS = {f.name: f for f in dataclasses.fields(Config)}


def flag(name: str) -> str:
    """learning_rate -> --learning-rate"""
    return "--" + name.replace("_", "-")
