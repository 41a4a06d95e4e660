"""A model as it is written for others to serve: in the dtype asked for, and so that answers end.

Servers stop at the eos tokens of generation_config.json, of config.json or of the tokenizer, whichever they read, so
each of them names the end token that was trained (the tokenizer by `data.templates.tokenizer_to_save`).
"""

from pathlib import Path
from typing import Any

from .device import DTYPES
from .files import read_json


def own_dtype(folder: Path) -> str:
    """What a model is stored in by its config.json: fp16 or bf16, else fp32."""
    config = read_json(folder / "config.json")
    return {"float16": "fp16", "bfloat16": "bf16"}.get(config.get("dtype") or config.get("torch_dtype"), "fp32")


def save_rounded(folder: Path, model: Any, dtype: str, tokenizer: Any) -> None:
    """Round a model's weights to fp16, bf16 or fp32, and write it with its tokenizer as a Hugging Face folder.

    Buffers that no file holds (rotary frequencies) are not rounded. The tokenizer's eos becomes the first.

    Raises:
        ValueError: a weight overflows.
    """
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(DTYPES[dtype])
        if not weight.isfinite().all():
            raise ValueError(f"--dtype {dtype}: the merged weight '{name}' overflows; use bf16 or fp32")
    model.config.use_cache = True
    configs = model.generation_config, model.config
    ends = [tokenizer.eos_token_id]
    for eos in (getattr(config, "eos_token_id", None) for config in configs):
        ends += [e for e in (eos if isinstance(eos, list) else [eos]) if e is not None and e not in ends]
    for config in configs:
        config.eos_token_id = ends if len(ends) > 1 else ends[0]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
