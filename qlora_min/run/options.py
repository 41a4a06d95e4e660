"""Option values from files: a TOML file, or the config.json of a run. Options of generation."""

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import FIELDS, Config
from ..system.text import refusing

REMOVED = {"packing": "--engine modules|fused"}  # options of earlier versions -> what there is instead
# Option, or option and value, or "" for none -> what transformers, peft, trl and the tools built on them call it, where
# that is not spelled alike.
WORDS = {
    "model": "model_name_or_path model_name model_id base_model",
    "dataset": "dataset_name dataset_path data_path train_file train_dataset",
    "eval_dataset": "validation_file test_file",
    "eval_fraction": "val_size val_set_size validation_split_percentage",
    "max_length": "max_seq_length max_seq_len model_max_length sequence_len cutoff_len",
    "max_new_tokens": "max_length",
    "limit": "max_samples max_train_samples",
    "eval_limit": "max_eval_samples",
    "epochs": "num_train_epochs num_epochs",
    "batch_size": "per_device_train_batch_size per_device_eval_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "max_grad_norm": "gradient_clipping clip_grad_norm gradient_clip_val",
    "learning_rate": "lr lrate",
    "seed": "random_state data_seed",
    "rank": "r lora_r lora_rank",
    "targets": "lora_target_modules",
    "adapter": "adapter_name_or_path lora_path lora_model_dir adapter_path peft_model",
    "quantization nf4": "load_in_4bit",
    "quantization": "bnb_4bit_quant_type quantization_bit",
    "precision": "torch_dtype dtype bnb_4bit_compute_dtype mixed_precision",
    "precision bf16": "bf16",
    "precision fp16": "fp16",
    "eval_every": "eval_steps eval_strategy evaluation_strategy",
    "save_every": "save_steps save_strategy",
    "log_every": "logging_steps logging_strategy",
    "patience": "early_stopping_patience",
    "output_dir": "save_path",
    "resume": "resume_from_checkpoint resume_from",
    "push_to_hub": "hub_model_id",
    "shard": "fsdp deepspeed",
    "": "save_total_limit do_train lora qlora",  # spelled like options that mean something else
}


def nearest(name: str, known: Sequence[str]) -> str:
    """ ", did you mean X?" with the known name X that means the same (WORDS) or is most similar, or "" if none is."""
    word, names = _plain(name), {_plain(k): k for k in known}
    for meant, words in WORDS.items():
        option, _, value = meant.partition(" ")
        if word in words.split() and option in names:
            as_value = f" {value}" if names[option].startswith("--") else f' = "{value}"'
            return f", did you mean {names[option]}{as_value if value else ''}?"
    if word in WORDS[""].split():
        return ""
    close = difflib.get_close_matches(word, names, n=1)
    return f", did you mean {names[close[0]]}?" if close else ""


def _plain(name: str) -> str:
    """--learning-rate -> learning_rate"""
    return name.lstrip("-").replace("-", "_")


def kinds_of(f: dataclasses.Field) -> set[type]:
    """The types that a field accepts: {int, NoneType} for `int | None`."""
    return set(typing.get_args(f.type)) or {f.type}


def _convert(kinds: set[type], value: Any) -> Any:
    """Convert a value from a TOML or JSON file to one of these types. Raises TypeError if it has another type."""
    if Ellipsis in kinds:
        value = [f"{k}={v}" for k, v in value.items()] if isinstance(value, Mapping) else value  # a table: columns
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
        ValueError: an unknown or removed name (the message suggests another), or a value of the wrong type.
    """
    out = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name in REMOVED:
            raise ValueError(f"{source}: option '{key}' was removed: {REMOVED[name]}")
        if name not in FIELDS:
            raise ValueError(f"{source}: unknown option '{key}'{nearest(name, list(FIELDS))}")
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


def read_toml(path: str) -> dict[str, Any]:
    """Option values from a TOML file.

    Raises:
        ValueError: the file can't be read or is not TOML, or a name or a value is not valid.
    """
    with refusing(f"--config {path}: can't be read", "expected a TOML file of options", OSError):
        content = Path(path).read_bytes()
    with refusing(f"--config {path}: not valid TOML"):
        values = tomllib.loads(content.decode("utf-8-sig"))
    return parse_values(values, path)


def config_from(values: Mapping[str, Any], source: str) -> Config:
    """The inverse of `Config.as_dict`, also for an earlier version's. source: the file's name, for errors."""
    return Config(**parse_values({k: v for k, v in values.items() if k not in REMOVED}, source))


def sampling(temperature: float, top_p: float) -> dict[str, Any]:
    """The fields of transformers' GenerationConfig for drawing tokens at `temperature` from the likeliest ones, which
    together have a probability of `top_p`; no fields at temperature 0, which takes the likeliest token.

    Raises:
        ValueError: a value is out of range, or `top_p` is below 1 at temperature 0.
    """
    if temperature and not 0.01 <= temperature <= 100:
        raise ValueError(f"--temperature: got {temperature}, expected 0 (the likeliest answer), or from 0.01 to 100")
    if not 0 < top_p <= 1:
        raise ValueError(f"--top-p: got {top_p}, expected a number above 0 and at most 1")
    if top_p < 1 and not temperature:
        raise ValueError("--top-p: chooses nothing at --temperature 0; give a temperature above 0")
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
