"""Every option of a training run, in one frozen dataclass: its default, its check, its help.

The command line (cli.py), the TOML file and a run's config.json are all made from the fields below, so an option exists
in one place only. `learning_rate` here is `--learning-rate` on the command line and `learning-rate` (or
`learning_rate`) in the file. The command line wins over the file, the file over the defaults.
"""

import argparse
import dataclasses
import difflib
import math
import os
import re
import reprlib
import tomllib
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60


def shown(value: Any) -> str:
    """repr of a value from a file that may be hostile, for an error message: one line, never long."""
    return clipped(_REPR.repr(value), 120)


def clipped(text: object, limit: int = 160) -> str:
    """Foreign text, such as a library's error, for an error message: one line of at most `limit` characters."""
    line = "".join(c if c.isprintable() else " " for c in str(text)[: 4 * limit])
    line = " ".join(line.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


_SECRETS = re.compile(r"(?<=://)\S*@|[^\s/]+:[^\s/]+@|\bhf_[A-Za-z0-9]{20,}")  # user:password@, tokens of the hub


def redacted(text: str) -> str:
    """Text with *** where it holds a password or a hub token, by its form or because the environment holds it."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if len(token := os.environ.get(name, "")) >= 8:
            text = text.replace(token, "***")
    return _SECRETS.sub("***", text)


def refuse_secrets(name: str, what: str) -> None:
    """Names end up in logs and in files, so none may carry a token.

    Raises:
        ValueError: it does; the message leaves the secret out.
    """
    if redacted(name) != name:
        raise ValueError(
            f"{what}: '{clipped(redacted(name))}' carries a token or password; give a hub id like OWNER/NAME, "
            "and the token in the environment variable HF_TOKEN"
        )


def option(default: Any, help: str, *, check: Callable[[Any], bool] | None = None, expected: str = "", **meta: Any):
    """A dataclass field that is also an option: `check(value)` must hold, `expected` says so in words."""
    return dataclasses.field(default=default, metadata={"help": help, "check": check, "expected": expected, **meta})


def _choice(default: str, choices: Sequence[str], help: str):
    return option(default, help, check=lambda v: v in choices, expected=f"one of {', '.join(choices)}", choices=choices)


def _positive(default: int | None, help: str):
    return option(default, help, check=lambda v: v is None or v >= 1, expected="an integer of at least 1")


ABOVE_0 = {"check": lambda v: v > 0, "expected": "a number above 0"}
AT_LEAST_0 = {"check": lambda v: v >= 0, "expected": "a number of at least 0"}
SHARE = {"check": lambda v: 0 <= v < 1, "expected": "a number in [0, 1)"}


@dataclass(frozen=True)
class Config:
    """The options of one training run. Without arguments: the reference configuration.

    Raises:
        ValueError: a value fails its field's check; the message gives option, value and what was expected.
    """

    model: str = option("Qwen/Qwen2-0.5B-Instruct", "base model: a hub id or a local folder")
    dataset: tuple[str, ...] = option(
        ("medalpaca/medical_meadow_medqa",),
        "training data: hub ids or local .jsonl/.json/.csv/.parquet files; several are mixed",
        check=bool,
        expected="at least one data set",
    )
    eval_dataset: tuple[str, ...] = option((), "held-out data; without it, a share of --dataset is held out")
    eval_fraction: float = option(0.1, "share of --dataset held out (0: no evaluation)", **SHARE)
    max_length: int = _positive(512, "longest row in tokens; longer rows are left out whole")
    limit: int | None = _positive(None, "use at most the first N rows of each training data set")
    eval_limit: int | None = _positive(None, "use at most the first N held-out rows (of each held-out data set)")
    skip_bad_rows: bool = option(False, "leave rows that can't be used out, and count them, instead of ending")
    shuffle_options: bool = option(
        False, "multiple choice: another order of a training row's options each epoch; the answer's letter follows"
    )
    mix: tuple[float, ...] = option(
        (),
        "how often an epoch sees each data set's rows, a weight for each: 2: twice, 0.5: half of them, in turn",
        check=lambda v: all(0 < w < math.inf for w in v),
        expected="numbers above 0",
    )

    epochs: float = option(3.0, "passes over the data", **ABOVE_0)
    max_steps: int | None = _positive(None, "end after N optimizer steps, whatever the epochs")
    batch_size: int = _positive(4, "times --grad-accum: the rows of an optimizer step")
    grad_accum: int = _positive(4, "times --batch-size: the rows of an optimizer step")
    micro_batch_tokens: int | None = _positive(
        None,
        "tokens of a micro-batch, which changes no result (default: what fits; with checkpointing on the longest row)",
    )
    learning_rate: float = option(
        2e-4, "peak learning rate, QLoRA's for models up to 13B (its table 9); cosine to 0 after the warm-up", **ABOVE_0
    )
    warmup_ratio: float = option(0.03, "share of the steps that warm up", **SHARE)
    weight_decay: float = option(0.0, "AdamW's weight decay", **AT_LEAST_0)
    max_grad_norm: float = option(1.0, "clip the gradients to this global norm", **ABOVE_0)
    optimizer: str = _choice(
        "paged_adamw8bit", ("paged_adamw8bit", "adamw"), "bitsandbytes' paged 8-bit AdamW, or torch's AdamW"
    )

    rank: int = _positive(
        16, "r: a layer's update is a product of two matrices of rank r; QLoRA saw no effect of 8 to 256 (appendix A)"
    )
    alpha: float = option(
        32.0,
        "the update is scaled by alpha / rank, so that another rank needs no other learning rate (LoRA, section 4.1)",
        **ABOVE_0,
    )
    dropout: float = option(0.05, "dropout on the update's input; QLoRA took 0.1 up to 13B, 0.05 above", **SHARE)
    targets: tuple[str, ...] = option(
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        "the linear layers that get an update; QLoRA needed all seven to match full fine-tuning (section 4)",
        check=bool,
        expected="at least one name",
        separator=",",
    )
    quantization: str = _choice(
        "nf4",
        ("nf4", "fp4", "none"),
        "the frozen base's 4-bit type, doubly quantised; or none. QLoRA: nf4 loses less (section 4)",
    )
    precision: str = _choice(
        "auto",
        ("auto", "bf16", "fp16", "fp32"),
        "compute dtype; auto: bf16 where the hardware has it, fp16 on older GPUs, fp32 on a CPU",
    )
    gradient_checkpointing: str = _choice(
        "auto", ("auto", "on", "off"), "recompute activations: less memory, more time; auto: where they do not fit"
    )
    shard: bool = option(
        False, "several GPUs: each keeps a part of the frozen base, and gathers a layer where it computes"
    )
    engine: str = _choice(
        "auto",
        ("auto", "modules", "fused"),
        "modules: the model's own, by autograd; fused: by hand, with kernels; auto: fused where it can",
    )

    eval_every: int | None = _positive(None, "steps between evaluations (default: a quarter of an epoch)")
    patience: int = _positive(3, "stop after N evaluations in a row without improvement")
    log_every: int = _positive(10, "steps between lines in metrics.jsonl")
    tensorboard: bool = option(False, "write what metrics.jsonl says to RUN/tensorboard too (extra `tensorboard`)")
    save_every: int | None = _positive(None, "steps between checkpoints (besides those at evaluations)")
    save_minutes: float = option(5.0, "minutes after which a checkpoint is due (0: none by time)", **AT_LEAST_0)
    output_dir: str | None = option(None, "the run directory (default: runs/MODEL-DATASET-TIME)")
    seed: int = option(
        42,
        "seed of the split, the order, the adapter and dropout",
        check=lambda v: 0 <= v < 2**32,
        expected="from 0 to 2**32 - 1",
    )

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, check = getattr(self, f.name), f.metadata["check"]
            if f.type is float and type(value) is int:  # epochs=1: in a checkpoint as from the command line, 1.0
                object.__setattr__(self, f.name, float(value))
            for name in (value,) if isinstance(value, str) else value if f.type == tuple[str, ...] else ():
                refuse_secrets(name, flag(f.name))
            finite = not isinstance(value, float) or math.isfinite(value)
            if not finite or (check and not check(value)):
                shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
                raise ValueError(f"{flag(f.name)}: got {shown!r}, expected {f.metadata['expected'] or 'a number'}")
        if self.mix and len(self.mix) != (count := len(set(self.dataset))):
            raise ValueError(
                f"--mix: got {len(self.mix)} weights, expected {count}, one for each data set of --dataset"
            )

    def as_dict(self) -> dict[str, Any]:
        """Field -> value, ready for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> "Config":
        """The reverse of `as_dict`, of an earlier version's too; `source` says in errors where the values are from."""
        return cls(**parse_values({k: v for k, v in values.items() if k not in REMOVED}, source))


REMOVED = {"packing": "--engine modules|fused"}  # options of earlier versions -> what there is instead

FIELDS = {f.name: f for f in dataclasses.fields(Config)}


def flag(name: str) -> str:
    """learning_rate -> --learning-rate"""
    return "--" + name.replace("_", "-")


def nearest(name: str, known: Sequence[str]) -> str:
    """ ", did you mean X?", or nothing where no known name is near."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""


def kinds_of(f: dataclasses.Field) -> set[type]:
    """The types that a field admits: {int, NoneType} for `int | None`."""
    return set(typing.get_args(f.type)) or {f.type}


def _convert(kinds: set[type], value: Any) -> Any:
    """A value from a TOML or JSON file as one of these types; raises TypeError where it is of another."""
    if Ellipsis in kinds:
        items = value if isinstance(value, list | tuple) else str(value).split(",") if str in kinds else [value]
        items = [_convert(kinds - {Ellipsis}, i) for i in items]
        return tuple(i.strip() for i in items if i.strip()) if str in kinds else tuple(items)
    if type(value) in kinds:
        return value
    number = type(value) in (int, float)
    if int in kinds and number and value == int(value):
        return int(value)
    if float in kinds and number:
        return float(value)
    raise TypeError


def parse_values(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Check names and types of option values read from a file.

    Raises:
        ValueError: an unknown name (the nearest known one is suggested) or a value of another type.
    """
    out = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name in REMOVED:
            raise ValueError(f"{source}: option '{key}' was removed: {REMOVED[name]}")
        if name not in FIELDS:
            raise ValueError(f"{source}: unknown option '{key}'{nearest(name, list(FIELDS)).replace('_', '-')}")
        f = FIELDS[name]
        if "choices" in f.metadata and isinstance(value, bool):  # gradient-checkpointing = true
            value = "on" if value else "off"
        try:
            out[name] = _convert(kinds_of(f), value)
        except (TypeError, ValueError, OverflowError):
            lists = {tuple[str, ...]: "list", tuple[float, ...]: "list of numbers"}
            kinds = lists.get(f.type) or "/".join(k.__name__ for k in kinds_of(f) - {type(None)})
            raise ValueError(f"{source}: option '{key}': got {value!r}, expected {kinds}") from None
    return out


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of at least 1")
    return int(text)


def read_toml(path: str) -> dict[str, Any]:
    """Option values from a TOML file.

    Raises:
        ValueError: no such file, not TOML, an unknown name or a value of another type.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise ValueError(f"--config {path}: can't be read ({e.strerror}); expected a TOML file of options") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"--config {path}: not valid TOML ({e})") from None
    return parse_values(values, path)


def is_first_process() -> bool:
    """Whether this process speaks for all that torchrun started, or is alone; also before they know of each other."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"
