"""Answers to prompts, greedily or drawn, by transformers' own `generate` with its key-value cache.

Generation stops at the end token of the chat template, and at any that the model's generation config names.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GenerationConfig

from .base import Base
from .system.device import autocast, unless_out_of_memory

# Without cuDNN, which PyTorch prefers on Hopper: it makes a plan for each length of the keys, so for each token anew.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def generate(base: Base, prompts: Sequence[Sequence[int]], max_new_tokens: int = 64, **how: Any) -> list[str]:
    """The model's answer to each prompt, as text without the end token; in halves where memory runs out.

    Args:
        prompts: token ids of conversations that wait for an answer, from `ChatEncoder.prompt` or a row's beginning.
        max_new_tokens: an answer is cut here if it has not ended.
        how: `streamer`, transformers' TextStreamer, which prints the answer to one prompt while it is generated; and
            fields of transformers' GenerationConfig, by which the answers are drawn instead (do_sample, temperature).
    """
    answers = unless_out_of_memory(
        lambda: _generate(base, prompts, max_new_tokens, **how), base, len(prompts),
        f"answering {len(prompts)} prompts", f"answering a prompt of {len(prompts[0])} tokens", "shorten it",
    )  # fmt: skip
    if answers is not None:
        return answers
    halves = prompts[: len(prompts) // 2], prompts[len(prompts) // 2 :]
    return [answer for half in halves for answer in generate(base, half, max_new_tokens, **how)]


@torch.no_grad()
def _generate(base: Base, prompts: Sequence[Sequence[int]], max_new_tokens: int, streamer=None, **how) -> list[str]:
    model, encoder, device = base.model, base.encoder, base.device
    width = max(map(len, prompts))
    # Generation appends on the right, so prompts of different lengths are padded on the left and masked.
    input_ids = torch.tensor([[encoder.end_id] * (width - len(p)) + list(p) for p in prompts], device=device)  # (B, T)
    attention_mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    ends = end_ids(base)
    settings = GenerationConfig(**{"do_sample": False} | how, max_new_tokens=max_new_tokens, use_cache=True,
                                eos_token_id=sorted(ends), pad_token_id=encoder.end_id)  # fmt: skip
    with autocast(device, base.dtype), sdpa_kernel(BACKENDS):
        out = model.generate(
            input_ids, attention_mask=attention_mask, generation_config=settings, streamer=streamer,
            synced_gpus=base.sharded,  # processes that gather layers together go on until the last answer ends
        )  # fmt: skip
    answers = (itertools.takewhile(lambda t: t not in ends, ids) for ids in out[:, width:].tolist())  # (B, new)
    return [encoder.tokenizer.decode([*ids], skip_special_tokens=True).strip() for ids in answers]


def end_ids(base: Base) -> set[int]:
    """Tokens that end an answer: the chat template's, and those of the model's generation config."""
    eos = getattr(base.model.generation_config, "eos_token_id", None)
    return {base.encoder.end_id, *(eos if isinstance(eos, list) else [eos] if eos is not None else [])}
