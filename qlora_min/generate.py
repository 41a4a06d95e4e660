"""Answers to prompts, greedily, by transformers' own `generate` with its key-value cache.

Generation stops at the end token of the chat template, and at any that the model's generation config names.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from .base import Base
from .system.device import autocast, unless_out_of_memory


def generate(base: Base, prompts: Sequence[Sequence[int]], max_new_tokens: int = 64, streamer: Any = None) -> list[str]:
    """The model's answer to each prompt, as text without the end token; in halves where memory runs out.

    Args:
        prompts: token ids of conversations that wait for an answer, from `ChatEncoder.prompt` or a row's beginning.
        max_new_tokens: an answer is cut here if it has not ended.
        streamer: transformers' TextStreamer, for one prompt: prints while generating.
    """
    answers = unless_out_of_memory(
        lambda: _generate(base, prompts, max_new_tokens, streamer), base, len(prompts),
        f"answering {len(prompts)} prompts", f"answering a prompt of {len(prompts[0])} tokens", "shorten it",
    )  # fmt: skip
    if answers is not None:
        return answers
    half = len(prompts) // 2
    return [a for part in (prompts[:half], prompts[half:]) for a in generate(base, part, max_new_tokens, streamer)]


@torch.no_grad()
def _generate(base: Base, prompts: Sequence[Sequence[int]], max_new_tokens: int, streamer: Any) -> list[str]:
    model, encoder = base.model, base.encoder
    width = max(map(len, prompts))
    device = base.device
    # Generation appends on the right, so prompts of different lengths are padded on the left and masked.
    input_ids = torch.tensor([[encoder.end_id] * (width - len(p)) + list(p) for p in prompts], device=device)  # (B, T)
    attention_mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    ends = end_ids(base)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=encoder.end_id,
        use_cache=True,
    )
    was_training = model.training
    model.eval()
    try:
        with autocast(device, base.dtype):
            out = model.generate(
                input_ids, attention_mask=attention_mask, generation_config=settings, streamer=streamer,
                synced_gpus=base.sharded,  # processes that gather layers together go on until the last answer ends
            )  # fmt: skip
    finally:
        model.train(was_training)
    answers = []
    for ids in out[:, width:].tolist():  # (B, new)
        end = next((i for i, t in enumerate(ids) if t in ends), len(ids))
        answers.append(encoder.tokenizer.decode(ids[:end], skip_special_tokens=True).strip())
    return answers


def end_ids(base: Base) -> set[int]:
    """Tokens that end an answer: the chat template's, and those of the model's generation config."""
    eos = getattr(base.model.generation_config, "eos_token_id", None)
    return {base.encoder.end_id, *(eos if isinstance(eos, list) else [eos] if eos is not None else [])}
