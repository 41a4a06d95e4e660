"""What is written for others to serve: a model in the dtype asked for, in which answers end.

Servers stop at the eos tokens of generation_config.json, of config.json or of the tokenizer, whichever they read, so
each of them names the end token that was trained.
"""

import copy
import json
from pathlib import Path
from typing import Any

from .device import DTYPES
from .files import read_json

SAMPLE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


def ending_with(tokenizer: Any, end_id: int) -> Any:
    """The tokenizer, or a copy of it whose eos token is `end_id`. The one in use never changes; pad stays what it is.

    A template that writes `eos_token` elsewhere (Phi-3's, at the very end) keeps writing the old one.
    """
    old, new = tokenizer.eos_token, tokenizer.convert_ids_to_tokens(end_id)
    if old == new:
        return tokenizer
    saved = copy.deepcopy(tokenizer)
    saved.eos_token = new
    if _rendered(saved) != _rendered(tokenizer):
        saved.chat_template = f"{{% set eos_token = {json.dumps(old or '')} %}}{saved.get_chat_template()}"
    return saved


def _rendered(tokenizer: Any) -> str:
    return tokenizer.apply_chat_template(SAMPLE, tokenize=False)


def own_dtype(folder: Path) -> str:
    """What a model is stored in by its config.json: fp16 or bf16, else fp32."""
    config = read_json(folder / "config.json")
    return {"float16": "fp16", "bfloat16": "bf16"}.get(config.get("dtype") or config.get("torch_dtype"), "fp32")


def save_rounded(folder: Path, model: Any, dtype: str, tokenizer: Any, end_id: int) -> None:
    """Round a model's weights to fp16, bf16 or fp32, and write it with its tokenizer as a Hugging Face folder.

    Buffers that no file holds (rotary frequencies) are not rounded. The end token becomes the first eos token.

    Raises:
        ValueError: a weight overflows.
    """
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(DTYPES[dtype])
        if not weight.isfinite().all():
            raise ValueError(f"--dtype {dtype}: the merged weight '{name}' overflows; use bf16 or fp32")
    model.config.use_cache = True
    configs = model.generation_config, model.config
    ends = [end_id]
    for eos in (config.eos_token_id for config in configs):
        ends += [e for e in (eos if isinstance(eos, list) else [eos]) if e is not None and e not in ends]
    for config in configs:
        config.eos_token_id = ends if len(ends) > 1 else end_id
    model.save_pretrained(folder)
    ending_with(tokenizer, end_id).save_pretrained(folder)
